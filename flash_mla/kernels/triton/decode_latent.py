"""Decode over an FP8 latent (MLA) where there is wgmma: out^T = V^T softmax(K q^T * scale)^T, V the first columns of K.

Grid, items, shares and parts are decode.py's; so is the bound, in bytes: 576 a token. Keys are the rows of the first
product, the columns of V those of the second, so that few query rows fill wgmma's 64 rows:

    K [TILE_N, D] e4m3, as it was copied  x  q^T [D, TILE_M] e4m3       -> scores^T [TILE_N, TILE_M]
    V^T [DV, TILE_N], widened to FP16     x  P^T [TILE_N, TILE_M] FP16  -> out^T [DV, TILE_M]

So K is never converted, V once a tile, and neither q nor a tile of K is held in registers. q in 16 bits is two e4m3
rows, high + low, after a power of two that takes a row's largest number to 2^7 .. 2^8; FP16 holds every e4m3.

NOTE: wgmma keeps some 14 bits of a sum of e4m3 products. The sums of 64 columns are therefore added in FP32, CUT, which
takes 8 % of the time: at magnitudes of 20 (scores in the thousands) out is off by 1.2e-2 of its largest element,
without it by 3.4e-1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import LOG2E, hide, widen
from flash_mla.kernels.triton.decode import Config
from flash_mla.kernels.triton.item import store_item
from flash_mla.kernels.triton.share import (
    BLOCK,
    MOST_PIECES,
    PIECE,
    block_id,
    first_unit,
    request_length,
    slot,
    units,
)
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.tiles import mask_kind

CUT = tl.constexpr(64)
"""Products that wgmma sums by itself."""


# --- Steps ---


@triton.jit
def power_of(q_main, q_rest):
    """The power of two [TILE_M], as FP32's bits, that takes the largest number of each row below 2^8."""
    most = tl.maximum(tl.max(tl.abs(q_main), 1), tl.max(tl.abs(q_rest), 1))
    bits = most.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 0x08000000), 0x7F000000) - 0x03800000


@triton.jit
def high_low(x):
    """FP32 below 2^8 as two e4m3 whose sum has eight bits; what is not finite as NaN."""
    x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
    high = x.to(tl.float8e4nv)
    return high, (x - high.to(tl.float32)).to(tl.float8e4nv)


# --- Kernel ---


