"""A decode call and its problem."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from flash_mla.contract.caches import check_caches, check_decode_dtypes, check_ranks, check_seq_lens_shape, check_table
from flash_mla.contract.given import DecodeCall
from flash_mla.contract.masks import check_decode_mask
from flash_mla.contract.order import refuse_deepseek_order
from flash_mla.contract.scales import check_descales, check_descales_given, check_scale, check_sink
from flash_mla.contract.tensors import check_on, check_tensor, is_aligned, named, out_dtype
from flash_mla.errors import LayoutError
from flash_mla.passed import Passed, facts, traced
from flash_mla.problem import FP8, DecodeProblem
from flash_mla.quant import needs_descale


def decode(call: DecodeCall) -> DecodeProblem:
    """The problem of a `flash_mla_with_kvcache` call; reads no value.

    A call without a mask whose shapes, strides, dtypes and devices passed before is not checked again.
    """
    scale_sign = check_scale(call.softmax_scale)
    key = facts_of(call, scale_sign)
    problem = None if key is None else PASSED.get(key)
    if problem is not None:
        return problem
    refuse_deepseek_order(call.q, call.k_cache, call.v_cache)
    problem = checked_decode(call, scale_sign)
    return problem if key is None else PASSED.keep(key, problem)


# NOTE: 4 us against 16 for the checks; a whole call without its launch then takes 13 us (Zen 4).
PASSED = Passed[DecodeProblem]()


def facts_of(call: DecodeCall, scale_sign: int, *others: Tensor | None) -> Hashable | None:
    """All that the checks of a call without a mask look at, as a key; None where they have to look themselves.

    others: more tensors that they look at.
    """
    q, k, v, block_table, seq_lens, mask, _, descales, attn_sink, options, _ = call
    if mask is not None or traced(q):
        return None
    try:
        tensors = facts(q, k, v, block_table, seq_lens, attn_sink, *descales, *others)
        k_start, v_start = k.data_ptr(), v.data_ptr()
    except AttributeError:  # a number, whose value counts, or something that should be a tensor
        return None
    if not k_start:  # without memory, addresses do not tell what is an alias
        return None
    marked = k.dtype == FP8 and (needs_descale(k), needs_descale(v))
    return tensors, k_start == v_start, marked, scale_sign, options


def checked_decode(call: DecodeCall, scale_sign: int) -> DecodeProblem:
    """As `decode`, every check made."""
    q, k_cache, v_cache, block_table, seq_lens, mask, _, descales, attn_sink, options, _ = call
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
