"""What a consumer warpgroup of an MLA decode does with a segment: compute it and write its half of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.lanes import quad_sum
from flash_mla.kernels.hopper.limits import STAGED, TILE_M
from flash_mla.kernels.hopper.mla_decode.config import CONSUMERS, HALF, Bar
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer
from flash_mla.kernels.hopper.mla_decode.pairs import Causal, Masked, consume_left, consume_right
from flash_mla.kernels.hopper.mla_decode.shared import Scalars
from flash_mla.kernels.hopper.partials import slot_of
from flash_mla.kernels.hopper.staging import store_rows
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class Segments:
    """What a consumer warpgroup does with the segments of its cluster, of which this CTA is number `rank`."""

    consumer: Consumer
    tensors: Tensors
    scalars: Scalars
    rank: Int32
    cluster_id: Int32

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of an empty request, zeros."""
        consumer = self.consumer
        row0 = (place.group * consumer.config.sharers + self.rank) * TILE_M
        if part.last > part.first:
            self.attend_pairs(place.request, row0, length, part, done)
            done = done.plus(part.last - part.first)
            table, groups, piece = self.tensors.table, self.scalars.groups, consumer.config.piece
            slot = slot_of(place, part, self.cluster_id, groups, table, piece)
            self.write_result(place.request, row0, part.whole, slot)
        elif const_expr(consumer.side == 0):  # noqa: SIM102
            if part.whole:
                self.write_nothing(place.request, row0)
        return done

    @cute.jit
    def attend_pairs(self, request, row0, length, part: split.Segment, done: Done) -> None:
        """O, maxima and sums of the pairs of a segment."""
        consumer = self.consumer
        consumer.start(row0, length, self.scalars.packing)
        consumer.shared.q.wait(0, done.segments)
        keys = self.keys(request, row0, length)
        if const_expr(consumer.side == 0):
            consume_left(consumer, keys, part.first, part.last, done.items)
        else:
            consume_right(consumer, keys, part.first, part.last, done.items)

    def end(self, _row0):
        """Where the rows end that a tile from row `row0` on may write."""
        return self.tensors.out.shape[1]

    def keys(self, request, row0, length) -> Causal:
        """The keys that the rows from `row0` of a request on may see."""
        S_q = self.scalars.packing.S_q
        if self.consumer.config.masked:
            return Masked(length, S_q, self.tensors.mask, request, row0)
        return Causal(length, S_q)

    @cute.jit
    def add_sums(self) -> None:
        """The sums of the four threads of a row, added, to shared memory, where both warpgroups find them."""
        rows, sSum = self.consumer.rows, self.consumer.shared.sSum
        for r in cutlass.range_constexpr(2):
            total = quad_sum(rows.sum[r])
            if self.consumer.tid % 4 == 0:
                sSum[rows.first + 8 * r, self.consumer.side] = total
        sync(Bar.SUMS, CONSUMERS)

    @cute.jit
    def write_result(self, request, row0, whole, slot) -> None:
        """Normalise O and write it: to out and lse if the segment is a whole item, else to the partial slot."""
        consumer, tensors, partials = self.consumer, self.tensors, self.tensors.partials
        packing = self.scalars.packing
        rows_of, side, sSum = consumer.rows, consumer.side, consumer.shared.sSum
        global_lse, lse_partial, rows = tensors.lse, partials.lse, self.end(row0)
        first_lane, empty_lse = consumer.tid % 4 == 0, self.scalars.empty_lse
        self.add_sums()
        scales = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            tile_row = rows_of.first + 8 * r
            row = row0 + tile_row
            total = sSum[tile_row, 0] + sSum[tile_row, 1]
            lse = rows_of.max[r] + cute.math.log2(total, fastmath=True)
            lse = lse if total > 0.0 else -Float32.inf
            writes = side == 0 and first_lane
            if whole:
                if row < rows:
                    if writes:
                        global_lse[request, packing.lse_of(row)] = lse * math.log(2.0) if total > 0.0 else empty_lse
                    if self.scalars.has_sink != 0:
                        sink = tensors.sink[packing.head_of(row)] * math.log2(math.e)
                        total = total + cute.math.exp2(sink - rows_of.max[r], fastmath=True)
            elif writes:
                lse_partial[slot, self.rank * TILE_M + tile_row] = lse
            # NOTE: a row without keys has O = 0 and, with a sink, a total above 0; without, 0 * inf would be NaN
            scales[r] = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
        if whole:
            store_out(consumer, tensors.out, request, row0, scales)
        else:
            for r in cutlass.range_constexpr(2):
                tile_row = rows_of.first + 8 * r
                if row0 + tile_row < rows:
                    store_partial(consumer, r, partials.out[slot, self.rank * TILE_M + tile_row, None], scales[r])
        # NOTE: the sums may be overwritten by the next segment only when both warpgroups have read them
        sync(Bar.SUMS, CONSUMERS)

    @cute.jit
    def write_nothing(self, request, row0, tile_rows: cutlass.Constexpr = TILE_M) -> None:
        """An empty request: out 0."""
        out, lse, tid = self.tensors.out, self.tensors.lse, self.consumer.tid
        zeros = cute.make_rmem_tensor(8, out.element_type)
        zeros.fill(0.0)
        for i in cutlass.range(tile_rows // 2, unroll=1):
            row = row0 + 2 * i + tid // 64
            if row < out.shape[1]:
                cute.autovec_copy(zeros, cute.local_tile(out[request, row, None], (8,), (tid % 64,)))
                if tid % 64 == 0:
                    lse[request, self.scalars.packing.lse_of(row)] = self.scalars.empty_lse


@cute.jit
def store_partial(consumer: Consumer, r: cutlass.Constexpr, row: cute.Tensor, scale) -> None:
    """One row's part of this thread, scaled: 8 bytes of it, 32 of the row, an instruction."""
    two = cute.make_rmem_tensor(2, Float32)
    for j in cutlass.range_constexpr(HALF // 8):
        for e in cutlass.range_constexpr(2):
            two[e] = consumer.O[4 * j + 2 * r + e] * scale
        columns = HALF // 2 * consumer.side + 4 * j + consumer.rows.column // 2
        cute.autovec_copy(two, cute.local_tile(row, (2,), (columns,)))


@cute.jit
def store_out(consumer: Consumer, out: cute.Tensor, index, row0, scales: cute.Tensor) -> None:
    """This warpgroup's half of the columns, scaled, to out[index, row0 ..]."""
    staged = consumer.shared.staged + (4 * consumer.side + consumer.tid // 32) * STAGED
    store_rows(consumer.O, scales, staged, out[index, None, None], row0, HALF * consumer.side, consumer.tid)
