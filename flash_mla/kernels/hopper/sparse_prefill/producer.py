"""The gather of a sparse prefill: four warps that bring in the rows that a token names, and its queries."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint16, const_expr

from flash_mla.kernels.hopper.boxes import tma_boxes
from flash_mla.kernels.hopper.gather import ROWS, Gather, row_named
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, WARP
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS
from flash_mla.kernels.hopper.sparse_prefill.config import CHUNK_BYTES, PAIR, PRODUCER_WARPS, Config
from flash_mla.kernels.hopper.sparse_prefill.shared import Scalars, Shared, Tensors, Tile, tile_at


@dataclass(frozen=True)
class Producer:
    """A thread of the four warps; warp 0 also loads Q by TMA.

    sQ [box, chunk]; gQ [box, head tile, chunk, token]. key: the key of a pair whose id this thread holds: lanes 0 to 15
    of a warp those of its rows of the even block, the others those of the odd block.
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
    key: Int32

    @staticmethod
    def over(shared: Shared, tensors: Tensors, scalars: Scalars, tma_q, tQ, warp) -> Producer:
        config, lane = shared.config, cute.arch.lane_idx()
        box = (config.tile_heads, CHUNK)
        many = cute.make_layout(config.chunks, stride=config.tile_heads * CHUNK)
        sQ, gQ = tma_boxes(tma_q, shared.sQ.iterator, many, tQ, box, (None, None, None))
        gather = Gather.over(tensors.kv, scalars.row_bytes, warp, lane)
        key = lane // ROWS * BLOCK + ROWS * warp + lane % ROWS
        shared.q.written_by("gather")
        shared.k.written_by("gather", PRODUCER_WARPS * (WARP + 1))
        return Producer(config, shared, tensors, scalars, tma_q, sQ, gQ, gather, warp, key)

    @cute.jit
    def id_at(self, tile: Tile, pair):
        """This thread's id in a pair of a tile, negative where it names no row."""
        key = PAIR * pair + self.key
        return row_named(self.tensors.indices, tile.token, key, tile.keys, self.scalars.num_rows)

    @cute.jit
    def load_q(self, tile: Tile, count) -> None:
        """The tile's heads; those past the last arrive as zeros."""
        q = self.shared.q
        q.acquire(0, count)
        with cute.arch.elect_one():
            q.expect(0, self.config.tile_heads * self.config.D * 2)
        for chunk in cutlass.range_constexpr(self.config.chunks):
            source = self.gQ[None, tile.group, chunk, tile.token]
            cute.copy(self.tma_q, source, self.sQ[None, chunk], tma_bar_ptr=q.bar(0))

    @cute.jit
    def load_half(self, stage: cutlass.Constexpr, sources, seen, round) -> None:
        """One half of a block, and with its first half the keys that name a row; seen: a bit for each lane."""
        k, block, sSeen = self.shared.k, stage // 2, self.shared.sSeen
        k.acquire(stage, round)
        buffer = self.shared.k_address + block * K_CHUNKS * CHUNK_BYTES
        self.gather.copy(buffer, sources, self.config.stage_chunks(stage))
        k.arrive_copied(stage)
        with cute.arch.elect_one():
            if const_expr(stage % 2 == 0):
                sSeen[block, self.warp] = Uint16(seen >> (ROWS * block))
            k.arrive(stage)

    @cute.jit
    def run(self, first, ctas) -> None:
        """Bring in the CTA's tiles, numbers `first`, `first + ctas`, ...; ids are read a pair ahead."""
        tensors, scalars = self.tensors, self.scalars
        tiles_done, pairs_done = Int32(0), Int32(0)
        index, tile = first, tile_at(tensors, scalars, first)
        row = self.id_at(tile, 0)
        while index < scalars.tiles:
            next_tile = tile_at(tensors, scalars, index + ctas)
            # NOTE: the first Q goes before K; later ones behind the even block, when the last tile has let go of Q
            if tile.pairs > 0 and tiles_done == 0 and self.warp == 0:
                self.load_q(tile, tiles_done)
            for pair in cutlass.range(tile.pairs, unroll=1):
                next_row = self.id_at(tile, pair + 1)
                if pair + 1 == tile.pairs:
                    next_row = self.id_at(next_tile, 0)
                turn = pairs_done + pair
                seen = Int32(cute.arch.vote_ballot_sync(row >= 0))
                even = self.gather.sources(row, 0)
                self.load_half(0, even, seen, turn)
                self.load_half(1, even, seen, turn)
                if pair == 0 and tiles_done > 0 and self.warp == 0:
                    self.load_q(tile, tiles_done)
                odd = self.gather.sources(row, ROWS)
                self.load_half(2, odd, seen, turn)
                self.load_half(3, odd, seen, turn)
                row = next_row
            if tile.pairs > 0:
                tiles_done, pairs_done = tiles_done + 1, pairs_done + tile.pairs
            else:
                row = self.id_at(next_tile, 0)
            index, tile = index + ctas, next_tile
