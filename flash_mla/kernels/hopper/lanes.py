"""Which elements of a wgmma accumulator a thread holds.

A warpgroup holds [64, N]: warp w has rows 16 w to 16 w + 15. Element 4 j + 2 r + e of a thread, r and e in 0, 1, is at
row `row_of(tid) + 8 r` and column `8 j + column_of(tid) + e`. So four neighbouring threads share a row, and a row's
values are summed over them by `quad_sum`.
"""

from __future__ import annotations

import cutlass.cute as cute

HELD = 64 * 256
"""Elements of a tile of 256 columns, which is what a warpgroup holds."""


def row_of(tid):
    """The first of a thread's two rows; the second is 8 below. tid: of the thread among those that hold the tile."""
    return (tid // 32) * 16 + (tid % 32) // 4


def column_of(tid):
    """The first of a thread's two neighbouring columns in every 8."""
    return 2 * (tid % 4)


@cute.jit
def quad_sum(value):
    """Sum over the four threads that share a row, in each of them."""
    value = value + cute.arch.shuffle_sync_bfly(value, offset=1)
    return value + cute.arch.shuffle_sync_bfly(value, offset=2)


@cute.jit
def quad_max(value):
    """Maximum over the four threads that share a row, in each of them."""
    value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=1))
    return cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=2))


# --- Tiles as they are held -------------------------------------------------------------------------------------------
# Sixteen columns of a row are four of each of its threads. Stored so, thread by thread, they are 512 bytes of a warp.


def held_columns(columns: int) -> cute.Layout:
    """Place -> column, the four of a thread side by side."""
    return cute.make_layout(((2, 2, 4, columns // 16),), stride=((1, 8, 2, 16),))


def held_tiles(rows: int, columns: int, slots, slot) -> cute.Layout:
    """[slots, rows, columns] of tiles as they are held, the columns by place; slot: elements of one."""
    halves = columns // 256
    return cute.make_layout(
        (slots, (8, 2, 4, rows // 64), (2, 2, 4, 16, halves)),
        stride=(slot, (16, HELD // 8, HELD // 4, HELD * halves), (1, 2, 4, 128, HELD)),
    )


def held_by(tile: cute.Pointer, tid) -> cute.Tensor:
    """[four, two rows, sixteens] of a thread in a tile of 256 columns, as it is held."""
    first = (tile + tid // 32 * (HELD // 4) + 4 * (tid % 32)).align(16)
    return cute.make_tensor(first, cute.make_layout((4, 2, 16), stride=(1, HELD // 8, 128)))
