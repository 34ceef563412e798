"""Combine: merge the partial results that decode wrote for items that lie across shares.

A partial is out_i, the largest score max_i of its keys in base 2, and the sum sum_i of their weights:
out = sum_i w_i out_i / sum_i w_i with w_i = sum_i exp2(max_i - max), in the order of the shares, so that reruns are
bitwise equal. Grid: (rows * column tiles * (programs - 1)). A program looks at the boundary before share p + 1: if an
item lies across it, and across no boundary before, it merges one row of that item; otherwise it has nothing to do.
Where items are cut into pieces, the grid is (rows * column tiles * items), and a program merges the pieces of an item,
if it has more than one.

Bound: bytes of the partials, at most two items a share: 2 * programs * rows * Dv * 4.

NOTE: max and sum apart, not the one lse of both (as in merge.py): where a mask adds -1e9 or finfo.min to every key of a
row, FP32 has no place beside it for the log of a sum, and parts of 64 and of 6 keys would weigh the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import LN2, sink_factor
from flash_mla.kernels.triton.share import MOST_PIECES, PIECE, VARYING, locate, piece_units, request_length, units
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.tiles import power_of_2

# --- Config ---


@dataclass(frozen=True)
class Config:
    """tile_s partials by tile_c columns a step; pieces: of an item, at most, where there are no shares."""

    tile_s: int
    tile_c: int
    warps: int = 4
    pieces: int = 0


def config(*, items: int, programs: int, Dv: int, pieces: int = 0) -> Config:
    """Few items are cut many times: then more partials a step and fewer columns, so that loads overlap."""
    if pieces:  # a tile decides in which order its partials are added
        return Config(MOST_PIECES, min(max(power_of_2(Dv), 16), 4096 // MOST_PIECES), pieces=pieces)
    tile_s = min(32, max(4, power_of_2(-(-programs // max(items, 1)) + 1)))
    return Config(tile_s, min(max(power_of_2(Dv), 16), 4096 // tile_s))


# --- Kernel ---


@triton.jit(do_not_specialize_on_alignment=VARYING)
def combine_kernel(
    seq_lens_ptr,  # [B]
    partial_ptr,  # out [slots, partial_rows, DV_TILE], max and sum [slots, partial_rows]; 2 slots a program, a piece: 1
    sink_ptr,  # [Hq]
    out_ptr,  # [B, Hq, S_q, Dv], last dim contiguous
    lse_ptr,  # [B, Hq, S_q] contiguous
    B,
    Hk,
    capacity,
    partial_rows,
    pieces,
    stride_ob, stride_oh, stride_os,
    S_Q: tl.constexpr,
    RATIO: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    PDL: tl.constexpr,
    PIECE: tl.constexpr,  # as in decode_kernel
    TILE_S: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (DV + TILE_C - 1) // TILE_C
    TILES: tl.constexpr = S_Q * RATIO * COLUMN_TILES
    row = tl.program_id(0) % TILES // COLUMN_TILES
    columns = tl.program_id(0) % COLUMN_TILES * TILE_C + tl.arange(0, TILE_C)
    place = tl.program_id(0) // TILES  # an item, or a boundary
    places = tl.num_programs(0) // TILES
    if PDL:
        # NOTE: one program waits in any case, as PTX asks: where no item is cut, all would end before decode, and what
        # comes next might start beside it
        is_first = tl.program_id(0) == 0
        if is_first:
            tl.extra.cuda.gdc_wait()
    if PIECE > 0:
        # the slots of an item's pieces lie side by side
        item = place
        b = item // Hk
        kv_head = item % Hk
        size = units(request_length(seq_lens_ptr, b, capacity))
        each = piece_units(size, PIECE, TILE_S)
        if size <= each:
            return
        programs = places * pieces
        first = item * pieces
        last = first + (size - 1) // each
    else:
        first = place
        programs = places + 1
        # is an item cut here, and for the first time?
        total, share, b, request_start = locate(seq_lens_ptr, B, capacity, Hk, programs, first + 1)
        boundary = (first + 1) * share
        if boundary >= total:
            return
        size = units(request_length(seq_lens_ptr, b, capacity))
        kv_head = (boundary - request_start) // size
        item_start = request_start + kv_head * size
        if (item_start == boundary) | (item_start < first * share):
            return
        last = (item_start + size - 1) // share

    if PDL:
        tl.extra.cuda.gdc_wait()

    # merge
    SLOTS: tl.constexpr = 1 if PIECE > 0 else 2
    slot_rows = tl.cast(SLOTS * programs * partial_rows, tl.int64)
    max_partial_ptr = partial_ptr + slot_rows * DV_TILE
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.zeros([TILE_C], tl.float32)
    for start in tl.range(first, last + 1, TILE_S):
        program = start + tl.arange(0, TILE_S)
        slot = program
        if PIECE == 0:  # only in its first share may the item not be the share's first
            slot = 2 * program + ((program == first) & (item_start > first * share)).to(tl.int32)
        slot_row = slot.to(tl.int64) * partial_rows + row  # [TILE_S]
        part_max = tl.load(max_partial_ptr + slot_row, mask=program <= last, other=float("-inf"))
        part_sum = tl.load(max_partial_ptr + slot_rows + slot_row, mask=program <= last, other=0.0)
        part = tl.load(
            partial_ptr + slot_row[:, None] * DV_TILE + columns[None, :],
            mask=(program <= last)[:, None] & (columns < DV)[None, :],
            other=0.0,
        )  # [TILE_S, TILE_C]
        row_max_new = tl.maximum(row_max, tl.max(part_max, 0))
        shift = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
        weight = part_sum * tl.exp2(part_max - shift)
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(part * weight[:, None], 0)
        row_max = row_max_new

    empty = row_sum == 0.0
    out = acc / tl.where(empty, 1.0, row_sum)
    lse2 = tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
    head = kv_head * RATIO + row % RATIO
    b64 = b.to(tl.int64)
    out_row = out_ptr + (b64 * stride_ob + head.to(tl.int64) * stride_oh + (row // RATIO).to(tl.int64) * stride_os)
    if sink_ptr is not None:
        out *= sink_factor(lse2, tl.load(sink_ptr + head))
    tl.store(out_row + columns, out.to(out_ptr.dtype.element_ty), mask=columns < DV)
    if lse_ptr is not None:
        lse_row = lse_ptr + (b64 * (Hk * RATIO) + head) * S_Q + row // RATIO
        tl.store(lse_row, lse2 * LN2, mask=tl.program_id(0) % COLUMN_TILES == 0)


# --- Launch ---


def grid(config: Config, rows: int, Dv: int, programs: int) -> tuple[int, int, int]:
    """(rows * column tiles * boundaries or items, 1, 1)."""
    places = programs // config.pieces if config.pieces else programs - 1
    return rows * -(-Dv // config.tile_c) * places, 1, 1


def constants(
    config: Config,
    *,
    B: int,
    Hk: int,
    capacity: int,
    S_q: int,
    ratio: int,
    Dv: int,
    out: Tensor,
    pdl: bool,
    partial_rows: int,
    dv_tile: int,
) -> dict[str, int | bool | str]:
    """combine_kernel's arguments after its tensors; pdl, partial_rows and dv_tile as decode was launched with them."""
    return dict(
        B=B,
        Hk=Hk,
        capacity=capacity,
        partial_rows=partial_rows,
        pieces=config.pieces,
        **strides("o", "bhs", out),
        S_Q=S_q,
        RATIO=ratio,
        DV=Dv,
        DV_TILE=dv_tile,
        PDL=pdl,
        PIECE=PIECE if config.pieces else 0,
        TILE_S=config.tile_s,
        TILE_C=config.tile_c,
    )
