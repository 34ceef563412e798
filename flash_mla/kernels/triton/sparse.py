"""Sparse attention: each query token attends to the rows that it names, out = softmax(q k^T * scale) v, V inside K.

Grid: (head tiles, tokens, splits). The head tiles of a token run side by side, so that the rows they gather meet in L2.
A split is a share of the token's key tiles; with more than one, programs write partials in FP32 and combine_kernel
merges them.

Bound: 128 heads make about 240 FLOP of a BF16 byte of K: the tensor cores, once the gather keeps up. A row is gathered
as it is stored and dequantised in registers, tile by tile.

A cache is two or three strided parts of its rows: `codes` (the first QUANT columns in e4m3, or all columns in q's dtype
where QUANT is 0), `rope` (the columns from QUANT on, BF16) and `scales` (one for GROUP columns, FP32 or e8m0). Of K's
columns, D_MAIN are one tile, which is also V, and D_REST, where D is 576, a second. A row is read only if its index is
inside the cache, at 64-bit offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from flash_mla.kernels.triton.attend import LN2, LOG2E, normalise, sink_factor
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import head_tiles, least_rest, power_of_2, precision

# --- Config ---


@dataclass(frozen=True)
class Config:
    """tile_m heads by tile_n keys; d_main + d_rest columns of K; splits of a token's keys.

    native: e4m3 is converted by the GPU's own instruction.
    flat: row i of a cache lies i rows after its first, so that an index alone is an address.
    """

    tile_m: int
    tile_n: int
    d_main: int
    d_rest: int
    splits: int
    native: bool
    precision: str
    warps: int
    stages: int
    flat: bool


TILES = ((64, 64, 2), (64, 32, 2), (32, 32, 2), (32, 16, 2), (16, 16, 2), (16, 16, 1))
"""(tile_m, tile_n, stages), best first where they fit. H200, prefill of 128 heads: 245 TFLOP/s at (64, 64, 2), 162 at
(64, 32, 3), 152 at (64, 32, 2), 59 at (128, 32, 1)."""


def config(
    *, tokens: int, Hq: int, D: int, topk: int, itemsize: int, quantised: int, flat: bool, split: bool, target: Target
) -> Config:
    """The first tiles that fit; splits while the programs do not fill the GPU twice, 4 key tiles each at least.

    quantised: columns in e4m3, 0 in a cache of q's dtype.
    """
    d_main, d_rest = head_tiles(D, least_rest(target))
    row = (d_main + d_rest) * itemsize
    rows = max(16, power_of_2(Hq))

    def fits(tile_m: int, tile_n: int, stages: int) -> bool:
        # but for Hopper, Triton keeps a dequantised tile beside the stored one; there too where rope lies in the main
        # tile and mma.sync, for few heads, takes its operands from registers
        in_place = target.wgmma and (min(tile_m, rows) == 64 or quantised >= d_main)
        copies = 1 if in_place or not quantised else 2
        # NOTE: (32, 16, 2) of a dequantised tile spills 1.6 KB a thread on sm_80 (seen in its SASS, not run)
        spills = copies == 2 and not target.wgmma and (tile_m, tile_n, stages) == (32, 16, 2)
        return not spills and (min(tile_m, rows) + copies * tile_n * stages) * row <= target.smem

    tile_m, tile_n, stages = next((tiles for tiles in TILES if fits(*tiles)), TILES[-1])
    tile_m = min(tile_m, rows)
    tiles = -(-topk // tile_n)
    programs = max(tokens * -(-Hq // tile_m), 1)
    splits = max(1, min(tiles // 4, 2 * target.multiprocessors // programs, 32)) if split else 1
    if target.backend == "interpreter" and split:
        splits = max(1, min(3, tiles))
    native = target.backend == "cuda" and target.arch >= 89
    warps = 8 if tile_m >= 32 else 4
    return Config(tile_m, tile_n, d_main, d_rest, splits, native, precision(itemsize, target), warps, stages, flat)


# --- Steps ---


@triton.jit
def from_e4m3(codes, NATIVE: tl.constexpr):
    """e4m3 bytes to FP32."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    # moved into FP16's fields the value is 2^-8 of itself, see attend.widen
    bits = codes.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def load_columns(
    codes_rows,
    rope_rows,
    scale_rows,
    live,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Columns FIRST .. FIRST + WIDTH of K, [TILE_N, WIDTH] in the dtype of the dots; 0 in rows that are not live."""
    cols = FIRST + tl.arange(0, WIDTH)
    rope_mask = live[:, None] & ((cols >= QUANT) & (cols < D))[None, :]
    if QUANT == 0:
        k = tl.load(codes_rows[:, None] + cols[None, :], mask=live[:, None] & (cols < D)[None, :], other=0.0)
    elif FIRST >= QUANT:
        k = tl.load(rope_rows[:, None] + (cols - QUANT)[None, :], mask=rope_mask, other=0.0)
    else:
        codes = tl.load(codes_rows[:, None] + cols[None, :], mask=live[:, None] & (cols < QUANT)[None, :], other=0)
        values = from_e4m3(codes, NATIVE)
        if GROUP > 0:
            groups = FIRST // GROUP + tl.arange(0, WIDTH // GROUP)
            scale_mask = live[:, None] & (groups < QUANT // GROUP)[None, :]
            scales = tl.load(scale_rows[:, None] + groups[None, :], mask=scale_mask, other=0)
            if E8M0:
                scales = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            values = tl.reshape(values, [TILE_N, WIDTH // GROUP, GROUP]) * scales[:, :, None]
            values = tl.reshape(values, [TILE_N, WIDTH])
        k = values.to(tl.bfloat16)
        if FIRST + WIDTH > QUANT and D > QUANT:
            rope = tl.load(rope_rows[:, None] + (cols - QUANT)[None, :], mask=rope_mask, other=0.0)
            k = tl.where((cols < QUANT)[None, :], k, rope)
    return k


@triton.jit
def attend_keys(
    acc,  # [TILE_M, D_MAIN] FP32
    row_max,
    row_sum,
    q,
    q_rest,
    scale,
    index_row,  # to the token's indices
    first,  # key tiles first .. last
    last,
    count,  # indices that count
    codes_ptr,
    rope_ptr,
    scale_ptr,
    pages,
    page,
    codes_page,
    codes_row,
    rope_page,
    rope_row,
    scale_page,
    scale_row,
    D: tl.constexpr,
    QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Online softmax over the key tiles of one cache."""
    # rows of every format are a multiple of 16 bytes apart, which 656-byte rows do not show by their BF16 stride, 328
    # NOTE: pages need not be: a pitch of 820 bytes rounded down like this was another page's rows
    rope_row = rope_row // 8 * 8
    for tile in tl.range(first, last):
        offs_n = tile * TILE_N + tl.arange(0, TILE_N)
        index = tl.load(index_row + offs_n, mask=offs_n < count, other=-1).to(tl.int64)
        live = (index >= 0) & (index < pages * page)
        index = tl.where(live, index, 0)
        if FLAT:
            codes_rows = codes_ptr + index * codes_row
            rope_rows = rope_ptr + index * rope_row if QUANT > 0 else codes_rows
            scale_rows = scale_ptr + index * scale_row if QUANT > 0 else codes_rows
        else:
            slot = index.to(tl.uint32)
            rows = tl.cast(page, tl.uint32)  # not page.to(): Triton makes an argument of 1 a constant
            block = (slot // rows).to(tl.int64)
            slot = (slot % rows).to(tl.int64)
            codes_rows = codes_ptr + block * codes_page + slot * codes_row
            rope_rows = rope_ptr + block * rope_page + slot * rope_row if QUANT > 0 else codes_rows
            scale_rows = scale_ptr + block * scale_page + slot * scale_row if QUANT > 0 else codes_rows
        k = load_columns(
            codes_rows, rope_rows, scale_rows, live, 0, D_MAIN, D, QUANT, GROUP, E8M0, NATIVE, TILE_N
        )  # fmt: skip
        if D_REST > 0:
            k_rest = load_columns(
                codes_rows, rope_rows, scale_rows, live, D_MAIN, D_REST, D, QUANT, GROUP, E8M0, NATIVE, TILE_N
            )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [TILE_M, TILE_N]
        if D_REST > 0:
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        scores = tl.where(live[None, :], scores * scale, float("-inf"))

        row_max_new = tl.maximum(row_max, tl.max(scores, 1))
        # a row without a key yet: subtract 0, so that exp2(-inf) is 0 and not exp2(-inf + inf)
        shift = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
        p = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * rescale[:, None], input_precision=PRECISION)
        row_max = row_max_new
    return acc, row_max, row_sum


# --- Kernels ---


@triton.jit(do_not_specialize_on_alignment=("tokens", "pages", "pages2"))
def sparse_kernel(
    q_ptr,  # [B, S_q, Hq, D]
    index_ptr,
    length_ptr,  # [B]
    codes_ptr,
    rope_ptr,
    scale_ptr,
    index_ptr2,  # the second cache, likewise
    length_ptr2,
    codes_ptr2,
    rope_ptr2,
    scale_ptr2,
    sink_ptr,  # [Hq]
    out_ptr,  # [B, S_q, Hq, DV] contiguous
    lse_ptr,  # [B, S_q, Hq] contiguous
    max_ptr,  # [B, S_q, Hq] contiguous
    partial_ptr,  # with SPLIT: out [splits, B, S_q, Hq, DV], then base-2 lse [splits, B, S_q, Hq]
    softmax_scale,
    tokens,
    Hq,
    stride_qb, stride_qs, stride_qh,
    topk,
    pages,
    page,
    stride_ib, stride_is,
    stride_cn, stride_ct, stride_rn, stride_rt, stride_sn, stride_st,  # of the parts: page, row
    topk2,
    pages2,
    page2,
    stride_ib2, stride_is2,
    stride_cn2, stride_ct2, stride_rn2, stride_rt2, stride_sn2, stride_st2,
    S_Q: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    SPLIT: tl.constexpr,  # a token's keys among the programs of grid dim 1
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    # tokens and head tiles share grid dim 0, the only one that reaches beyond 65535
    head_tiles = (Hq + TILE_M - 1) // TILE_M
    token = tl.program_id(0) // head_tiles
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = (token // S_Q).to(tl.int64)
    i = (token % S_Q).to(tl.int64)
    heads = tl.program_id(0) % head_tiles * TILE_M + tl.arange(0, TILE_M)
    head_live = heads < Hq
    offs_d = tl.arange(0, D_MAIN)

    # load q
    q_rows = q_ptr + b * stride_qb + i * stride_qs + heads.to(tl.int64) * stride_qh
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=head_live[:, None] & (offs_d < D)[None, :], other=0.0)
    q_rest = q
    if D_REST > 0:
        offs_r = D_MAIN + tl.arange(0, D_REST)
        q_rest = tl.load(q_rows[:, None] + offs_r[None, :], mask=head_live[:, None] & (offs_r < D)[None, :], other=0.0)

    acc = tl.zeros([TILE_M, D_MAIN], tl.float32)
    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    scale = softmax_scale * LOG2E

    # this split's share of the key tiles of both caches, laid end to end
    count = tl.cast(topk, tl.int32)
    if length_ptr is not None:
        count = tl.maximum(tl.minimum(tl.load(length_ptr + b), topk), 0).to(tl.int32)
    tiles = (count + TILE_N - 1) // TILE_N
    total = tiles
    count2 = tl.cast(topk2, tl.int32)
    if index_ptr2 is not None:
        if length_ptr2 is not None:
            count2 = tl.maximum(tl.minimum(tl.load(length_ptr2 + b), topk2), 0).to(tl.int32)
        total += (count2 + TILE_N - 1) // TILE_N
    each = (total + splits - 1) // splits
    first = split * each
    last = tl.minimum(first + each, total)

    acc, row_max, row_sum = attend_keys(
        acc, row_max, row_sum, q, q_rest, scale, index_row=index_ptr + b * stride_ib + i * stride_is,
        first=first, last=tl.minimum(last, tiles), count=count, codes_ptr=codes_ptr, rope_ptr=rope_ptr,
        scale_ptr=scale_ptr, pages=pages, page=page, codes_page=stride_cn, codes_row=stride_ct,
        rope_page=stride_rn, rope_row=stride_rt, scale_page=stride_sn, scale_row=stride_st, D=D,
        QUANT=QUANT, GROUP=GROUP, E8M0=E8M0, NATIVE=NATIVE, TILE_N=TILE_N, D_MAIN=D_MAIN, D_REST=D_REST,
        PRECISION=PRECISION, FLAT=FLAT,
    )  # fmt: skip
    if index_ptr2 is not None:
        acc, row_max, row_sum = attend_keys(
            acc, row_max, row_sum, q, q_rest, scale, index_row=index_ptr2 + b * stride_ib2 + i * stride_is2,
            first=tl.maximum(first, tiles) - tiles, last=last - tiles, count=count2, codes_ptr=codes_ptr2,
            rope_ptr=rope_ptr2, scale_ptr=scale_ptr2, pages=pages2, page=page2, codes_page=stride_cn2,
            codes_row=stride_ct2, rope_page=stride_rn2, rope_row=stride_rt2, scale_page=stride_sn2,
            scale_row=stride_st2, D=D, QUANT=QUANT, GROUP=GROUP, E8M0=E8M0, NATIVE=NATIVE, TILE_N=TILE_N,
            D_MAIN=D_MAIN, D_REST=D_REST, PRECISION=PRECISION, FLAT=FLAT,
        )  # fmt: skip

    out, lse2 = normalise(acc, row_max, row_sum)
    row = tl.cast(token, tl.int64) * Hq + heads
    live = head_live[:, None] & (offs_d < DV)[None, :]
    if SPLIT:
        row += tl.cast(tokens, tl.int64) * split * Hq
        tl.store(partial_ptr + row[:, None] * DV + offs_d[None, :], out, mask=live)
        tl.store(partial_ptr + tl.cast(tokens, tl.int64) * (splits * Hq * DV) + row, lse2, mask=head_live)
    else:
        if sink_ptr is not None:
            out *= sink_factor(lse2, tl.load(sink_ptr + heads, mask=head_live, other=0.0))[:, None]
        tl.store(out_ptr + row[:, None] * DV + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=live)
        tl.store(lse_ptr + row, lse2 * LN2, mask=head_live)
        if max_ptr is not None:
            tl.store(max_ptr + row, row_max * LN2, mask=head_live)


@triton.jit(do_not_specialize_on_alignment=("rows", "splits"))
def merge_kernel(
    partial_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    rows,  # B * S_q * Hq
    Hq,
    splits,  # up to 32
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
):
    """One row (token, head): the splits' partials, merged in their order (merge.py is the spec)."""
    row = tl.program_id(0).to(tl.int64)
    rows64 = tl.cast(rows, tl.int64)
    every = tl.arange(0, 32)
    lses = partial_ptr + splits * rows64 * DV
    lse2 = tl.load(lses + every * rows64 + row, mask=every < splits, other=float("-inf"))
    row_max = tl.max(lse2, 0)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(tl.exp2(lse2 - shift), 0)
    total = tl.where(row_sum == 0.0, float("-inf"), shift + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))
    cols = tl.arange(0, DV_TILE)
    out = tl.zeros([DV_TILE], tl.float32)
    for split in tl.range(0, splits):
        part_lse = tl.load(lses + split * rows64 + row)
        part = tl.load(partial_ptr + (split * rows64 + row) * DV + cols, mask=cols < DV, other=0.0)
        out += part * tl.exp2(part_lse - shift)
    # by the sum: total is rounded, and weights of exp2(part_lse - total) would not sum to 1
    out /= tl.where(row_sum == 0.0, 1.0, row_sum)
    if sink_ptr is not None:
        out *= sink_factor(total, tl.load(sink_ptr + row % Hq))
    tl.store(out_ptr + row * DV + cols, out.to(out_ptr.dtype.element_ty), mask=cols < DV)
    tl.store(lse_ptr + row, total * LN2)


# --- Launch ---


def grid(config: Config, tokens: int, Hq: int) -> tuple[int, int, int]:
    """(tokens * head tiles, splits, 1)."""
    return tokens * -(-Hq // config.tile_m), config.splits, 1
