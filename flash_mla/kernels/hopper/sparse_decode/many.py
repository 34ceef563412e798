"""The consumers of sparse decode with 64 heads a CTA: those of MLA decode, but for keys that are not there.

Any key of a block may be missing. The producers zero its row, so that P V needs no care, and say so in a mask, from
which its scores are made -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M
from flash_mla.kernels.hopper.mla_decode import result, shared
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, STAGED, STAGES, Bar
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer
from flash_mla.kernels.hopper.sparse_decode.config import CONSUMER_WARPS, Config
from flash_mla.kernels.hopper.sparse_decode.live import live_words
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class Shared(shared.Shared):
    """Views of a CTA's shared memory; sLive: a bit for each key of the even, the odd block, set where it is there."""

    sLive: cute.Tensor

    @staticmethod
    def fields(config: Config) -> dict:
        """Those of this kind of CTA alone."""
        align, array = cute.struct.Align, cute.struct.MemRange
        return {
            "staged": align[array[BFloat16, CONSUMER_WARPS * STAGED], 128],
            "sMax": array[Float32, 2 * TILE_M],
            "sSum": array[Float32, 2 * TILE_M],
        }

    @staticmethod
    def over(config: Config, storage) -> Shared:
        rows, buffers = row_layout(BFloat16, BLOCK, config.D), row_layout(BFloat16, BLOCK, 2 * K_CHUNKS * CHUNK)
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        readers = CONSUMER_WARPS // 2 * config.cluster
        return Shared(
            config=config,
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            sMax=storage.sMax.get_tensor(cute.make_layout((TILE_M, 2))),
            sSum=storage.sSum.get_tensor(cute.make_layout((TILE_M, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(config.warps))),
            staged=storage.staged.data_ptr(),
            k=Channel.over(
                "K", k_barriers, STAGES, readers=readers, writers=config.producer_warps, cluster=config.cluster
            ),
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
            sLive=storage.sLive.get_tensor(cute.make_layout(2 * BLOCK // 8)),
        )


@dataclass(frozen=True)
class Segments(result.Segments):
    """A consumer warpgroup's way through the segments of its cluster, of which this CTA is number `rank`."""

    @property
    def empty_lse(self):
        """lse of a row without keys."""
        return self.scalars.empty_lse

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of a token without keys, zeros."""
        consumer = self.consumer
        row0 = (place.group * consumer.config.cluster + self.rank) * TILE_M
        if part.last > part.first:
            pairs = part.last - part.first
            consumer.start(row0, length, 1)
            consumer.shared.q.wait(0, done.segments)
            if const_expr(consumer.side == 0):
                consume_left(consumer, pairs, done.items)
            else:
                consume_right(consumer, pairs, done.items)
            done = done.plus(pairs)
            self.write_result(place.request, row0, part.whole, split.SLOTS * self.cluster_id + part.slot)
        elif const_expr(consumer.side == 0):  # noqa: SIM102
            if part.whole:
                self.write_nothing(place.request, row0)
        return done


@cute.jit
def hide_keys(consumer: Consumer) -> None:
    """S = -inf where a key of the own block is not there."""
    live = live_words(consumer.shared.sLive)
    low, high = live[2 * consumer.side], live[2 * consumer.side + 1]
    if (low & high) != -1:
        hide_half(consumer.S, 0, low >> consumer.rows.column)
        hide_half(consumer.S, 16, high >> consumer.rows.column)


@cute.jit
def hide_half(S: cute.Tensor, first: cutlass.Constexpr, bits) -> None:
    """S = -inf in four groups of 8 columns from element `first` on; bit 0: the thread's first column."""
    for j in cutlass.range_constexpr(4):
        for e in cutlass.range_constexpr(2):
            there = (bits & (1 << (8 * j + e))) != 0
            for r in cutlass.range_constexpr(2):
                i = first + 4 * j + 2 * r + e
                S[i] = S[i] if there else -Float32.inf


@cute.jit
def consume_left(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 0: scores of the even blocks, left half of the output."""
    score_even(consumer, count)
    for pair in cutlass.range(0, pairs - 1, unroll=1):
        step_left(consumer, count + pair, True)
    consumer.shared.q.release(0)
    step_left(consumer, count + pairs - 1, False)


@cute.jit
def score_even(consumer: Consumer, turn) -> None:
    """Scores of a pair's even block."""
    k = consumer.shared.k
    k.wait(0, turn)
    consumer.scores(range(4), True)
    k.wait(1, turn)
    consumer.scores(range(4, consumer.config.chunks), False)
    warpgroup.wait_group(0)


@cute.jit
def step_left(consumer: Consumer, turn, follow: cutlass.Constexpr) -> None:
    """One pair, whose even block's scores are there; `follow`: then the scores of the next pair's even block."""
    k = consumer.shared.k
    # softmax of the even block
    hide_keys(consumer)
    for r in cutlass.range_constexpr(2):
        consumer.find_peak(r)
        consumer.raise_max(r)
    consumer.exponentials()
    if const_expr(consumer.config.chunks < K_CHUNKS):
        k.acquire(1, turn)
    consumer.publish(Bar.P_EVEN)

    # P V of the even block
    consumer.rows.rescale(consumer.O)
    consumer.values(0)
    warpgroup.wait_group(0)
    k.release(0)

    # P V of the odd block, and the next scores
    consumer.receive(Bar.P_ODD)
    consumer.rows.rescale(consumer.O)
    consumer.values(1)
    warpgroup.wait_group(0)
    k.release(2)
    if const_expr(follow):
        score_even(consumer, turn + 1)


@cute.jit
def consume_right(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 1: scores of the odd blocks, right half of the output.

    The P V of the even block hides the softmax of the odd one in clusters; a CTA alone does it first.
    """
    k, early = consumer.shared.k, const_expr(consumer.config.cluster == 1)
    for pair in cutlass.range(pairs, unroll=1):
        turn = count + pair
        if const_expr(early):
            multiply_even(consumer)
            warpgroup.wait_group(0)
            k.release(1)

        # scores of the odd block
        k.wait(2, turn)
        consumer.scores((0, 1, 2, 3, *range(8, consumer.config.chunks)), True)
        k.wait(3, turn)
        consumer.scores(range(4, 8), False)
        warpgroup.wait_group(0)
        if pair == pairs - 1:
            consumer.shared.q.release(0)
        hide_keys(consumer)
        for r in cutlass.range_constexpr(2):
            consumer.find_peak(r)
        if const_expr(not early):
            multiply_even(consumer)

        # softmax of the odd block
        for r in cutlass.range_constexpr(2):
            consumer.raise_max(r)
        consumer.exponentials()
        if const_expr(consumer.config.chunks < K_CHUNKS):
            k.acquire(2, turn)
        consumer.publish(Bar.P_ODD)
        if const_expr(not early):
            warpgroup.wait_group(0)
            k.release(1)

        # P V of the odd block
        consumer.rows.rescale(consumer.O)
        consumer.values(1)
        warpgroup.wait_group(0)
        k.release(3)


@cute.jit
def multiply_even(consumer: Consumer) -> None:
    """Warpgroup 1 takes over P and the running max of the even block and starts its P V."""
    consumer.receive(Bar.P_EVEN)
    consumer.rows.rescale(consumer.O)
    consumer.values(0)