@triton.jit
def decode_latent_kernel(
    q_ptr,  # [B, Hq, S_q, D]
    k_ptr,  # [B, Hk, Nblk, PAGE, D] e4m3; DV columns where rope_ptr has the rest
    rope_ptr,  # [B, Hk, Nblk, PAGE, D - DV], or None: K's rows are whole
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
    REST: tl.constexpr,  # D - DV, a power of two or 0
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
    TERMS: tl.constexpr,  # e4m3 rows that a row of q is
    WIDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)  # [TILE_M] row = query * RATIO + head of the group
    row_live = rows < S_Q * RATIO
    query = rows // RATIO
    offs_n = tl.arange(0, TILE_N)
    offs_v = tl.arange(0, DV)
    offs_r = tl.arange(0, max(REST, 1))

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    b, request_start, share_start, end = first_unit(
        seq_lens_ptr, B, Hk, capacity, program, tl.num_programs(1), SPLIT, PIECE, MOST_PIECES
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
        q_rows = b64 * stride_qb + head.to(tl.int64) * stride_qh + query * stride_qs
        q_tile = q_ptr + q_rows[:, None]
        q = tl.load(q_tile + offs_v[None, :], mask=row_live[:, None], other=0.0)
        q_rest = q
        if REST > 0:
            q_rest = tl.load(q_tile + DV + offs_r[None, :], mask=row_live[:, None], other=0.0)

        # the scale of the scores
        scale = softmax_scale * LOG2E
        if q_descale_ptr is not None:
            scale *= tl.load(q_descale_ptr + b64 * stride_qdb + kv_head * stride_qdh)
        if k_descale_ptr is not None:
            scale *= tl.load(k_descale_ptr + b64 * stride_kdb + kv_head * stride_kdh)
        scale += tl.zeros([TILE_M], tl.float32)
        if TERMS == 2:
            q, q_rest = q.to(tl.float32), q_rest.to(tl.float32)
            power = power_of(q, q_rest)
            inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)[:, None]
            scale *= power.to(tl.float32, bitcast=True)
            q, q_low = high_low(q * inverse)
            q_rest, q_rest_low = high_low(q_rest * inverse)
        scale = tl.maximum(scale, 1e-30)  # at 0, -inf * scale would be NaN

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

        acc = tl.zeros([DV, TILE_M], tl.float32)
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
            stored = (tokens < seq_len)[:, None]

            # scores^T [TILE_N, TILE_M]
            k_rows = k_head + (page * stride_kn + first * STRIDE_KT) + along * STRIDE_KT
            k = tl.load(k_rows[:, None] + offs_v[None, :], mask=stored, other=0.0)
            scores = tl.dot(k, tl.trans(q), max_num_imprecise_acc=CUT)
            if TERMS == 2:
                scores = tl.dot(k, tl.trans(q_low), scores, max_num_imprecise_acc=CUT)
            if REST > 0:
                rest_rows = k_rows + DV
                if rope_ptr is not None:
                    rest_rows = rope_head + (page * stride_rn + first * STRIDE_RT) + along * STRIDE_RT
                k_rest = tl.load(rest_rows[:, None] + offs_r[None, :], mask=stored, other=0.0)
                scores = tl.dot(k_rest, tl.trans(q_rest), scores, max_num_imprecise_acc=CUT)
                if TERMS == 2:
                    scores = tl.dot(k_rest, tl.trans(q_rest_low), scores, max_num_imprecise_acc=CUT)
            if FLIP:
                scores = -scores
            unit_scale = scale
            if MASK == "float":
                scores *= scale[None, :]
                unit_scale = tl.full([TILE_M], 1.0, tl.float32)
            scores = hide(
                scores, tokens[:, None], stored, limit[None, :], mask_rows[None, :] if MASK != "none" else None,
                mask_len, stride_mt, row_live[None, :], seq_len - S_Q, MASK, TAIL,
            )  # fmt: skip

            # online softmax, as in attend
            row_max_new = tl.maximum(row_max, tl.max(scores, 0) * unit_scale)
            shift = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
            p = tl.exp2(scores * unit_scale[None, :] - shift[None, :])
            rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(p, 0)
            row_max = row_max_new
            acc = acc * rescale[None, :]
            v = widen(k.to(tl.uint8, bitcast=True) if WIDEN == "fp8_once" else k, WIDEN)
            acc = tl.dot(tl.trans(v), p.to(tl.float16), acc)

        # write the item, or this share's part of it
        empty = row_sum == 0.0
        whole = tl.where(empty, 1.0, row_sum)
        lse2 = tl.where(empty, float("-inf"), row_max + tl.log2(whole))
        factor = 1.0 / whole
        if v_descale_ptr is not None:
            factor *= tl.load(v_descale_ptr + b64 * stride_vdb + kv_head * stride_vdh)
        store_item(
            tl.trans(acc * factor[None, :]), row_max, row_sum, lse2, rows, row_live, head, query, b64,
            part=(unit > share_start).to(tl.int32), cut=(unit > item_start) | (stop < item_end),
            partial_ptr=partial_ptr, sink_ptr=sink_ptr, out_ptr=out_ptr, lse_ptr=lse_ptr, heads=Hk * RATIO,
            stride_ob=stride_ob, stride_oh=stride_oh, stride_os=stride_os, S_Q=S_Q, DV=DV, SPLIT=SPLIT, PIECE=PIECE,
            TILE_M=TILE_M, DV_TILE=DV,
        )  # fmt: skip

        # on to the next head, or request
        unit = stop
        if unit == request_start + size * Hk:
            request_start = unit
            b += 1


# --- Launch ---


def constants(
    config: Config,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rope: Tensor | None,
    block_table: Tensor,
    mask: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    out: Tensor,
    flip: bool,
    tail: bool,
) -> dict[str, int | bool | str]:
    """decode_latent_kernel's arguments after softmax_scale: all that one problem fixes."""
    B, Hq, S_q, D = q.shape
    _, Hk, Nblk, page, Dv = v.shape
    return dict(
        B=B, Hk=Hk, Nblk=Nblk, capacity=block_table.shape[1] * page, mask_len=0 if mask is None else mask.shape[3],
        **strides("q", "bhs", q), **strides("k", "bhn", k), **strides("r", "bhn", k_rope),
        **strides("o", "bhs", out), **strides("t", "b", block_table), **strides("m", "bhst", mask),
        **strides("qd", "bh", q_descale), **strides("kd", "bh", k_descale), **strides("vd", "bh", v_descale),
        S_Q=S_q, RATIO=Hq // Hk, DV=Dv, REST=D - Dv, STRIDE_KT=k.stride(3),
        STRIDE_RT=0 if k_rope is None else k_rope.stride(3), PAGE=page, FLIP=flip, MASK=mask_kind(mask), TAIL=tail,
        SPLIT=config.programs > 0, PIECE=PIECE if config.pieces else 0, MOST_PIECES=MOST_PIECES, PDL=config.pdl,
        TILE_M=config.tile_m, TILE_N=config.tile_n, TERMS=1 if q.element_size() == 1 else 2, WIDEN=config.widen,
    )  # fmt: skip
