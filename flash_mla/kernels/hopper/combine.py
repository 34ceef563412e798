"""Combine the partial results of split items: out = sum_i 2^(lse_i - lse) out_i, lse = log2 sum_i 2^lse_i.

The item that begins in a cluster and goes on in later ones, up to the last that `split_of` names, is cut into units: a
row or 128 columns of it, a warp each. Every warp counts the items and takes each W-th unit, so that the work spreads
over the machine whether one item has 32 pieces or 65 items have two; without split items it leaves at once.
Bound: it reads 4 * Dv * rows bytes a partial result, once, from L2.
Launched with programmatic dependent launch, so its CTAs are resident when the last CTA of the decode kernel ends.
The partial results are added in the order of the clusters: deterministic.
"""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from flash_mla.kernels.hopper import split

WARPS = 8
"""Of a CTA."""
CTAS = 528
"""Of the grid: four for each SM of an H200, enough loads in flight for L2 and few enough to start quickly."""
ROUNDS = 5
"""32 clusters each: a Hopper chip has at most 144 SMs."""
WIDTH = 4
"""Columns of a lane; Dv is a multiple of it."""
UNROLL = 8
"""Pieces whose loads are in flight together; divides 32."""


@cute.kernel
def combine_kernel(
    out: cute.Tensor,  # [B, heads * rows, Dv]
    lse: cute.Tensor,  # [B, heads * rows]
    out_partial: cute.Tensor,  # [2 * clusters, cluster rows, Dv]
    lse_partial: cute.Tensor,  # [2 * clusters, cluster rows], base 2
    split_of: cute.Tensor,  # [clusters, 4]
    sink: cute.Tensor,  # [Hq]
    has_sink: Int32,
    S_q: Int32,
    heads: Int32,
):
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    lane = cute.arch.lane_idx()
    # a lane takes WIDTH columns, a warp one of `units_row` parts of a row
    columns = out.shape[2] // WIDTH
    units_row = (columns + 31) // 32
    # the groups of a request are the row tiles of its first KV head, of its second, ...
    clusters, cluster_rows, rows = split_of.shape[0], lse_partial.shape[1], lse.shape[1] // heads
    tiles = (rows + cluster_rows - 1) // cluster_rows
    units_item = cluster_rows * units_row
    unit = cta * WARPS + cute.arch.warp_idx()
    cute.arch.griddepcontrol_wait()

    # number the split items: lane l looks after clusters l, l + 32, ...
    number = cute.make_rmem_tensor(ROUNDS, Int32)
    items = Int32(0)
    for i in cutlass.range_constexpr(ROUNDS):
        number[i] = -1
        begins = Boolean(False)
        if 32 * i + lane < clusters:
            begins = split_of[32 * i + lane, 0] >= 0
        vote = cute.arch.vote_ballot_sync(begins)
        if begins:
            number[i] = items + cute.arch.popc(vote & cute.arch.lanemask_lt())
        items = items + cute.arch.popc(vote)

    while unit < items * units_item:
        cluster = Int32(0)
        for i in cutlass.range_constexpr(ROUNDS):
            if number[i] == unit // units_item:
                cluster = 32 * i + lane
        cluster = cute.arch.warp_redux_sync(cluster, "max")
        request, group, pieces = split_of[cluster, 0], split_of[cluster, 1], split_of[cluster, 2] - cluster + 1
        part_row, part = unit % units_item // units_row, unit % units_row
        head_row = group % tiles * cluster_rows + part_row
        row = group // tiles * rows + head_row
        if head_row < rows:
            # a row without keys: keep 2^(-inf - largest) at 0
            largest = Float32(-1.0e30)
            for first in cutlass.range(0, pieces, 32, unroll=1):
                largest = cute.arch.fmax(largest, lse_of(lse_partial, cluster, first + lane, pieces, part_row))
            for i in cutlass.range_constexpr(5):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << i))

            total = Float32(0.0)
            result = cute.make_rmem_tensor(WIDTH, Float32)
            result.fill(0.0)
            piece = cute.make_rmem_tensor(WIDTH, Float32)
            # NOTE: lanes past the last column load it too, since they hold weights
            column = cutlass.min(32 * part + lane, columns - 1)
            for first in cutlass.range(0, pieces, 32, unroll=1):
                own = cute.math.exp2(
                    lse_of(lse_partial, cluster, first + lane, pieces, part_row) - largest, fastmath=True
                )
                for i in cutlass.range(0, cutlass.min(32, pieces - first), UNROLL, unroll=1):
                    for u in cutlass.range_constexpr(UNROLL):
                        # NOTE: past the last piece the weight is 0, and the last piece is read again
                        weight = cute.arch.shuffle_sync(own, offset=i + u)
                        slot = slot_of(cluster, cutlass.min(first + i + u, pieces - 1))
                        values = out_partial[slot, part_row, None]
                        cute.autovec_copy(cute.local_tile(values, (WIDTH,), (column,)), piece)
                        for e in cutlass.range_constexpr(WIDTH):
                            result[e] = result[e] + piece[e] * weight
                        total = total + weight

            if 32 * part + lane == 0:
                lse[request, row] = (
                    (largest + cute.math.log2(total, fastmath=True)) * math.log(2.0) if total > 0.0 else -Float32.inf
                )
            denominator = total
            if has_sink != 0:
                sink_log2 = sink[row // S_q] * math.log2(math.e)
                denominator = denominator + cute.math.exp2(sink_log2 - largest, fastmath=True)
            scale = cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)
            rounded = cute.make_rmem_tensor(WIDTH, out.element_type)
            for e in cutlass.range_constexpr(WIDTH):
                rounded[e] = (result[e] * scale).to(out.element_type)
            if 32 * part + lane < columns:
                cute.autovec_copy(rounded, cute.local_tile(out[request, row, None], (WIDTH,), (column,)))
        unit = unit + ctas * WARPS


@cute.jit
def slot_of(cluster, piece):
    """Where a piece of the item that begins in a cluster lies."""
    # NOTE: the first cluster ends inside the item (slot 1), the others start inside it (slot 0)
    return split.SLOTS * (cluster + piece) + 1 - cutlass.min(piece, 1)


@cute.jit
def lse_of(lse_partial: cute.Tensor, cluster, piece, pieces, part_row):
    """The lse of a row of a piece; -inf past the last."""
    value = -Float32.inf
    if piece < pieces:
        value = lse_partial[slot_of(cluster, piece), part_row]
    return value


@cute.jit
def combine(out, lse, out_partial, lse_partial, split_of, sink, has_sink: Int32, S_q: Int32, heads: Int32, stream):
    """Launch the kernel behind the decode kernel of the same stream; `heads`: KV heads."""
    combine_kernel(out, lse, out_partial, lse_partial, split_of, sink, has_sink, S_q, heads).launch(
        grid=(CTAS, 1, 1), block=(32 * WARPS, 1, 1), use_pdl=True, stream=stream
    )
