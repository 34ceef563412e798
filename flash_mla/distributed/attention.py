"""One rank's share of attention.

    decode    own blocks -> (out, lse) -> one exchange of both -> merge     context parallel
              own heads of q and of the cache, no exchange                 head parallel
    prefill   K and V of all chunks by one all-gather, then own chunks' queries over them

Softmax over all keys is the average of the ranks' outputs weighted by exp(lse) (`flash_mla.merge`). All ranks merge the
same parts in the same order: they hold the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from flash_mla import contract
from flash_mla.api import flash_mla_with_kvcache, get_mla_metadata
from flash_mla.autograd import learning, refusing
from flash_mla.contract import MLAMetadata
from flash_mla.distributed.exchange import Ranks, pack, pack_rows, unpack, unpack_rows
from flash_mla.distributed.split import (
    chunk_length,
    head_slices,
    local_lengths,
    local_mask,
    prompt_chunks,
    tail_keys,
    tail_table,
)
from flash_mla.errors import HeadGroupingError, SequenceLengthError, ShapeError
from flash_mla.heads import as_heads, from_heads
from flash_mla.kinds import explained_class
from flash_mla.launch import launch_prefill
from flash_mla.merge import apply_sink, merge
from flash_mla.plan import plan
from flash_mla.problem import BLOCK


class KeyPart(NamedTuple):
    """Some of this rank's keys, and what a decode call over them takes.

    Attributes:
        seq_lens: [B], how many they are.
        block_table: [B, n] of their blocks; None: the rank's own.
        mask: [B|1, Hq|1, S_q|1, L] over them, or None.
        folded: the queries of a request go in as heads, since all of them see the same keys (see `heads`).
        metadata: of the call.
    """

    seq_lens: Tensor
    block_table: Tensor | None
    mask: Tensor | None
    folded: bool
    metadata: MLAMetadata


@dataclass(frozen=True)
class DecodeStep:
    """What all layers of a decode step share.

    Attributes:
        metadata: of this rank's tensors.
        parts: this rank's keys in one call's or two calls' worth: all under a mask, or those before the new tokens,
            which all queries see, then those of the new tokens.
    """

    metadata: MLAMetadata
    parts: tuple[KeyPart, ...]


@explained_class
class ShardedAttention:
    """Attention whose cache is dealt out over the ranks of a mesh dim by blocks, and whose heads over another's.

    Args:
        mesh: a DeviceMesh with named dims.
        context: the dim whose ranks hold different blocks of each request. None (default): each holds all.
        heads: the dim whose ranks hold different heads. None (default): each holds all. It may be `context` itself:
            see `decode`'s scatter_heads.

    Every call that exchanges something (`step` with check_values, `decode` and the gathers) is made by all ranks of
    the dim, in the same order, with tensors of the same shapes and dtypes: only `step` compares what it is given, and
    gloo ends a process that is sent more or fewer bytes than it waits for. A rank that dies, or does not come within
    the process group's timeout, gives the others a RankError; what they hold stays as it is.

    NOTE: that is so over gloo. NCCL's exchanges run on the GPU and the host does not wait for them, so that nothing is
    raised, with TORCH_NCCL_BLOCKING_WAIT neither (torch 2.11, two H200s): after the group's timeout NCCL's watchdog
    writes to stderr which exchange of which rank waits, and ends the process when it has dumped its state (17 s later
    it had not yet). In a group of both, "cpu:gloo,cuda:nccl", `step` would compare arguments over gloo, and find a rank
    that was lost between two steps; that has not run on GPUs.
    """

    def __init__(self, mesh: DeviceMesh, *, context: str | None = None, heads: str | None = None) -> None:
        self.context = Ranks(mesh, context)
        self.heads = Ranks(mesh, heads)

    def head_slices(self, Hq: int, Hk: int) -> tuple[slice, slice]:
        """This rank's query heads and KV heads; ranks share a KV head where there are fewer than ranks (MLA: one).

        Raises:
            HeadGroupingError: Hq or Hk does not divide among the ranks.
        """
        return head_slices(Hq, Hk, self.heads.rank, self.heads.size)

    # Decode

    def step(
        self,
        q_shape: Sequence[int],
        kv_shape: Sequence[int],
        block_table: Tensor,
        seq_lens: Tensor,
        mask: Tensor | None = None,
        *,
        tail_mask: Tensor | None = None,
        v_head_dim: int | None = None,
        check_values: bool = True,
    ) -> DecodeStep:
        """Prepare a decode step once; its layers pass the result to `decode`.

        It computes this rank's lengths on the device. On interleaved blocks the causality of several new tokens is not
        the one that kernels know. So `decode` makes two calls then: over the keys before the new tokens, which all
        queries see and no mask hides, and over the one or two blocks with the new tokens, under a small mask. Where
        lengths change in place, as in a captured graph, call `step` again with check_values=False, which may be
        captured.

        Args:
            q_shape: (B, Hq, S_q, D) of this rank's queries.
            kv_shape: (B, Hk, Nblk, 64, D) of this rank's cache.
            block_table: [B, W] int32 or int64 of this rank: its i-th block of a request is block rank + i * ranks.
            seq_lens: [B] int32 or int64, tokens of whole requests, over all ranks, the S_q new ones included.
            mask: [B|1, Hq|1, S_q|1, L], L >= max(seq_lens), over the keys of whole requests, as in
                flash_mla_with_kvcache. None (default): causal. NOTE: Hopper's decode kernels take bool masks alone.
            tail_mask: [B|1, Hq|1, S_q, S_q], bool or floating, over the S_q new tokens alone (tree decoding); earlier
                keys are all seen. Default None.
            v_head_dim: as in get_mla_metadata.
            check_values: read seq_lens and the table and check them, which waits for the GPU, and compare seq_lens,
                q_shape, Hk, D, v_head_dim and masks' shapes among the ranks of `context`. False: nothing is read or
                exchanged.

        Raises:
            RankError: another rank refused its arguments, or was given others.
            FlashMLAError's other subclasses: docs/contract.md, section 8.
        """
        rank, size = self.context.rank, self.context.size

        def prepare() -> tuple[DecodeStep, object]:
            contract.check_tensor("seq_lens", seq_lens)
            contract.check_tensor("block_table", block_table)
            contract.check_shape("q_shape", q_shape, 4, "[B, Hq, S_q, D]")
            B, Hq, S_q, _ = q_shape
            contract.check_seq_lens_shape(seq_lens, B)
            lengths = local_lengths(seq_lens, rank, size)
            metadata = get_mla_metadata(
                q_shape, kv_shape, block_table, lengths, v_head_dim=v_head_dim, check_values=check_values
            )
            whole = contract.one_mask(mask, tail_mask)
            contract.check_on(seq_lens.device, mask=whole)
            contract.check_decode_mask(whole, tail_mask is not None, B, Hq, S_q)
            values = None
            if check_values:
                values = seq_lens.tolist()
                check_whole_lengths(values)
                contract.check_mask_length("mask", mask, max(values, default=0))
            own = None if mask is None else local_mask(mask, block_table.shape[1] * BLOCK, rank, size)
            parts = [KeyPart(lengths, None, own, False, metadata)]
            # a rank with no column in its table has no key
            if (tail_mask is not None or (mask is None and S_q > 1 and size > 1)) and block_table.shape[1]:
                old = local_lengths(seq_lens - S_q, rank, size)
                new, few = lengths - old // BLOCK * BLOCK, tail_table(block_table, old, S_q)
                seen = tail_keys(tail_mask, seq_lens, old, S_q, rank, size)
                make = partial(get_mla_metadata, v_head_dim=v_head_dim, check_values=False)
                folded = (B, Hq * S_q, 1, q_shape[3])
                parts = [
                    KeyPart(old, None, None, True, make(folded, kv_shape, block_table, old)),
                    KeyPart(new, few, seen, False, make(q_shape, kv_shape, few, new)),
                ]
            shapes = [None if x is None else [*x.shape] for x in (mask, tail_mask)]
            facts = {
                "q_shape": [*q_shape], "Hk, D": [kv_shape[1], kv_shape[4]], "v_head_dim": v_head_dim,
                "seq_lens": values, "mask": shapes[0], "tail_mask": shapes[1],
            }  # fmt: skip
            return DecodeStep(metadata, tuple(parts)), facts

        return self.context.agree(prepare) if check_values else prepare()[0]

    @overload
    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, step: DecodeStep, *,
        softmax_scale: float | None = ..., q_descale: float | Tensor | None = ...,
        k_descale: float | Tensor | None = ..., v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: Literal[False] = False, scatter_heads: bool = ..., backend: str | None = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, step: DecodeStep, *,
        softmax_scale: float | None = ..., q_descale: float | Tensor | None = ...,
        k_descale: float | Tensor | None = ..., v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: Literal[True], scatter_heads: bool = ..., backend: str | None = ...,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, step: DecodeStep, *,
        softmax_scale: float | None = ..., q_descale: float | Tensor | None = ...,
        k_descale: float | Tensor | None = ..., v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: bool, scatter_heads: bool = ..., backend: str | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        step: DecodeStep,
        *,
        softmax_scale: float | None = None,
        q_descale: float | Tensor | None = None,
        k_descale: float | Tensor | None = None,
        v_descale: float | Tensor | None = None,
        attn_sink: Tensor | None = None,
        return_lse: bool = False,
        scatter_heads: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Decode: attention of S_q new tokens a request over the blocks of all ranks of `context`.

        Args:
            q: [B, Hq, S_q, D] contiguous, the same on all ranks of `context`.
            k_cache, v_cache, block_table: this rank's, as in flash_mla_with_kvcache.
            step: from `step`.
            attn_sink: [Hq] FP32 of q's heads; it counts once, in the merged result.
            scatter_heads: return only this rank's share of the heads, heads rank * Hq / ranks and on, by one all-to-all
                in place of the all-gather: 1/ranks of the bytes. With `heads` on the same dim as `context`, the
                usual form of it, q is `gather_heads(own q)` and every rank again ends with the heads it began with.
            softmax_scale, q_descale, k_descale, v_descale, return_lse, backend: as in flash_mla_with_kvcache.

        Returns:
            out [B, Hq, S_q, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, Hq, S_q] FP32 without the sink); with
            scatter_heads Hq / ranks heads of them.

        Raises:
            RankError: a rank died or did not come.
            HeadGroupingError: scatter_heads, and Hq is no multiple of the ranks.
            FlashMLAError's other subclasses: docs/contract.md, section 8.
        """
        rank, size = self.context.rank, self.context.size
        for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("block_table", block_table)):
            contract.check_tensor(name, x)
        contract.check_metadata(step.metadata, q, k_cache, v_cache, block_table)
        contract.check_sink(attn_sink, q.shape[1], q.device)
        if scatter_heads and q.shape[1] % size:
            raise HeadGroupingError(
                given=f"q {list(q.shape)}, scatter_heads=True over {size} ranks",
                required="Hq a multiple of the ranks",
                cause="The heads do not divide among the ranks",
                fix="Leave scatter_heads out",
            )
        inputs = (q, k_cache, v_cache, q_descale, k_descale, v_descale, attn_sink, *(part.mask for part in step.parts))
        options = {
            "softmax_scale": softmax_scale, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale,
            "backend": backend,
        }  # fmt: skip
        with torch.no_grad():
            out, lse = attend_own(q, k_cache, v_cache, block_table, step, options)
            dtype = out.dtype
            if size > 1:
                if scatter_heads:
                    # [ranks, B, Hq / ranks, S_q, ..], each rank's heads together
                    own = (x.unflatten(1, (size, -1)).transpose(0, 1) for x in (out, lse))
                    parts = self.context.all_to_all(pack(*own))
                    attn_sink = None if attn_sink is None else attn_sink.unflatten(0, (size, -1))[rank]
                else:
                    parts = self.context.all_gather(pack(out, lse))
                out, lse = merge_rounded(*unpack(parts, dtype), attn_sink)
            elif attn_sink is not None:
                out = apply_sink(out.float(), lse, attn_sink[:, None]).to(dtype)
        out, lse = refuse_gradients("ShardedAttention.decode", (out, lse), inputs)
        return (out, lse) if return_lse else out

    # Heads

    def gather_heads(self, x: Tensor) -> Tensor:
        """[B, H, ...] of this rank's heads -> [B, ranks * H, ...] of all ranks of `heads`, by one all-gather."""
        contract.check_tensor("x", x)
        if self.heads.size == 1:
            return x
        with torch.no_grad():
            whole = self.heads.all_gather(x).transpose(0, 1).flatten(1, 2).contiguous()
        return refuse_gradients("ShardedAttention.gather_heads", (whole,), (x,))[0]

    # Prefill

    def shard_prompt(self, x: Tensor, dim: int) -> Tensor:
        """The rows along `dim`, a prompt's tokens, that this rank of `context` computes: its two chunks, in order."""
        contract.check_tensor("x", x)
        if not -x.dim() <= dim < x.dim():
            raise ShapeError(
                f"x {list(x.shape)}, dim = {dim}", "a dim of x", "x has no such dim", "Name the tokens' dim"
            )
        first, second = prompt_chunks(x.shape[dim], self.context.rank, self.context.size)
        return torch.cat([x.narrow(dim, part.start, part.stop - part.start) for part in (first, second)], dim)

    def gather_prompt(self, *rows: Tensor, num_tokens: int) -> tuple[Tensor, ...]:
        """Rows of all chunks from the ranks' own: K and V, or (MLA) latents, which are smaller; by one all-gather.

        Args:
            rows: [B, H, own tokens, D] each, what this rank made of its chunks (`shard_prompt`); H and D may differ.
            num_tokens: P, tokens of the whole prompt.

        Returns:
            [B, H, P, D] each.
        """
        rank, size = self.context.rank, self.context.size
        own = sum(part.stop - part.start for part in prompt_chunks(num_tokens, rank, size))
        for x in rows:
            contract.check_tensor("rows", x)
            if x.dim() != 4 or x.shape[2] != own:
                raise ShapeError(
                    given=f"rows {list(x.shape)}, num_tokens = {num_tokens}, rank {rank} of {size}",
                    required=f"[B, H, {own}, D]: this rank's chunks of the prompt",
                    fix="Take them by shard_prompt",
                )
        if size == 1:
            return rows
        C = chunk_length(num_tokens, size)
        with torch.no_grad():
            padded = tuple(self._pad_chunks(x, num_tokens, C) for x in rows)
            parts = unpack_rows(self.context.all_gather(pack_rows(padded)), padded)
            whole = []
            for part in parts:
                first, second = part.unflatten(3, (2, C)).unbind(3)  # [ranks, B, H, C, D]
                chunks = torch.cat([first, second.flip(0)])  # [2 ranks, B, H, C, D] in the prompt's order
                whole.append(chunks.movedim(0, 2).flatten(2, 3)[:, :, :num_tokens])
        return refuse_gradients("ShardedAttention.gather_prompt", tuple(whole), rows)

    def _pad_chunks(self, x: Tensor, num_tokens: int, C: int) -> Tensor:
        """[B, H, own tokens, D] -> [B, H, 2C, D], a row of zeros for each that a chunk lacks."""
        lengths = [part.stop - part.start for part in prompt_chunks(num_tokens, self.context.rank, self.context.size)]
        raw = x.contiguous().view(torch.uint8)  # NOTE: FP8 has no pad
        full = [pad(part, (0, 0, 0, C - part.shape[2])) for part in raw.split(lengths, 2)]
        return torch.cat(full, 2).view(x.dtype)

    @overload
    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
        seq_lens: Tensor | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
        v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: Literal[False] = False, backend: str | None = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
        seq_lens: Tensor | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
        v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: Literal[True], backend: str | None = ...,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
        seq_lens: Tensor | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
        v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: bool, backend: str | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        seq_lens: Tensor | None = None,
        q_descale: float | Tensor | None = None,
        k_descale: float | Tensor | None = None,
        v_descale: float | Tensor | None = None,
        attn_sink: Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prefill: the queries of this rank's chunks of the prompt over the keys of all of it. Exchanges nothing.

        Args:
            q: [B, Hq, own tokens, D], this rank's chunks (`shard_prompt`).
            k: [B, Hk, P, D]; v: [B, Hk, P, Dv]: the whole prompt's, from `gather_prompt`.
            causal: a query sees keys up to its own position (default); False: all keys.
            seq_lens, softmax_scale, q_descale, k_descale, v_descale, attn_sink, return_lse, backend: as in
                flash_mla_prefill; a ragged batch is padded to P at its end.

        Returns:
            out [B, Hq, own tokens, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, Hq, own tokens] FP32).

        Raises:
            FlashMLAError's subclasses, before anything is written: docs/contract.md, section 8.
        """
        for name, x, layout in (("q", q, "[B, Hq, own tokens, D]"), ("k", k, "[B, Hk, P, D]"), ("v", v, "[.., P, Dv]")):
            contract.check_tensor(name, x)
            contract.check_rank(name, x.shape, 4, layout)
        P = k.shape[2]
        chunks = prompt_chunks(P, self.context.rank, self.context.size)
        lengths = [part.stop - part.start for part in chunks]
        if q.shape[2] != sum(lengths):
            raise ShapeError(
                given=contract.named(q=q, k=k),
                required=f"q [B, Hq, {sum(lengths)}, D]: rank {self.context.rank}'s chunks of {P} tokens",
                cause="q does not hold the tokens of this rank",
                fix="Take them by shard_prompt, and k and v by gather_prompt",
            )
        # whether the prompt fits is judged on a query of its length
        whole = q[:, :, :1].expand(-1, -1, P, -1) if q.shape[2] else q.new_empty((*q.shape[:2], P, q.shape[3]))
        descales = (q_descale, k_descale, v_descale)
        call = contract.PrefillCall(whole, k, v, None, None, causal, softmax_scale, seq_lens, descales, attn_sink)
        checked = contract.prefill(call)
        contract.check_prefill_lengths(seq_lens, P)
        contract.check_last_dim("q", q)
        contract.check_monotonic("q", q.shape[:3], q.stride()[:3], "B H P")
        results = []
        for rows, part in zip(q.split(lengths, 2), chunks, strict=True):
            keys = part.stop if causal else P
            own_k, own_v = k[:, :, :keys], v[:, :, :keys]
            start = part.start if causal else 0
            problem = contract.prefill_problem(
                rows, own_k, own_v, S_kv=keys, causal=causal, start_pos=start > 0, seq_lens=seq_lens is not None,
                descale=checked.descale, sink=checked.sink, scale_sign=checked.scale_sign,
            )  # fmt: skip
            positions = torch.full((q.shape[0],), start, dtype=torch.int32, device=q.device) if start else None
            result = launch_prefill(
                plan(problem, backend), "ShardedAttention.prefill", q=rows, k=own_k, v=own_v, block_table=None,
                seq_lens=None if seq_lens is None else seq_lens.clamp(max=keys), mask=None,
                softmax_scale=softmax_scale, descales=descales, attn_sink=attn_sink, out=None, return_lse=True,
                start_pos=positions, block_mask=None,
            )  # fmt: skip
            results.append(cast(tuple[Tensor, Tensor], result))
        out, lse = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
        return (out, lse) if return_lse else out


# --- A rank's own keys ------------------------------------------------------------------------------------------------


def attend_own(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, step: DecodeStep, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, S_q, Dv], lse [B, Hq, S_q]) of q over this rank's keys."""
    results: list[tuple[Tensor, Tensor]] = []
    for part in step.parts:
        rows = as_heads(q, k_cache.shape[1]) if part.folded else q
        table = block_table if part.block_table is None else part.block_table
        out, lse = flash_mla_with_kvcache(
            rows, k_cache, v_cache, table, part.seq_lens, part.mask, part.metadata, return_lse=True, **options
        )
        if part.folded:
            out, lse = (from_heads(x, k_cache.shape[1], q.shape[2]) for x in (out, lse))
        results.append((out, lse))
    if len(results) == 1:
        return results[0]
    outs, lses = (torch.stack(x) for x in zip(*results, strict=True))
    return merge_rounded(outs, lses, None)


