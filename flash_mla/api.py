"""The public functions, and the torch custom ops behind them.

A call checks its arguments (`contract`), finds its plan (`plan`) and launches. Outside of torch.compile this is plain
Python; while a graph is traced, the same work is done by the custom ops `torch.ops.flash_mla.*`, which the functions
call instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.contract import MLAMetadata
from flash_mla.layout import BlockSparseLayout
from flash_mla.plan import plan
from flash_mla.problem import AppendArgs, DecodeArgs, PrefillArgs

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["MLAMetadata", "flash_mla_prefill", "flash_mla_with_kvcache", "get_mla_metadata", "mha_fwd_kvcache"]

P_ = ParamSpec("P_")
R_ = TypeVar("R_")


def points_to_deepseek(function: Callable[P_, R_]) -> Callable[P_, R_]:
    """Turn the TypeError of a call with DeepSeek's arguments into a ShapeError that names flash_mla.deepseek."""

    @wraps(function)
    def call(*args: P_.args, **kwargs: P_.kwargs) -> R_:
        try:
            return function(*args, **kwargs)
        except TypeError:
            contract.refuse_deepseek_order(*args)
            if not (args or kwargs) or contract.DEEPSEEK_NAMES & kwargs.keys():
                contract.deepseek_order([*args, *kwargs.values()])
            raise

    return call


@points_to_deepseek
def get_mla_metadata(
    q_shape: Sequence[int],
    kv_shape: Sequence[int],
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    v_head_dim: int | None = None,
    check_values: bool = True,
) -> MLAMetadata:
    """Check a decode step's shapes and values once; layers then pass the result to `flash_mla_with_kvcache`.

    It makes no tensor and plans nothing: a kernel finds its share of the work from `seq_lens` on the device, so the
    metadata stays right when lengths, table or cache change in place.

    Args:
        q_shape: (B, Hq, S_q, D).
        kv_shape: (B, Hk, Nblk, 64, D).
        block_table: [B, Nblk] int32 or int64, contiguous.
        seq_lens: [B] int32 or int64, tokens in the cache, the S_q new ones included.
        v_head_dim: Dv. None (default): not checked.
        check_values: read seq_lens and block_table once and check them, which waits for the GPU. False: shapes only.

    Returns:
        An immutable MLAMetadata.

    Raises:
        HeadGroupingError, BlockCountError, SequenceLengthError, BlockTableError, LayoutError, DTypeError,
        DeviceError, ShapeError: see docs/contract.md, section 8.
    """
    contract.refuse_deepseek_order(q_shape, kv_shape, block_table)
    return contract.metadata(q_shape, kv_shape, block_table, seq_lens, v_head_dim, check_values)


