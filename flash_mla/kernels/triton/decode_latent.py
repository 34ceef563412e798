"""Decode of few query rows over an FP8 latent (MLA) where there is wgmma: out^T = V^T softmax(K q^T * scale)^T.

Grid, items, shares and parts are decode.py's; so is the bound, in bytes: 576 a token. Keys are the rows of the first
product and V's columns, the first of K, those of the second, so that 16 query rows fill wgmma's 64:

    K [TILE_N, D]   x  q^T [D, TILE_M]       -> scores^T [TILE_N, TILE_M]
    V^T [DV, TILE_N]  x  P^T [TILE_N, TILE_M]  -> out^T [DV, TILE_M]

all in FP16, which holds every e4m3; q is scaled by a power of two a row. K and V^T are wgmma's first operand, which may
come from registers, so that bytes are widened there and never go back to shared memory.

A PAIR of neighbouring columns is one 16-bit element on its way: `ldmatrix` can transpose those, not bytes. Even and odd
columns are then two operands, and q, out and the products are cut likewise.

NOTE: K's tile is copied twice, once for each product: Triton keeps one copy of a tile in shared memory only if both
products read it in the same order. The second comes from L2, and takes the shared memory that BF16's tile does.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import LOG2E, hide, power_of
from flash_mla.kernels.triton.decode import Config, same_constants
from flash_mla.kernels.triton.item import store_item
from flash_mla.kernels.triton.share import (
    BLOCK,
    VARYING,
    block_id,
    first_unit,
    request_length,
    slot,
    units,
)


def half_of_pairs(which: str) -> str:
    """PTX: the `even` or the `odd` e4m3 of two pairs, to FP16."""
    return f"""{{
    .reg .b32 sorted;
    .reg .b16 even, odd;
    prmt.b32 sorted, $1, 0, 0x3120;
    mov.b32 {{even, odd}}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, {which};
}}"""


EVEN = tl.constexpr(half_of_pairs("even"))
ODD = tl.constexpr(half_of_pairs("odd"))


# --- Steps ---


@triton.jit
def even(pairs, WIDEN: tl.constexpr):
    """The first e4m3 of each pair, as FP16."""
    if WIDEN == "fp8_once":
        return tl.inline_asm_elementwise(EVEN, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    return (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def odd(pairs, WIDEN: tl.constexpr):
    """The second e4m3 of each pair, as FP16."""
    if WIDEN == "fp8_once":
        return tl.inline_asm_elementwise(ODD, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    return ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def in_pairs(q, inverse, TILE_M: tl.constexpr, PAIRS: tl.constexpr):
    """The even and the odd columns of q [TILE_M, 2 * PAIRS], as [PAIRS, TILE_M] FP16."""
    first, second = tl.split(tl.reshape((q * inverse).to(tl.float16), (TILE_M, PAIRS, 2)))
    return tl.trans(first), tl.trans(second)


@triton.jit
def in_rows(first, second, factor, TILE_M: tl.constexpr, PAIRS: tl.constexpr):
    """Rows [TILE_M, 2 * PAIRS] of their even and odd columns [PAIRS, TILE_M], times factor [TILE_M]."""
    both = tl.join(first * factor[None, :], second * factor[None, :])
    return tl.reshape(tl.permute(both, (1, 0, 2)), (TILE_M, 2 * PAIRS))


# --- Kernel ---


@triton.jit(do_not_specialize_on_alignment=VARYING)
def decode_latent_kernel(
    q_ptr,  # [B, Hq, S_q, D]
    k_ptr,  # [B, Hk, Nblk, PAGE, D / 2] pairs; DV / 2 where rope_ptr has the rest
    rope_ptr,  # [B, Hk, Nblk, PAGE, (D - DV) / 2], or None: K's rows are whole
    table_ptr,  # this and the next as in decode_kernel
    seq_lens_ptr,
    mask_ptr,
    q_descale_ptr,
    k_descale_ptr,
    v_descale_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    softmax_scale,
    B,
    Hk,
    Nblk,
    capacity,
    mask_len,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_kn,
    stride_rb, stride_rh, stride_rn,
    stride_ob, stride_oh, stride_os,
    stride_tb,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_qdb, stride_qdh, stride_kdb, stride_kdh, stride_vdb, stride_vdh,
    S_Q: tl.constexpr,
    RATIO: tl.constexpr,
    DV: tl.constexpr,
    REST: tl.constexpr,  # pairs of K beside V's, a power of two or 0
    STRIDE_KT: tl.constexpr,
    STRIDE_RT: tl.constexpr,
    PAGE: tl.constexpr,
    FLIP: tl.constexpr,
    MASK: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PIECE: tl.constexpr,
    MOST_PIECES: tl.constexpr,
    PDL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    M_TILES: tl.constexpr = (S_Q * RATIO + TILE_M - 1) // TILE_M
    m_tile = tl.program_id(0) % M_TILES
    program = tl.program_id(0) // M_TILES
    programs = tl.num_programs(0) // M_TILES
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)  # [TILE_M] row = query * RATIO + head of the group
    row_live = rows < S_Q * RATIO
    query = rows // RATIO
    HALF: tl.constexpr = DV // 4  # pairs of half of V's columns
    offs_n = tl.arange(0, TILE_N)
    pairs = tl.arange(0, HALF)
    rest = tl.arange(0, max(REST, 1))
    columns = tl.arange(0, 2 * HALF)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    b, request_start, share_start, end = first_unit(
        seq_lens_ptr, B, Hk, capacity, program, programs, SPLIT, PIECE, MOST_PIECES
    )
    unit = share_start
    while unit < end:
        # the item, as in decode_kernel
        seq_len = request_length(seq_lens_ptr, b, capacity)
        size = units(seq_len)
        kv_head = (unit - request_start) // size
        item_start = request_start + kv_head * size
        item_end = item_start + size
        stop = tl.minimum(end, item_end)
        t_begin = (unit - item_start) * BLOCK
        t_end = tl.minimum((stop - item_start) * BLOCK, seq_len)
        b64 = b.to(tl.int64)
        head = kv_head * RATIO + rows % RATIO

        # load q
        q_rows = b64 * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qs
        q_tile = q_ptr + q_rows[:, None]
        live = row_live[:, None]
        q0 = tl.load(q_tile + columns[None, :], mask=live, other=0.0).to(tl.float32)
        q1 = tl.load(q_tile + 2 * HALF + columns[None, :], mask=live, other=0.0).to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
        if REST > 0:
            q2 = tl.load(q_tile + DV + tl.arange(0, 2 * REST)[None, :], mask=live, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.max(tl.abs(q2), 1))
        power = power_of(most, 8)  # FP16 then holds what is 2^-22 of it
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)[:, None]
        q0_even, q0_odd = in_pairs(q0, inverse, TILE_M, HALF)
        q1_even, q1_odd = in_pairs(q1, inverse, TILE_M, HALF)
        if REST > 0:
            q2_even, q2_odd = in_pairs(q2, inverse, TILE_M, REST)

        # the scale of the scores
        scale = softmax_scale * LOG2E
        if q_descale_ptr is not None:
            scale *= tl.load(q_descale_ptr + b64 * stride_qdb + kv_head * stride_qdh)
        if k_descale_ptr is not None:
            scale *= tl.load(k_descale_ptr + b64 * stride_kdb + kv_head * stride_kdh)
        scale = tl.maximum(scale * power.to(tl.float32, bitcast=True), 1e-30)  # at 0, -inf * scale would be NaN

        k_head = k_ptr + (b64 * stride_kb + kv_head.to(tl.int64) * stride_kh)
        if rope_ptr is not None:
            rope_head = rope_ptr + (b64 * stride_rb + kv_head.to(tl.int64) * stride_rh)
        table_row = table_ptr + b64 * stride_tb
        mask_rows = mask_ptr
        if MASK != "none":
            mask_rows = mask_ptr + (b64 * stride_mb + head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_ms)
            limit = tl.zeros([TILE_M], tl.int32) + seq_len
        else:
            limit = seq_len - (S_Q - 1) + query  # causal: query i sees t <= seq_len - S_q + i

        out0_even = tl.zeros([HALF, TILE_M], tl.float32)
        out0_odd = tl.zeros([HALF, TILE_M], tl.float32)
        out1_even = tl.zeros([HALF, TILE_M], tl.float32)
        out1_odd = tl.zeros([HALF, TILE_M], tl.float32)
        row_max = tl.full([TILE_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([TILE_M], tl.float32)

        # a tile's pages, read one tile ahead
        SPREAD: tl.constexpr = PAGE < TILE_N
        last = tl.maximum(t_end - 1, 0)
        ahead = tl.minimum(t_begin + offs_n, last) if SPREAD else t_begin
        page_next = block_id(table_row, ahead, Nblk, PAGE)
        for t in tl.range(t_begin, t_end, TILE_N):
            page = page_next
            ahead = tl.minimum(t + TILE_N + offs_n, last) if SPREAD else tl.minimum(t + TILE_N, last)
            page_next = block_id(table_row, ahead, Nblk, PAGE)
            first = slot(t + offs_n, PAGE) if SPREAD else slot(t, PAGE)
            along = 0 if SPREAD else offs_n
            tokens = t + offs_n
            stored = tokens < seq_len

            # scores^T [TILE_N, TILE_M]
            k_rows = k_head + (page * stride_kn + first * STRIDE_KT) + along * STRIDE_KT
            k0 = tl.load(k_rows[:, None] + pairs[None, :], mask=stored[:, None], other=0)
            k1 = tl.load(k_rows[:, None] + HALF + pairs[None, :], mask=stored[:, None], other=0)
            scores = tl.dot(even(k0, WIDEN), q0_even)
            scores = tl.dot(odd(k0, WIDEN), q0_odd, scores)
            scores = tl.dot(even(k1, WIDEN), q1_even, scores)
            scores = tl.dot(odd(k1, WIDEN), q1_odd, scores)
            if REST > 0:
                rest_rows = k_rows + 2 * HALF
                if rope_ptr is not None:
                    rest_rows = rope_head + (page * stride_rn + first * STRIDE_RT) + along * STRIDE_RT
                k2 = tl.load(rest_rows[:, None] + rest[None, :], mask=stored[:, None], other=0)
                scores = tl.dot(even(k2, WIDEN), q2_even, scores)
                scores = tl.dot(odd(k2, WIDEN), q2_odd, scores)
            if FLIP:
                scores = -scores
            unit_scale = scale
            if MASK == "float":
                scores *= scale[None, :]
                unit_scale = tl.full([TILE_M], 1.0, tl.float32)
            scores = hide(
                scores, tokens[:, None], stored[:, None], limit[None, :],
                mask_rows[None, :] if MASK != "none" else None, mask_len, stride_mt, row_live[None, :], seq_len - S_Q,
                MASK, TAIL,
            )  # fmt: skip

            # online softmax, as in attend
            row_max_new = tl.maximum(row_max, tl.max(scores, 0) * unit_scale)
            shift = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
            p = tl.exp2(scores * unit_scale[None, :] - shift[None, :])
            rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(p, 0)
            row_max = row_max_new
            p = p.to(tl.float16)
            v0 = tl.load(k_rows[None, :] + pairs[:, None], mask=stored[None, :], other=0)  # [HALF, TILE_N]
            v1 = tl.load(k_rows[None, :] + HALF + pairs[:, None], mask=stored[None, :], other=0)
            out0_even = tl.dot(even(v0, WIDEN), p, out0_even * rescale[None, :])
            out0_odd = tl.dot(odd(v0, WIDEN), p, out0_odd * rescale[None, :])
            out1_even = tl.dot(even(v1, WIDEN), p, out1_even * rescale[None, :])
            out1_odd = tl.dot(odd(v1, WIDEN), p, out1_odd * rescale[None, :])

        # write the item, or this share's part of it
        empty = row_sum == 0.0
        whole = tl.where(empty, 1.0, row_sum)
        lse2 = tl.where(empty, float("-inf"), row_max + tl.log2(whole))
        factor = 1.0 / whole
        if v_descale_ptr is not None:
            factor *= tl.load(v_descale_ptr + b64 * stride_vdb + kv_head * stride_vdh)
        part = (unit > share_start).to(tl.int32)
        cut = (unit > item_start) | (stop < item_end)
        store_item(
            in_rows(out0_even, out0_odd, factor, TILE_M, HALF), row_max, row_sum, lse2, rows, row_live, head, query,
            b64, program, programs, part=part, cut=cut, partial_ptr=partial_ptr, sink_ptr=sink_ptr, out_ptr=out_ptr,
            lse_ptr=lse_ptr, heads=Hk * RATIO, stride_ob=stride_ob, stride_oh=stride_oh, stride_os=stride_os, S_Q=S_Q,
            DV=DV, SPLIT=SPLIT, PIECE=PIECE, PARTIAL_ROWS=M_TILES * TILE_M, DV_TILE=DV, COLUMNS=2 * HALF, FIRST=0,
        )  # fmt: skip
        store_item(
            in_rows(out1_even, out1_odd, factor, TILE_M, HALF), row_max, row_sum, lse2, rows, row_live, head, query,
            b64, program, programs, part=part, cut=cut, partial_ptr=partial_ptr, sink_ptr=sink_ptr, out_ptr=out_ptr,
            lse_ptr=lse_ptr, heads=Hk * RATIO, stride_ob=stride_ob, stride_oh=stride_oh, stride_os=stride_os, S_Q=S_Q,
            DV=DV, SPLIT=SPLIT, PIECE=PIECE, PARTIAL_ROWS=M_TILES * TILE_M, DV_TILE=DV, COLUMNS=2 * HALF,
            FIRST=2 * HALF,
        )  # fmt: skip

        # on to the next head, or request
        unit = stop
        if unit == request_start + size * Hk:
            request_start = unit
            b += 1


# --- Launch ---


def constants(config: Config, *, q: Tensor, v: Tensor, **others: Any) -> dict[str, int | bool | str]:
    """decode_latent_kernel's arguments after softmax_scale, of `same_constants`' arguments; k and k_rope are pairs."""
    return dict(**same_constants(config, q=q, v=v, **others), REST=(q.shape[3] - v.shape[4]) // 2)
