"""The consumers of sparse decode with fewer than 64 heads a CTA: those of GQA decode, but for keys that are not there.

The schedule: `gqa_decode/pairs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint8

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.absent import hide_rows
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.gqa_decode import consumer as gqa
from flash_mla.kernels.hopper.gqa_decode import result, shared
from flash_mla.kernels.hopper.gqa_decode.pairs import consume_pairs
from flash_mla.kernels.hopper.gqa_decode.shared import Item
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, STAGES
from flash_mla.kernels.hopper.sparse_decode.config import CHUNK_BYTES, CONSUMER_WARPS, DV, Config
from flash_mla.kernels.hopper.sparse_decode.live import live_words
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class Shared(shared.Shared):
    """Views of a CTA's shared memory: stage i of sK and sV is block i of a pair, and V its first 512 columns.

    k_buffers: where K lies; sLive: a bit for each key of the even, the odd block, set where it is there; raw: the
    producer warps' rings.
    """

    k_buffers: cute.Pointer
    sLive: cute.Tensor
    raw: Int32

    @staticmethod
    def fields(config: Config) -> dict:
        """Those of this kind of CTA alone."""
        align, array = cute.struct.Align, cute.struct.MemRange
        return {
            "sP": align[array[BFloat16, 4 * config.tile_heads * BLOCK], 1024],
            **({"raw": align[array[Uint8, config.ring_bytes], 16]} if config.ringed else {}),
            "sSum": array[Float32, CONSUMER_WARPS * config.tile_heads],
            "sMax": array[Float32, 2 * config.tile_heads],
        }

    @staticmethod
    def over(config: Config, storage) -> Shared:
        def view(field, rows: int, columns: int, count: int, apart: int) -> cute.Tensor:
            one = row_layout(BFloat16, rows, columns)
            return field.get_tensor(cute.append(one.outer, cute.make_layout(count, stride=apart)), swizzle=one.inner)

        heads, block = config.tile_heads, K_CHUNKS * CHUNK_BYTES // 2
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        # NOTE: each stage has one reader, the warpgroup of its block
        k = Channel.over("K", k_barriers, STAGES, readers=CONSUMER_WARPS // 2, writers=config.k_writers)
        sK = view(storage.sK, BLOCK, config.D, 2, block)
        return Shared(
            config=config,
            sQ=view(storage.sQ, heads, config.D, 1, heads * config.D),
            sK=sK,
            sV=view(storage.sK, BLOCK, DV, 2, block),
            sP=view(storage.sP, heads, BLOCK, 4, heads * BLOCK),
            exchange=cute.make_tensor(
                cute.recast_ptr(storage.sP.data_ptr(), dtype=Float32),
                cute.make_layout((128, heads // 2, 2, 1), stride=(1, 128, 128 * heads // 2, 0)),
            ),
            sSum=storage.sSum.get_tensor(cute.make_layout((heads, CONSUMER_WARPS))),
            sMax=storage.sMax.get_tensor(cute.make_layout((heads, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(config.warps))),
            sUnit=None,
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
            k=k,
            v=k,
            k_buffers=sK.iterator,
            sLive=storage.sLive.get_tensor(cute.make_layout(2 * BLOCK // 8)),
            raw=storage.raw.data_ptr().toint() if config.ringed else Int32(0),
        )


@dataclass(frozen=True)
class Consumer(gqa.Consumer):
    """A consumer warpgroup."""

    @cute.jit
    def hide_absent(self) -> None:
        """S = -inf where a key of the own block is not there."""
        live = live_words(self.shared.sLive)
        hide_rows(self.S, live[2 * self.side + self.key // 32] >> (self.key % 32))


@dataclass(frozen=True)
class Segments(result.Segments):
    """A consumer warpgroup's way through the segments of its CTA."""

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of a token without keys, zeros."""
        item = Item(place.request, Int32(0), place.group)
        if part.last > part.first:
            pairs = part.last - part.first
            self.consumer.start()
            self.consumer.shared.q.wait(0, done.segments)
            consume_pairs(self.consumer, self.scalars.scale_log2, pairs, done.items)
            self.write_result(item, Float32(1.0), part.whole, split.SLOTS * self.cta + part.slot)
            done = done.plus(pairs)
        elif part.whole:
            self.write_nothing(item)
        return done