@points_to_deepseek
def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None = None,
    metadata: MLAMetadata | None = None,
    *,
    softmax_scale: float | None = None,
    q_descale: float | Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    attn_sink: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode: attention of S_q new tokens a request over its paged cache.

    Args:
        q: [B, Hq, S_q, D] contiguous; S_q 1, or 2..8 for speculative decoding. FP8 (e4m3), BF16, FP16 or FP32.
        k_cache: [B, Hk, Nblk, 64, D] of q's dtype; a block is contiguous, leading dims strided (batch stride 0: pool).
        v_cache: [B, Hk, Nblk, 64, Dv] likewise; for MLA the view k_cache[..., :Dv], whose rows are then read once.
        block_table: [B, Nblk] int32 or int64, contiguous: token t of request b is at
            k_cache[b, h, block_table[b, t // 64], t % 64]. Entries past ceil(seq_lens[b]/64) may hold anything.
        seq_lens: [B] int32 or int64, tokens in the cache, the new ones included. 0: out 0, lse -inf.
        mask: [B|1, Hq|1, S_q|1, L], L >= max(seq_lens); bool (True = attend) or floating (added to the scaled scores);
            applied together with the length limit. None (default): causal, query i sees t <= seq_lens[b] - S_q + i.
        metadata: from get_mla_metadata. With it no value is read and the GPU is never waited for; without it
            (None, default) the values are checked in this call, which waits for the GPU.
        softmax_scale: default D ** -0.5.
        q_descale, k_descale, v_descale: factor from stored to real value, a float or FP32 broadcasting to [B, Hk];
            default 1.
        attn_sink: [Hq] FP32, one extra logit a head that takes weight and gives no value. Default none.
        return_lse: also return the natural-log sum of exponentials (without the sink). Default False.
        out: [B, Hq, S_q, Dv] contiguous to write into, apart from the inputs. Default: a new tensor.
        backend: "hopper", "triton" or "cpu", which then never falls back. Default: the first that can.

    Returns:
        out [B, Hq, S_q, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, Hq, S_q] FP32).

    Raises:
        FlashMLAError's subclasses, before anything is written: see docs/contract.md, section 8.
    """
    contract.refuse_deepseek_order(q, k_cache, v_cache)
    if metadata is not None:
        contract.check_metadata(metadata, q, k_cache, v_cache, block_table)
        contract.check_mask_length("mask", mask, metadata.max_seq_len or 0)
    if torch.compiler.is_compiling():
        descales = [expand_descale(x, q, k_cache) for x in (q_descale, k_descale, v_descale)]
        check_values = metadata is None
        result = torch.ops.flash_mla.flash_mla_with_kvcache(
            q, k_cache, v_cache, block_table, seq_lens, mask, softmax_scale, *descales, attn_sink, check_values, backend
        )
        return give_back(result, return_lse, out)

    problem = contract.decode(
        q, k_cache, v_cache, block_table, seq_lens, mask, (q_descale, k_descale, v_descale), attn_sink
    )
    rows = (problem.B, problem.Hq, problem.S_q)
    contract.check_out(out, (*rows, problem.Dv), problem.out_dtype, q=q, k_cache=k_cache, v_cache=v_cache)
    chosen = plan(problem, backend)
    if metadata is None:
        longest = contract.check_values(block_table, seq_lens, problem.Nblk)
        contract.check_mask_length("mask", mask, longest)
    args = DecodeArgs(
        q=q,
        k=k_cache,
        v=v_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        mask=None if mask is None else mask.expand(*rows, -1),
        q_descale=expand_descale(q_descale, q, k_cache),
        k_descale=expand_descale(k_descale, q, k_cache),
        v_descale=expand_descale(v_descale, q, k_cache),
        attn_sink=attn_sink,
        softmax_scale=problem.D**-0.5 if softmax_scale is None else softmax_scale,
        out=q.new_empty((*rows, problem.Dv), dtype=problem.out_dtype) if out is None else out,
        lse=q.new_empty(rows, dtype=torch.float32) if return_lse else None,
    )
    chosen.launch(args)
    return args.out if args.lse is None else (args.out, args.lse)


def flash_mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_layout: Tensor | BlockSparseLayout | BlockMask | None = None,
    attn_mask: Tensor | None = None,
    *,
    causal: bool | None = None,
    softmax_scale: float | None = None,
    seq_lens: Tensor | None = None,
    q_descale: float | Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    attn_sink: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Prefill: dense or block-sparse attention of P prompt tokens.

    Args:
        q: [B, Hq, P, D]; last dim contiguous, leading dims strided but monotonic. FP8 (e4m3), BF16, FP16 or FP32.
        k: [B, Hk, P, D]; v: [B, Hk, P, Dv]; of q's dtype, strided likewise. Hq is a multiple of Hk.
        sparse_layout: which 64x64 blocks are computed: bool [B|1, Hq|1, ceil(P/64), ceil(P/64)], a BlockSparseLayout,
            or a FlexAttention BlockMask (its blocks, not its mask_mod). None (default): all.
        attn_mask: [B|1, Hq|1, P, P], bool (True = attend) or floating (added to the scaled scores). Default none.
        causal: keep keys t <= i. None (default): True without attn_mask, False with one.
        softmax_scale: default D ** -0.5.
        seq_lens: [B] int32 or int64, keys a request: keys at or past seq_lens[b] (padding, which may hold anything)
            are not seen; every query row is computed. Values outside [0, P] are an error on a CPU and clamped on a GPU,
            which is never waited for. Default P.
        q_descale, k_descale, v_descale, attn_sink, return_lse, out, backend: as in flash_mla_with_kvcache.

    Returns:
        out [B, Hq, P, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, Hq, P] FP32). A row with no key left gives 0
        and lse -inf.

    Raises:
        FlashMLAError's subclasses, before anything is written: see docs/contract.md, section 8.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        contract.check_tensor(name, tensor)
    contract.check_rank("q", q.shape, 4, "[B, Hq, P, D]")
    blocks = contract.sparse_blocks(sparse_layout, q)
    causal = attn_mask is None if causal is None else causal
    if torch.compiler.is_compiling():
        descales = [expand_descale(x, q, k) for x in (q_descale, k_descale, v_descale)]
        result = torch.ops.flash_mla.flash_mla_prefill(
            q, k, v, blocks, attn_mask, causal, softmax_scale, seq_lens, *descales, attn_sink, backend
        )
        return give_back(result, return_lse, out)

    problem = contract.prefill(
        q,
        k,
        v,
        seq_lens,
        attn_mask,
        (q_descale, k_descale, v_descale),
        attn_sink,
        causal=causal,
        block_mask=blocks is not None,
    )
    rows = (problem.B, problem.Hq, problem.P)
    contract.check_mask_length("attn_mask", attn_mask, problem.P)
    contract.check_out(out, (*rows, problem.Dv), problem.out_dtype, q=q, k=k, v=v)
    chosen = plan(problem, backend)
    args = PrefillArgs(
        q=q,
        k=k,
        v=v,
        block_table=None,
        seq_lens=seq_lens,
        start_pos=None,
        mask=None if attn_mask is None else attn_mask.expand(*rows, -1),
        block_mask=blocks,
        q_descale=expand_descale(q_descale, q, k),
        k_descale=expand_descale(k_descale, q, k),
        v_descale=expand_descale(v_descale, q, k),
        attn_sink=attn_sink,
        softmax_scale=problem.D**-0.5 if softmax_scale is None else softmax_scale,
        out=q.new_empty((*rows, problem.Dv), dtype=problem.out_dtype) if out is None else out,
        lse=q.new_empty(rows, dtype=torch.float32) if return_lse else None,
    )
    chosen.launch(args)
    return args.out if args.lse is None else (args.out, args.lse)


def mha_fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    attn_mask: Tensor | None = None,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    start_pos: Tensor | None = None,
    causal: bool | None = None,
    softmax_scale: float | None = None,
    q_descale: float | Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """MHA prefill on a paged cache, written first when k and v are given.

    Args:
        q: [B, H, P, D]; last dim contiguous, leading dims strided but monotonic. FP8 (e4m3), BF16, FP16 or FP32.
        k_cache: [B, H, Nblk, 64, D]; v_cache: [B, H, Nblk, 64, Dv]; of q's dtype, as in flash_mla_with_kvcache.
        block_table: [B, Nblk] int32 or int64, contiguous; it covers the prompt: at least ceil((start+P)/64) blocks.
        attn_mask: [B|1, H|1, P, L] over the keys from position 0, L >= P (start_pos[b] + P with start_pos), bool or
            floating. Default none.
        k, v: [B, H, P, D] and [B, H, P, Dv]: written to the cache through the table before attending, token i of
            request b to position start_pos[b] + i. Default None: the cache already holds the prompt.
        start_pos: [B] int32 or int64, tokens before this chunk (chunked prefill); its values are checked, which waits
            for the GPU. Default 0.
        causal: the query at position p sees keys t <= p. None (default): True without attn_mask, False with one.
        softmax_scale, q_descale, k_descale, v_descale, return_lse, out, backend: as in flash_mla_with_kvcache.

    Returns:
        out [B, H, P, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, H, P] FP32).

    Raises:
        FlashMLAError's subclasses, before anything is written: see docs/contract.md, section 8.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("block_table", block_table)):
        contract.check_tensor(name, tensor)
    causal = attn_mask is None if causal is None else causal
    if torch.compiler.is_compiling():
        descales = [expand_descale(x, q, k_cache) for x in (q_descale, k_descale, v_descale)]
        result = torch.ops.flash_mla.mha_fwd_kvcache(
            q, k_cache, v_cache, block_table, attn_mask, k, v, start_pos, causal, softmax_scale, *descales, backend
        )
        return give_back(result, return_lse, out)

    problem = contract.mha(
        q,
        k_cache,
        v_cache,
        block_table,
        start_pos,
        k,
        v,
        attn_mask,
        (q_descale, k_descale, v_descale),
        causal=causal,
    )
    rows = (problem.B, problem.Hq, problem.P)
    contract.check_out(out, (*rows, problem.Dv), problem.out_dtype, q=q, k_cache=k_cache, v_cache=v_cache)
    chosen = plan(problem, backend)
    longest = contract.check_prompt_values(block_table, start_pos, problem, k_cache.shape[2])
    contract.check_mask_length("attn_mask", attn_mask, longest)
    if k is not None:
        chosen.backend.append(AppendArgs(k, v, k_cache, v_cache, block_table, start_pos, None))
    args = PrefillArgs(
        q=q,
        k=k_cache,
        v=v_cache,
        block_table=block_table,
        seq_lens=None if start_pos is None else start_pos + problem.P,
        start_pos=start_pos,
        mask=None if attn_mask is None else attn_mask.expand(*rows, -1),
        block_mask=None,
        q_descale=expand_descale(q_descale, q, k_cache),
        k_descale=expand_descale(k_descale, q, k_cache),
        v_descale=expand_descale(v_descale, q, k_cache),
        attn_sink=None,
        softmax_scale=problem.D**-0.5 if softmax_scale is None else softmax_scale,
        out=q.new_empty((*rows, problem.Dv), dtype=problem.out_dtype) if out is None else out,
        lse=q.new_empty(rows, dtype=torch.float32) if return_lse else None,
    )
    chosen.launch(args)
    return args.out if args.lse is None else (args.out, args.lse)


