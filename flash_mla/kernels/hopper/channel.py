"""A ring of shared-memory stages between producers and consumers, on two mbarriers a stage.

`full[i]` completes when stage i holds its item: all `writers` have arrived and all announced bytes have landed.
`empty[i]` completes when everybody who reads stage i is done with it: `readers` arrivals. Item k of the stream uses
stage `k % stages` in round `k // stages`; the parity of the round is the phase of both barriers, so an item is named by
(stage, round) and no state is kept.

A producer fills a stage in one of three ways, and arrives on `full` accordingly:
    TMA        one thread calls `expect` (its one arrival, with the bytes); the copies name `bar(stage)`
    cp.async   every thread of the producer warps calls `arrive_copied` behind its copies: 32 arrivals a warp
    stores     each thread calls `arrive`, or each warp `arrive_warp`; behind a fence where wgmma reads the stage
Several may fill one stage together: `writers` is the sum of their arrivals.

In a cluster whose CTAs load parts of every stage for each other (TMA multicast), a stage may be refilled only when the
readers of all CTAs are done: a reader then arrives on the `empty` barrier of every CTA, and `readers` counts them all.

A wrong count hangs the GPU. So each role says what it will do when it is made (`written_by`, `read_by`), and the
kernel calls `check` when all roles are traced: it does not compile if the sums differ from what `init` sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync


class Ends:
    """The roles at both ends of a channel: arrivals that each makes in a stage and round, by (role, stage)."""

    def __init__(self) -> None:
        self.writers: dict[tuple[str, int], int] = {}
        self.readers: dict[tuple[str, int], int] = {}


@dataclass(frozen=True)
class Channel:
    """`stages` pairs of mbarriers (frozen: the DSL then lets run-time branches and loops use it).

    full, empty: shared-memory pointers to `stages` 64-bit words each. writers: arrivals that fill a stage, in this CTA.
    readers: arrivals that free a stage, over all CTAs of the cluster. 0 of either where something else says so.
    cluster: CTAs that fill and free each stage together.
    """

    name: str
    full: cute.Pointer
    empty: cute.Pointer
    stages: int
    readers: int
    writers: int
    cluster: int
    ends: Ends

    @staticmethod
    def over(
        name: str, barriers: cute.Pointer, stages: int, *, readers: int, writers: int = 1, cluster: int = 1
    ) -> Channel:
        """A channel on `words(stages)` words of shared memory."""
        return Channel(name, barriers, barriers + stages, stages, readers, writers, cluster, Ends())

    @staticmethod
    def words(stages: int) -> int:
        """64-bit words of shared memory that a channel of this many stages needs (`limits.barrier_bytes`)."""
        return 2 * stages

    @cute.jit
    def init(self) -> None:
        """Set the arrival counts; by one thread, before a fence and a CTA (or cluster) barrier."""
        for i in cutlass.range_constexpr(self.stages):
            if const_expr(self.writers > 0):
                cute.arch.mbarrier_init(self.full + i, self.writers)
            if const_expr(self.readers > 0):
                cute.arch.mbarrier_init(self.empty + i, self.readers)

    # what is checked when the kernel is built

    def written_by(self, role: str, arrivals: int = 1, stages: Sequence[int] | None = None) -> None:
        """A role will arrive so often on `full` of these stages (None: all) in each round."""
        for stage in range(self.stages) if stages is None else stages:
            self.ends.writers[role, stage] = arrivals

    def read_by(self, role: str, warps: int, stages: Sequence[int] | None = None) -> None:
        """A role of so many warps will release these stages (None: all) in each round."""
        for stage in range(self.stages) if stages is None else stages:
            self.ends.readers[role, stage] = warps

    def check(self) -> None:
        """Raise unless the arrivals of all roles add up to what the barriers wait for."""
        for stage in range(self.stages):
            writers = {role: n for (role, at), n in self.ends.writers.items() if at == stage}
            readers = {role: n * self.cluster for (role, at), n in self.ends.readers.items() if at == stage}
            for barrier, wanted, roles in (("full", self.writers, writers), ("empty", self.readers, readers)):
                if sum(roles.values()) != wanted:
                    ctas = f", in {self.cluster} CTAs" if barrier == "empty" and self.cluster > 1 else ""
                    terms = " + ".join(f"{n} ({role})" for role, n in roles.items()) or "nobody"
                    raise ValueError(
                        f"channel {self.name}: `{barrier}` of stage {stage} waits for {wanted} arrivals a round, "
                        f"its roles make {terms} = {sum(roles.values())}{ctas}"
                    )

    # producer

    @cute.jit
    def acquire(self, stage, round) -> None:
        """Wait until the readers of the stage's previous round are done (round 0 passes at once)."""
        cute.arch.mbarrier_wait(self.empty + stage, (round & 1) ^ 1)

    @cute.jit
    def expect(self, stage, num_bytes) -> None:
        """Arrive, and announce the bytes that TMA brings into this CTA's stage; by one thread."""
        cute.arch.mbarrier_arrive_and_expect_tx(self.full + stage, num_bytes)

    def bar(self, stage) -> cute.Pointer:
        """The barrier on which TMA counts the bytes of a stage."""
        return self.full + stage

    @cute.jit
    def arrive(self, stage) -> None:
        """Arrive for this thread, which has stored its part of the stage."""
        cute.arch.mbarrier_arrive(self.full + stage)

    @cute.jit
    def arrive_warp(self, stage) -> None:
        """Arrive once for this warp, when all its lanes have stored their part of the stage."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.full + stage)

    @cute.jit
    def arrive_copied(self, stage) -> None:
        """Arrive for this thread when all cp.async that it has issued so far have landed; it goes on at once."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + stage)

    # consumer

    @cute.jit
    def wait(self, stage, round) -> None:
        """Wait until the stage holds the item of this round."""
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


@cute.jit
def open_channels(channels: cutlass.Constexpr, tmas: cutlass.Constexpr) -> None:
    """Initialise channels and fetch the descriptors of TMA; by one warp, before a barrier of the CTA (or cluster)."""
    for tma in tmas:
        cpasync.prefetch_descriptor(tma)
    with cute.arch.elect_one():
        for channel in channels:
            channel.init()
    cute.arch.mbarrier_init_fence()
