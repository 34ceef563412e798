"""A ring of shared-memory stages between a producer and its consumers, on two mbarriers a stage.

`full[i]` completes when the bytes of stage i have landed: one arrival (the producer, which also announces the bytes)
plus the bytes themselves. `empty[i]` completes when everybody who reads stage i is done with it: `readers` arrivals.
Item k of the stream uses stage `k % stages` in round `k // stages`; the parity of the round is the phase of both
barriers, so an item is named by (stage, round) and no state is kept.

In a cluster whose CTAs load parts of every stage for each other (TMA multicast), a stage may be refilled only when the
readers of all CTAs are done: a reader then arrives on the `empty` barrier of every CTA, and `readers` counts them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


@dataclass(frozen=True)
class Channel:
    """`stages` pairs of mbarriers (frozen: the DSL then lets run-time branches and loops use it).

    full, empty: shared-memory pointers to `stages` 64-bit words each. readers: arrivals that free a stage, over all
    CTAs of the cluster. cluster: CTAs that fill and free each stage together.
    """

    full: cute.Pointer
    empty: cute.Pointer
    stages: int
    readers: int
    cluster: int = 1

    @staticmethod
    def over(barriers: cute.Pointer, stages: int, readers: int, cluster: int = 1) -> Channel:
        """A channel on `words(stages)` words of shared memory."""
        return Channel(barriers, barriers + stages, stages, readers, cluster)

    @staticmethod
    def words(stages: int) -> int:
        """64-bit words of shared memory that a channel of this many stages needs."""
        return 2 * stages

    @cute.jit
    def init(self) -> None:
        """Set the arrival counts; by one thread, before a fence and a CTA (or cluster) barrier."""
        for i in cutlass.range_constexpr(self.stages):
            cute.arch.mbarrier_init(self.full + i, 1)
            cute.arch.mbarrier_init(self.empty + i, self.readers)

    # producer

    @cute.jit
    def acquire(self, stage, round) -> None:
        """Wait until the readers of the stage's previous round are done (round 0 passes at once)."""
        cute.arch.mbarrier_wait(self.empty + stage, (round & 1) ^ 1)

    @cute.jit
    def expect(self, stage, num_bytes) -> None:
        """Announce the bytes that this CTA will receive in the stage; by one thread."""
        cute.arch.mbarrier_arrive_and_expect_tx(self.full + stage, num_bytes)

    # consumer

    @cute.jit
    def wait(self, stage, round) -> None:
        """Wait until the stage's bytes of this round have landed."""
        cute.arch.mbarrier_wait(self.full + stage, round & 1)

    @cute.jit
    def release(self, stage) -> None:
        """Give the stage back; one lane of every reading warp arrives, once for each CTA."""
        with cute.arch.elect_one():
            if const_expr(self.cluster == 1):
                cute.arch.mbarrier_arrive(self.empty + stage)
            else:
                for rank in cutlass.range_constexpr(self.cluster):
                    cute.arch.mbarrier_arrive(self.empty + stage, Int32(rank))
