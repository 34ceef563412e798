"""Append to a cache of FP8 rows: quantise each token's latent, copy its rope part, write its scales, in one kernel.

Grid: (tokens); a program is one row. Bound: bytes, 2 * D read and a row's written; 128 rows are 0.15 MB, so that the
launch decides. The formats are `quant.RowFormat`'s, and every byte is the one that its `quantise` writes, on any GPU:
e4m3 is rounded by integer arithmetic, since Triton has no such type before sm_89.

NOTE: a row is dropped, not clamped, where its slot is negative or past the pages: a write to any other place would
destroy another token's row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.tiles import power_of_2

SCALE_MIN = tl.constexpr(1e-4)
"""As in quant.py."""


@triton.jit
def e4m3(x, source):
    """The e4m3 codes of FP32, rounded to nearest even, saturating; NaN has the sign of its BF16 source."""
    bits = x.to(tl.int32, bitcast=True)
    source_bits = source.to(tl.int16, bitcast=True).to(tl.int32)
    size = tl.where(x == x, tl.minimum(tl.abs(x), 448.0), 0.0)
    size_bits = size.to(tl.int32, bitcast=True)
    # from 2^-6 on: 3 of 23 bits of the mantissa stay, and the exponent's bias is 7, not 127
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    # below: multiples of 2^-9, the last bit of an FP32 from 2^14 on
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    # NOTE: a GPU's arithmetic makes every NaN positive
    code = tl.where(x == x, code | ((bits >> 24) & 0x80), 0x7F | ((source_bits >> 8) & 0x80))
    return code.to(tl.uint8)


@triton.jit
def values(nope_row, last_row, stride_nd, stride_ld, column, live, NOPE: tl.constexpr):
    """Columns of a token's row: the first NOPE are in one tensor, the others in another."""
    nope = tl.load(nope_row + column * stride_nd, mask=live & (column < NOPE), other=0.0)
    last = tl.load(last_row + (column - NOPE) * stride_ld, mask=live & (column >= NOPE), other=0.0)
    return tl.where(column < NOPE, nope, last)


@triton.jit
def append_rows_kernel(
    codes_ptr,  # [blocks, PAGE, QUANTISED] bytes
    scales_ptr,  # [blocks, PAGE, SCALE_BYTES] bytes
    rope_ptr,  # [blocks, PAGE, 2 * ROPE] bytes
    slots_ptr,  # [N]
    nope_ptr,  # [N, NOPE]
    last_ptr,  # [N, QUANTISED + ROPE - NOPE]
    descale_ptr,  # one number, or None
    tokens,  # that the pages hold
    stride_cb, stride_ct,
    stride_sb, stride_st,
    stride_rb, stride_rt,
    stride_slot,
    stride_nn, stride_nd,
    stride_ln, stride_ld,
    PAGE: tl.constexpr,
    NOPE: tl.constexpr,
    QUANTISED: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,  # columns with one scale
    SCALE_SIZE: tl.constexpr,  # bytes of a scale: FP32's 4, e8m0's 1; 0: none is stored
    SCALE_BYTES: tl.constexpr,  # of a row
    TILES: tl.constexpr,  # a power of two
    ROPE_TILE: tl.constexpr,
    PAD_TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n * stride_slot).to(tl.int64)
    if (slot < 0) | (slot >= tokens):
        return
    block = slot // PAGE
    row = slot % PAGE
    nope_row = nope_ptr + n * stride_nn
    last_row = last_ptr + n * stride_ln

    # quantise
    tile = tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]  # [TILES, TILE]
    live = column < QUANTISED
    source = values(nope_row, last_row, stride_nd, stride_ld, column, live, NOPE)
    x = source.to(tl.float32)
    if SCALE_SIZE > 0:
        # the least power of two whose 448-fold no finite value of the tile passes
        size = tl.abs(x)
        most = tl.max(tl.where(size < float("inf"), size, 0.0), 1)
        bits = tl.maximum(tl.div_rn(most, 448.0), SCALE_MIN).to(tl.int32, bitcast=True)
        scale = (bits + 0x7FFFFF) & 0x7F800000  # [TILES], FP32's bits
        x *= (0x7F000000 - scale).to(tl.float32, bitcast=True)[:, None]
    elif descale_ptr is not None:
        x = tl.div_rn(x, tl.load(descale_ptr))
    tl.store(codes_ptr + block * stride_cb + row * stride_ct + column, e4m3(x, source), mask=live)

    # the scales, and zeros behind them
    if SCALE_SIZE > 0:
        scales = scales_ptr + block * stride_sb + row * stride_st
        USED: tl.constexpr = QUANTISED // TILE * SCALE_SIZE
        if SCALE_SIZE == 1:
            tl.store(scales + tile, (scale >> 23).to(tl.uint8), mask=tile < USED)
        else:
            byte = tl.arange(0, 4)[None, :]
            places = tile[:, None] * 4 + byte
            tl.store(scales + places, ((scale[:, None] >> (8 * byte)) & 0xFF).to(tl.uint8), mask=places < USED)
        if SCALE_BYTES > USED:
            pad = tl.arange(0, PAD_TILE)
            tl.store(scales + USED + pad, tl.zeros([PAD_TILE], tl.uint8), mask=pad < SCALE_BYTES - USED)

    # rope
    if ROPE > 0:
        at = tl.arange(0, ROPE_TILE)
        last = values(nope_row, last_row, stride_nd, stride_ld, QUANTISED + at, at < ROPE, NOPE)
        byte = tl.arange(0, 2)[None, :]
        two = last.to(tl.int16, bitcast=True).to(tl.int32)[:, None] >> (8 * byte)
        places = at[:, None] * 2 + byte
        rope = rope_ptr + block * stride_rb + row * stride_rt
        tl.store(rope + places, (two & 0xFF).to(tl.uint8), mask=places < 2 * ROPE)


# --- Launch ---


def arguments(
    *,
    codes: Tensor,
    scales: Tensor,
    rope: Tensor,
    slots: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    descale: Tensor | None,
    tile: int,
    scale_size: int,
) -> dict[str, Tensor | int | None]:
    """append_rows_kernel's arguments; tile and scale_size 0 where rows store no scale."""
    blocks, page, quantised = codes.shape
    columns, scale_bytes = rope.shape[2] // 2, scales.shape[2]
    tile = tile or 64
    used = quantised // tile * scale_size
    return dict(
        codes_ptr=codes, scales_ptr=scales, rope_ptr=rope, slots_ptr=slots, nope_ptr=k_nope, last_ptr=k_rope,
        descale_ptr=descale, tokens=blocks * page,
        **strides("c", "bt", codes), **strides("s", "bt", scales), **strides("r", "bt", rope),
        stride_slot=slots.stride(0), **strides("n", "nd", k_nope), **strides("l", "nd", k_rope),
        PAGE=page, NOPE=k_nope.shape[1], QUANTISED=quantised, ROPE=columns, TILE=tile, SCALE_SIZE=scale_size,
        SCALE_BYTES=scale_bytes, TILES=power_of_2(-(-quantised // tile)), ROPE_TILE=power_of_2(max(columns, 1)),
        PAD_TILE=power_of_2(max(scale_bytes - used, 1)),
    )  # fmt: skip
