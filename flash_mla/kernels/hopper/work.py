"""How a cluster finds its range of the work, on the device, from the lengths: `split.py` in the kernels' integers."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.kernels.hopper import split

BLOCK = 64
"""Tokens of a block: one cache page."""


class Work(NamedTuple):
    """A cluster's range: `steps` steps, from `offset` steps into item (request, group) on; and the plan."""

    request: Int32
    group: Int32
    offset: Int32
    steps: Int32
    chunk: Int32
    floor: Int32


def scan_words(warps: int) -> int:
    """32-bit words of shared memory that `find_work` needs: two a warp, and two for what it finds."""
    return 2 * warps + 2


@cute.jit
def length_of(table: cute.Tensor, seq_lens: cute.Tensor, request):
    """The request's length, kept inside what its row of the table covers."""
    return cutlass.max(0, cutlass.min(seq_lens[request], table.shape[1] * BLOCK))


@cute.jit
def warp_sum(value):
    """Sum over the warp, in every lane."""
    for i in cutlass.range_constexpr(5):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=1 << i)
    return value


@cute.jit
def warp_max(value):
    """Maximum over the warp, in every lane."""
    for i in cutlass.range_constexpr(5):
        value = cutlass.max(value, cute.arch.shuffle_sync_bfly(value, offset=1 << i))
    return value


@cute.jit
def find_work(
    table: cute.Tensor,  # [B, table_blocks] int32
    seq_lens: cute.Tensor,  # [B] int32
    groups,
    cluster_id,
    clusters,
    warps: cutlass.Constexpr,
    sScan: cute.Tensor,  # [scan_words(warps)] int32
):
    """This cluster's range of the line of steps, found by all `warps` warps of a CTA.

    Warp w sums the weights of its run of requests; where the plan splits, the warp in whose run the range starts then
    scans that run 32 requests at a time. sScan holds the warps' sums, their maxima, the request and its start.
    """
    warp_id, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    B = seq_lens.shape[0]
    rounds = (B + 32 * warps - 1) // (32 * warps)
    first = warp_id * rounds * 32 + lane

    # sum this warp's run
    run, heaviest = Int32(0), Int32(1)
    for i in cutlass.range(rounds, unroll=1):
        request = first + 32 * i
        if request < B:
            own = split.weight(split.pairs(length_of(table, seq_lens, request)), 1, cutlass.max)
            run, heaviest = run + groups * own, cutlass.max(heaviest, own)
    run, heaviest = warp_sum(run), warp_max(heaviest)
    if lane == 0:
        sScan[warp_id] = run
        sScan[warps + warp_id] = heaviest
    cute.arch.sync_threads()
    base, total = Int32(0), Int32(0)
    for w in cutlass.range_constexpr(warps):
        if w < warp_id:
            base = base + sScan[w]
        total, heaviest = total + sScan[w], cutlass.max(heaviest, sScan[warps + w])

    # choose the plan
    even, whole = split.even(total, clusters), split.unsplit(heaviest, B * groups, clusters)
    chunk, floor = whole.chunk, whole.floor
    if split.pays(even, whole):
        chunk, floor = even.chunk, Int32(1)
    else:
        total = whole.total
    start = cluster_id * chunk

    # the warp that holds the start looks for its request
    if floor == 1 and base <= start and start < base + run:
        for i in cutlass.range(rounds, unroll=1):
            request = first + 32 * i
            own = Int32(0)
            if request < B:
                own = groups * split.weight(split.pairs(length_of(table, seq_lens, request)), 1, cutlass.max)
            upto = own
            for d in cutlass.range_constexpr(5):
                below = cute.arch.shuffle_sync_up(upto, offset=1 << d, mask_and_clamp=0)
                if lane >= (1 << d):
                    upto = upto + below
            if start >= base + upto - own and start < base + upto:
                sScan[2 * warps] = request
                sScan[2 * warps + 1] = base + upto - own
            base = base + cute.arch.shuffle_sync(upto, offset=31)
    cute.arch.sync_threads()
    request, begin = start // (floor * groups), start // (floor * groups) * (floor * groups)
    if floor == 1:
        request, begin = sScan[2 * warps], sScan[2 * warps + 1]
    left = cutlass.max(0, cutlass.min(chunk, total - start))
    if left == 0:
        request, begin = Int32(0), start
    item = split.weight(split.pairs(length_of(table, seq_lens, request)), floor, cutlass.max)
    group = (start - begin) // item
    return Work(request, group, start - begin - group * item, left, chunk, floor)
