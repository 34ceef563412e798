"""Which elements of a wgmma accumulator a thread holds.

A warpgroup holds [64, N]: warp w has rows 16 w to 16 w + 15. Element 4 j + 2 r + e of a thread, r and e in 0, 1, is at
row `row_of(tid) + 8 r` and column `8 j + column_of(tid) + e`. So four neighbouring threads share a row, and a row's
values are summed over them by `quad_sum`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute


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


@cute.jit
def warp_max(value):
    """Maximum over the threads of a warp, in each of them."""
    for i in cutlass.range_constexpr(5):
        value = cute.arch.fmax(value, cute.arch.shuffle_sync_bfly(value, offset=1 << i))
    return value
