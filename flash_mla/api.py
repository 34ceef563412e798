"""The reference's four functions.

A call checks its arguments (`contract`), finds its plan (`plan`) and launches (`launch`). Outside of torch.compile this
is plain Python; while a graph is traced, the functions call the custom ops of `ops` instead, which do the same work
when the graph runs. So does a prefill whose backward is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.autograd import learning, transformed
from flash_mla.calls import (
    append_mha,
    as_tensors,
    attend_mha,
    attend_prefill,
    give_back,
    plan_decode,
    plan_mha,
    plan_prefill,
)
from flash_mla.contract import DecodeCall, MhaCall, MLAMetadata, PrefillCall
from flash_mla.entry import entry
from flash_mla.gradients import Prefill
from flash_mla.launch import attend_decode
from flash_mla.layout import BlockSparseLayout
from flash_mla.passed import traced
from flash_mla.problem import PLAIN, Options

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["MLAMetadata", "flash_mla_prefill", "flash_mla_with_kvcache", "get_mla_metadata", "mha_fwd_kvcache"]


@entry("flash_mla", reference=True)
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
        FlashMLAError: the subclass that names what does not fit, see docs/contract.md, section 8.
    """
    contract.refuse_deepseek_order(q_shape, kv_shape, block_table)
    return contract.metadata(q_shape, kv_shape, block_table, seq_lens, v_head_dim, check_values)


