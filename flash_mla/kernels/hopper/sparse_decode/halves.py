"""The consumers of sparse decode over raw rows (`raw.py`) with 64 heads a CTA: each has half of O's columns.

O of 64 heads is 128 registers of a thread in two halves. A warpgroup scores its block of a pair, and computes its half
of O over both: every code is converted once a CTA for K and once for V. The warpgroups share the running max, in shared
memory, and meet twice a pair: when both have their scores, and when both have published P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.barriers import any_of, sync
from flash_mla.kernels.hopper.gqa_decode import result
from flash_mla.kernels.hopper.gqa_decode.config import CONSUMERS, Bar
from flash_mla.kernels.hopper.gqa_decode.shared import Item
from flash_mla.kernels.hopper.limits import WARP
from flash_mla.kernels.hopper.softmax import LAZY, LOW
from flash_mla.kernels.hopper.sparse_decode import folded
from flash_mla.kernels.hopper.sparse_decode.config import CONSUMER_WARPS
from flash_mla.kernels.hopper.sparse_decode.folded import CHUNKS
from flash_mla.kernels.hopper.sparse_decode.raw_consumer import LEAST, inverse_power
from flash_mla.kernels.hopper.walk import Done, Place

OWN_TILES = CHUNKS // 2
"""Tiles of O^T of a warpgroup."""


@dataclass(frozen=True)
class Consumer(folded.Consumer):
    """A consumer warpgroup. row_sum: its share of the sums of two heads, `first_sum` and the next of its rows."""

    @property
    def top(self):
        """The larger unit of the thread's two keys."""
        return cute.arch.fmax(self.key_unit[0], self.key_unit[1])

    @property
    def warp(self):
        """Of the CTA's consumers."""
        return 4 * self.side + self.tid // WARP

    @property
    def first_sum(self):
        """Number of the first of the two rows whose sums this thread keeps."""
        lane = self.tid % WARP
        return lane // 16 * 8 + lane // 8 % 2 * 4 + lane // 4 % 2 * 2

    @cute.jit
    def start(self) -> None:
        """Begin a segment; `convert_queries` shows it to all."""
        self.O.fill(0.0)
        self.row_sum.fill(0.0)
        self.unit[0] = Float32(LEAST)
        sMax = self.shared.sMax
        if self.side == 0 and self.tid < self.config.tile_n:
            sMax[self.tid, 0] = Float32(LOW)

    @cute.jit
    def weigh(self, buffer) -> None:
        """P of the own block to shared memory and to the sums, against the max so far of both warpgroups."""
        largest = -Float32.inf
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i, row_max = 4 * (c // 2) + c % 2, self.shared.sMax[self.row(c), 0]
            largest = cute.arch.fmax(largest, cute.arch.fmax(self.S[i], self.S[i + 2]) - row_max)
        # NOTE: here the other warpgroup is done with the pair before: P may be overwritten
        if any_of(Bar.MERGE, CONSUMERS, largest > LAZY or self.top > self.unit[0]) != 0:
            self.raise_max()
        inverse = inverse_power(self.unit[0])
        weights = [self.key_unit[half] * inverse for half in range(2)]
        sums = []
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i, row_max = 4 * (c // 2) + c % 2, self.shared.sMax[self.row(c), 0]
            a = cute.math.exp2(self.S[i] - row_max, fastmath=True)
            b = cute.math.exp2(self.S[i + 2] - row_max, fastmath=True)
            sums.append(a + b)
            self.P[i], self.P[i + 2] = (a * weights[0]).to(Float16), (b * weights[1]).to(Float16)
        cute.copy(self.store, self.store.retile(self.P), self.sP_store[None, None, None, buffer])
        cute.arch.fence_view_async_shared()
        sync(Bar.MERGE, CONSUMERS)
        # each step halves the rows that a thread sums and doubles the threads whose keys are in the sum
        lane = self.tid % WARP
        for offset in (16, 8, 4):
            upper, half = lane // offset % 2 == 1, len(sums) // 2
            kept = [sums[j + half] if upper else sums[j] for j in range(half)]
            sent = [sums[j] if upper else sums[j + half] for j in range(half)]
            sums = [kept[j] + cute.arch.shuffle_sync_bfly(sent[j], offset=offset) for j in range(half)]
        for j in cutlass.range_constexpr(2):
            self.row_sum[j] = self.row_sum[j] + sums[j]

    @cute.jit
    def raise_max(self) -> None:
        """Move the running max and the unit to those of both blocks where they are larger; rescale the sums and O."""
        sPeak, sMax = self.shared.sPeak, self.shared.sMax
        lane, warps = self.tid % WARP, CONSUMER_WARPS
        unit = self.top
        for offset in (4, 8, 16):
            unit = cute.arch.fmax(unit, cute.arch.shuffle_sync_bfly(unit, offset=offset))
        if lane == 0:
            sPeak[self.warp] = unit
        self.show_peaks()
        sync(Bar.MERGE, CONSUMERS)
        unit = self.unit[0]
        for w in cutlass.range_constexpr(warps):
            unit = cute.arch.fmax(unit, sPeak[w])
        change = self.unit[0] * inverse_power(unit)
        self.unit[0] = unit
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i, row = 4 * (c // 2) + c % 2, self.row(c)
            factor = change * cute.math.exp2(sMax[row, 0] - self.new_max(row), fastmath=True)
            for t in cutlass.range_constexpr(OWN_TILES):
                o = t * self.config.tile_n // 2 + i
                self.O[o], self.O[o + 2] = self.O[o] * factor, self.O[o + 2] * factor
        for j in cutlass.range_constexpr(2):
            row = self.row_of_sum(j)
            self.row_sum[j] = self.row_sum[j] * cute.math.exp2(sMax[row, 0] - self.new_max(row), fastmath=True)
        sync(Bar.MERGE, CONSUMERS)
        if self.side == 0 and self.tid < self.config.tile_n:
            sMax[self.tid, 0] = self.new_max(self.tid)
        sync(Bar.MERGE, CONSUMERS)

    def row_of_sum(self, j: int):
        """The row of the thread's sum number j."""
        c = self.first_sum + j
        return 8 * (c // 2) + self.tid % 4 * 2 + j

    @cute.jit
    def new_max(self, row):
        """The max of a row, once the peaks of all warps are there."""
        peak = self.shared.sMax[row, 0]
        for w in cutlass.range_constexpr(CONSUMER_WARPS):
            peak = cute.arch.fmax(peak, self.shared.sSum[row, w])
        return peak


@dataclass(frozen=True)
class Segments(result.Segments):
    """A consumer warpgroup's way through the segments of its CTA."""

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of a token without keys, zeros."""
        consumer, item = self.consumer, Item(place.request, Int32(0), place.group)
        k, blocks = consumer.shared.k, consumer.config.blocks
        if part.last > part.first:
            pairs = part.last - part.first
            consumer.start()
            consumer.shared.q.wait(0, done.segments)
            consumer.convert_queries(consumer.config.chunks)
            for pair in cutlass.range(pairs, unroll=1):
                even = 2 * (done.items + pair)
                own, parity = even + consumer.side, pair % 2
                k.wait(own % blocks, own // blocks)
                consumer.score(own % blocks, 2 * consumer.side + parity, self.scalars.scale_log2)
                consumer.hide_absent(own % blocks)
                consumer.weigh(consumer.side)
                for side in cutlass.range_constexpr(2):
                    stage = (even + side) % blocks
                    k.wait(stage, (even + side) // blocks)
                    consumer.add_half(stage, 2 * side + parity, side)
                    if const_expr(side == 1):
                        warpgroup.wait_group(0)
                    # NOTE: what was read of the even block is in registers
                    k.release(stage)
            consumer.shared.q.release(0)
            self.write_half(item, part.whole, split.SLOTS * self.cta + part.slot)
            done = done.plus(pairs)
        elif part.whole:
            self.write_nothing(item)
        return done

    @cute.jit
    def write_half(self, item: Item, whole, slot) -> None:
        """Normalise and write: to out and lse if the segment is a whole item, else to its slot."""
        consumer, scalars, config = self.consumer, self.scalars, self.consumer.config
        sSum, sMax, N = consumer.shared.sSum, consumer.shared.sMax, config.tile_n
        global_lse, lse_partial, empty_lse = self.tensors.lse, self.tensors.partials.lse, scalars.empty_lse
        lane = consumer.tid % WARP
        for j in cutlass.range_constexpr(2):
            sSum[consumer.row_of_sum(j), consumer.warp] = consumer.row_sum[j]
        sync(Bar.MERGE, CONSUMERS)
        inverse = cute.make_rmem_tensor(N // 4, Float32)
        for c in cutlass.range_constexpr(N // 4):
            row, head = consumer.row(c), item.tile * N + consumer.row(c)
            row_max, total = sMax[row, 0], sSum[row, 0]
            for w in cutlass.range_constexpr(1, CONSUMER_WARPS):
                total = total + sSum[row, w]
            denominator = total
            if head < scalars.rows:
                if consumer.warp == 0 and lane < 4:
                    lse = row_max + cute.math.log2(total, fastmath=True) if total > 0.0 else -Float32.inf
                    if whole:
                        global_lse[item.request, head] = lse * math.log(2.0) if total > 0.0 else empty_lse
                    else:
                        lse_partial[slot, row] = lse
                if whole and scalars.has_sink != 0:
                    sink = self.tensors.sink[head] * math.log2(math.e)
                    denominator = denominator + cute.math.exp2(sink - row_max, fastmath=True)
            scale = consumer.unit[0] * cute.arch.rcp_approx(denominator)
            inverse[c] = scale if total > 0.0 else Float32(0.0)
        kept = cute.make_rmem_tensor((N // 2, 1), Float32)
        for t in cutlass.range_constexpr(OWN_TILES):
            for i in cutlass.range_constexpr(N // 2):
                kept[i, 0] = consumer.O[t * N // 2 + i] * inverse[2 * (i // 4) + i % 2]
            tiles = [OWN_TILES * consumer.side + t]
            if whole:
                self.store_tiles(self.tensors.out, item.request, item.head * scalars.rows, item, tiles, kept)
            else:
                self.store_tiles(self.tensors.partials.out, slot, -item.tile * N, item, tiles, kept)
        # NOTE: the next segment writes the max and the sums
        sync(Bar.MERGE, CONSUMERS)
