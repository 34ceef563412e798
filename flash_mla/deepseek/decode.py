"""Decode over a pool: dense through our own decode, sparse through the sparse launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_mla.contract import (
    NO_DESCALES,
    Descales,
    check_head_dims,
    check_index,
    check_on,
    check_rank,
    check_tensor,
    named,
    out_dtype,
)
from flash_mla.deepseek.checks import check_out, check_query, check_same_dtype, given, writable
from flash_mla.deepseek.sparse import sparse
from flash_mla.entry import entry
from flash_mla.errors import DTypeError, ShapeError
from flash_mla.pages import PoolCall, attend_planned, plan_pools
from flash_mla.problem import FP8, SparseKeys


@dataclass
class FlashMLASchedMeta:
    """What DeepSeek's get_mla_metadata returns. Empty: our kernels find their work on the device, at every call.

    The attributes are theirs, for code that reads or resets them; nothing here does, so one object serves calls of any
    shape and of any lengths.
    """

    have_initialized: bool = False
    config: Any = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """(an empty FlashMLASchedMeta, None), for any arguments, old interface or new."""
    return FlashMLASchedMeta(), None


@entry("flash_mla.deepseek")
def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """MLA or GQA decode over a pool: dense, or over the tokens that `indices` names.

    Args:
        q: [b, s_q, h_q, d], BF16, FP16 or (CPU, Triton) FP32; last dim contiguous.
        k_cache: [num_blocks, page, h_kv, d] in q's dtype, whose first head_dim_v columns are V; or, with
            is_fp8_kvcache, the bytes of a row format (fp8_ds_mla 656, fp8_token 644, model1 584, v4.1 528, flat 576
            with factor 1) as [num_blocks, page, 1, bytes], told apart by their size.
        block_table: [b, max_blocks] int32, pages of the pool; dense only, else None or anything.
        cache_seqlens: [b] int32, tokens of each request; dense only.
        head_dim_v: columns of a row that are V.
        tile_scheduler_metadata, num_splits: not used.
        softmax_scale: 1/sqrt(d) if None.
        causal: query i of s_q sees keys t <= cache_seqlens[b] - s_q + i; otherwise every key. Dense only.
        is_fp8_kvcache: the caches hold a row format; dense or sparse.
        indices: [b, s_q, topk] int32, block * page + offset in the pool; a negative one or one past the pool names no
            token. Given: sparse attention, with h_kv = 1 and pages of any length.
        attn_sink: [h_q] FP32: out is scaled by exp(lse) / (exp(lse) + exp(attn_sink)); lse is not.
        extra_k_cache, extra_indices_in_kvcache: a second cache of the same format, [.., page2, 1, ..], and its indices
            [b, s_q, topk2]: attended together with the first.
        topk_length, extra_topk_length: [b] int32, only the leftmost so many indices of each row count.
        out: [b, s_q, h_q, head_dim_v] to write into (vLLM's argument), last dim contiguous. Default: a new tensor.
        backend: run this backend or raise; None takes the first that can.

    Returns:
        out [b, s_q, h_q, head_dim_v] in q's dtype, contiguous; lse [b, h_q, s_q] FP32. A query without keys: 0, +inf.

    Raises:
        FlashMLAError: a subclass that names what does not fit. Values are not checked.
    """
    if indices is None:
        sparse_only = (extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
        if any(x is not None for x in sparse_only):
            raise ShapeError(
                "indices None",
                "indices with extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length",
                "These arguments belong to sparse attention",
                "Pass indices",
            )
        if is_fp8_kvcache:
            check_query(q, "[b, s_q, h_q, d]", 4)
            check_tensor("k_cache", k_cache)
            check_rank("k_cache", k_cache.shape, 4, "[num_blocks, page, h_kv, d]")
            return dense_rows(
                q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, attn_sink, backend, out
            )
        return dense(
            q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, (None, None), attn_sink,
            backend, out,
        )  # fmt: skip
    if causal:
        raise ShapeError(
            "causal = True and indices",
            "causal = False with indices",
            "Indices alone say what a query sees",
            "Leave later tokens out of indices",
        )
    if (extra_k_cache is None) != (extra_indices_in_kvcache is None) or (
        extra_k_cache is None and extra_topk_length is not None
    ):
        raise ShapeError(
            f"extra_k_cache {'omitted' if extra_k_cache is None else 'given'}, extra_indices_in_kvcache "
            f"{'omitted' if extra_indices_in_kvcache is None else 'given'}",
            "both or neither, and extra_topk_length only with them",
            "A cache is read through its indices",
        )
    keys: tuple[SparseKeys, ...] = (SparseKeys(k_cache, indices, topk_length),)
    if extra_k_cache is not None and extra_indices_in_kvcache is not None:
        keys += (SparseKeys(extra_k_cache, extra_indices_in_kvcache, extra_topk_length),)
    return sparse(q, keys, is_fp8_kvcache, head_dim_v, softmax_scale, attn_sink, False, backend, out)[:2]


@entry("flash_mla.deepseek")
def flash_mla_with_kvcache_fp8(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense decode of e4m3 q over an e4m3 pool, as in vLLM's copy.

    Args:
        q: [b, s_q, h_q, d] e4m3; k_cache: [num_blocks, page, h_kv, d] e4m3.
        descale_q, descale_k: [1] or [b] FP32, the factor from the stored to the real value; 1 if None.

    The others, and what is returned (out in BF16), are as in flash_mla_with_kvcache.
    """
    check_query(q, "[b, s_q, h_q, d]", 4)
    if q.dtype != FP8:
        raise DTypeError(f"q {q.dtype}", f"q {FP8}", "The function is for FP8", "Call flash_mla_with_kvcache")
    descales = (descale_q, descale_k)
    return dense(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, descales, None, backend)


# --- Dense, over rows of a format -------------------------------------------------------------------------------------
def dense_rows(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    Dv: int,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: Tensor | None,
    backend: str | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense decode over a pool in a row format: the sparse launch, told to read every token of a request in turn.

    The indices cost 4 bytes a token and query beside the row's hundreds.
    """
    table, lengths = named_tokens(block_table, cache_seqlens)
    B, S_q = q.shape[:2]
    check_on(q.device, k_cache=k_cache, block_table=table, cache_seqlens=lengths)
    check_index("block_table", table, (B, -1), "[b, max_blocks]")
    check_index("cache_seqlens", lengths, (B,), "[b]")
    num_blocks, page = k_cache.shape[:2]
    slots = torch.arange(page, device=q.device)
    inside = (table >= 0) & (table < num_blocks)
    rows = torch.where(inside, table.long() * page, -page).unsqueeze(2) + slots  # [b, max_blocks, page]
    last = lengths.long()[:, None]
    if causal:
        last = last + torch.arange(1 - S_q, 1, device=q.device)
    t = torch.arange(rows.shape[1] * page, device=q.device)
    seen = t < last.expand(B, S_q).unsqueeze(2)  # [b, s_q, tokens]
    indices = torch.where(seen, rows.flatten(1).unsqueeze(1), -1).to(torch.int32)
    keys = (SparseKeys(k_cache, indices, lengths),)
    return sparse(q, keys, True, Dv, softmax_scale, attn_sink, False, backend, out)[:2]


# --- Dense ------------------------------------------------------------------------------------------------------------
def dense(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    Dv: int,
    softmax_scale: float | None,
    causal: bool,
    descales: tuple[Tensor | None, Tensor | None],
    attn_sink: Tensor | None,
    backend: str | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Our own decode over pages, as `decode_over_pages` has it; q and out are read and written where they lie."""
    block_table, cache_seqlens = named_tokens(block_table, cache_seqlens)
    if q.dim() != 4:
        check_query(q, "[b, s_q, h_q, d]", 4)
    factors: Descales = NO_DESCALES
    if descales[0] is not None or descales[1] is not None:
        descale_q, descale_k = (None if x is None else x.to(torch.float32).view(-1, 1) for x in descales)
        factors = descale_q, descale_k, descale_k
    call = PoolCall(
        q, k_cache, None, None, block_table, cache_seqlens, None, "NHD", Dv, causal, softmax_scale, factors, attn_sink,
        by_token=True,
    )  # fmt: skip
    planned = plan_pools(call, backend, None, False, also=check_dense)
    check_out(out, q, Dv, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens, attn_sink=attn_sink)
    written = writable(out)
    if planned.like is not None:
        written = torch.empty_like(planned.like) if written is None else written
        written, lse = attend_planned(planned, written, True, math.inf)
        return given(out, written), lse
    # no kernel writes by token, which another `out` of the problem asks for
    if written is None and (planned.folded or planned.packed):
        written = q.new_empty((*q.shape[:3], Dv), dtype=out_dtype(q.dtype))
    by_head, lse = attend_planned(planned, None if written is None else written.transpose(1, 2), True, math.inf)
    return given(out, by_head.transpose(1, 2) if written is None else written), lse


def check_dense(call: PoolCall) -> None:
    """What the package's dense decode asks of a call beyond `decode_over_pages`, in its own names."""
    q, k_cache, Dv = call.q, call.k_pages, call.v_head_dim
    check_query(q, "[b, s_q, h_q, d]", 4)
    assert Dv is not None
    check_head_dims(q.shape[3], Dv)
    check_tensor("k_cache", k_cache)
    check_rank("k_cache", k_cache.shape, 4, "[num_blocks, page, h_kv, d]")
    check_same_dtype(q, "k_cache", k_cache)
    B, _, _, D = q.shape
    if k_cache.shape[3] != D or Dv > D:
        raise ShapeError(
            f"{named(q=q, k_cache=k_cache)}, head_dim_v = {Dv}",
            "k_cache [num_blocks, page, h_kv, d] with q's d, and head_dim_v <= d",
            "V is the first head_dim_v columns of K",
        )
    check_tensor("cache_seqlens", call.seq_lens)
    check_index("cache_seqlens", call.seq_lens, (B,), "[b]")


def named_tokens(block_table: Tensor | None, cache_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both, or an error: dense attention has no other way to its tokens."""
    if block_table is None or cache_seqlens is None:
        raise ShapeError(
            "indices None, block_table or cache_seqlens None",
            "block_table and cache_seqlens, or indices",
            "Dense attention finds its tokens through them",
            "Pass block_table [b, max_blocks] and cache_seqlens [b], or indices for sparse attention",
        )
    return block_table, cache_seqlens
