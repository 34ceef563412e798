"""How a cluster finds its range of the work, on the device, from the lengths: `split.py` in the kernels' integers."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.table import length_of


class Work(NamedTuple):
    """A cluster's range: `steps` steps, from `offset` steps into item (request, group) on; and the plan."""

    request: Int32
    group: Int32
    offset: Int32
    steps: Int32
    chunk: Int32
    floor: Int32
    start: Int32

    @staticmethod
    def nothing() -> Work:
        """No steps, before they are found."""
        return Work(*(Int32(0) for _ in Work._fields))


@cute.jit
def warp_sum(value):
    """Sum over the warp, in every lane."""
    return cute.arch.warp_redux_sync(value, "add")


@cute.jit
def warp_max(value):
    """Maximum over the warp, in every lane."""
    return cute.arch.warp_redux_sync(value, "max")


@cute.jit
def warp_scan(value):
    """Sum over the lanes up to and with the own."""
    lane = cute.arch.lane_idx()
    for d in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, offset=1 << d, mask_and_clamp=0)
        if lane >= (1 << d):
            value = value + below
    return value


@cute.jit
def choose(total, heaviest, items, most_items, clusters, start, split_cost, most_parts: cutlass.Constexpr):
    """The plan for `items` items of `total` steps, the heaviest of `heaviest`; `most_items`: a cluster's share."""
    even = split.even(total, items, clusters, start, cutlass.min, cutlass.max)
    whole = split.unsplit(heaviest, items, most_items)
    chunk, total, floor, start = even.chunk, even.total, Int32(1), even.start
    if not split.pays(even, whole, split_cost):
        chunk, total, floor, start = whole.chunk, whole.total, whole.floor, Int32(0)
    elif const_expr(most_parts > 0):
        longer = split.longer(chunk, heaviest, most_parts, cutlass.max)
        if longer <= chunk + split.PATIENCE:
            chunk = longer
    return split.Shares(chunk, total, floor, start)


@cute.jit
def find_equal_work(seq_lens: cute.Tensor, groups, cluster_id, clusters, weight) -> Work:
    """This cluster's range where all items weigh so many steps, and none is split.

    A barrier of the CTA lies inside, as in `find_work`.
    """
    items, chunk = seq_lens.shape[0] * groups, Int32(1)
    # NOTE: a division is 100 cycles
    if items > clusters:
        chunk = (items + clusters - 1) // clusters
    here = cluster_id * chunk
    steps = cutlass.max(0, cutlass.min(chunk, items - here))
    request, group = here if steps > 0 else 0, Int32(0)
    if groups > 1:
        request, group = request // groups, request % groups
    cute.arch.sync_threads()
    return Work(request, group, Int32(0), weight * steps, weight * chunk, weight, Int32(0))


@cute.jit
def find_work(
    table: cute.Tensor,  # [B, table_blocks] int32
    seq_lens: cute.Tensor,  # [B] int32
    groups,
    cluster_id,
    clusters,
    warps: cutlass.Constexpr,
    sScan: cute.Tensor,  # [split.scan_words(warps)] int32
    start: cutlass.Constexpr = 0,  # steps that beginning an item costs
    split_cost: cutlass.Constexpr = split.SPLIT_COST,
    piece: cutlass.Constexpr = 0,  # pairs of a piece (see `walk`); 0: items are cut where ranges end
    most_parts: cutlass.Constexpr = 0,  # into which an item is cut, if that costs little (`split.longer`); 0: any
):
    """This cluster's range of the line of steps, found by all `warps` warps of a CTA.

    Up to 32 requests, a lane each, every warp finds it alone. Beyond, warp w sums the weights of its run of requests;
    where the plan splits, the warp in whose run the range starts then scans that run 32 requests at a time. sScan holds
    the warps' sums, their maxima, the request and its start. A barrier of the CTA lies inside in either case.
    """
    warp_id, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    B = seq_lens.shape[0]
    alone = B <= 32
    rounds = (B + 32 * warps - 1) // (32 * warps)
    first = lane if alone else warp_id * rounds * 32 + lane

    # NOTE: before the lengths are waited for: a division is 100 cycles
    most_items = (B * groups + clusters - 1) // clusters
    # sum this warp's run
    run, heaviest = Int32(0), Int32(1)
    for i in cutlass.range(rounds, unroll=1):
        request = first + 32 * i
        if request < B:
            own = split.weight(split.pairs(length_of(table, seq_lens, request)), 1, cutlass.max)
            run, heaviest = run + groups * own, cutlass.max(heaviest, own)
    upto, own = run, run
    run, heaviest = warp_sum(run), warp_max(heaviest)
    base, total = Int32(0), run
    if not alone:
        if lane == 0:
            sScan[warp_id] = run
            sScan[warps + warp_id] = heaviest
        cute.arch.sync_threads()
        sums = Int32(0)
        if lane < warps:
            sums, heaviest = sScan[lane], sScan[warps + lane]
        base, total, heaviest = warp_sum(sums if lane < warp_id else 0), warp_sum(sums), warp_max(heaviest)

    if const_expr(piece > 0):
        chunk, floor, start = (total + clusters - 1) // clusters, Int32(1), Int32(0)
    else:
        chunk, total, floor, start = choose(
            total, heaviest, B * groups, most_items, clusters, Int32(start), split_cost, most_parts
        )
    # where the range starts, and the request there
    here = cluster_id * chunk
    request, begin = Int32(0), Int32(0)
    if floor > 1:
        request = here // (floor * groups)
        begin = request * (floor * groups)
    base = base + groups * start * cutlass.min(warp_id * rounds * 32, B)
    run = run + groups * start * cutlass.max(0, cutlass.min(rounds * 32, B - warp_id * rounds * 32))
    if alone and floor == 1:
        if lane < B:
            own = own + groups * start
        upto = warp_scan(own)
        request = warp_max(lane if here >= upto - own and here < upto else 0)
        begin = cute.arch.shuffle_sync(upto - own, offset=request)
    # the warp that holds the start looks for its request
    if not alone and floor == 1 and base <= here and here < base + run:
        for i in cutlass.range(rounds, unroll=1):
            candidate = first + 32 * i
            own = Int32(0)
            if candidate < B:
                pairs = split.pairs(length_of(table, seq_lens, candidate))
                own = groups * split.weight(pairs, 1, cutlass.max, start)
            upto = base + warp_scan(own)
            if here >= upto - own and here < upto:
                sScan[2 * warps] = candidate
                sScan[2 * warps + 1] = upto - own
            base = cute.arch.shuffle_sync(upto, offset=31)
    cute.arch.sync_threads()
    if not alone and floor == 1:
        request, begin = sScan[2 * warps], sScan[2 * warps + 1]
    left = cutlass.max(0, cutlass.min(chunk, total - here))
    if left == 0:
        request, begin = Int32(0), here
    item = split.weight(split.pairs(length_of(table, seq_lens, request)), floor, cutlass.max, start)
    group = Int32(0)
    if groups > 1:
        group = (here - begin) // item
    return Work(request, group, here - begin - group * item, left, chunk, floor, start)
