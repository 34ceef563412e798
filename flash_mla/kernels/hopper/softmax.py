"""Online softmax of a warpgroup's 64 rows, two a thread, as wgmma lays an accumulator out.

Scores are base 2 once `scale` has been multiplied in. The running max moves only when a block exceeds it by 2^8
(`LAZY`), so O is rarely rescaled: exact after normalisation, and P stays below 2^8.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.lanes import column_of, quad_max, row_of

LOW = -1.0e30
"""A running max below every score, finite so that LOW - LOW is 0."""
LAZY = 8.0


@dataclass(frozen=True)
class Rows:
    """The two rows of a thread: running max (base 2), its share of the running sum, the factor of the last move of the
    max, the last key that the row may see. tid: of the thread among those that hold the tile.
    """

    tid: Int32
    max: cute.Tensor
    sum: cute.Tensor
    factor: cute.Tensor
    last_key: cute.Tensor

    @staticmethod
    def over(tid) -> Rows:
        return Rows(tid, *(cute.make_rmem_tensor(2, kind) for kind in (Float32, Float32, Float32, Int32)))

    @property
    def first(self):
        """The first of this thread's rows in the tile; the second is 8 below."""
        return row_of(self.tid)

    @property
    def column(self):
        """The first of this thread's columns in every 8."""
        return column_of(self.tid)

    def start(self) -> None:
        """Begin with no key seen; the caller sets `last_key`."""
        self.max.fill(LOW)
        self.sum.fill(0.0)

    @cute.jit
    def mask(self, S: cute.Tensor, key0) -> None:
        """S = -inf past each row's last key; the block starts at key `key0`."""
        for r in cutlass.range_constexpr(2):
            room = self.last_key[r] - key0 - self.column
            for j in cutlass.range_constexpr(cute.size(S) // 4):
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    S[i] = S[i] if 8 * j + e <= room else -Float32.inf

    @cute.jit
    def peak(self, S: cute.Tensor, r: cutlass.Constexpr):
        """The largest score of a row in this block, by the four threads that share it."""
        fmax = cute.arch.fmax
        a, b = fmax(S[2 * r], S[2 * r + 1]), fmax(S[4 + 2 * r], S[5 + 2 * r])
        for j in cutlass.range_constexpr(2, cute.size(S) // 4, 2):
            a = fmax(a, fmax(S[4 * j + 2 * r], S[4 * j + 2 * r + 1]))
            b = fmax(b, fmax(S[4 * j + 4 + 2 * r], S[4 * j + 5 + 2 * r]))
        return quad_max(fmax(a, b))

    @cute.jit
    def move_max(self, r: cutlass.Constexpr, new_max) -> None:
        """Set the running max; `factor` is what the sums and O are off by since."""
        self.factor[r] = cute.math.exp2(self.max[r] - new_max, fastmath=True)
        self.max[r] = new_max

    @cute.jit
    def rescale(self, O: cute.Tensor) -> None:
        """O *= factor, skipped when no row of the warp moved its max."""
        factor = self.factor
        if cute.arch.vote_any_sync((factor[0] != 1.0) | (factor[1] != 1.0)):
            for i in cutlass.range_constexpr(cute.size(O)):
                O[i] = O[i] * factor[(i // 2) % 2]
