"""The gather of the sparse backward's weights: four warps that bring in a tile's Q and dout, then the rows it names."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint16

from flash_mla.kernels.hopper.boxes import Tma, tma_boxes
from flash_mla.kernels.hopper.gather import ROWS, Gather, row_named
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M
from flash_mla.kernels.hopper.sparse_backward.config import PRODUCER_WARPS, ROW_STAGES
from flash_mla.kernels.hopper.sparse_backward.weights_shared import Scalars, Shared, Tensors, Tile


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
        shared.rows.written_by("gather", shared.rows.writers)
        return Producer(shared, tensors, scalars, gather, warp)

    @cute.jit
    def load_heads(self, tma: Tma, columns: cutlass.Constexpr, tile: Tile, item) -> None:
        """Bring in Q or dout of the tile's heads; those past the last arrive as zeros."""
        rows, config = self.shared.rows, self.shared.config
        stage, round = item % ROW_STAGES, item // ROW_STAGES
        rows.acquire(stage, round)
        if self.warp == 0:
            with cute.arch.elect_one():
                rows.expect(stage, 2 * TILE_M * columns)
            shape = (columns // CHUNK, ROW_STAGES)
            many = cute.make_layout(shape, stride=(TILE_M * CHUNK, BLOCK * config.D))
            boxes = (TILE_M, CHUNK), (None, None, None)
            target, source = tma_boxes(tma.atom, self.shared.ring, many, tma.tensor, *boxes)
            for chunk in cutlass.range_constexpr(columns // CHUNK):
                box = source[None, tile.group, chunk, tile.token]
                cute.copy(tma.atom, box, target[None, (chunk, stage)], tma_bar_ptr=rows.bar(stage))
        else:
            with cute.arch.elect_one():
                rows.arrive(stage)
        rows.arrive_copied(stage)

    @cute.jit
    def id_at(self, tile: Tile, step):
        """This lane's id in a step, negative where it names no row."""
        key = BLOCK * step + ROWS * self.warp + cute.arch.lane_idx() % ROWS
        return row_named(self.tensors.indices, tile.token, key, tile.keys, self.scalars.num_rows)

    @cute.jit
    def load_keys(self, row, item) -> None:
        """This warp's 16 rows, and which keys name a row; row: of lane r and r + 16 for row r."""
        rows, config = self.shared.rows, self.shared.config
        stage, round = item % ROW_STAGES, item // ROW_STAGES
        seen = Int32(cute.arch.vote_ballot_sync(row >= 0))
        sources = self.gather.sources(row, 0)
        rows.acquire(stage, round)
        self.gather.copy(self.shared.address + stage * (2 * BLOCK * config.D), sources, tuple(range(config.chunks)))
        rows.arrive_copied(stage)
        with cute.arch.elect_one():
            self.shared.sSeen[stage * PRODUCER_WARPS + self.warp] = Uint16(seen & 0xFFFF)
            rows.arrive(stage)

    @cute.jit
    def run(self, q: Tma, d_out: Tma, tile: Tile, item):
        """Bring in a tile, from item `item` of the ring on; ids are read a step ahead."""
        config = self.shared.config
        row = self.id_at(tile, 0)
        self.load_heads(q, config.D, tile, item)
        self.load_heads(d_out, config.Dv, tile, item + 1)
        for step in cutlass.range(tile.steps, unroll=1):
            following = self.id_at(tile, step + 1)
            self.load_keys(row, item + 2 + step)
            row = following


assert PRODUCER_WARPS * ROWS == BLOCK
