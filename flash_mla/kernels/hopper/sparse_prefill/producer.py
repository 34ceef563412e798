"""The gather of a sparse prefill: four warps that bring in the rows that a token names, and its queries."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from flash_mla.kernels.hopper.gather import NO_ROW, ROWS, Gather
from flash_mla.kernels.hopper.sparse_prefill.config import CHUNK, CHUNK_BYTES, K_CHUNKS, PAIR, TILE_M, Config
from flash_mla.kernels.hopper.sparse_prefill.shared import CHUNK_ELEMENTS, Scalars, Shared, Tensors, keys_of


@dataclass(frozen=True)
class Producer:
    """A thread of the four warps; warp 0 also loads Q by TMA.

    sQ [box, chunk]; gQ [box, head tile, chunk, token]. key: the key of a pair whose index this thread holds: lanes 0 to
    15 of a warp those of its rows of the even block, the others those of the odd block.
    """

    config: Config
    shared: Shared
    tensors: Tensors
    scalars: Scalars
    tma_q: cute.CopyAtom
    sQ: cute.Tensor
    gQ: cute.Tensor
    gather: Gather
    warp: Int32
    lane: Int32
    key: Int32

    @staticmethod
    def over(config: Config, shared: Shared, tensors: Tensors, scalars: Scalars, tma_q, tQ, warp) -> Producer:
        chunks = cute.append(shared.row_layout(1).outer, cute.make_layout(config.chunks, stride=CHUNK_ELEMENTS))
        smem = cute.make_tensor(shared.sQ.iterator, chunks)
        gmem = cute.local_tile(tQ, (TILE_M, CHUNK), (None, None, None))
        smem, gmem = cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2)
        sQ, gQ = cpasync.tma_partition(tma_q, 0, cute.make_layout(1), smem, gmem)
        lane = cute.arch.lane_idx()
        gather = Gather.over(tensors.rows, scalars.row_bytes, warp, lane)
        key = lane // ROWS * (PAIR // 2) + ROWS * warp + lane % ROWS
        return Producer(config, shared, tensors, scalars, tma_q, sQ, gQ, gather, warp, lane, key)

    @cute.jit
    def index_at(self, tile, pair):
        """This thread's index in a pair of a tile, NO_ROW where it names no row."""
        index = Int32(NO_ROW)
        if tile < self.scalars.tiles:
            token = tile // self.scalars.head_tiles
            key = PAIR * pair + self.key
            if key < keys_of(self.tensors, self.scalars, token):
                index = self.tensors.indices[token, key]
        return index if index < self.scalars.num_rows else Int32(NO_ROW)

    @cute.jit
    def load_q(self, tile, count) -> None:
        """The tile's heads; those past the last arrive as zeros."""
        q, token = self.shared.q, tile // self.scalars.head_tiles
        q.acquire(0, count)
        with cute.arch.elect_one():
            q.expect(0, self.config.chunks * CHUNK_BYTES)
        for chunk in cutlass.range_constexpr(self.config.chunks):
            source = self.gQ[None, tile - token * self.scalars.head_tiles, chunk, token]
            cute.copy(self.tma_q, source, self.sQ[None, chunk], tma_bar_ptr=q.full)

    @cute.jit
    def load_half(self, stage: cutlass.Constexpr, sources, seen, round) -> None:
        """One half of a block, and with its first half the keys that name a row; seen: a bit for each lane."""
        k, block, sSeen = self.shared.k, stage // 2, self.shared.sSeen
        k.acquire(stage, round)
        base = self.shared.k_address + block * K_CHUNKS * CHUNK_BYTES
        self.gather.copy(base, sources, self.config.stage_chunks(stage))
        cute.arch.cp_async_mbarrier_arrive_noinc(k.full + stage)
        with cute.arch.elect_one():
            if const_expr(stage % 2 == 0):
                sSeen[block, self.warp] = cutlass.Uint16(seen >> (ROWS * block))
            cute.arch.mbarrier_arrive(k.full + stage)

    @cute.jit
    def run(self, first_tile, ctas) -> None:
        """Walk the CTA's tiles."""
        tiles_done, pairs_done = Int32(0), Int32(0)
        scalars, tensors = self.scalars, self.tensors
        index, after = self.index_at(first_tile, 0), Int32(NO_ROW)
        tile = first_tile
        while tile < scalars.tiles:
            keys = keys_of(tensors, scalars, tile // scalars.head_tiles)
            pairs = (keys + (PAIR - 1)) // PAIR
            for pair in cutlass.range(pairs, unroll=1):
                last = pair + 1 == pairs
                after = self.index_at(tile + ctas if last else tile, 0 if last else pair + 1)
                turn = pairs_done + pair
                seen = Int32(cute.arch.vote_ballot_sync(index >= 0))
                if pair == 0 and tiles_done == 0 and self.warp == 0:
                    self.load_q(tile, tiles_done)
                even = self.gather.sources(index, 0)
                self.load_half(0, even, seen, turn)
                self.load_half(1, even, seen, turn)
                if pair == 0 and tiles_done > 0 and self.warp == 0:
                    self.load_q(tile, tiles_done)
                odd = self.gather.sources(index, ROWS)
                self.load_half(2, odd, seen, turn)
                self.load_half(3, odd, seen, turn)
                index = after
            if pairs == 0:
                index = self.index_at(tile + ctas, 0)
            else:
                tiles_done, pairs_done = tiles_done + 1, pairs_done + pairs
            tile = tile + ctas
