"""Combine the partial results of split items: out = sum_i 2^(lse_i - lse) out_i, lse = log2 sum_i 2^lse_i.

Grid [clusters, rows / ROWS_CTA]: CTA x finishes the item that begins in cluster x and goes on in later ones, up to the
last that `split_of` names; most find none and leave. A row belongs to Dv / 4 threads, four columns each.
Bound: it reads 4 * Dv * rows bytes a partial result, once, from L2.
Launched with programmatic dependent launch, so its CTAs are resident when the last CTA of the decode kernel ends.
The partial results are added in the order of the clusters: deterministic.
"""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper import split

ROWS_CTA = 4
"""Rows of a CTA; a cluster's rows are a multiple of it."""


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
    threads_row: cutlass.Constexpr,
):
    cluster_id, tile, _ = cute.arch.block_idx()
    tidx, _, _ = cute.arch.thread_idx()
    cute.arch.griddepcontrol_wait()
    request, group, last = split_of[cluster_id, 0], split_of[cluster_id, 1], split_of[cluster_id, 2]
    # the groups of a request are the row tiles of its first KV head, of its second, ...
    cluster_rows, rows = lse_partial.shape[1], lse.shape[1] // heads
    tiles = (rows + cluster_rows - 1) // cluster_rows
    part_row = tile * ROWS_CTA + tidx // threads_row
    head_row = group % tiles * cluster_rows + part_row
    row = group // tiles * rows + head_row
    if request >= 0 and head_row < rows:
        # NOTE: the first cluster ends inside the item (slot 1), the others start inside it (slot 0)
        begin = split.SLOTS * cluster_id + 1
        largest = lse_partial[begin, part_row]
        for cluster in cutlass.range(cluster_id + 1, last + 1, unroll=4):
            largest = cute.arch.fmax(largest, lse_partial[split.SLOTS * cluster, part_row])
        # a row without keys: keep 2^(-inf - largest) at 0
        largest = cute.arch.fmax(largest, Float32(-1.0e30))

        column = tidx % threads_row
        total = cute.math.exp2(lse_partial[begin, part_row] - largest, fastmath=True)
        result = cute.make_rmem_tensor(4, Float32)
        part = cute.make_rmem_tensor(4, Float32)
        cute.autovec_copy(cute.local_tile(out_partial[begin, part_row, None], (4,), (column,)), part)
        for i in cutlass.range_constexpr(4):
            result[i] = part[i] * total
        for cluster in cutlass.range(cluster_id + 1, last + 1, unroll=4):
            weight = cute.math.exp2(lse_partial[split.SLOTS * cluster, part_row] - largest, fastmath=True)
            cute.autovec_copy(
                cute.local_tile(out_partial[split.SLOTS * cluster, part_row, None], (4,), (column,)), part
            )
            for i in cutlass.range_constexpr(4):
                result[i] = result[i] + part[i] * weight
            total = total + weight

        if column == 0:
            lse[request, row] = (
                (largest + cute.math.log2(total, fastmath=True)) * math.log(2.0) if total > 0.0 else -Float32.inf
            )
        denominator = total
        if has_sink != 0:
            sink_log2 = sink[row // S_q] * math.log2(math.e)
            denominator = denominator + cute.math.exp2(sink_log2 - largest, fastmath=True)
        scale = cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)
        rounded = cute.make_rmem_tensor(4, out.element_type)
        for i in cutlass.range_constexpr(4):
            rounded[i] = (result[i] * scale).to(out.element_type)
        cute.autovec_copy(rounded, cute.local_tile(out[request, row, None], (4,), (column,)))


@cute.jit
def combine(out, lse, out_partial, lse_partial, split_of, sink, has_sink: Int32, S_q: Int32, heads: Int32, stream):
    """Launch the kernel behind the decode kernel of the same stream; `heads`: KV heads."""
    clusters, cluster_rows = split_of.shape[0], lse_partial.shape[1]
    threads_row = out_partial.shape[2] // 4
    combine_kernel(out, lse, out_partial, lse_partial, split_of, sink, has_sink, S_q, heads, threads_row).launch(
        grid=(clusters, cluster_rows // ROWS_CTA, 1),
        block=(ROWS_CTA * threads_row, 1, 1),
        use_pdl=True,
        stream=stream,
    )
