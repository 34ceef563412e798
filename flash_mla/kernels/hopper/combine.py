"""Combine the partial results of split items: out = sum_i 2^(lse_i - lse) out_i, lse = log2 sum_i 2^lse_i.

Grid [clusters, rows / ROWS_CTA]: CTA x finishes the item that begins in cluster x and goes on in later ones, up to the
last that `split_of` names; most find none and leave. A row belongs to 128 threads, four columns each.
Bound: it reads 4 * 512 * rows bytes a partial result, once, from L2.
Launched with programmatic dependent launch, so its CTAs are resident when the last CTA of the decode kernel ends.
The partial results are added in the order of the clusters: deterministic.
"""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper import split

DV = 512
ROWS_CTA = 4
"""Rows of a CTA."""
THREADS_ROW = DV // 4


@cute.kernel
def combine_kernel(
    out: cute.Tensor,  # [B, rows, 512]
    lse: cute.Tensor,  # [B, rows]
    out_partial: cute.Tensor,  # [2 * clusters, cluster rows, 512]
    lse_partial: cute.Tensor,  # [2 * clusters, cluster rows], base 2
    split_of: cute.Tensor,  # [clusters, 4]
    sink: cute.Tensor,  # [Hq]
    has_sink: Int32,
    S_q: Int32,
):
    cluster_id, tile, _ = cute.arch.block_idx()
    tidx, _, _ = cute.arch.thread_idx()
    cute.arch.griddepcontrol_wait()
    request, group, last = split_of[cluster_id, 0], split_of[cluster_id, 1], split_of[cluster_id, 2]
    cluster_rows = lse_partial.shape[1]
    part_row = tile * ROWS_CTA + tidx // THREADS_ROW
    row = group * cluster_rows + part_row
    if request >= 0 and row < out.shape[1]:
        # NOTE: the first cluster ends inside the item (slot 1), the others start inside it (slot 0)
        begin = split.SLOTS * cluster_id + 1
        largest = lse_partial[begin, part_row]
        for cluster in cutlass.range(cluster_id + 1, last + 1, unroll=4):
            largest = cute.arch.fmax(largest, lse_partial[split.SLOTS * cluster, part_row])
        # a row without keys: keep 2^(-inf - largest) at 0
        largest = cute.arch.fmax(largest, Float32(-1.0e30))

        column = tidx % THREADS_ROW
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
def combine(out, lse, out_partial, lse_partial, split_of, sink, has_sink: Int32, S_q: Int32, stream):
    """Launch the kernel behind the decode kernel of the same stream."""
    clusters, cluster_rows = split_of.shape[0], lse_partial.shape[1]
    combine_kernel(out, lse, out_partial, lse_partial, split_of, sink, has_sink, S_q).launch(
        grid=(clusters, cluster_rows // ROWS_CTA, 1),
        block=(ROWS_CTA * THREADS_ROW, 1, 1),
        use_pdl=True,
        stream=stream,
    )
