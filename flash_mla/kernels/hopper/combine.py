"""Combine the partial results of split items: out = sum_i 2^(lse_i - lse) out_i, lse = log2 sum_i 2^lse_i.

The item that begins in a cluster goes on in later ones, up to the last that `split_of` names. Every warp counts the
items; without any it leaves at once. Where there are many, a warp takes a row of one (65 items of two pieces: latency
binds, so a row's loads are all in flight at once). Where there are so few that most warps would be idle, a CTA takes
128 columns of a row, its warps sharing the pieces (one item of 64).
Bound: it reads 4 * Dv * rows bytes a partial result, once, from L2.
Launched with programmatic dependent launch, so its CTAs are resident when the last CTA of the decode kernel ends.
The partial results are added in a fixed order: deterministic.

Items that are cut into pieces are told by the lengths. A warp takes a row of one, always, so that its pieces are added
in the same order in every batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Boolean, Float32, Int32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.lanes import warp_max
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.table import length_of

WARPS = 8
"""Of a CTA."""
CTAS = 396
"""Of the grid: three for each SM of an H200, as many as its registers hold."""
ROUNDS = 5
"""32 clusters each: a Hopper chip has at most 144 SMs."""
IN_FLIGHT = 8
"""16-byte loads of a lane in flight together."""


@cute.kernel
def combine_kernel(
    out: cute.Tensor,  # [B, heads * rows, Dv]
    lse: cute.Tensor,  # [B, heads * rows]
    out_partial: cute.Tensor,  # [2 * clusters, cluster rows, Dv]
    lse_partial: cute.Tensor,  # [2 * clusters, cluster rows], base 2
    split_of: cute.Tensor,  # [clusters, 4]
    sink: cute.Tensor,  # [Hq]
    has_sink: Int32,
    packing: Packing,
    heads: Int32,
    empty_lse: Float32,
):
    cta, _, _ = cute.arch.block_idx()
    warp_id, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    clusters, cluster_rows = split_of.shape[0], lse_partial.shape[1]
    # of an item, where a KV head has fewer than a cluster takes
    item_rows = cutlass.min(cluster_rows, lse.shape[1] // heads)
    parts = (out.shape[2] + 127) // 128
    smem = utils.SmemAllocator()
    sResult = smem.allocate_tensor(Float32, cute.make_layout((4, 32, WARPS)), 16)
    sBegins = smem.allocate_tensor(Int32, cute.make_layout(32 * ROUNDS), 4)
    cute.arch.griddepcontrol_wait()

    # list the clusters in which split items begin, every warp all of them
    items = Int32(0)
    for i in cutlass.range_constexpr(ROUNDS):
        begins = Boolean(False)
        if 32 * i + lane < clusters:
            begins = split_of[32 * i + lane, 0] >= 0
        vote = cute.arch.vote_ballot_sync(begins)
        if begins:
            sBegins[items + cute.arch.popc(vote & cute.arch.lanemask_lt())] = 32 * i + lane
        items = items + cute.arch.popc(vote)
    cute.arch.sync_threads()

    few = items * item_rows * parts <= 2 * CTAS
    target = Target(out, lse, sink, has_sink, packing, heads, empty_lse, cluster_rows)
    if few:
        unit = cta
        while unit < items * item_rows * parts:
            cluster, part_row = sBegins[unit // (item_rows * parts)], unit // parts % item_rows
            part = unit % parts
            pieces = split_of[cluster, 2] - cluster + 1
            result = cute.make_rmem_tensor(cute.make_layout((4, 1)), Float32)
            largest, total = add_pieces(
                out_partial, lse_partial, cluster, pieces, part_row, part, warp_id, WARPS, result
            )
            cute.autovec_copy(result[None, 0], sResult[None, lane, warp_id])
            cute.arch.sync_threads()
            if warp_id == 0:
                other = cute.make_rmem_tensor(4, Float32)
                for w in cutlass.range_constexpr(1, WARPS):
                    cute.autovec_copy(sResult[None, lane, w], other)
                    for e in cutlass.range_constexpr(4):
                        result[e, 0] = result[e, 0] + other[e]
                request, group = split_of[cluster, 0], split_of[cluster, 1]
                write_row(target, request, group, part_row, part, largest, total, result)
            cute.arch.sync_threads()
            unit = unit + CTAS
    else:
        # NOTE: rows go round the CTAs first, so that all SMs have some
        unit = cta + CTAS * warp_id
        while unit < items * item_rows:
            cluster, part_row = sBegins[unit // item_rows], unit % item_rows
            pieces = split_of[cluster, 2] - cluster + 1
            result = cute.make_rmem_tensor(cute.make_layout((4, parts)), Float32)
            largest, total = add_pieces(out_partial, lse_partial, cluster, pieces, part_row, 0, 0, 1, result)
            request, group = split_of[cluster, 0], split_of[cluster, 1]
            write_row(target, request, group, part_row, 0, largest, total, result)
            unit = unit + CTAS * WARPS


@cute.kernel
def combine_pieces_kernel(
    out: cute.Tensor,  # [B, heads * rows, Dv]
    lse: cute.Tensor,  # [B, heads * rows]
    out_partial: cute.Tensor,  # [B * groups * piece slots, cluster rows, Dv]
    lse_partial: cute.Tensor,  # [B * groups * piece slots, cluster rows], base 2
    table: cute.Tensor,  # [B, table_blocks]
    seq_lens: cute.Tensor,  # [B]
    sink: cute.Tensor,  # [Hq]
    has_sink: Int32,
    packing: Packing,
    heads: Int32,
    groups: Int32,
    empty_lse: Float32,
    piece: cutlass.Constexpr,
):
    cta, _, _ = cute.arch.block_idx()
    warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    cluster_rows = lse_partial.shape[1]
    item_rows = cutlass.min(cluster_rows, lse.shape[1] // heads)
    items = seq_lens.shape[0] * groups
    slots = split.piece_slots(table.shape[1], piece, cutlass.min)
    target = Target(out, lse, sink, has_sink, packing, heads, empty_lse, cluster_rows)
    cute.arch.griddepcontrol_wait()

    unit = cta + CTAS * warp_id
    while unit < items * item_rows:
        item, part_row = unit // item_rows, unit % item_rows
        request = item // groups
        pieces = split.pieces_of(split.pairs(length_of(table, seq_lens, request)), piece, cutlass.max)
        if pieces > 1:
            result = cute.make_rmem_tensor(cute.make_layout((4, (out.shape[2] + 127) // 128)), Float32)
            largest, total = add_pieces(
                out_partial, lse_partial, item * slots, pieces, part_row, 0, 0, 1, result, together=True
            )
            write_row(target, request, item - request * groups, part_row, 0, largest, total, result)
        unit = unit + CTAS * WARPS


class Target(NamedTuple):
    """Where results go, and what a row of an item is there."""

    out: cute.Tensor
    lse: cute.Tensor
    sink: cute.Tensor
    has_sink: Int32
    packing: Packing
    heads: Int32
    empty_lse: Float32
    cluster_rows: int


@cute.jit
def add_pieces(
    out_partial: cute.Tensor,
    lse_partial: cute.Tensor,
    begin,  # the cluster in which the item begins; of pieces that lie together, the slot of the first
    pieces,
    part_row,
    part,
    start,
    step: cutlass.Constexpr,
    result: cute.Tensor,  # [four columns, parts]: parts `part`, `part` + 1, ... of the row, 128 columns each
    together: cutlass.Constexpr = False,  # the item's slots lie side by side
):
    """Sum pieces start, start + step, ... of a row, by a warp; return the largest lse and the weights of all pieces."""
    lane = cute.arch.lane_idx()
    parts = result.shape[1]
    in_flight = min(IN_FLIGHT // parts, 32 // step)
    # a row without keys: keep 2^(-inf - largest) at 0
    largest = Float32(-1.0e30)
    for chunk in cutlass.range(0, pieces, 32, unroll=1):
        largest = cute.arch.fmax(largest, lse_of(lse_partial, begin, chunk + lane, pieces, part_row, together))
    largest = warp_max(largest)

    total = Float32(0.0)
    result.fill(0.0)
    values = cute.make_rmem_tensor(cute.make_layout((4, parts, in_flight)), Float32)
    for chunk in cutlass.range(0, pieces, 32, unroll=1):
        lse = lse_of(lse_partial, begin, chunk + lane, pieces, part_row, together)
        own = cute.math.exp2(lse - largest, fastmath=True)
        total = total + own
        for first in cutlass.range(start, cutlass.min(32, pieces - chunk), in_flight * step, unroll=1):
            for i in cutlass.range_constexpr(in_flight):
                piece = chunk + first + step * i
                if piece < pieces:
                    row = out_partial[slot_of(begin, piece, together), part_row, None]
                    for p in cutlass.range_constexpr(parts):
                        cute.autovec_copy(four_columns(row, part + p), values[None, p, i])
            for i in cutlass.range_constexpr(in_flight):
                weight = cute.arch.shuffle_sync(own, offset=first + step * i)
                if chunk + first + step * i < pieces:
                    for p in cutlass.range_constexpr(parts):
                        for e in cutlass.range_constexpr(4):
                            result[e, p] = result[e, p] + values[e, p, i] * weight
    for i in cutlass.range_constexpr(5):
        total = total + cute.arch.shuffle_sync_bfly(total, offset=1 << i)
    return largest, total


@cute.jit
def four_columns(row: cute.Tensor, part) -> cute.Tensor:
    """The columns of a part of a row that a lane takes; lanes past the end repeat the last."""
    return cute.local_tile(row, (4,), (cutlass.min(32 * part + cute.arch.lane_idx(), row.shape[0] // 4 - 1),))


class RowTile(NamedTuple):
    """Where the rows of an item lie: from row `tile_row` of a KV head's `rows` on, whose first is row `head_row0` of
    the request."""

    head_row0: Int32
    tile_row: Int32
    rows: Int32

    @staticmethod
    def of(target: Target, group) -> RowTile:
        rows = target.lse.shape[1] // target.heads
        # the groups of a request are the row tiles of its first KV head, of its second, ...
        tiles = (rows + target.cluster_rows - 1) // target.cluster_rows
        return RowTile(group // tiles * rows, group % tiles * target.cluster_rows, rows)


@cute.jit
def write_lse(target: Target, request, row, largest, total) -> None:
    """The lse of a row whose weights relative to 2^largest add up to `total`."""
    target.lse[request, target.packing.lse_of(row)] = (
        (largest + cute.math.log2(total, fastmath=True)) * math.log(2.0) if total > 0.0 else target.empty_lse
    )


@cute.jit
def scale_of(target: Target, row, largest, total):
    """What the row's sum is multiplied by, its sink counted."""
    denominator = total
    if target.has_sink != 0:
        sink_log2 = target.sink[target.packing.head_of(row)] * math.log2(math.e)
        denominator = denominator + cute.math.exp2(sink_log2 - largest, fastmath=True)
    return cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)


