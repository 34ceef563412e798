"""The consumers of sparse decode with 64 heads a CTA: those of MLA decode, but for keys that are not there."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int64, const_expr

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
    """Views of a CTA's shared memory.

    sLive: a bit for each key of the even, the odd block, set where it is there. landed: one stage for the rope chunk of
    the even, the odd block, which both CTAs of a cluster free when they have their rows of it; None: nothing is copied
    from where P will be.
    """

    sLive: cute.Tensor
    landed: Channel | None

    @staticmethod
    def fields(config: Config) -> dict:
        """Those of this kind of CTA alone."""
        align, array = cute.struct.Align, cute.struct.MemRange
        return {
            "staged": align[array[BFloat16, CONSUMER_WARPS * STAGED], 128],
            "sMax": array[Float32, 2 * TILE_M],
            "sSum": array[Float32, 2 * TILE_M],
            **({"landed_barriers": array[Int64, Channel.words(2)]} if config.exchanges_rope else {}),
        }

    @staticmethod
    def over(config: Config, storage) -> Shared:
        rows, buffers = row_layout(BFloat16, BLOCK, config.D), row_layout(BFloat16, BLOCK, 2 * K_CHUNKS * CHUNK)
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        readers, landed = CONSUMER_WARPS // 2 * config.sharing, None
        if config.exchanges_rope:
            barriers = storage.landed_barriers.data_ptr()
            landed = Channel.over("rope", barriers, 2, readers=readers, writers=0, cluster=config.cluster)
            for side in range(2):
                landed.read_by(f"warpgroup {side}", CONSUMER_WARPS // 2, stages=(side,))
        return Shared(
            config=config,
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            sMax=storage.sMax.get_tensor(cute.make_layout((TILE_M, 2))),
            sSum=storage.sSum.get_tensor(cute.make_layout((TILE_M, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(config.warps))),
            staged=storage.staged.data_ptr(),
            k=Channel.over("K", k_barriers, STAGES, readers=readers, writers=config.k_writers, cluster=config.sharing),
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
            sLive=storage.sLive.get_tensor(cute.make_layout(2 * BLOCK // 8)),
            landed=landed,
        )

    @property
    def channels(self) -> tuple[Channel, ...]:
        return (self.k, self.q) if self.landed is None else (self.k, self.q, self.landed)


@dataclass(frozen=True)
class Named(Gathered):
    """The keys that a token's indices name.

    In a cluster a CTA copies its rows to the other, the rope chunk's too, over which its own consumers write P. That a
    copy has left is told by nothing but that it has landed. So the consumers of both CTAs tell each other when their
    scores are there, and wait for that before they write P: without it a tile in a million had P in place of rope.
    """

    @cute.jit
    def hide(self, consumer: Consumer, pair) -> None:
        """The consumer's own block of a pair."""
        if const_expr(consumer.shared.landed is not None):
            consumer.shared.landed.release(consumer.side)
        live = live_words(consumer.shared.sLive)
        low, high = live[2 * consumer.side], live[2 * consumer.side + 1]
        if (low & high) != -1:
            hide_columns(consumer.S, low >> consumer.rows.column, high >> consumer.rows.column)

    @cute.jit
    def make_room(self, consumer: Consumer, stage: cutlass.Constexpr, turn) -> None:
        """Wait for the place of P of a block that comes with this stage."""
        if const_expr(consumer.shared.landed is not None):
            consumer.shared.landed.acquire(consumer.side, turn + 1)
        Gathered.make_room(self, consumer, stage, turn)


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
