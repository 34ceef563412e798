"""The end of an item of decode: its rows go to `out`, or as a part of them to where the combine kernel looks."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.kernels.triton.attend import LN2, sink_factor


@triton.jit
def store_item(
    out,  # [TILE_M, COLUMNS] FP32, columns from FIRST on
    row_max, row_sum, lse2, rows, row_live, head, query,  # [TILE_M]
    b, program, programs,
    part,  # whether the item is not the first of its program
    cut,  # whether other programs have parts of it
    partial_ptr, sink_ptr, out_ptr, lse_ptr,
    heads,
    stride_ob, stride_oh, stride_os,
    S_Q: tl.constexpr,
    DV: tl.constexpr,
    SPLIT: tl.constexpr,
    PIECE: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,  # of a slot
    DV_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Write a finished item, or the program's part of it: these columns and, with the first, what a row has once."""
    columns = FIRST + tl.arange(0, COLUMNS)
    inside = (columns < DV)[None, :]
    written = row_live
    if SPLIT:
        if cut:
            SLOTS: tl.constexpr = 1 if PIECE > 0 else 2
            slot_row = ((SLOTS * program + part) * PARTIAL_ROWS + rows).to(tl.int64)  # [TILE_M]
            part_tile = partial_ptr + slot_row[:, None] * DV_TILE + columns[None, :]
            tl.store(part_tile, out, mask=row_live[:, None] & inside)
            if FIRST == 0:
                slot_rows = tl.cast(SLOTS * programs * PARTIAL_ROWS, tl.int64)
                max_partial_ptr = partial_ptr + slot_rows * DV_TILE
                tl.store(max_partial_ptr + slot_row, row_max, mask=row_live)
                tl.store(max_partial_ptr + slot_rows + slot_row, row_sum, mask=row_live)
        written = row_live & (cut == 0)
    if sink_ptr is not None:
        out *= sink_factor(lse2, tl.load(sink_ptr + head, mask=row_live, other=0.0))[:, None]
    out_row = out_ptr + (b * stride_ob + head.to(tl.int64) * stride_oh + query.to(tl.int64) * stride_os)  # [TILE_M]
    tl.store(out_row[:, None] + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=written[:, None] & inside)
    if lse_ptr is not None and FIRST == 0:
        tl.store(lse_ptr + (b * heads + head) * S_Q + query, lse2 * LN2, mask=written)