@cute.jit
def write_row(target: Target, request, group, part_row, part, largest, total, result: cute.Tensor) -> None:
    """Normalise a row, or parts of it, and write it; the warp with its first part writes its lse."""
    out, tile = target.out, RowTile.of(target, group)
    head_row = tile.tile_row + part_row
    row = tile.head_row0 + head_row
    if head_row < tile.rows:
        if part == 0 and cute.arch.lane_idx() == 0:
            write_lse(target, request, row, largest, total)
        scale = scale_of(target, row, largest, total)
        rounded = cute.make_rmem_tensor(4, out.element_type)
        for p in cutlass.range_constexpr(result.shape[1]):
            for e in cutlass.range_constexpr(4):
                rounded[e] = (result[e, p] * scale).to(out.element_type)
            cute.autovec_copy(rounded, four_columns(out[request, row, None], part + p))


def slot_of(begin, piece, together: bool):
    """Where a piece of the item lies."""
    # NOTE: the cluster in which it begins ends inside the item (slot 1), the others start inside it (slot 0)
    return begin + piece if together else split.SLOTS * (begin + piece) + 1 - cutlass.min(piece, 1)


@cute.jit
def lse_of(lse_partial: cute.Tensor, begin, piece, pieces, part_row, together: cutlass.Constexpr):
    """The lse of a row of a piece; -inf past the last."""
    value = -Float32.inf
    if piece < pieces:
        value = lse_partial[slot_of(begin, piece, together), part_row]
    return value


