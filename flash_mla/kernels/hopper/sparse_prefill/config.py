"""What the sparse prefill takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, ROW_BYTES, STAGED, TILE_M, WARP, barrier_bytes, smem_bytes
from flash_mla.kernels.hopper.mla_decode.config import (
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    DV,
    K_CHUNKS,
    PRODUCER_REGISTERS,
    STAGES,
)

TILES = (8, 16, TILE_M)
"""Heads of a tile."""
MAX_ROWS = 2**31 - 1
"""Rows of kv: an id has 32 bits."""

PAIR = 2 * BLOCK
"""Keys of a step."""
CHUNK_BYTES = BLOCK * ROW_BYTES
PRODUCER_WARPS = 4
WARPS = CONSUMER_WARPS + PRODUCER_WARPS
THREADS = WARP * WARPS

BINS, ORDER_WARPS = 32, 8
"""Ranges of rows that ids are ordered by, one a lane, and warps that order a token's."""
MAX_ORDERED = 8192
"""Ids of a token that fit into 32 KB of shared memory."""


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    dtype of q, kv and out; D, the width of the rows: 576, or 512 without a rope part; tile_heads, the heads of a tile:
    64 as the M of the products, or 8 or 16 as their N.
    """

    dtype: Literal["bf16", "fp16"]
    D: int
    tile_heads: int = TILE_M

    cluster, threads = 1, THREADS

    @property
    def few(self) -> bool:
        """Whether heads are the N of the products."""
        return self.tile_heads < TILE_M

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's and of a producer's thread."""
        return (216, 72) if self.few else (CONSUMER_REGISTERS, PRODUCER_REGISTERS)

    def stage_chunks(self, stage: int) -> tuple[int, ...]:
        """Chunks of a block that travel through a stage: four of V, and the rope chunk with stages 1 and 2."""
        first = 4 * (stage % 2)
        rope = (K_CHUNKS - 1,) if stage in (1, 2) and self.chunks == K_CHUNKS else ()
        return (*range(first, first + 4), *rope)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, two K buffers, what the consumers exchange, seen keys, barriers."""
        heads = self.tile_heads
        q, k = 2 * heads * self.D, 2 * K_CHUNKS * CHUNK_BYTES
        if self.few:
            # P, two buffers a warpgroup; sum and top of each warp, row max of each warpgroup
            rest = 2 * 4 * heads * BLOCK + 4 * heads * (2 * CONSUMER_WARPS + 2)
        else:
            # max, sum and top of each row and warpgroup; staged out
            rest = 4 * 3 * 2 * heads + 2 * CONSUMER_WARPS * STAGED
        return smem_bytes(q, k, rest, PAIR // 8, barrier_bytes(STAGES, 1))

    # what the consumers of GQA decode read of their config

    @property
    def product(self) -> Literal["bf16", "fp16"]:
        return self.dtype

    @property
    def tile_n(self) -> int:
        return self.tile_heads

    @property
    def k_steps(self) -> int:
        """Instructions of K Q^T: 16 columns each."""
        return self.D // 16

    fp8 = False
    stages = 2
    """Blocks in shared memory."""
    Dv = DV
    tiles_m = DV // TILE_M


def bin_shift(num_rows: int) -> int:
    """Row r falls into bin r >> shift, one of BINS."""
    return max(0, (num_rows - 1).bit_length() - (BINS - 1).bit_length())
