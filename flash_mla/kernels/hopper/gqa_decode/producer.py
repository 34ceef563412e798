"""The producing warp of a GQA decode: it fills the stages of Q, K and V by TMA."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.boxes import Tma, tma_boxes
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.gqa_decode.config import CHUNK_BYTES, Config
from flash_mla.kernels.hopper.gqa_decode.shared import Item, Scalars, Shared
from flash_mla.kernels.hopper.limits import BLOCK, ROW_BYTES
from flash_mla.kernels.hopper.table import block_of, kept_inside, prefetch_line
from flash_mla.kernels.hopper.team import Share
from flash_mla.kernels.hopper.walk import Done, Place, block_range


@dataclass(frozen=True)
class Producer:
    """One warp that fills the stages by TMA.

    sQ [chunk], gQ [row tile, chunk, KV head, request]; sK, sV [chunk of a stage], gK, gV [chunk, KV head, block,
    request]; each of one box. blocks, requests: of the caches.
    """

    config: Config
    shared: Shared
    table: cute.Tensor
    scalars: Scalars
    tma: tuple[cute.CopyAtom | None, cute.CopyAtom, cute.CopyAtom]
    sQ: cute.Tensor | None
    gQ: cute.Tensor | None
    sK: cute.Tensor
    gK: cute.Tensor
    sV: cute.Tensor
    gV: cute.Tensor
    blocks: Int32
    requests: Int32

    @staticmethod
    def over(shared: Shared, table: cute.Tensor, scalars: Scalars, q: Tma, k: Tma, v: Tma) -> Producer:
        config = shared.config

        def boxes(load: Tma, smem: cute.Tensor, rows: int, count: int, coordinate):
            many = cute.make_layout(count, stride=rows * config.chunk)
            return tma_boxes(load.atom, smem.iterator, many, load.tensor, (rows, config.chunk), coordinate)

        tiles, page = (None, None, None, None), (0, None, None, None, None)
        sQ = gQ = None
        if q is not None:
            sQ, gQ = boxes(q, shared.sQ, config.tile_n, config.q_stages * config.k_chunks, tiles)
            shared.q.written_by("producer")
        sK, gK = boxes(k, shared.sK, BLOCK, config.stages * config.k_chunks, page)
        sV, gV = boxes(v, shared.sV, BLOCK, config.stages * config.v_chunks, page)
        for channel in (shared.k, shared.v):
            channel.written_by("producer")
        tma, (_, _, _, blocks, requests) = (None if q is None else q.atom, k.atom, v.atom), k.tensor.shape
        return Producer(config, shared, table, scalars, tma, sQ, gQ, sK, gK, sV, gV, blocks, requests)

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and the blocks of a segment."""
        config, shared, table, lane = self.config, self.shared, self.table, cute.arch.lane_idx()
        if part.last > part.first:
            item = Item.at(place, self.scalars)
            first, last = block_range(part, length)
            if const_expr(config.q_terms == 1):
                self.load_q(item, done.segments)
            request = cutlass.min(item.request, self.requests - 1)
            ids = Int32(0)
            for block in cutlass.range(first, last, unroll=1):
                # 32 block ids at a time, one a lane
                if (block - first) % 32 == 0:
                    ids = block_of(table, item.request, cutlass.min(block + lane, last - 1), self.blocks)
                page = (item.head, cute.arch.shuffle_sync(ids, offset=(block - first) % 32), request)
                turn = done.items + block - first
                self.load_page(shared.k, self.tma[1], self.gK, self.sK, config.k_chunks, page, turn)
                self.load_page(shared.v, self.tma[2], self.gV, self.sV, config.v_chunks, page, turn)
            done = done.plus(last - first)
        return done

    @cute.jit
    def load_pair(self, share: Share) -> None:
        """Q, and the one or two blocks of a CTA in a team."""
        shared, config = self.shared, self.config
        if share.part.last > share.part.first:
            item = Item.at(share.place, self.scalars)
            first, last = block_range(share.part, share.length)
            request = cutlass.min(item.request, self.requests - 1)
            for i in cutlass.range_constexpr(2):
                if first + i < last:
                    page = (item.head, kept_inside(share.ids[i], self.blocks), request)
                    self.load_page(shared.k, self.tma[1], self.gK, self.sK, config.k_chunks, page, Int32(i))
                    if const_expr(i == 0 and config.q_terms == 1):
                        self.load_q(item, Int32(0))
                    self.load_page(shared.v, self.tma[2], self.gV, self.sV, config.v_chunks, page, Int32(i))

    @cute.jit
    def load_q(self, item: Item, count) -> None:
        """The item's query rows; rows past the KV head's arrive as zeros."""
        config, q = self.config, self.shared.q
        stage, turn = count % config.q_stages, count // config.q_stages
        q.acquire(stage, turn)
        with cute.arch.elect_one():
            q.expect(stage, config.k_chunks * config.tile_n * ROW_BYTES)
        for c in cutlass.range_constexpr(config.k_chunks):
            cute.copy(
                self.tma[0],
                self.gQ[None, item.tile, c, item.head, item.request],
                self.sQ[None, stage * config.k_chunks + c],
                tma_bar_ptr=q.bar(stage),
            )

    @cute.jit
    def load_page(self, channel: Channel, atom, gmem, smem, chunks: cutlass.Constexpr, page, count) -> None:
        """A block of K or V into stage `count` of its ring; page: (KV head, block, request)."""
        stages = self.config.stages
        stage, turn = count % stages, count // stages
        channel.acquire(stage, turn)
        with cute.arch.elect_one():
            channel.expect(stage, chunks * CHUNK_BYTES)
        head, block, request = page
        for c in cutlass.range_constexpr(chunks):
            source, target = gmem[None, c, head, block, request], smem[None, stage * chunks + c]
            cute.copy(atom, source, target, tma_bar_ptr=channel.bar(stage))


@cute.jit
def prefetch_table(table: cute.Tensor, thread) -> None:
    """Ask L2 for a 128-byte line of the table, one a thread of the grid: which entries to read is known 1 us later."""
    first = thread * (128 // 4)
    if first < (table.shape[0] - 1) * table.stride[0] + table.shape[1]:
        prefetch_line(table.iterator.toint() + 4 * cutlass.Int64(first))
