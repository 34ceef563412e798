"""What the consumer warpgroups of a GQA decode do with a segment: compute it, merge their halves, write the result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.gqa_decode.config import CONSUMERS, Bar
from flash_mla.kernels.hopper.gqa_decode.consumer import Consumer, consume
from flash_mla.kernels.hopper.gqa_decode.shared import Item, Scalars
from flash_mla.kernels.hopper.limits import TILE_M
from flash_mla.kernels.hopper.partials import slot_of
from flash_mla.kernels.hopper.walk import Done, Place, block_range


@dataclass(frozen=True)
class Segments:
    """What a consumer warpgroup does with the segments of its CTA."""

    consumer: Consumer
    tensors: Tensors
    scalars: Scalars
    cta: Int32

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of an empty request, zeros."""
        tensors, scalars, item = self.tensors, self.scalars, Item.at(place, self.scalars)
        if part.last > part.first:
            first, last = block_range(part, length)
            scale, v_scale = scalars.scale_log2, Float32(1.0)
            if const_expr(self.consumer.config.descale):
                q_scale = tensors.q_descale[item.request, item.head]
                scale = scale * q_scale * tensors.k_descale[item.request, item.head]
                v_scale = tensors.v_descale[item.request, item.head]
            self.consumer.start()
            consume(self.consumer, scalars, item, scale, first, last, length, done, tensors.mask)
            piece = self.consumer.config.piece
            slot = slot_of(place, part, self.cta, scalars.groups, tensors.table, piece)
            self.write_result(item, v_scale, part.whole, slot)
            done = done.plus(last - first)
        else:
            self.write_nothing(item)
        return done

    @cute.jit
    def write_result(self, item: Item, v_scale, whole, slot) -> None:
        """Merge the warpgroups, normalise, and write: to out and lse if the segment is a whole item, else to its slot.

        Each warpgroup gives every second O^T tile to the other and finishes the rest, as many pairs of tiles at a time
        as the exchange holds.
        """
        consumer, tensors, shared = self.consumer, self.tensors, self.consumer.shared
        side, tid, tiles, N = consumer.side, consumer.tid, consumer.config.tiles_m, consumer.config.tile_n
        exchange, factor = shared.exchange, consumer.factor
        self.merge_rows(item, v_scale, whole, slot)
        inverse = cute.make_rmem_tensor(N // 4, Float32)
        for c in cutlass.range_constexpr(N // 4):
            factor[c], inverse[c] = shared.sMax[consumer.row(c), side], shared.sSum[consumer.row(c), 0]
        pairs, depth = (tiles + 1) // 2, cute.size(exchange, mode=[3])
        kept = cute.make_rmem_tensor((N // 2, depth), Float32)
        for first in cutlass.range_constexpr(0, pairs, depth):
            if first > 0:
                sync(Bar.MERGE, CONSUMERS)
            count = min(depth, pairs - first)
            for j in cutlass.range_constexpr(count):
                pair = first + j
                for i in cutlass.range_constexpr(N // 2):
                    c = 2 * (i // 4) + i % 2
                    left, right = consumer.O[pair * N + i], Float32(0.0)
                    if const_expr(2 * pair + 1 < tiles):
                        right = consumer.O[pair * N + N // 2 + i]
                    kept[i, j] = (left if side == 0 else right) * factor[c]
                    exchange[tid, i, side, j] = (right if side == 0 else left) * factor[c]
            sync(Bar.MERGE, CONSUMERS)
            for j in cutlass.range_constexpr(count):
                for i in cutlass.range_constexpr(N // 2):
                    kept[i, j] = (kept[i, j] + exchange[tid, i, 1 - side, j]) * inverse[2 * (i // 4) + i % 2]
            some = [2 * (first + j) + side for j in range(count)]
            if whole:
                self.store_tiles(tensors.out, item.request, item.head * self.scalars.rows, item, some, kept)
            else:
                self.store_tiles(tensors.partials.out, slot, -item.tile * N, item, some, kept)
        # NOTE: the exchange is P's memory: the next segment may write P only when both warpgroups have read it
        sync(Bar.MERGE, CONSUMERS)

    @cute.jit
    def merge_rows(self, item: Item, v_scale, whole, slot) -> None:
        """lse of each row; what either warpgroup's O is to be multiplied by to sMax, and their sum to sSum[row, 0].

        NOTE: one thread a row. Code that runs once is fetched from memory: a copy of this for each of a thread's rows
        was a third of the instructions of a segment's end.
        """
        consumer, tensors, scalars, N = self.consumer, self.tensors, self.scalars, self.consumer.config.tile_n
        shared, side, tid = consumer.shared, consumer.side, consumer.tid
        sSum, sMax, lane, warp_id = shared.sSum, shared.sMax, tid % 32, tid // 32
        global_lse, lse_partial, empty_lse = tensors.lse, tensors.partials.lse, scalars.empty_lse
        for c in cutlass.range_constexpr(N // 4):
            total = consumer.row_sum[c]
            for offset in (4, 8, 16):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
            if lane < 4:
                sSum[consumer.row(c), 4 * side + warp_id] = total
                if warp_id == 0:
                    sMax[consumer.row(c), side] = consumer.row_max[c]
        sync(Bar.MERGE, CONSUMERS)
        if side == 0 and tid < N:
            head_row = item.tile * N + tid
            max0, max1 = sMax[tid, 0], sMax[tid, 1]
            row_max = cute.arch.fmax(max0, max1)
            sum0, sum1 = sSum[tid, 0], sSum[tid, 4]
            for w in cutlass.range_constexpr(1, 4):
                sum0, sum1 = sum0 + sSum[tid, w], sum1 + sSum[tid, 4 + w]
            factor0 = cute.math.exp2(max0 - row_max, fastmath=True)
            factor1 = cute.math.exp2(max1 - row_max, fastmath=True)
            total = sum0 * factor0 + sum1 * factor1
            lse = row_max + cute.math.log2(total, fastmath=True) if total > 0.0 else -Float32.inf
            denominator = total
            if head_row < scalars.rows:
                out_row = item.head * scalars.rows + head_row
                if whole:
                    place = scalars.packing.lse_of(out_row)
                    global_lse[item.request, place] = lse * math.log(2.0) if total > 0.0 else empty_lse
                else:
                    lse_partial[slot, tid] = lse
                if whole and scalars.has_sink != 0:
                    sink = tensors.sink[scalars.packing.head_of(out_row)] * math.log2(math.e)
                    denominator = denominator + cute.math.exp2(sink - row_max, fastmath=True)
            sMax[tid, 0], sMax[tid, 1] = factor0, factor1
            sSum[tid, 0] = v_scale * cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)
        sync(Bar.MERGE, CONSUMERS)

    @cute.jit
    def store_tiles(self, target: cute.Tensor, index, row0, item: Item, tiles: list, kept: cute.Tensor) -> None:
        """O^T tiles, kept[:, j] the j-th, to target[index, row0 + row of the KV head, column]."""
        consumer, config = self.consumer, self.consumer.config
        lane, warp_id = consumer.tid % 32, consumer.tid // 32
        # known here where pairs of tiles fill the columns
        full = config.Dv % (2 * TILE_M) == 0
        two = cute.make_rmem_tensor(2, target.element_type)
        for c in cutlass.range_constexpr(config.tile_n // 4):
            head_row = item.tile * config.tile_n + consumer.row(c)
            i = 4 * (c // 2) + c % 2
            if head_row < self.scalars.rows:
                row = target[index, row0 + head_row, None]
                for j in cutlass.range_constexpr(len(tiles)):
                    group = tiles[j] * TILE_M + warp_id * 16
                    if const_expr(config.fp8):
                        inside = True if const_expr(full) else group + lane // 4 * 2 < config.Dv
                        if inside:
                            two[0], two[1] = (kept[i + 2 * half, j].to(target.element_type) for half in range(2))
                            cute.autovec_copy(two, cute.local_tile(row, (2,), (group // 2 + lane // 4,)))
                    else:
                        for half in cutlass.range_constexpr(2):
                            column = group + lane // 4 + 8 * half
                            inside = True if const_expr(full) else column < config.Dv
                            if inside:
                                row[column] = kept[i + 2 * half, j].to(target.element_type)

    @cute.jit
    def write_nothing(self, item: Item) -> None:
        """An empty request: out 0."""
        consumer, config, out, lse = self.consumer, self.consumer.config, self.tensors.out, self.tensors.lse
        row0 = item.head * self.scalars.rows + item.tile * config.tile_n
        rows = cutlass.min(config.tile_n, self.scalars.rows - item.tile * config.tile_n)
        for i in cutlass.range(128 * consumer.side + consumer.tid, rows * config.Dv, CONSUMERS, unroll=1):
            out[item.request, row0 + i // config.Dv, i % config.Dv] = Float32(0.0).to(out.element_type)
            if i % config.Dv == 0:
                lse[item.request, self.scalars.packing.lse_of(row0 + i // config.Dv)] = self.scalars.empty_lse
