"""The consumers of sparse decode with 64 heads a CTA: those of MLA decode, but for keys that are not there."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import BFloat16, Float32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.absent import hide_columns
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M
from flash_mla.kernels.hopper.mla_decode import result, shared
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, STAGED, STAGES
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer
from flash_mla.kernels.hopper.mla_decode.pairs import Gathered, consume_left, consume_right
from flash_mla.kernels.hopper.packing import Packing
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
            k=Channel.over("K", k_barriers, STAGES, readers=readers, writers=config.k_writers, cluster=config.cluster),
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
            sLive=storage.sLive.get_tensor(cute.make_layout(2 * BLOCK // 8)),
        )


@dataclass(frozen=True)
class Named(Gathered):
    """The keys that a token's indices name."""

    @cute.jit
    def hide(self, consumer: Consumer, pair) -> None:
        """The consumer's own block of a pair."""
        live = live_words(consumer.shared.sLive)
        low, high = live[2 * consumer.side], live[2 * consumer.side + 1]
        if (low & high) != -1:
            hide_columns(consumer.S, low >> consumer.rows.column, high >> consumer.rows.column)


@dataclass(frozen=True)
class Segments(result.Segments):
    """A consumer warpgroup's way through the segments of its cluster, of which this CTA is number `rank`."""

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of a token without keys, zeros."""
        consumer = self.consumer
        row0 = (place.group * consumer.config.cluster + self.rank) * TILE_M
        if part.last > part.first:
            pairs = part.last - part.first
            consumer.start(row0, length, Packing(1))
            consumer.shared.q.wait(0, done.segments)
            if const_expr(consumer.side == 0):
                consume_left(consumer, Named(), 0, pairs, done.items)
            else:
                consume_right(consumer, Named(), 0, pairs, done.items)
            done = done.plus(pairs)
            self.write_result(place.request, row0, part.whole, split.SLOTS * self.cluster_id + part.slot)
        elif const_expr(consumer.side == 0):  # noqa: SIM102
            if part.whole:
                self.write_nothing(place.request, row0)
        return done
