"""A team: the CTAs of a cluster that compute a few pairs of blocks each of one item, and merge their results in place.

Each leaves its partial result in its own shared memory. Behind a barrier of the cluster a CTA reads a share of the
columns of all (distributed shared memory), adds them, and writes them to out. Where several teams compute an item, it
writes them to the workspace, and the last of those CTAs to arrive at a counter adds the teams' results, in their order.
So a call is one launch, and little of it passes through L2.

Where a call has teams for all that its table has room for, what a CTA computes follows without a search.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from flash_mla.kernels.hopper import combine, split
from flash_mla.kernels.hopper.barriers import any_of, sync
from flash_mla.kernels.hopper.combine import Target
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.partials import Partials
from flash_mla.kernels.hopper.softmax import LOW
from flash_mla.kernels.hopper.table import length_of
from flash_mla.kernels.hopper.walk import Place

VECTOR = 4
"""Columns that a thread merges at a time."""
PADDING = 8
"""FP32 elements between rows of results in shared memory: stores of eight rows then have no bank conflicts."""
IN_FLIGHT = 4
"""Teams' results that a thread loads together."""


class Share(NamedTuple):
    """What a CTA of a team does: some pairs of an item, or nothing.

    part: the pairs; ids: the blocks of the first, as the table has them; busy: whether there is something to write,
    zeros of an empty request too; active: CTAs of the team that have a pair; teams: those that compute some of the
    item; first: the first of them.
    """

    place: Place
    length: Int32
    part: split.Segment
    ids: tuple[Int32, Int32]
    busy: Boolean
    active: Int32
    teams: Int32
    first: Int32


class Post(NamedTuple):
    """Where a team stands: it is number `team` of the `teams` of an item."""

    request: Int32
    group: Int32
    team: Int32
    teams: Int32


@cute.jit
def find_post(cluster_id, groups, teams) -> Post:
    """Items lie one after another, each with so many teams."""
    item, team = cluster_id, Int32(0)
    # NOTE: a division is 100 cycles
    if teams > 1:
        item, team = cluster_id // teams, cluster_id % teams
    request, group = item, Int32(0)
    if groups > 1:
        request, group = item // groups, item % groups
    return Post(request, group, team, teams)


@cute.jit
def find_share(
    table: cute.Tensor,  # [B, table_blocks] int32
    seq_lens: cute.Tensor,  # [B] int32
    groups,
    cluster_id,
    member,
    members: cutlass.Constexpr,
    each: cutlass.Constexpr = 1,  # pairs of a CTA, at most
) -> Share:
    """This CTA's share, where each item has as many teams as the table has room for.

    A barrier of the CTA lies inside, as in `find_work`.
    """
    width = table.shape[1]
    post = find_post(cluster_id, groups, split.teams(width, members * each, cutlass.max))
    ids = Int32(0), Int32(0)
    if const_expr(each == 1):
        # NOTE: asked for beside the length, not behind it: a short call is a chain of latencies
        pair = post.team * members + member
        ids = tuple(table[post.request, cutlass.min(2 * pair + i, width - 1)] for i in range(2))
    length = length_of(table, seq_lens, post.request)
    return share_of(post, length, ids, cluster_id, member, members, each)


@cute.jit
def share_of(
    post: Post,
    length,
    ids: tuple[Int32, Int32],
    cluster_id,
    member,
    members: cutlass.Constexpr,
    each: cutlass.Constexpr,  # 1, or more: as many as there are teams for
) -> Share:
    """This CTA's share of an item of so many keys. A barrier of the CTA lies inside."""
    pairs = split.pairs(length)
    own = split.portion(pairs, post.team, post.teams, member, members, each, cutlass.min, cutlass.max)
    part = split.Segment(own.first, own.last, pairs, own.last - own.first, False, 0)
    busy = own.first < own.last or (pairs == 0 and post.team == 0 and member == 0)
    cute.arch.sync_threads()
    place = Place(post.request, post.group, Int32(0), Int32(1))
    return Share(place, length, part, ids, busy, own.active, own.needed, cluster_id - post.team)


@cute.jit
def meet() -> None:
    """Wait for all threads of the cluster; what they wrote before is then seen."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


@cute.jit
def leave() -> None:
    """Wait for all threads of the cluster, not for what they wrote: a CTA's shared memory must outlive its readers."""
    cute.arch.cluster_arrive_relaxed()
    cute.arch.cluster_wait()


