"""The gather of a sparse backward: four warps that bring in the rows that a token names, and its Q and dout."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint16, const_expr

from flash_mla.kernels.hopper.boxes import Tma, tma_boxes
from flash_mla.kernels.hopper.gather import NO_ROW, ROWS, Gather
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M
from flash_mla.kernels.hopper.sparse_backward.config import PRODUCER_WARPS
from flash_mla.kernels.hopper.sparse_backward.queries_shared import Scalars, Shared, Tensors, Tile


@dataclass(frozen=True)
class Producer:
    """A thread of the four warps, which bring in 16 rows of a step each; warp 0 also loads Q and dout by TMA."""

    shared: Shared
    tensors: Tensors
    scalars: Scalars
    gather: Gather
    warp: Int32

    @staticmethod
    def over(shared: Shared, tensors: Tensors, scalars: Scalars, warp) -> Producer:
        gather = Gather.over(tensors.kv, scalars.row_bytes, warp, cute.arch.lane_idx())
        shared.keys.written_by("gather", shared.keys.writers)
        shared.queries.written_by("gather")
        return Producer(shared, tensors, scalars, gather, warp)

    @cute.jit
    def load_queries(self, q: Tma, d_out: Tma, tile: Tile) -> None:
        """The tile's heads; those past the last arrive as zeros."""
        shared, config = self.shared, self.shared.config
        with cute.arch.elect_one():
            shared.queries.expect(0, 2 * TILE_M * (config.D + config.Dv))
        for tma, sX, columns in ((q, shared.sQ, config.D), (d_out, shared.sO, config.Dv)):
            many = cute.make_layout(columns // CHUNK, stride=TILE_M * CHUNK)
            target, source = tma_boxes(tma.atom, sX.iterator, many, tma.tensor, (TILE_M, CHUNK), (None, None, None))
            for chunk in cutlass.range_constexpr(columns // CHUNK):
                bar = shared.queries.bar(0)
                cute.copy(tma.atom, source[None, tile.group, chunk, tile.token], target[None, chunk], tma_bar_ptr=bar)

    @cute.jit
    def id_at(self, tile: Tile, step):
        """This lane's id in a step, NO_ROW where it names no row."""
        row, lane = Int32(NO_ROW), cute.arch.lane_idx()
        key = BLOCK * step + ROWS * self.warp + lane % ROWS
        if key < tile.keys:
            row = self.tensors.indices[tile.token, key]
        return row if row < self.scalars.num_rows else Int32(NO_ROW)

    @cute.jit
    def load_keys(self, row, step) -> None:
        """This warp's 16 rows, chunk after chunk, and which keys name a row; row: of lane r and r + 16 for row r."""
        keys, sSeen = self.shared.keys, self.shared.sSeen
        seen = Int32(cute.arch.vote_ballot_sync(row >= 0))
        sources = self.gather.sources(row, 0)
        for chunk in cutlass.range_constexpr(self.shared.config.chunks):
            keys.acquire(chunk, step)
            self.gather.copy(self.shared.k_address, sources, (chunk,))
            keys.arrive_copied(chunk)
            with cute.arch.elect_one():
                if const_expr(chunk == 0):
                    sSeen[self.warp] = Uint16(seen & 0xFFFF)
                keys.arrive(chunk)

    @cute.jit
    def run(self, tile: Tile) -> None:
        """Bring in the rows of every step; ids are read a step ahead."""
        row = self.id_at(tile, 0)
        for step in cutlass.range(tile.steps, unroll=1):
            following = self.id_at(tile, step + 1)
            self.load_keys(row, step)
            row = following


assert PRODUCER_WARPS * ROWS == BLOCK
