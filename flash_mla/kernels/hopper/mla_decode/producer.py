"""The producing warp of an MLA decode: it fills Q and the halves of K blocks by TMA."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.boxes import tma_boxes
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK
from flash_mla.kernels.hopper.mla_decode.config import CHUNK_ELEMENTS, K_CHUNKS, P_CHUNK, STAGES, Config
from flash_mla.kernels.hopper.mla_decode.shared import Shared
from flash_mla.kernels.hopper.table import block_of, kept_inside
from flash_mla.kernels.hopper.team import Share
from flash_mla.kernels.hopper.walk import Done, Place

EVICT_FIRST = 0x12F0000000000000
"""TMA cache hint of a cluster's loads: nobody else reads that K."""


@dataclass(frozen=True)
class Producer:
    """One warp that fills the K stages and Q by TMA; in a cluster it loads its share of every stage for all CTAs.

    sQ [chunk], gQ [row tile, chunk, request] and sK [buffer chunk], gK [chunk, block, request], each of 64 x 64 boxes;
    pages [64, D, blocks, requests] is the cache itself.
    """

    config: Config
    shared: Shared
    table: cute.Tensor
    rank: Int32
    tma_q: cute.CopyAtom
    tma_k: cute.CopyAtom
    sQ: cute.Tensor
    gQ: cute.Tensor
    sK: cute.Tensor
    gK: cute.Tensor
    pages: cute.Tensor

    @staticmethod
    def over(shared: Shared, table: cute.Tensor, rank, tma_q, tQ, tma_k, tK, pages) -> Producer:
        many = cute.make_layout(2 * K_CHUNKS, stride=CHUNK_ELEMENTS)
        sQ, gQ = tma_boxes(tma_q, shared.sQ.iterator, many, tQ, (shared.config.tile_m, CHUNK), (None, None, None))
        sK, gK = tma_boxes(tma_k, shared.k_buffers, many, tK, (BLOCK, CHUNK), (0, None, None, None))
        for channel in shared.channels:
            channel.written_by("producer")
        return Producer(shared.config, shared, table, rank, tma_q, tma_k, sQ, gQ, sK, gK, pages)

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and every pair of a segment, half block by half block in the order in which the consumers free them."""
        table, request, first, last = self.table, place.request, part.first, part.last
        if last > first:
            blocks = self.pages.shape[2]
            last_block = (length + BLOCK - 1) // BLOCK - 1
            pool_request = cutlass.min(request, self.pages.shape[3] - 1)
            even = block_of(table, request, 2 * first, blocks)
            odd = block_of(table, request, cutlass.min(2 * first + 1, last_block), blocks)
            if const_expr(not self.config.team):
                self.load_q(place.group * self.config.sharers + self.rank, request, done.segments)
            for pair in cutlass.range(first, last, unroll=1):
                # read the next ids while this pair is loaded
                next_even = block_of(table, request, cutlass.min(2 * pair + 2, last_block), blocks)
                next_odd = block_of(table, request, cutlass.min(2 * pair + 3, last_block), blocks)
                turn = done.items + pair - first
                self.prefetch(next_even, next_odd, pool_request)
                self.load_halves(even, odd, pool_request, turn, False)
                even, odd = next_even, next_odd
            done = done.plus(last - first)
        return done

    @cute.jit
    def load_pair(self, share: Share) -> None:
        """The blocks of a CTA in a team."""
        if share.part.last > share.part.first:
            pool_request = cutlass.min(share.place.request, self.pages.shape[3] - 1)
            even, odd = (kept_inside(block, self.pages.shape[2]) for block in share.ids)
            lone = share.length - split.PAIR * share.part.first <= BLOCK
            self.load_halves(even, odd, pool_request, Int32(0), lone)

    @cute.jit
    def load_halves(self, even, odd, pool_request, turn, lone) -> None:
        """A pair of blocks, of which there may be the first alone."""
        self.load_half(0, even, pool_request, turn)
        self.load_half(1, even, pool_request, turn)
        if lone:
            self.leave_half(2, turn)
            self.leave_half(3, turn)
        else:
            self.load_half(2, odd, pool_request, turn)
            self.load_half(3, odd, pool_request, turn)

    @cute.jit
    def leave_half(self, stage: cutlass.Constexpr, count) -> None:
        """Half of a block that is wholly past the end: it counts as loaded."""
        k = self.shared.k
        k.acquire(stage, count)
        with cute.arch.elect_one():
            k.arrive(stage)

    @cute.jit
    def outlive_peers(self, done: Done) -> None:
        """Wait until the readers of all CTAs are done with the last stages."""
        # a CTA must outlive its peer's arrivals on its barriers; the bytes that it gets, its consumers have waited for
        # NOTE: a cluster barrier in its place would flush every write first
        for stage in cutlass.range_constexpr(STAGES):
            self.shared.k.acquire(stage, done.items)

    @cute.jit
    def load_q(self, row_tile, request, count) -> None:
        """The CTA's query rows; rows past the request's arrive as zeros."""
        q = self.shared.q
        q.acquire(0, count)
        with cute.arch.elect_one():
            q.expect(0, self.config.chunks * 2 * CHUNK * self.config.tile_m)
        for chunk in cutlass.range_constexpr(self.config.chunks):
            cute.copy(self.tma_q, self.gQ[None, row_tile, chunk, request], self.sQ[None, chunk], tma_bar_ptr=q.bar(0))

    @cute.jit
    def load_half(self, stage: cutlass.Constexpr, block, request, count) -> None:
        """One half of a block: this CTA's share of its chunks, to every CTA of the cluster."""
        config, k, buffer = self.config, self.shared.k, stage // 2
        k.acquire(stage, count)
        with cute.arch.elect_one():
            k.expect(stage, config.stage_chunks(stage) * 2 * CHUNK_ELEMENTS)
        first = 4 * (stage % 2)
        if const_expr(config.sharers == 1):
            for i in cutlass.range_constexpr(4):
                self.load_chunk(stage, first + i, block, request)
            if const_expr(config.stage_chunks(stage) == 5):
                self.load_chunk(stage, P_CHUNK, block, request)
        else:
            for i in cutlass.range_constexpr(0, 4, config.sharers):
                self.load_chunk(stage, first + i + self.rank, block, request)
            if const_expr(config.stage_chunks(stage) == 5):  # noqa: SIM102
                if self.rank == buffer:
                    self.load_chunk(stage, P_CHUNK, block, request)

    @cute.jit
    def load_chunk(self, stage: cutlass.Constexpr, chunk, block, request) -> None:
        buffer = stage // 2
        gK, sK = self.gK[None, chunk, block, request], self.sK[None, buffer * K_CHUNKS + chunk]
        bar = self.shared.k.bar(stage)
        if const_expr(self.config.sharers == 1):
            # NOTE: without the hint: 4.27 against 4.18 TB/s at 16 heads, S 32768
            cute.copy(self.tma_k, gK, sK, tma_bar_ptr=bar)
        else:
            everyone, hint = cutlass.Int16((1 << self.config.sharers) - 1), Int64(EVICT_FIRST)
            cute.copy(self.tma_k, gK, sK, tma_bar_ptr=bar, mcast_mask=everyone, cache_policy=hint)

    @cute.jit
    def prefetch(self, even, odd, request) -> None:
        """Ask L2 for a pair of blocks, each in one piece; in a cluster each CTA asks for one."""
        # NOTE: the TMA boxes of a block are 128-byte pieces of its rows; whole blocks keep DRAM pages open
        if const_expr(self.config.sharers > 1):  # noqa: SIM102
            if self.pages.stride[0] == self.config.D:
                self.prefetch_block(even if self.rank == 0 else odd, request)

    @cute.jit
    def prefetch_block(self, block, request) -> None:
        address = self.pages[None, None, block, request].iterator.toint()
        with cute.arch.elect_one():
            cute.arch.inline_ptx(
                "cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};",
                read_only_args=[address, Int32(2 * BLOCK * self.config.D)],
            )
