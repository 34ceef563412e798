"""The consumers of a sparse prefill: products and softmax of MLA decode, over keys of which some name no row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.absent import hide_columns
from flash_mla.kernels.hopper.mla_decode import consumer as mla
from flash_mla.kernels.hopper.mla_decode.pairs import Gathered
from flash_mla.kernels.hopper.sparse_prefill.shared import Shared


@dataclass(frozen=True)
class Consumer(mla.Consumer):
    """A consumer warpgroup. top: the greatest score of each of the thread's rows so far, base 2."""

    top: cute.Tensor

    @staticmethod
    def over(shared: Shared, side: int, tid, scale_log2: Float32) -> Consumer:
        base = mla.Consumer.over(shared, side, tid, scale_log2)
        top = cute.make_rmem_tensor(2, Float32)
        return Consumer(*(getattr(base, field.name) for field in fields(base)), top)

    @cute.jit
    def start(self) -> None:
        """Begin a tile."""
        self.O.fill(0.0)
        self.rows.start()
        self.top.fill(-Float32.inf)

    @property
    def early(self) -> bool:
        """P V of the even block goes under the softmax of the odd one."""
        return False

    @cute.jit
    def find_peak(self, r: cutlass.Constexpr) -> None:
        """The largest score of a row in this block, and so far."""
        mla.Consumer.find_peak(self, r)
        self.top[r] = cute.arch.fmax(self.top[r], self.peak[r])


@dataclass(frozen=True)
class Named(Gathered):
    """The keys that a token's ids name."""

    @cute.jit
    def hide(self, consumer: Consumer, pair) -> None:
        """The consumer's own block of a pair."""
        words = cute.recast_tensor(consumer.shared.sSeen[consumer.side, None], Int32)
        low, high = words[0], words[1]
        if (low & high) != -1:
            hide_columns(consumer.S, low >> consumer.rows.column, high >> consumer.rows.column)
