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

        Each warpgroup gives every second O^T tile to the other and finishes the rest.
        """
        consumer, tensors, scalars = self.consumer, self.tensors, self.scalars
        config, shared, side, tid = consumer.config, consumer.shared, consumer.side, consumer.tid
        tiles, N = config.tiles_m, config.tile_n
        sSum, sMax, exchange = shared.sSum, shared.sMax, shared.exchange
        global_lse, lse_partial = tensors.lse, tensors.partials.lse
        lane, warp_id, empty_lse = tid % 32, tid // 32, scalars.empty_lse
        # row maxima and sums of all warps
        for c in cutlass.range_constexpr(N // 4):
            total = consumer.row_sum[c]
            for offset in (4, 8, 16):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
            if lane < 4:
                sSum[consumer.row(c), 4 * side + warp_id] = total
                if warp_id == 0:
                    sMax[consumer.row(c), side] = consumer.row_max[c]
        sync(Bar.MERGE, CONSUMERS)
        inverse = cute.make_rmem_tensor(N // 4, Float32)
        for c in cutlass.range_constexpr(N // 4):
            row, head_row = consumer.row(c), item.tile * N + consumer.row(c)
            max0, max1 = sMax[row, 0], sMax[row, 1]
            row_max = cute.arch.fmax(max0, max1)
            sum0, sum1 = sSum[row, 0], sSum[row, 4]
            for w in cutlass.range_constexpr(1, 4):
                sum0, sum1 = sum0 + sSum[row, w], sum1 + sSum[row, 4 + w]
            total = sum0 * cute.math.exp2(max0 - row_max, fastmath=True)
            total = total + sum1 * cute.math.exp2(max1 - row_max, fastmath=True)
            consumer.factor[c] = cute.math.exp2(consumer.row_max[c] - row_max, fastmath=True)
            lse = row_max + cute.math.log2(total, fastmath=True) if total > 0.0 else -Float32.inf
            denominator = total
            if head_row < scalars.rows:
                out_row = item.head * scalars.rows + head_row
                if side == 0 and warp_id == 0 and lane < 4:
                    if whole:
                        place = scalars.packing.lse_of(out_row)
                        global_lse[item.request, place] = lse * math.log(2.0) if total > 0.0 else empty_lse
                    else:
                        lse_partial[slot, row] = lse
                if whole and scalars.has_sink != 0:
                    sink = tensors.sink[scalars.packing.head_of(out_row)] * math.log2(math.e)
                    denominator = denominator + cute.math.exp2(sink - row_max, fastmath=True)
            inverse[c] = v_scale * cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)

        # trade O^T tiles in pairs
        kept = cute.make_rmem_tensor(N // 2, Float32)
        for pair in cutlass.range_constexpr((tiles + 1) // 2):
            if const_expr(pair > 0):
                sync(Bar.MERGE, CONSUMERS)
            for i in cutlass.range_constexpr(N // 2):
                c = 2 * (i // 4) + i % 2
                left, right = consumer.O[pair * N + i], Float32(0.0)
                if const_expr(2 * pair + 1 < tiles):
                    right = consumer.O[pair * N + N // 2 + i]
                kept[i] = (left if side == 0 else right) * consumer.factor[c]
                exchange[tid, i, side] = (right if side == 0 else left) * consumer.factor[c]
            sync(Bar.MERGE, CONSUMERS)
            tile = 2 * pair + side
            if tile < tiles:
                for i in cutlass.range_constexpr(N // 2):
                    kept[i] = (kept[i] + exchange[tid, i, 1 - side]) * inverse[2 * (i // 4) + i % 2]
                if whole:
                    self.store_tile(tensors.out, item.request, item.head * scalars.rows, item, tile, kept)
                else:
                    self.store_tile(tensors.partials.out, slot, -item.tile * N, item, tile, kept)
        # NOTE: the exchange is P's memory: the next segment may write P only when both warpgroups have read it
        sync(Bar.MERGE, CONSUMERS)

    @cute.jit
    def store_tile(self, target: cute.Tensor, index, row0, item: Item, tile, kept: cute.Tensor) -> None:
        """One O^T tile to target[index, row0 + row of the KV head, column]."""
        consumer, config = self.consumer, self.consumer.config
        lane, warp_id = consumer.tid % 32, consumer.tid // 32
        group = tile * TILE_M + warp_id * 16
        two = cute.make_rmem_tensor(2, target.element_type)
        for c in cutlass.range_constexpr(config.tile_n // 4):
            head_row = item.tile * config.tile_n + consumer.row(c)
            i = 4 * (c // 2) + c % 2
            if head_row < self.scalars.rows:
                if const_expr(config.fp8):
                    if group + lane // 4 * 2 < config.Dv:
                        two[0], two[1] = kept[i].to(target.element_type), kept[i + 2].to(target.element_type)
                        row = target[index, row0 + head_row, None]
                        cute.autovec_copy(two, cute.local_tile(row, (2,), (group // 2 + lane // 4,)))
                else:
                    for half in cutlass.range_constexpr(2):
                        column = group + lane // 4 + 8 * half
                        if column < config.Dv:
                            target[index, row0 + head_row, column] = kept[i + 2 * half].to(target.element_type)

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