@overload
def flash_mla_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, mask: Tensor | None = ...,
    metadata: MLAMetadata | None = ..., *, softmax_scale: float | None = ..., q_descale: float | Tensor | None = ...,
    k_descale: float | Tensor | None = ..., v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
    return_lse: Literal[False] = False, out: Tensor | None = ..., tail_mask: Tensor | None = ...,
    batch_invariant: bool = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def flash_mla_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, mask: Tensor | None = ...,
    metadata: MLAMetadata | None = ..., *, softmax_scale: float | None = ..., q_descale: float | Tensor | None = ...,
    k_descale: float | Tensor | None = ..., v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
    return_lse: Literal[True], out: Tensor | None = ..., tail_mask: Tensor | None = ...,
    batch_invariant: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_mla_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, mask: Tensor | None = ...,
    metadata: MLAMetadata | None = ..., *, softmax_scale: float | None = ..., q_descale: float | Tensor | None = ...,
    k_descale: float | Tensor | None = ..., v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
    return_lse: bool, out: Tensor | None = ..., tail_mask: Tensor | None = ...,
    batch_invariant: bool = ..., backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@entry("flash_mla", reference=True)
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
    tail_mask: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode: attention of S_q new tokens a request over its paged cache.

    Args:
        q: [B, Hq, S_q, D] contiguous; S_q 1, or more in speculative decoding. FP8 (e4m3), BF16, FP16 or FP32.
        k_cache: [B, Hk, Nblk, 64, D] of q's dtype, or FP8 under BF16 or FP16 q; a block is contiguous, leading dims
            strided (batch stride 0: pool).
        v_cache: [B, Hk, Nblk, 64, Dv] likewise; for MLA the view k_cache[..., :Dv], whose rows are then read once.
        block_table: [B, Nblk] int32 or int64, contiguous: token t of request b is at
            k_cache[b, h, block_table[b, t // 64], t % 64]. Entries past ceil(seq_lens[b]/64) may hold anything.
        seq_lens: [B] int32 or int64, tokens in the cache, the new ones included. 0: out 0, lse -inf.
        mask: [B|1, Hq|1, S_q|1, L], L >= max(seq_lens); bool (True = attend) or floating (added to the scaled scores);
            applied together with the length limit. With metadata L is not checked, and keys at or past L are not seen.
            None (default): causal, query i sees t <= seq_lens[b] - S_q + i.
        metadata: from get_mla_metadata. With it no value is read and the GPU is never waited for; without it
            (None, default) the values are checked in this call, which waits for the GPU.
        softmax_scale: any finite number, 0 and negative ones too. Default D ** -0.5; over MLA's latent that is not the
            model's, which is (nope + rope) ** -0.5, and leaving it out gives a ScaleWarning.
        q_descale, k_descale, v_descale: factor from stored to real value, not negative, a float or FP32 broadcasting to
            [B, Hk]; default 1.
        attn_sink: [Hq] FP32, one extra logit a head that takes weight and gives no value. Default none.
        return_lse: also return the natural-log sum of exponentials (without the sink). Default False.
        out: [B, Hq, S_q, Dv] contiguous to write into, apart from every other tensor. Default: a new tensor.
        tail_mask: [B|1, Hq|1, S_q, S_q], bool or floating, in place of mask: over the S_q newest tokens (a tree of
            drafts), column j being the key seq_lens[b] - S_q + j; earlier keys are all seen. Default none.
        batch_invariant: a request's rows are the same bits alone and in any batch: its keys are split by their number
            alone, not so that all requests together fill the machine. What else chooses a kernel must stay: S_q, heads,
            widths, dtypes, mask or none, backend, device. Default False, which is faster where requests are few.
        backend: "hopper", "triton" or "cpu", which then never falls back. Default: the first that can.

    Returns:
        out [B, Hq, S_q, Dv] of q's dtype (BF16 for FP8), or (out, lse [B, Hq, S_q] FP32). Forward only: a backward
        through them raises GradientError.

    Raises:
        FlashMLAError: one of its subclasses, before anything is written: see docs/contract.md, section 8.
    """
    tail = tail_mask is not None
    if tail:
        mask = contract.one_mask(mask, tail_mask)
    descales = (q_descale, k_descale, v_descale)
    if traced(q):
        if metadata is not None:
            contract.check_metadata(metadata, q, k_cache, v_cache, block_table)
        check_values = metadata is None
        result = torch.ops.flash_mla.flash_mla_with_kvcache(
            q, k_cache, v_cache, block_table, seq_lens, mask, softmax_scale, *as_tensors(descales, q), attn_sink,
            tail, batch_invariant, check_values, backend, out,
        )  # fmt: skip
        return give_back(result, return_lse, out)

    options = Options(tail, batch_invariant) if tail or batch_invariant else PLAIN
    call = DecodeCall(
        q, k_cache, v_cache, block_table, seq_lens, mask, softmax_scale, descales, attn_sink, options
    )  # fmt: skip
    return attend_decode(plan_decode(call, metadata, backend, out), call, out, return_lse)


@overload
def flash_mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, sparse_layout: Tensor | BlockSparseLayout | BlockMask | None = ...,
    attn_mask: Tensor | None = ..., *, causal: bool | None = ..., softmax_scale: float | None = ...,
    seq_lens: Tensor | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ..., return_lse: Literal[False] = False,
    out: Tensor | None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def flash_mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, sparse_layout: Tensor | BlockSparseLayout | BlockMask | None = ...,
    attn_mask: Tensor | None = ..., *, causal: bool | None = ..., softmax_scale: float | None = ...,
    seq_lens: Tensor | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ..., return_lse: Literal[True],
    out: Tensor | None = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, sparse_layout: Tensor | BlockSparseLayout | BlockMask | None = ...,
    attn_mask: Tensor | None = ..., *, causal: bool | None = ..., softmax_scale: float | None = ...,
    seq_lens: Tensor | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ..., return_lse: bool, out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@entry("flash_mla", reference=True)
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
        and lse -inf. Both carry gradients to q, k, v and attn_sink, the same bits in every run (Dao 2023,
        FlashAttention-2, without its atomic sums); a backward to attn_mask, or with FP8 or a descale, raises
        GradientError.

    Raises:
        FlashMLAError: one of its subclasses, before anything is written: see docs/contract.md, section 8.
    """
    blocks = contract.sparse_blocks(sparse_layout, q)
    causal = contract.settle_causal(causal, attn_mask)
    descales = (q_descale, k_descale, v_descale)
    compiling = traced(q)
    if compiling or transformed() or learning(q, k, v, attn_mask, *descales, attn_sink):
        if out is not None:
            contract.refuse_learning_out(out)
        attend = torch.ops.flash_mla.flash_mla_prefill if compiling else Prefill.apply
        result = attend(
            q, k, v, blocks, attn_mask, causal, softmax_scale, seq_lens, *as_tensors(descales, q), attn_sink, backend,
            out,
        )  # fmt: skip
        return give_back(result, return_lse, out)

    call = PrefillCall(q, k, v, blocks, attn_mask, causal, softmax_scale, seq_lens, descales, attn_sink)
    return attend_prefill(plan_prefill(call, backend, out), call, out, return_lse)


@overload
def mha_fwd_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, attn_mask: Tensor | None = ..., *,
    k: Tensor | None = ..., v: Tensor | None = ..., start_pos: Tensor | None = ..., causal: bool | None = ...,
    softmax_scale: float | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., return_lse: Literal[False] = False, out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def mha_fwd_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, attn_mask: Tensor | None = ..., *,
    k: Tensor | None = ..., v: Tensor | None = ..., start_pos: Tensor | None = ..., causal: bool | None = ...,
    softmax_scale: float | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., return_lse: Literal[True], out: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def mha_fwd_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, attn_mask: Tensor | None = ..., *,
    k: Tensor | None = ..., v: Tensor | None = ..., start_pos: Tensor | None = ..., causal: bool | None = ...,
    softmax_scale: float | None = ..., q_descale: float | Tensor | None = ..., k_descale: float | Tensor | None = ...,
    v_descale: float | Tensor | None = ..., return_lse: bool, out: Tensor | None = ..., backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@entry("flash_mla", reference=True)
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
        FlashMLAError: one of its subclasses, before anything is written: see docs/contract.md, section 8.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("block_table", block_table)):
        contract.check_tensor(name, tensor)
    causal = contract.settle_causal(causal, attn_mask)
    descales = (q_descale, k_descale, v_descale)
    if traced(q):
        writes = k is not None or v is not None
        if writes and (is_pool(k_cache) or is_pool(v_cache)):
            # NOTE: a graph cannot declare that it writes to an expanded tensor: it breaks here, and the call is eager
            from flash_mla import uncompiled

            return uncompiled.write_pool(
                mha_fwd_kvcache, q, k_cache, v_cache, block_table, attn_mask, k=k, v=v, start_pos=start_pos,
                causal=causal, softmax_scale=softmax_scale, q_descale=q_descale, k_descale=k_descale,
                v_descale=v_descale, return_lse=return_lse, out=out, backend=backend,
            )  # fmt: skip
        more = (attn_mask, k, v, start_pos, causal, softmax_scale, *as_tensors(descales, q), backend, out)
        if writes:
            torch.ops.flash_mla.mha_fwd_kvcache_append(q, k_cache, v_cache, block_table, *more)
        result = torch.ops.flash_mla.mha_fwd_kvcache(q, k_cache, v_cache, block_table, *more)
        return give_back(result, return_lse, out)

    call = MhaCall(q, k_cache, v_cache, block_table, attn_mask, k, v, start_pos, causal, softmax_scale, descales)
    chosen = plan_mha(call, backend, out)
    append_mha(chosen, call)
    return attend_mha(chosen, call, out, return_lse)


def is_pool(cache: Tensor) -> bool:
    return cache.dim() == 5 and cache.stride(0) == 0 and cache.shape[0] > 1
