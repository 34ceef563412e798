"""The producer warps of sparse decode over BF16 rows: they only start copies, `cp.async` into the swizzled chunks.

A warp copies 16 rows of each block, four with one instruction, half of their columns at a time (`gather.py`): bytes on
their way take no registers, and all that a stage can hold is on its way at once. Each lane's copies tell the barrier
themselves that they have landed. Of two CTAs in a cluster each copies all rows: L2 gives them twice in less time than
two CTAs take to hand each other half of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from flash_mla.kernels.hopper.gather import PASS, PASSES, PIECE, ROWS, Gather, Sources, place
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS
from flash_mla.kernels.hopper.sparse_decode.config import CHUNK_BYTES
from flash_mla.kernels.hopper.sparse_decode.producer import Copying


@dataclass(frozen=True)
class CopyProducer(Copying):
    """One of the warps that have rows copied: lane l looks after row l % 16 of its warp's, of the even or odd block."""

    @cute.jit
    def sources(self, block: cutlass.Constexpr) -> Sources:
        """Where this thread reads rows of a block; of a row that is not there nothing, and zeros arrive."""
        addresses, sizes = [], []
        for i in cutlass.range_constexpr(PASSES):
            row = cute.arch.shuffle_sync(self.row[0], offset=ROWS * block + PASS * i + self.lane // 8)
            addresses.append(row + PIECE * (self.lane % 8))
            sizes.append(Int32(PIECE) if row != 0 else Int32(0))
        return Sources(addresses, sizes)

    @cute.jit
    def fill_pair(self, turn) -> None:
        """Start to copy a pair of blocks, half a block at a time."""
        k, config = self.shared.k, self.config
        gather = Gather(Int64(0), Int64(0), place(self.warp, self.lane, 0), place(self.warp, self.lane, 1) - 128 * PASS)
        for block in cutlass.range_constexpr(2):
            sources = self.sources(block)
            buffer = self.shared.k_buffers.toint() + CHUNK_BYTES * K_CHUNKS * block
            for stage in cutlass.range_constexpr(2 * block, 2 * block + 2):
                k.acquire(stage, turn)
                gather.copy(buffer, sources, config.stage_chunks(stage))
                k.arrive_copied(stage)
                if stage % 2 == 0:
                    self.tell_live(stage)
                k.arrive_warp(stage)
