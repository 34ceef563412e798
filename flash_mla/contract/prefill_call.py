"""The two prefill calls, over contiguous keys and over the cache, and their problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flash_mla.contract.caches import (
    check_caches,
    check_grouping,
    check_head_dims,
    check_ranks,
    check_seq_lens_shape,
    check_table,
    is_alias,
)
from flash_mla.contract.given import MhaCall, PrefillCall
from flash_mla.contract.masks import check_mask, check_mask_length
from flash_mla.contract.memory import check_apart, check_writable, share_memory
from flash_mla.contract.scales import check_descales, check_descales_given, check_scale, check_sink
from flash_mla.contract.tensors import (
    check_dtypes,
    check_last_dim,
    check_monotonic,
    check_on,
    check_rank,
    check_tensor,
    is_aligned,
    named,
    out_dtype,
)
from flash_mla.errors import BlockCountError, HeadGroupingError, LayoutError, ShapeError
from flash_mla.passed import apart
from flash_mla.problem import BLOCK, PrefillProblem


def prefill(call: PrefillCall) -> PrefillProblem:
    """The problem of a `flash_mla_prefill` call; reads no value."""
    q, k, v, sparse_layout, attn_mask, causal, softmax_scale, seq_lens, descales, attn_sink = call
    for name, tensor, layout in (("q", q, "[B, Hq, P, D]"), ("k", k, "[B, Hk, P, D]"), ("v", v, "[B, Hk, P, Dv]")):
        check_tensor(name, tensor)
        check_rank(name, tensor.shape, 4, layout)
        check_last_dim(name, tensor)
        check_monotonic(name, tensor.shape[:3], tensor.stride()[:3], "B H P")
    check_on(q.device, k=k, v=v, seq_lens=seq_lens, attn_mask=attn_mask)
    check_dtypes(q=q, k=k, v=v)
    B, Hq, P, D = q.shape
    Hk, Dv = k.shape[1], v.shape[3]
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, P, D) or v.shape[:3] != k.shape[:3]:
        tokens_first = q.shape[1] == k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2] and k.shape[3] == D
        raise ShapeError(
            named(q=q, k=k, v=v),
            "q [B, Hq, P, D], k [B, Hk, P, D], v [B, Hk, P, Dv]",
            "The tensors look like [B, P, H, D], as FlashAttention takes them" if tokens_first else None,
            "Call .transpose(1, 2) on q, k, v and on what is returned" if tokens_first else None,
        )
    check_grouping(Hq, Hk)
    check_head_dims(D, Dv)
    if seq_lens is not None:
        check_seq_lens_shape(seq_lens, B)
    check_sink(attn_sink, Hq, q.device)
    mask = check_mask("attn_mask", attn_mask, B, Hq, P, "[B, 1|Hq, P, P]")
    check_mask_length("attn_mask", attn_mask, P)
    return prefill_problem(
        q,
        k,
        v,
        S_kv=P,
        causal=causal,
        mask=mask,
        block_mask=sparse_layout is not None,
        seq_lens=seq_lens is not None,
        descale=check_descales(descales, B, Hk, q.device),
        sink=attn_sink is not None,
        scale_sign=check_scale(softmax_scale),
    )


def prefill_problem(q: Tensor, k: Tensor, v: Tensor, *, S_kv: int, causal: bool, **inputs: Any) -> PrefillProblem:
    """The problem of q [B, Hq, P, D] over k and v, contiguous [B, Hk, S_kv, D] or page views.

    `inputs` are the fields of PrefillProblem from `mask` on that are not at their default.
    """
    B, Hq, P, D = q.shape
    return PrefillProblem(
        device=q.device,
        dtype=q.dtype,
        out_dtype=out_dtype(q.dtype),
        B=B,
        Hq=Hq,
        Hk=k.shape[1],
        P=P,
        S_kv=S_kv,
        D=D,
        Dv=v.shape[-1],
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        paged=k.dim() == 5,
        alias=is_alias(k, v),
        causal=causal,
        aligned=is_aligned(q, k, v),
        **inputs,
    )


def mha(call: MhaCall) -> PrefillProblem:
    """The problem of a `mha_fwd_kvcache` call; reads no value."""
    q, k_cache, v_cache, block_table, attn_mask, k, v, start_pos, causal, softmax_scale, descales = call
    check_on(q.device, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    check_on(q.device, start_pos=start_pos, k=k, v=v, attn_mask=attn_mask)
    check_ranks(q, k_cache, v_cache)
    check_dtypes(q=q, k_cache=k_cache, v_cache=v_cache)
    alias = check_caches(q, k_cache, v_cache)
    check_descales_given(k_cache, v_cache, descales)
    B, Hq, P, _ = q.shape
    Hk = k_cache.shape[1]
    if Hq != Hk:
        raise HeadGroupingError(
            f"q has {Hq} heads, k_cache has {Hk}",
            "H query heads and H KV heads",
            "`mha_fwd_kvcache` is standard MHA (no MLA head-grouping)",
            "Use flash_mla_prefill for grouped-query attention",
        )
    check_last_dim("q", q)
    check_monotonic("q", q.shape[:3], q.stride()[:3], "B H P")
    check_table(block_table, B)
    check_start_pos(start_pos, B)
    table_blocks = block_table.shape[1]
    blocks = min(table_blocks, k_cache.shape[2]) if start_pos is None else table_blocks
    if B and blocks * BLOCK < P:
        raise BlockCountError(
            f"P = {P} tokens, block_table {list(block_table.shape)}, Nblk = {k_cache.shape[2]}",
            f"at least ceil(P/64) = {-(-P // BLOCK)} blocks",
            "P does not align with block_table coverage (`ceil(P/64)` blocks)",
        )
    if k is not None or v is not None:
        check_new_rows(q, k, v, k_cache, v_cache, alias)
    return prefill_problem(
        q,
        k_cache,
        v_cache,
        S_kv=P if start_pos is None else table_blocks * BLOCK,
        causal=causal,
        mask=check_mask("attn_mask", attn_mask, B, Hq, P, "[B, 1|H, P, P]"),
        seq_lens=start_pos is not None,
        start_pos=start_pos is not None,
        descale=check_descales(descales, B, Hk, q.device),
        scale_sign=check_scale(softmax_scale),
    )


def check_start_pos(start_pos: Tensor | None, B: int) -> None:
    if start_pos is not None:
        check_seq_lens_shape(start_pos, B, "start_pos")


def check_new_rows(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, alias: bool
) -> None:
    """The rows that `mha_fwd_kvcache` writes into the caches before it attends; each has a place of its own."""
    if k is None or v is None or alias:
        raise ShapeError(
            f"k {'omitted' if k is None else 'given'}, v {'omitted' if v is None else 'given'}"
            + (", v_cache a view of k_cache" if alias else ""),
            "both k and v, and separate caches, or neither",
            "`k` and `v` are written together, each to its own cache",
            "Pass both, or write the cache beforehand and pass neither",
        )
    (B, Hk), P = k_cache.shape[:2], q.shape[2]
    for name, rows, cache in (("k", k, k_cache), ("v", v, v_cache)):
        shape = (B, Hk, P, cache.shape[4])
        if tuple(rows.shape) != shape:
            raise ShapeError(
                named(q=q, **{name: rows}), f"{name} {list(shape)}", f"`{name}` does not fit q and the cache"
            )
        check_last_dim(name, rows)
    check_dtypes(q=q, k=k, v=v)
    check_writable("k_cache", k_cache)
    check_writable("v_cache", v_cache)
    check_places(q, k, v, k_cache, v_cache)


def check_places(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Caches that are written lie apart from each other, and from what is read."""
    if share_memory(k_cache, v_cache):
        raise LayoutError(
            f"{named(k_cache=k_cache, v_cache=v_cache)} with strides {k_cache.stride()} and {v_cache.stride()}",
            "caches in memory of their own",
            "`k_cache` and `v_cache` overlap, and both are written",
            "Pass separate caches",
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_apart(name, cache, q=q, k=k, v=v)


def check_places_again(spans: Sequence[int], call: MhaCall) -> None:
    """Of written caches whose facts passed `mha`, what they do not tell: where they lie.

    spans: of the call's tensors.
    """
    if call.k is None or call.v is None:
        return
    q, k_cache, v_cache, _, _, k, v, *_ = call.tensors
    q_span, k_cache_span, v_cache_span, _, _, k_span, v_span, *_ = spans
    read, lengths = (q, k, v), (q_span, k_span, v_span)
    if not (
        apart(k_cache, k_cache_span, (v_cache, *read), (v_cache_span, *lengths))
        and apart(v_cache, v_cache_span, read, lengths)
    ):
        check_places(q, k, v, k_cache, v_cache)