def results_at(partials: Partials, base: cute.Pointer, rows: int, columns: int) -> Partials:
    """In place of the workspace's, a CTA's own partial result at an FP32 pointer to shared memory: one slot."""
    pitch = columns + PADDING
    return partials._replace(
        out=cute.make_tensor(base, cute.make_layout((1, rows, columns), stride=(0, pitch, 1))),
        lse=cute.make_tensor(base + rows * pitch, cute.make_layout((1, rows), stride=(0, 1))),
    )


def result_words(rows: int, columns: int) -> int:
    """32-bit words of it."""
    return rows * (columns + PADDING + 1)


class Rows(NamedTuple):
    """The rows of an item: `count` of them, from row `first` of the request on."""

    first: Int32
    count: Int32

    @staticmethod
    def of(target: Target, group) -> Rows:
        head_row0, tile_row, rows = combine.RowTile.of(target, group)
        return Rows(head_row0 + tile_row, cutlass.min(target.cluster_rows, rows - tile_row))


@cute.jit
def stand_by(share: Share) -> None:
    """What a warp without a result does where its CTA's are merged."""
    if share.active > 0:
        meet()
        leave()


@cute.jit
def merge(
    results: Partials,  # of each CTA, at the same place of its shared memory
    tensors: Tensors,  # partials: a team's in slot cluster_id; counters [at least CTAs] int32, 0
    scalars,  # of the kernel: has_sink, packing and empty_lse are read
    heads,  # KV heads
    rows: cutlass.Constexpr,  # of a CTA
    share: Share,
    cluster_id,
    member,
    members: cutlass.Constexpr,
    tid,
    threads: cutlass.Constexpr,
    bar: cutlass.Constexpr,  # a named barrier of these threads
) -> None:
    """Add this CTA's share of the team's results and write it, by so many threads; the others of the CTA stand by."""
    if share.active > 0:
        target = Target(
            tensors.out, tensors.lse, tensors.sink, scalars.has_sink, scalars.packing, heads, scalars.empty_lse, rows
        )
        meet()
        of_item, unit, step = Rows.of(target, share.place.group), member * threads + tid, members * threads
        # NOTE: where all read once more what the last has, in place of nothing, they wait for its memory: up to 7 us
        if share.active == members:
            merge_members(results, tensors.partials, target, share, of_item, cluster_id, members, unit, step, True)
        else:
            merge_members(results, tensors.partials, target, share, of_item, cluster_id, members, unit, step, False)
        if share.teams > 1:
            last = Int32(0)
            cute.arch.fence_acq_rel_gpu()
            sync(bar, threads)
            if tid == 0:
                last = arrive_last(tensors.counters.iterator + (share.first * members + member), share.teams)
            if any_of(bar, threads, last) != 0:
                cute.arch.fence_acq_rel_gpu()
                merge_teams(tensors.partials, target, share, of_item, unit, step)
        leave()


@cute.jit
def merge_members(
    results: Partials,
    partials: Partials,
    target: Target,
    share: Share,
    rows: Rows,
    slot,  # of the team
    members: cutlass.Constexpr,
    unit,
    step: cutlass.Constexpr,
    full: cutlass.Constexpr,  # whether each CTA has a result
) -> None:
    """Add the results of a team's CTAs, units `unit`, `unit` + step, ..., and write them: a team's alone to out."""
    vectors = results.out.shape[2] // VECTOR
    values = cute.make_rmem_tensor(cute.make_layout((VECTOR, members)), Float32)
    lse = cute.make_rmem_tensor(members, Float32)
    result = cute.make_rmem_tensor(VECTOR, Float32)
    while unit < rows.count * vectors:
        row, vector = unit // vectors, unit % vectors
        for p in cutlass.range_constexpr(members):
            live = None if const_expr(full) else p < share.active
            lse[p] = load_peer(results.lse.iterator + row, p, 1, live)
            place = results.out.iterator + (row * results.out.stride[1] + vector * VECTOR)
            words = load_peer(place, p, VECTOR, live)
            for e in cutlass.range_constexpr(VECTOR):
                values[e, p] = words[e]
            if const_expr(not full):
                lse[p] = lse[p] if live else -Float32.inf
        result.fill(0.0)
        largest, total = add(result, Float32(LOW), Float32(0.0), values, lse, members)
        if share.teams == 1:
            write(target, share.place.request, rows.first + row, vector, result, largest, total)
        else:
            scale = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
            for e in cutlass.range_constexpr(VECTOR):
                result[e] = result[e] * scale
            cute.autovec_copy(result, cute.local_tile(partials.out[slot, row, None], (VECTOR,), (vector,)))
            if vector == 0:
                lse2 = largest + cute.math.log2(total, fastmath=True) if total > 0.0 else -Float32.inf
                partials.lse[slot, row] = lse2
        unit = unit + step