def merge_rounded(outs: Tensor, lses: Tensor, attn_sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """`merge` of parts [n, B, Hq, S_q, ..] in FP32, then the sink: weights and sum of a 16-bit out are not rounded to
    16 bits on the way. One kernel on a GPU."""
    if outs.device.type != "cpu":
        from flash_mla.backends.triton import device
        from flash_mla.backends.triton import merge as merging

        if device.available() is None:
            return merging.launch(outs, lses, None if attn_sink is None else attn_sink.contiguous())
    out, lse = merge(outs.float(), lses)
    if attn_sink is not None:
        out = apply_sink(out, lse, attn_sink[:, None])
    return out.to(outs.dtype), lse


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_whole_lengths(seq_lens: list[int]) -> None:
    """No length is negative. (That none is too long, the metadata of a rank's own lengths has checked.)"""
    if seq_lens and min(seq_lens) < 0:
        raise SequenceLengthError(
            f"seq_lens has {min(seq_lens)}",
            "seq_lens[b] >= 0",
            "`seq_lens[b]` is negative",
            "Pass lengths in tokens, 0 or more",
        )


def refuse_gradients(function: str, results: tuple[Tensor, ...], inputs: Iterable[object]) -> tuple[Tensor, ...]:
    """The results, attached to the inputs that require grad: an exchange has no backward."""
    attached = learning(*inputs)
    return tuple(refusing(function, x.clone(), attached) for x in results) if attached else results
