"""The consumers of a sparse prefill: products and softmax of MLA decode, over keys of which some name no row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper.mla_decode import consumer as mla
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, Bar
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

    @cute.jit
    def mask_unseen(self) -> None:
        """S = -inf at keys that name no row."""
        words = cute.recast_tensor(self.shared.sSeen[self.side, None], Int32)
        low, high = words[0], words[1]
        if (low & high) != -1:
            self.mask(low >> self.rows.column, high >> self.rows.column)

    @cute.jit
    def mask(self, low, high) -> None:
        """S = -inf where a key's bit is 0; low, high: keys 0 and 32 on, shifted to this thread's first column."""
        for j in cutlass.range_constexpr(8):
            word = low if const_expr(j < 4) else high
            for e in cutlass.range_constexpr(2):
                seen = word & (1 << (8 * (j % 4) + e))
                for r in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    self.S[i] = self.S[i] if seen != 0 else -Float32.inf

    @cute.jit
    def find_peaks(self) -> None:
        """The largest scores of this block, and so far."""
        for r in cutlass.range_constexpr(2):
            self.find_peak(r)
            self.top[r] = cute.arch.fmax(self.top[r], self.peak[r])


@cute.jit
def consume_left(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 0: scores of the even blocks, left half of the output."""
    k = consumer.shared.k
    k.wait(0, count)
    consumer.scores(range(4), True)
    k.wait(1, count)
    consumer.scores(range(4, consumer.config.chunks), False)
    warpgroup.wait_group(0)
    for pair in cutlass.range(pairs - 1, unroll=1):
        step_left(consumer, count + pair, True)
    consumer.shared.q.release(0)
    step_left(consumer, count + pairs - 1, False)


@cute.jit
def step_left(consumer: Consumer, turn, follow: cutlass.Constexpr) -> None:
    """One pair, whose even block's scores are there; `follow`: then the scores of the next pair's even block."""
    k = consumer.shared.k
    # softmax of the even block
    consumer.mask_unseen()
    consumer.find_peaks()
    for r in cutlass.range_constexpr(2):
        consumer.raise_max(r)
    consumer.exponentials()
    if const_expr(consumer.config.chunks < K_CHUNKS):
        k.acquire(1, turn)
    consumer.publish(Bar.P_EVEN)

    # P V of the even block
    consumer.rows.rescale(consumer.O)
    consumer.values(0)
    warpgroup.wait_group(0)
    k.release(0)

    # P V of the odd block, and the next scores
    consumer.receive(Bar.P_ODD)
    consumer.rows.rescale(consumer.O)
    consumer.values(1)
    warpgroup.wait_group(0)
    k.release(2)
    if const_expr(follow):
        k.wait(0, turn + 1)
        consumer.scores(range(4), True)
        k.wait(1, turn + 1)
        consumer.scores(range(4, consumer.config.chunks), False)
        warpgroup.wait_group(0)


@cute.jit
def consume_right(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 1: scores of the odd blocks, right half of the output; P V of the even block under their softmax."""
    k = consumer.shared.k
    for pair in cutlass.range(pairs, unroll=1):
        turn = count + pair
        # scores of the odd block
        k.wait(2, turn)
        consumer.scores((0, 1, 2, 3, *range(8, consumer.config.chunks)), True)
        k.wait(3, turn)
        consumer.scores(range(4, 8), False)
        warpgroup.wait_group(0)
        if pair == pairs - 1:
            consumer.shared.q.release(0)
        consumer.mask_unseen()
        consumer.find_peaks()

        # P V of the even block
        consumer.receive(Bar.P_EVEN)
        consumer.rows.rescale(consumer.O)
        consumer.values(0)

        # softmax of the odd block
        for r in cutlass.range_constexpr(2):
            consumer.raise_max(r)
        consumer.exponentials()
        if const_expr(consumer.config.chunks < K_CHUNKS):
            k.acquire(2, turn)
        consumer.publish(Bar.P_ODD)
        warpgroup.wait_group(0)
        k.release(1)

        # P V of the odd block
        consumer.rows.rescale(consumer.O)
        consumer.values(1)
        warpgroup.wait_group(0)
        k.release(3)
