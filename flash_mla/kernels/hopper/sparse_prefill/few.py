"""The consumers of a sparse prefill of at most 16 heads: those of GQA decode, over keys of which some name no row.

The schedule: `gqa_decode/pairs.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.absent import hide_rows
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gqa_decode import consumer as gqa
from flash_mla.kernels.hopper.gqa_decode import result
from flash_mla.kernels.hopper.gqa_decode.config import Bar
from flash_mla.kernels.hopper.gqa_decode.pairs import consume_pairs
from flash_mla.kernels.hopper.gqa_decode.shared import Item
from flash_mla.kernels.hopper.limits import BLOCK, WARP, WARPGROUP
from flash_mla.kernels.hopper.mla_decode.config import CHUNK_ELEMENTS, CONSUMER_WARPS, CONSUMERS, DV, K_CHUNKS, STAGES
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.sparse_prefill.config import PRODUCER_WARPS, Config
from flash_mla.kernels.hopper.sparse_prefill.shared import Scalars, Tensors, tile_at


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory, named as `gqa_decode/shared.py` names them: stage i of sK and sV is block i of a
    pair, V its first 512 columns, and K and V one channel.

    sTop [heads, 8 warps] FP32: the greatest score; k_address, sSeen: as in `shared.py`.
    """

    config: Config
    k_address: Int32
    sQ: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sP: cute.Tensor
    exchange: cute.Tensor
    sSum: cute.Tensor
    sMax: cute.Tensor
    sTop: cute.Tensor
    sSeen: cute.Tensor
    q: Channel
    k: Channel
    v: Channel

    @staticmethod
    def fields(config: Config) -> dict[str, Any]:
        """The memory of this kind of CTA alone."""
        align, array, heads = cute.struct.Align, cute.struct.MemRange, config.tile_heads
        return {
            "sP": align[array[DTYPES[config.dtype], 4 * heads * BLOCK], 1024],
            "sSum": array[Float32, heads * CONSUMER_WARPS],
            "sMax": array[Float32, heads * 2],
            "sTop": array[Float32, heads * CONSUMER_WARPS],
        }

    @staticmethod
    def over(config: Config, storage) -> Shared:
        def view(field, rows: int, columns: int, count: int, apart: int) -> cute.Tensor:
            one = row_layout(DTYPES[config.dtype], rows, columns)
            return field.get_tensor(cute.append(one.outer, cute.make_layout(count, stride=apart)), swizzle=one.inner)

        heads, block = config.tile_heads, K_CHUNKS * CHUNK_ELEMENTS
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        writers = PRODUCER_WARPS * (WARP + 1)
        k = Channel.over("K", k_barriers, STAGES, readers=CONSUMER_WARPS // 2, writers=writers)
        warps = cute.make_layout((heads, CONSUMER_WARPS))
        return Shared(
            config=config,
            k_address=storage.sK.data_ptr().toint(),
            sQ=view(storage.sQ, heads, config.D, 1, heads * config.D),
            sK=view(storage.sK, BLOCK, config.D, 2, block),
            sV=view(storage.sK, BLOCK, DV, 2, block),
            sP=view(storage.sP, heads, BLOCK, 4, heads * BLOCK),
            exchange=cute.make_tensor(
                cute.recast_ptr(storage.sP.data_ptr(), dtype=Float32),
                cute.make_layout((128, heads // 2, 2, 1), stride=(1, 128, 128 * heads // 2, 0)),
            ),
            sSum=storage.sSum.get_tensor(warps),
            sMax=storage.sMax.get_tensor(cute.make_layout((heads, 2))),
            sTop=storage.sTop.get_tensor(warps),
            sSeen=storage.sSeen.get_tensor(cute.make_layout((2, PRODUCER_WARPS), stride=(PRODUCER_WARPS, 1))),
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
            k=k,
            v=k,
        )


@dataclass(frozen=True)
class Consumer(gqa.Consumer):
    """A consumer warpgroup. top: the greatest score so far of each of the thread's rows, among its keys."""

    top: cute.Tensor

    @staticmethod
    def over(shared: Shared, side, tid) -> Consumer:
        base = gqa.Consumer.over(shared, side, tid)
        top = cute.make_rmem_tensor(shared.config.tile_heads // 4, Float32)
        return Consumer(*(getattr(base, field.name) for field in fields(base)), top)

    @cute.jit
    def hide_absent(self) -> None:
        """S = -inf at keys that name no row; the greatest scores so far."""
        seen = self.shared.sSeen[self.side, self.tid // 32]
        hide_rows(self.S, Int32(seen) >> (self.tid % 32 // 4))
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i = 4 * (c // 2) + c % 2
            self.top[c] = cute.arch.fmax(self.top[c], cute.arch.fmax(self.S[i], self.S[i + 2]))


class Outputs(NamedTuple):
    """What `gqa_decode/result.py` writes. partials: anything with `out` and `lse`, for no item is split here."""

    out: cute.Tensor
    lse: cute.Tensor
    sink: cute.Tensor
    partials: Any


class Counts(NamedTuple):
    """What it asks for: heads; whether `sink` counts; lse of a token without keys."""

    rows: Int32
    has_sink: Int32
    empty_lse: Float32

    @property
    def packing(self) -> Packing:
        """A head is a row."""
        return Packing(1)


@dataclass(frozen=True)
class Tiles:
    """A consumer warpgroup's way through the tiles of its CTA."""

    consumer: Consumer
    tensors: Tensors
    scalars: Scalars
    writer: result.Segments

    @staticmethod
    def over(shared: Shared, side, tid, tensors: Tensors, scalars: Scalars) -> Tiles:
        consumer = Consumer.over(shared, side, tid)
        outputs = Outputs(tensors.out, tensors.lse, tensors.sink, tensors)
        counts = Counts(tensors.out.shape[1], scalars.has_sink, scalars.empty_lse)
        return Tiles(consumer, tensors, scalars, result.Segments(consumer, outputs, counts, Int32(0)))

    @cute.jit
    def run(self, first, ctas) -> None:
        """Compute and write tiles `first`, `first + ctas`, ..."""
        consumer, tiles_done, pairs_done = self.consumer, Int32(0), Int32(0)
        index, tile = first, tile_at(self.tensors, self.scalars, first)
        while index < self.scalars.tiles:
            next_tile = tile_at(self.tensors, self.scalars, index + ctas)
            item = Item(tile.token, Int32(0), tile.group)
            if tile.pairs > 0:
                consumer.start()
                consumer.top.fill(-Float32.inf)
                consumer.shared.q.wait(0, tiles_done)
                consume_pairs(consumer, self.scalars.scale_log2, tile.pairs, pairs_done)
                tiles_done, pairs_done = tiles_done + 1, pairs_done + tile.pairs
                self.publish_tops()
                self.writer.write_result(item, Float32(1.0), True, 0)
            else:
                self.publish_tops()
                self.writer.write_nothing(item)
            self.write_tops(item, tile.pairs > 0)
            index, tile = index + ctas, next_tile

    @cute.jit
    def publish_tops(self) -> None:
        """The greatest scores of this warp to shared memory; a barrier of both warpgroups must follow."""
        consumer, sTop = self.consumer, self.consumer.shared.sTop
        lane, warp_id = consumer.tid % 32, 4 * consumer.side + consumer.tid // 32
        for c in cutlass.range_constexpr(consumer.config.tile_n // 4):
            top = consumer.top[c]
            for offset in (4, 8, 16):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=offset))
            if lane < 4:
                sTop[consumer.row(c), warp_id] = top

    @cute.jit
    def write_tops(self, item: Item, any_key) -> None:
        """The greatest logits, by the first threads; -inf where the token has no id."""
        consumer, sTop, max_logits = self.consumer, self.consumer.shared.sTop, self.tensors.max_logits
        thread = WARPGROUP * consumer.side + consumer.tid
        head = item.tile * consumer.config.tile_n + thread
        if thread < consumer.config.tile_n and head < max_logits.shape[1]:
            top = -Float32.inf
            if any_key:
                for warp_id in cutlass.range_constexpr(CONSUMER_WARPS):
                    top = cute.arch.fmax(top, sTop[thread, warp_id])
            max_logits[item.request, head] = top * math.log(2.0)
        # NOTE: the tops may be overwritten by the next tile only when they have been read
        sync(Bar.MERGE, CONSUMERS)
