"""What a consumer warpgroup of a sparse prefill does with a tile: compute it and write its half of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.lanes import quad_sum
from flash_mla.kernels.hopper.limits import TILE_M
from flash_mla.kernels.hopper.mla_decode.config import CONSUMERS, Bar
from flash_mla.kernels.hopper.mla_decode.pairs import consume_left, consume_right
from flash_mla.kernels.hopper.mla_decode.result import store_out
from flash_mla.kernels.hopper.sparse_prefill.consumer import Consumer, Named
from flash_mla.kernels.hopper.sparse_prefill.shared import Scalars, Tensors, tile_at


@dataclass(frozen=True)
class Tiles:
    """A consumer warpgroup's way through the tiles of its CTA."""

    consumer: Consumer
    tensors: Tensors
    scalars: Scalars

    @cute.jit
    def run(self, first, ctas) -> None:
        """Compute and write tiles `first`, `first + ctas`, ..."""
        consumer, tiles_done, pairs_done = self.consumer, Int32(0), Int32(0)
        index, tile = first, tile_at(self.tensors, self.scalars, first)
        while index < self.scalars.tiles:
            next_tile = tile_at(self.tensors, self.scalars, index + ctas)
            if tile.pairs > 0:
                consumer.start()
                consumer.shared.q.wait(0, tiles_done)
                if const_expr(consumer.side == 0):
                    consume_left(consumer, Named(), 0, tile.pairs, pairs_done)
                else:
                    consume_right(consumer, Named(), 0, tile.pairs, pairs_done)
                tiles_done, pairs_done = tiles_done + 1, pairs_done + tile.pairs
                self.write_result(tile.token, tile.group * TILE_M)
            elif const_expr(consumer.side == 0):
                self.write_nothing(tile.token, tile.group * TILE_M)
            index, tile = index + ctas, next_tile

    @cute.jit
    def write_result(self, token, head0) -> None:
        """Normalise O and write it, lse and the greatest logits."""
        consumer, tensors, rows = self.consumer, self.tensors, self.consumer.rows
        side, sSum, sTop, top = consumer.side, consumer.shared.sSum, consumer.shared.sTop, consumer.top
        lse, max_logits, heads = tensors.lse, tensors.max_logits, tensors.out.shape[1]
        first_lane = consumer.tid % 4 == 0
        # add the sums of the four threads of a row, and of the two warpgroups
        for r in cutlass.range_constexpr(2):
            total = quad_sum(rows.sum[r])
            if first_lane:
                sSum[rows.first + 8 * r, side] = total
                sTop[rows.first + 8 * r, side] = top[r]
        sync(Bar.SUMS, CONSUMERS)
        scales = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            row = rows.first + 8 * r
            head = head0 + row
            total = sSum[row, 0] + sSum[row, 1]
            if head < heads:
                if side == 0 and first_lane:
                    log_sum = rows.max[r] + cute.math.log2(total, fastmath=True)
                    lse[token, head] = log_sum * math.log(2.0) if total > 0.0 else self.scalars.empty_lse
                    max_logits[token, head] = cute.arch.fmax(sTop[row, 0], sTop[row, 1]) * math.log(2.0)
                if self.scalars.has_sink != 0:
                    sink = tensors.sink[head] * math.log2(math.e)
                    total = total + cute.math.exp2(sink - rows.max[r], fastmath=True)
            # NOTE: a row without keys has O = 0 and, with a sink, a total above 0; without, 0 * inf would be NaN
            scales[r] = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
        store_out(consumer, tensors.out, token, head0, scales)
        # NOTE: the sums may be overwritten by the next tile only when both warpgroups have read them
        sync(Bar.SUMS, CONSUMERS)

    @cute.jit
    def write_nothing(self, token, head0) -> None:
        """A token without ids: out 0, the greatest logits -inf."""
        out, lse, max_logits, tid = self.tensors.out, self.tensors.lse, self.tensors.max_logits, self.consumer.tid
        zeros = cute.make_rmem_tensor(8, out.element_type)
        zeros.fill(0.0)
        for i in cutlass.range(TILE_M // 2, unroll=1):
            head = head0 + 2 * i + tid // 64
            if head < out.shape[1]:
                cute.autovec_copy(zeros, cute.local_tile(out[token, head, None], (8,), (tid % 64,)))
                if tid % 64 == 0:
                    lse[token, head] = self.scalars.empty_lse
                    max_logits[token, head] = -Float32.inf
