"""Named barriers: what some of a CTA's threads wait for, without a word of shared memory.

A kernel names its barriers in an IntEnum `Bar` in its config, from 1 on (0 is the CTA's, 15 the last). `threads`
counts all that take part, those that only arrive too.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def sync(bar, threads: cutlass.Constexpr) -> None:
    """Arrive and wait for the others."""
    cute.arch.barrier(barrier_id=bar, number_of_threads=threads)


@cute.jit
def arrive(bar, threads: cutlass.Constexpr) -> None:
    """Arrive and go on."""
    cute.arch.barrier_arrive(barrier_id=bar, number_of_threads=threads)


@cute.jit
def any_of(bar, threads: cutlass.Constexpr, predicate):
    """Arrive, wait, and learn whether the predicate held in any of the threads (int 0 or 1)."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r0}, 0; barrier.cta.red.or.pred.aligned p, {$r1}, {$r2}, p; "
        "selp.s32 {$w0}, 1, 0, p; }",
        write_only_types=[Int32],
        read_only_args=[Int32(predicate), Int32(bar), Int32(threads)],
    )
