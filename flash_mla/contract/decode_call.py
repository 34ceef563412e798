"""A decode call and its problem."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_mla.contract.caches import check_caches, check_decode_dtypes, check_ranks, check_seq_lens_shape, check_table
from flash_mla.contract.masks import check_decode_mask
from flash_mla.contract.order import refuse_deepseek_order
from flash_mla.contract.scales import (
    NO_DESCALES,
    Descales,
    check_descales,
    check_descales_given,
    check_scale,
    check_sink,
)
from flash_mla.contract.tensors import check_on, check_tensor, is_aligned, named, out_dtype
from flash_mla.errors import LayoutError
from flash_mla.passed import Passed
from flash_mla.problem import ALIGNMENT, FP8, PLAIN, DecodeProblem, Options
from flash_mla.quant import needs_descale


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None = None,
    descales: Descales = NO_DESCALES,
    attn_sink: Tensor | None = None,
    softmax_scale: float | None = None,
    options: Options = PLAIN,
) -> DecodeProblem:
    """The problem of a `flash_mla_with_kvcache` call; reads no value.

    A call without a mask whose shapes, strides, dtypes and devices passed before is not checked again.
    """
    scale_sign = check_scale(softmax_scale)
    key = (
        None
        if mask is not None
        else passing(q, k_cache, v_cache, block_table, seq_lens, descales, attn_sink, scale_sign, options)
    )
    problem = None if key is None else PASSED.get(key)
    if problem is not None:
        return problem
    refuse_deepseek_order(q, k_cache, v_cache)
    problem = checked_decode(q, k_cache, v_cache, block_table, seq_lens, mask, descales, attn_sink, scale_sign, options)
    return problem if key is None else PASSED.keep(key, problem)


# NOTE: 4 us against 16 for the checks; a whole call without its launch then takes 13 us (Zen 4).
PASSED = Passed[DecodeProblem]()


def passing(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    descales: Descales,
    attn_sink: Tensor | None,
    scale_sign: int,
    options: Options,
) -> tuple[object, ...] | None:
    """All that the checks of a call look at, as a key; None where an argument is not what it should be."""
    try:
        q_start, k_start, v_start = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
        tensors = [(x.shape, x.stride(), x.dtype, x.device) for x in (q, k_cache, v_cache, block_table, seq_lens)]
    except AttributeError:  # not a tensor: the checks say which
        return None
    if not k_start:  # without memory, addresses do not tell what is an alias
        return None
    more: tuple[object, ...] = ()
    if attn_sink is not None or descales != NO_DESCALES:
        for value in (attn_sink, *descales):
            if isinstance(value, Tensor):
                more = (*more, (value.shape, value.dtype, value.device))
            elif value is None:
                more = (*more, None)
            else:  # a number, whose value counts
                return None
    marked = k_cache.dtype == FP8 and (needs_descale(k_cache), needs_descale(v_cache))
    return (*tensors, k_start == v_start, (q_start | k_start | v_start) % ALIGNMENT, marked, more, scale_sign, options)


def checked_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    descales: Descales,
    attn_sink: Tensor | None,
    scale_sign: int,
    options: Options,
) -> DecodeProblem:
    """As `decode`, every check made."""
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
