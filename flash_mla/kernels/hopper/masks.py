"""A bool mask in decode: which keys a row may see, over all keys or over the newest tokens alone.

It is read where the scores are hidden, a byte a score, by the thread that holds the score. A tail mask touches the last
blocks of a request only; for the others nothing is read.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.packing import Packing


class Mask(NamedTuple):
    """The mask of a call.

    seen: [B, Hq, S_q, columns] uint8, 0 or 1, of any strides; tail: not 0 where its columns are the S_q newest tokens.
    """

    seen: cute.Tensor
    tail: Int32

    @cute.jit
    def first(self, length):
        """The key of a request's first column; earlier ones are all seen."""
        return length - self.seen.shape[2] if self.tail != 0 else Int32(0)

    @cute.jit
    def line(self, request, row, token_major: cutlass.Constexpr):
        """The columns of a row of a request, in the order of rows told; of one past the end, those of the last."""
        # NOTE: Hq and S_q of the mask itself, which has them in registers anyway: those of the call would spill
        Hq, S_q = self.seen.shape[1], self.seen.shape[2]
        packing = Packing(S_q, Hq if const_expr(token_major) else None)
        row = cutlass.min(row, Hq * S_q - 1)
        return self.seen[request, packing.head_of(row), packing.token_of(row), None]


@cute.jit
def sees(line: cute.Tensor, key, first, length) -> Boolean:
    """Whether a row sees a key, by its line of the mask whose first column is key `first`."""
    column, columns = key - first, line.shape[0]
    # NOTE: read in any case, from a place inside the line: loads that nothing guards are in flight together
    byte = Int32(line[cutlass.max(0, cutlass.min(column, columns - 1))])
    return (column < 0) | ((key < length) & (column < columns) & (byte != 0))


def needs_mask(key0, first):
    """Whether some key of the block at `key0` has a column."""
    return key0 + BLOCK > first
