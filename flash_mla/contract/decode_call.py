"""A decode call and its problem."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_mla.contract.caches import check_caches, check_decode_dtypes, check_ranks, check_seq_lens_shape, check_table
from flash_mla.contract.given import DecodeCall
from flash_mla.contract.masks import check_decode_mask
from flash_mla.contract.order import refuse_deepseek_order
from flash_mla.contract.scales import check_descales, check_descales_given, check_scale, check_sink
from flash_mla.contract.tensors import check_on, check_tensor, is_aligned, named, out_dtype
from flash_mla.errors import LayoutError
from flash_mla.problem import DecodeProblem


def decode(call: DecodeCall) -> DecodeProblem:
    """The problem of a `flash_mla_with_kvcache` call; reads no value."""
    q, k_cache, v_cache, block_table, seq_lens, mask, softmax_scale, descales, attn_sink, options, _ = call
    scale_sign = check_scale(softmax_scale)
    refuse_deepseek_order(q, k_cache, v_cache)
    check_tensor("q", q)
    check_tensor("k_cache", k_cache)
    check_tensor("v_cache", v_cache)
    check_tensor("block_table", block_table)
    check_tensor("seq_lens", seq_lens)
    check_on(q.device, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens, mask=mask)
    check_ranks(q, k_cache, v_cache)
    check_decode_dtypes(q, k_cache, v_cache)
    alias = check_caches(q, k_cache, v_cache)
    check_descales_given(k_cache, v_cache, descales)
    B, Hq, S_q, _ = q.shape
    check_table(block_table, B)
    check_seq_lens_shape(seq_lens, B)
    check_sink(attn_sink, Hq, q.device)
    if not q.is_contiguous():
        raise LayoutError(f"{named(q=q)} with strides {q.stride()}", "q contiguous", "`q` is not contiguous")
    return decode_problem(
        q,
        k_cache,
        v_cache,
        block_table,
        alias=alias,
        mask=check_decode_mask(mask, options.tail, B, Hq, S_q),
        descale=check_descales(descales, B, k_cache.shape[1], q.device),
        sink=attn_sink is not None,
        scale_sign=scale_sign,
        **options._asdict(),
    )


def decode_problem(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, k_rope: Tensor | None = None, **inputs: Any
) -> DecodeProblem:
    """The problem of q [B, Hq, S_q, D] over page views.

    `inputs` are the fields of DecodeProblem from `alias` on, but for those that the tensors tell: aligned, page,
    rope_strides.
    """
    B, Hq, S_q, D = q.shape
    return DecodeProblem(
        device=q.device,
        dtype=q.dtype,
        kv_dtype=k.dtype,
        out_dtype=out_dtype(q.dtype),
        B=B,
        Hq=Hq,
        Hk=k.shape[1],
        S_q=S_q,
        D=D,
        Dv=v.shape[4],
        Nblk=k.shape[2],
        table_blocks=block_table.shape[1],
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        aligned=is_aligned(q, k, v) and (k_rope is None or is_aligned(k_rope)),
        page=k.shape[3],
        rope_strides=None if k_rope is None else k_rope.stride(),
        **inputs,
    )
