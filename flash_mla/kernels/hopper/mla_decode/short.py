"""What a consumer warpgroup does where no item of a call has more than a pair of blocks: `Config.short`.

Such a call is a chain of latencies, each behind the other: there is no next block, and often no odd one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.limits import BLOCK, STAGED
from flash_mla.kernels.hopper.mla_decode import result
from flash_mla.kernels.hopper.mla_decode.config import CHUNK_ELEMENTS, CONSUMERS, HALF, K_CHUNKS, Bar
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer
from flash_mla.kernels.hopper.mla_decode.pairs import (
    consume_right,
    multiply_even,
    score_even,
    step_even,
    step_odd,
)
from flash_mla.kernels.hopper.staging import late, store_rows, store_tile
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class ShortSegments(result.Segments):
    """What a consumer warpgroup does with the items of its cluster, of which this CTA is number `rank`."""

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute an item and write its result; of an empty request, zeros."""
        consumer = self.consumer
        tile_m = consumer.config.tile_m
        row0 = (place.group * consumer.config.cluster + self.rank) * tile_m
        if part.last > part.first:
            consumer.start(row0, length, self.scalars.packing, False)
            consumer.shared.q.wait(0, done.segments)
            keys = self.keys(place.request, row0, length)
            if const_expr(consumer.side == 0):
                compute_left(consumer, keys, length, done.items)
            elif length > BLOCK:
                consume_right(consumer, keys, 0, 1, done.items, True)
            else:
                lone_right(consumer, keys, done.items)
            done = done.plus(1)
            self.write_item(place.request, row0, place.left <= part.steps)
        elif const_expr(consumer.side == 0):
            self.write_nothing(place.request, row0, tile_m)
        return done

    @cute.jit
    def write_item(self, request, row0, last) -> None:
        """Normalise O and write it, then lse. last: nothing is loaded any more, so that the K buffers are free."""
        consumer, tensors, scalars = self.consumer, self.tensors, self.scalars
        rows_of, sSum = consumer.rows, consumer.shared.sSum
        # of a half tile the other rows hold nothing
        rows = cutlass.min(tensors.out.shape[1], row0 + consumer.config.tile_m)
        out = cute.make_tensor(
            tensors.out[request, None, None].iterator,
            cute.make_layout((rows, tensors.out.shape[2]), stride=tensors.out.stride[1:]),
        )
        self.add_sums()
        scales, totals = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            tile_row = rows_of.first + 8 * r
            totals[r] = sSum[tile_row, 0] + sSum[tile_row, 1]
            total = totals[r]
            if scalars.has_sink != 0 and row0 + tile_row < rows:
                sink = tensors.sink[scalars.packing.head_of(row0 + tile_row)] * math.log2(math.e)
                total = total + cute.math.exp2(sink - rows_of.max[r], fastmath=True)
            scales[r] = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
        if last:
            tid = late(consumer.tid)
            store_tile(consumer.O, scales, free_buffer(consumer, tid), out, row0, HALF * consumer.side, tid)
        else:
            staged = consumer.shared.staged + (4 * consumer.side + consumer.tid // 32) * STAGED
            store_rows(consumer.O, scales, staged, out, row0, HALF * consumer.side, consumer.tid)
        # NOTE: behind the output, which the end of the kernel waits for
        if const_expr(consumer.side == 0):  # noqa: SIM102
            if consumer.tid % 4 == 0:
                for r in cutlass.range_constexpr(2):
                    row = row0 + rows_of.first + 8 * r
                    if row < rows:
                        self.write_lse(request, row, rows_of.max[r], totals[r])
        # NOTE: the sums may be overwritten by the next item only when both warpgroups have read them
        sync(Bar.SUMS, CONSUMERS)

    @cute.jit
    def write_lse(self, request, row, row_max, total) -> None:
        """lse of one row."""
        lse, natural = self.tensors.lse, (row_max + cute.math.log2(total, fastmath=True)) * math.log(2.0)
        lse[request, self.scalars.packing.lse_of(row)] = natural if total > 0.0 else self.scalars.empty_lse


@cute.jit
def compute_left(consumer: Consumer, keys, length, turn) -> None:
    """Warpgroup 0: as in `pairs.consume_left`, but for an odd block that is not there."""
    score_even(consumer, turn)
    consumer.shared.q.release(0)
    step_even(consumer, keys, 0, turn, False, True)
    if length > BLOCK:
        step_odd(consumer, keys, 0, turn, False)
    else:
        consumer.shared.k.wait(2, turn)
        consumer.shared.k.release(2)


@cute.jit
def lone_right(consumer: Consumer, keys, turn) -> None:
    """Warpgroup 1, of an item that is one block: it has no scores of its own."""
    k = consumer.shared.k
    consumer.shared.q.release(0)
    multiply_even(consumer, keys, 0, turn, True)
    warpgroup.wait_group(0)
    k.release(1)
    k.wait(3, turn)
    k.release(3)


def free_buffer(consumer: Consumer, tid) -> cute.Pointer:
    """Two chunks for this warp, of the K buffers that this warpgroup alone reads as V; without the swizzle."""
    warp = tid // 32
    chunk = consumer.shared.chunks(0, 4 * consumer.side) + (warp // 2 * K_CHUNKS + warp % 2 * 2) * CHUNK_ELEMENTS
    return cute.recast_ptr(chunk, swizzle_=cute.make_swizzle(0, 4, 3))