@cute.jit
def merge_teams(partials: Partials, target: Target, share: Share, rows: Rows, unit, step: cutlass.Constexpr) -> None:
    """Add the teams' results of units `unit`, `unit` + step, ... and write them."""
    vectors = partials.out.shape[2] // VECTOR
    values = cute.make_rmem_tensor(cute.make_layout((VECTOR, IN_FLIGHT)), Float32)
    lse, result = cute.make_rmem_tensor(IN_FLIGHT, Float32), cute.make_rmem_tensor(VECTOR, Float32)
    while unit < rows.count * vectors:
        row, vector = unit // vectors, unit % vectors
        largest, total = Float32(LOW), Float32(0.0)
        result.fill(0.0)
        for team in cutlass.range(0, share.teams, IN_FLIGHT, unroll=1):
            for i in cutlass.range_constexpr(IN_FLIGHT):
                slot = share.first + cutlass.min(team + i, share.teams - 1)
                lse[i] = partials.lse[slot, row]
                source = cute.local_tile(partials.out[slot, row, None], (VECTOR,), (vector,))
                cute.autovec_copy(source, values[None, i])
            largest, total = add(result, largest, total, values, lse, share.teams - team)
        write(target, share.place.request, rows.first + row, vector, result, largest, total)
        unit = unit + step


@cute.jit
def add(result: cute.Tensor, largest, total, values: cute.Tensor, lse: cute.Tensor, active):
    """Add the first `active` of some partial results to a sum of weight `total` relative to 2^largest; both anew."""
    new = largest
    for p in cutlass.range_constexpr(cute.size(lse)):
        new = cute.arch.fmax(new, lse[p])
    # a row without keys: keep 2^(-inf - new) at 0
    factor = cute.math.exp2(largest - new, fastmath=True)
    total = total * factor
    for e in cutlass.range_constexpr(VECTOR):
        result[e] = result[e] * factor
    for p in cutlass.range_constexpr(cute.size(lse)):
        weight = cute.math.exp2(lse[p] - new, fastmath=True) if p < active else Float32(0.0)
        total = total + weight
        for e in cutlass.range_constexpr(VECTOR):
            result[e] = result[e] + values[e, p] * weight
    return new, total


@cute.jit
def write(target: Target, request, row, vector, result: cute.Tensor, largest, total) -> None:
    """Normalise four columns of a row and write them; lse with the first."""
    scale = combine.scale_of(target, row, largest, total)
    rounded = cute.make_rmem_tensor(VECTOR, target.out.element_type)
    for e in cutlass.range_constexpr(VECTOR):
        rounded[e] = (result[e] * scale).to(rounded.element_type)
    cute.autovec_copy(rounded, cute.local_tile(target.out[request, row, None], (VECTOR,), (vector,)))
    if vector == 0:
        combine.write_lse(target, request, row, largest, total)


@cute.jit
def arrive_last(counter: cute.Pointer, arrivals):
    """Arrive at a counter; whether (int 0 or 1) so many have arrived now: it is 0 again then."""
    before = cute.arch.inline_ptx(
        "atom.acq_rel.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
        write_only_types=[Int32],
        read_only_args=[counter.toint(), Int32(arrivals - 1)],
    )
    return Int32(1) if before == arrivals - 1 else Int32(0)


@cute.jit
def load_peer(place: cute.Pointer, peer, count: cutlass.Constexpr, live):
    """So many FP32 words at a place in the shared memory of another CTA of the cluster; zeros unless `live`."""
    address = cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Int32],
        read_only_args=[place.toint(), Int32(peer)],
    )
    each = [f"{{$w{i}}}" for i in range(count)]
    kind, words = (f".v{count}", f"{{{', '.join(each)}}}") if count > 1 else ("", each[0])
    load = f"ld.shared::cluster{kind}.f32 {words}, [{{$r0}}];"
    if const_expr(live is not None):
        zeros = " ".join(f"mov.f32 {word}, 0f00000000;" for word in each)
        load = f"{{ .reg .pred q; setp.ne.s32 q, {{$r1}}, 0; {zeros} @q {load} }}"
    return cute.arch.inline_ptx(
        load,
        write_only_types=[Float32] * count,
        read_only_args=[address] if const_expr(live is None) else [address, Int32(live)],
    )
