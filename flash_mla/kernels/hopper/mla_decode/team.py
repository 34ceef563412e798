"""What a consumer warpgroup does in a call that teams compute (`kernels/hopper/team.py`).

Where each CTA has a pair of blocks at most (`Config.short`), such a call is a chain of latencies, each behind the
other: there is no next block, and often no odd one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.mla_decode import result
from flash_mla.kernels.hopper.mla_decode.config import CHUNK_ELEMENTS, HALF, K_CHUNKS
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer
from flash_mla.kernels.hopper.mla_decode.pairs import (
    consume_right,
    multiply_even,
    score_even,
    step_even,
    step_odd,
)
from flash_mla.kernels.hopper.staging import late, store_tile
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class TeamSegments(result.Segments):
    """What a consumer warpgroup does with the pairs of its CTA: a whole item, or what its team merges."""

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute the pairs, and write the result or leave it for the team; of an empty request, write zeros."""
        config, request = self.consumer.config, place.request
        row0 = place.group * config.tile_m
        if part.last > part.first:
            if const_expr(config.short):
                self.attend_pair(request, row0, length, part.first, length - split.PAIR * part.first, done)
            else:
                self.attend_pairs(request, row0, length, part, done)
            # NOTE: through or into the K buffers: behind a barrier of both warpgroups nobody reads them
            if const_expr(config.cluster == 1):
                self.write_item(request, row0)
            else:
                self.write_result(request, row0, False, 0)
        elif const_expr(self.consumer.side == 0):
            self.write_nothing(request, row0, config.tile_m)
        return done.plus(0)

    def end(self, row0):
        # of a half tile the other rows hold nothing
        return cutlass.min(self.tensors.out.shape[1], row0 + self.consumer.config.tile_m)

    @cute.jit
    def attend_pair(self, request, row0, length, pair, left, done: Done) -> None:
        """O, maxima and sums of a pair of blocks, from which on a request of `length` keys has `left`."""
        consumer = self.consumer
        consumer.start(row0, length, self.scalars.packing, False)
        consumer.shared.q.wait(0, done.segments)
        keys = self.keys(request, row0, length)
        if const_expr(consumer.side == 0):
            compute_left(consumer, keys, pair, left, done.items)
        elif left > BLOCK:
            consume_right(consumer, keys, pair, pair + 1, done.items, True)
        else:
            lone_right(consumer, keys, pair, done.items)

    @cute.jit
    def write_item(self, request, row0) -> None:
        """Normalise O and write it, then lse."""
        consumer, tensors, scalars = self.consumer, self.tensors, self.scalars
        rows_of, sSum = consumer.rows, consumer.shared.sSum
        rows = self.end(row0)
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
        tid = late(consumer.tid)
        store_tile(consumer.O, scales, free_buffer(consumer, tid), out, row0, HALF * consumer.side, tid)
        # NOTE: behind the output, which the end of the kernel waits for
        if const_expr(consumer.side == 0):  # noqa: SIM102
            if consumer.tid % 4 == 0:
                for r in cutlass.range_constexpr(2):
                    row = row0 + rows_of.first + 8 * r
                    if row < rows:
                        self.write_lse(request, row, rows_of.max[r], totals[r])

    @cute.jit
    def write_lse(self, request, row, row_max, total) -> None:
        """lse of one row."""
        lse, natural = self.tensors.lse, (row_max + cute.math.log2(total, fastmath=True)) * math.log(2.0)
        lse[request, self.scalars.packing.lse_of(row)] = natural if total > 0.0 else self.scalars.empty_lse


@cute.jit
def compute_left(consumer: Consumer, keys, pair, left, turn) -> None:
    """Warpgroup 0: as in `pairs.consume_left`, but for an odd block that is not there."""
    score_even(consumer, turn)
    consumer.shared.q.release(0)
    step_even(consumer, keys, pair, turn, False, True)
    if left > BLOCK:
        step_odd(consumer, keys, pair, turn, False)
    else:
        consumer.shared.k.wait(2, turn)
        consumer.shared.k.release(2)


@cute.jit
def lone_right(consumer: Consumer, keys, pair, turn) -> None:
    """Warpgroup 1, of an item that is one block: it has no scores of its own."""
    k = consumer.shared.k
    consumer.shared.q.release(0)
    multiply_even(consumer, keys, pair, turn, True)
    warpgroup.wait_group(0)
    k.release(1)
    k.wait(3, turn)
    k.release(3)


def free_buffer(consumer: Consumer, tid) -> cute.Pointer:
    """Two chunks for this warp, of the K buffers that this warpgroup alone reads as V; without the swizzle."""
    warp = tid // 32
    chunk = consumer.shared.chunks(0, 4 * consumer.side) + (warp // 2 * K_CHUNKS + warp % 2 * 2) * CHUNK_ELEMENTS
    return cute.recast_ptr(chunk, swizzle_=cute.make_swizzle(0, 4, 3))
