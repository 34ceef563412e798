"""Keys of a gathered block that are not there: a bit each says so, and their scores are made -inf.

The producers zero such a key's row, so that P V needs no care.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32


@cute.jit
def hide_columns(S: cute.Tensor, low, high) -> None:
    """S [heads, 64 keys] = -inf where a key's bit is 0; low, high: keys 0 and 32 on, from the thread's first column."""
    hide_half(S, 0, low)
    hide_half(S, 16, high)


@cute.jit
def hide_half(S: cute.Tensor, first: cutlass.Constexpr, bits) -> None:
    """The same in four groups of 8 columns from element `first` on."""
    for j in cutlass.range_constexpr(4):
        for e in cutlass.range_constexpr(2):
            there = (bits & (1 << (8 * j + e))) != 0
            for r in cutlass.range_constexpr(2):
                i = first + 4 * j + 2 * r + e
                S[i] = S[i] if there else -Float32.inf


@cute.jit
def hide_rows(S: cute.Tensor, bits) -> None:
    """S [64 keys, heads] = -inf for a thread's first key unless bit 0 is set, for its second unless bit 8 is."""
    if (bits & 0x101) != 0x101:
        first, second = (bits & 1) != 0, (bits & 0x100) != 0
        for i in cutlass.range_constexpr(cute.size(S) // 4):
            for e in cutlass.range_constexpr(2):
                S[4 * i + e] = S[4 * i + e] if first else -Float32.inf
                S[4 * i + 2 + e] = S[4 * i + 2 + e] if second else -Float32.inf
