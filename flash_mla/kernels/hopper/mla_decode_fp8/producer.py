"""The producing warp of an FP8 MLA decode: it fills Q and the K stages by TMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.boxes import Tma, tma_boxes
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M
from flash_mla.kernels.hopper.mla_decode.shared import Scalars
from flash_mla.kernels.hopper.mla_decode_fp8.config import CHUNK, CHUNKS, DV, ROPE, Config
from flash_mla.kernels.hopper.mla_decode_fp8.shared import Shared
from flash_mla.kernels.hopper.table import block_of, kept_inside
from flash_mla.kernels.hopper.team import Share
from flash_mla.kernels.hopper.walk import Done, Place, block_range, walk
from flash_mla.kernels.hopper.work import Work

EVICT_FIRST = 0x12F0000000000000
"""TMA cache hint of a cluster's loads: nobody else reads that K."""


class Loads(NamedTuple):
    """Each kind of load, if there is one."""

    q: Tma | None
    q_rope: Tma | None
    k: Tma
    k_rope: Tma | None


@dataclass(frozen=True)
class Boxes:
    """Where a copy goes from and to: TMA atom, boxes in shared memory [box], boxes in global memory [tile, ...]."""

    tma: cute.CopyAtom
    smem: cute.Tensor
    gmem: cute.Tensor


@dataclass(frozen=True)
class Producer:
    """One warp that fills the K stages and Q by TMA; in a cluster it loads its share of a block's rows for all CTAs.

    q, q_rope [row tile, chunk, request] and k, k_rope [row share, chunk, block, request]; pages [64, D, blocks,
    requests] is the cache itself.
    """

    config: Config
    shared: Shared
    tensors: Tensors
    rank: Int32
    q: Boxes | None
    q_rope: Boxes | None
    k: Boxes
    k_rope: Boxes | None
    pages: cute.Tensor

    @staticmethod
    def over(shared: Shared, tensors: Tensors, rank, loads: Loads, pages) -> Producer:
        config, loads_q = shared.config, shared.config.q == "fp8"
        box, share, pieces = config.q_box, BLOCK // config.sharers, config.stages * config.sharers

        def boxes(load: Tma | None, memory: cute.Tensor, count: int, stride: int, box, tiles: int) -> Boxes | None:
            if load is None:
                return None
            many = cute.make_layout(count, stride=stride)
            return Boxes(load.atom, *tma_boxes(load.atom, memory.iterator, many, load.tensor, box, (None,) * tiles))

        for channel in (shared.q, shared.k) if loads_q else (shared.k,):
            channel.written_by("producer")
        return Producer(
            config,
            shared,
            tensors,
            rank,
            boxes(loads.q, shared.sQ, CHUNKS * TILE_M // box, box * CHUNK, (box, CHUNK), 3),
            boxes(loads.q_rope, shared.sQ_rope, TILE_M // box, box * ROPE, (box, ROPE), 3),
            boxes(loads.k, shared.sK, CHUNKS * pieces, share * CHUNK, (share, CHUNK), 4),
            boxes(loads.k_rope, shared.sK_rope, pieces, share * ROPE, (share, ROPE), 4),
            pages,
        )

    @cute.jit
    def run(self, scalars: Scalars, work: Work) -> None:
        """Load the cluster's segments."""
        tensors, k = self.tensors, self.shared.k
        done = walk(work, tensors.table, tensors.seq_lens, scalars.groups, self.load_segment, Done.nothing())
        # a CTA must outlive its peer's arrivals on its barriers
        if const_expr(self.config.sharers > 1):
            for i in cutlass.range_constexpr(self.config.stages):
                number = done.items + i
                k.acquire(number % self.config.stages, number // self.config.stages)

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and every block of a segment."""
        if part.last > part.first:
            first, last = block_range(part, length)
            block = block_of(self.tensors.table, place.request, first, self.pages.shape[2])
            self.load_blocks(place, first, last, block, done)
            done = done.plus(last - first)
        return done

    @cute.jit
    def load_pair(self, share: Share) -> None:
        """Q, and the blocks of a CTA of a team that has a pair of them at most: the id of the first is at hand."""
        part = share.part
        if part.last > part.first:
            block = kept_inside(share.ids[0], self.pages.shape[2])
            self.load_blocks(share.place, *block_range(part, share.length), block, Done.nothing())

    @cute.jit
    def load_blocks(self, place: Place, first, last, block, done: Done) -> None:
        """Q and blocks [first, last) of a request, the first of which is `block` of the cache."""
        request, blocks = place.request, self.pages.shape[2]
        pool_request = cutlass.min(request, self.pages.shape[3] - 1)
        if const_expr(self.config.q == "fp8"):
            self.load_q(place.group * self.config.sharers + self.rank, request, done.segments)
        for logical in cutlass.range(first, last, unroll=1):
            # read the next id while this block is loaded
            next_block = block_of(self.tensors.table, request, cutlass.min(logical + 1, last - 1), blocks)
            self.load_block(block, pool_request, done.items + logical - first)
            block = next_block

    @cute.jit
    def load_q(self, row_tile, request, count) -> None:
        """The CTA's query rows; rows past the request's arrive as zeros."""
        config, channel, q, rope = self.config, self.shared.q, self.q, self.q_rope
        channel.acquire(0, count)
        with cute.arch.elect_one():
            channel.expect(0, config.tile_n * config.D)
        boxes = config.tile_n // config.q_box
        for i in cutlass.range_constexpr(boxes):
            tile, place = boxes * row_tile + i, config.tile_row(i * config.q_box) // config.q_box
            for chunk in cutlass.range_constexpr(CHUNKS):
                source, target = (
                    q.gmem[None, tile, chunk, request],
                    q.smem[None, TILE_M // config.q_box * chunk + place],
                )
                cute.copy(q.tma, source, target, tma_bar_ptr=channel.bar(0))
            if const_expr(config.rope > 0):
                source = rope.gmem[None, tile, DV // ROPE, request]
                cute.copy(rope.tma, source, rope.smem[None, place], tma_bar_ptr=channel.bar(0))

    @cute.jit
    def load_block(self, block, request, number) -> None:
        """A block of K into stage `number` of the ring: this CTA's share of its rows, to every CTA of the cluster."""
        config, channel, k, rope = self.config, self.shared.k, self.k, self.k_rope
        stage = number % config.stages
        channel.acquire(stage, number // config.stages)
        with cute.arch.elect_one():
            channel.expect(stage, BLOCK * config.D)
        for chunk in cutlass.range_constexpr(CHUNKS):
            piece = (stage * CHUNKS + chunk) * config.sharers + self.rank
            self.copy(k.tma, k.gmem[None, self.rank, chunk, block, request], k.smem[None, piece], channel.bar(stage))
        if const_expr(config.rope > 0):
            source = rope.gmem[None, self.rank, DV // ROPE, block, request]
            self.copy(rope.tma, source, rope.smem[None, stage * config.sharers + self.rank], channel.bar(stage))

    @cute.jit
    def copy(self, tma, source, target, bar) -> None:
        if const_expr(self.config.sharers == 1):
            cute.copy(tma, source, target, tma_bar_ptr=bar)
        else:
            everyone, hint = cutlass.Int16((1 << self.config.sharers) - 1), Int64(EVICT_FIRST)
            cute.copy(tma, source, target, tma_bar_ptr=bar, mcast_mask=everyone, cache_policy=hint)