@cute.jit
def combine(out, lse, out_partial, lse_partial, split_of, sink, has_sink, packing, heads, empty_lse, stream):
    """Launch the kernel behind the decode kernel of the same stream.

    has_sink and heads (KV heads): Int32; packing: the order of rows; empty_lse: lse of a row without keys, Float32.
    """
    combine_kernel(out, lse, out_partial, lse_partial, split_of, sink, has_sink, packing, heads, empty_lse).launch(
        grid=(CTAS, 1, 1), block=(32 * WARPS, 1, 1), use_pdl=True, stream=stream
    )


@cute.jit
def combine_partials(tensors, has_sink, packing, heads, groups, empty_lse, stream, piece: cutlass.Constexpr):
    """Launch what a decode call needs, whose items are cut where ranges end or, unless `piece` is 0, into pieces.

    tensors: the call's; groups: items a request; the others as in `combine`.
    """
    out, lse, sink, partials = tensors.out, tensors.lse, tensors.sink, tensors.partials
    if const_expr(piece == 0):
        combine(out, lse, *partials, sink, has_sink, packing, heads, empty_lse, stream)
    else:
        combine_pieces_kernel(
            out, lse, partials.out, partials.lse, tensors.table, tensors.seq_lens, sink, has_sink, packing, heads,
            groups, empty_lse, piece,
        ).launch(grid=(CTAS, 1, 1), block=(32 * WARPS, 1, 1), use_pdl=True, stream=stream)  # fmt: skip