def expand_descale(value: float | Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A checked descale as an FP32 tensor [B, Hk]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float32, device=q.device)
    return value.expand(q.shape[0], k.shape[1])


# --- Custom ops -------------------------------------------------------------------------------------------------------


def give_back(result: tuple[Tensor, Tensor], return_lse: bool, out: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """What a public function returns, from what its op returned."""
    first = result[0] if out is None else out.copy_(result[0])
    return (first, result[1]) if return_lse else first


@torch.library.custom_op("flash_mla::flash_mla_with_kvcache", mutates_args=())
def decode_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    attn_sink: Tensor | None,
    check_values: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """flash_mla_with_kvcache; check_values says whether the call had no metadata."""
    metadata = None
    if not check_values:
        metadata = contract.metadata(q.shape, k_cache.shape, block_table, seq_lens, None, read_values=False)
    return flash_mla_with_kvcache(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        mask,
        metadata,
        softmax_scale=softmax_scale,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attn_sink=attn_sink,
        return_lse=True,
        backend=backend,
    )  # type: ignore[return-value]


@torch.library.custom_op("flash_mla::flash_mla_prefill", mutates_args=())
def prefill_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_layout: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    seq_lens: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    attn_sink: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """flash_mla_prefill, with causal settled."""
    return flash_mla_prefill(
        q,
        k,
        v,
        sparse_layout,
        attn_mask,
        causal=causal,
        softmax_scale=softmax_scale,
        seq_lens=seq_lens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attn_sink=attn_sink,
        return_lse=True,
        backend=backend,
    )  # type: ignore[return-value]


@torch.library.custom_op("flash_mla::mha_fwd_kvcache", mutates_args=("k_cache", "v_cache"))
def mha_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    attn_mask: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    start_pos: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """mha_fwd_kvcache, with causal settled; declared to write both caches, which it does when k and v are given."""
    return mha_fwd_kvcache(
        q,
        k_cache,
        v_cache,
        block_table,
        attn_mask,
        k=k,
        v=v,
        start_pos=start_pos,
        causal=causal,
        softmax_scale=softmax_scale,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        return_lse=True,
        backend=backend,
    )  # type: ignore[return-value]


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of (out, lse), for q [B, Hq, rows, D] and v [..., Dv]."""
    dtype = contract.out_dtype(q.dtype)
    return q.new_empty((*q.shape[:3], v.shape[-1]), dtype=dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


for op in (decode_op, prefill_op, mha_op):
    op.register_fake(fake)
