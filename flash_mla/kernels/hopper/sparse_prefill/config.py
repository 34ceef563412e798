"""What the sparse prefill takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, ROW_BYTES, STAGED, TILE_M, WARP, barrier_bytes, smem_bytes
from flash_mla.kernels.hopper.mla_decode.config import CONSUMER_WARPS, K_CHUNKS, STAGES

WIDTHS = ((576, 512), (512, 512))
"""(D, Dv): the latent with and without a rope part."""
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

    dtype of q, kv and out; D, the width of the rows: 576, or 512 without a rope part.
    """

    dtype: Literal["bf16", "fp16"]
    D: int

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    def stage_chunks(self, stage: int) -> tuple[int, ...]:
        """Chunks of a block that travel through a stage: four of V, and the rope chunk with stages 1 and 2."""
        first = 4 * (stage % 2)
        rope = (K_CHUNKS - 1,) if stage in (1, 2) and self.chunks == K_CHUNKS else ()
        return (*range(first, first + 4), *rope)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, two K buffers, max, sum and top of each row, staged out, seen keys, barriers."""
        q, k = 2 * TILE_M * self.D, 2 * K_CHUNKS * CHUNK_BYTES
        rows, out, seen = 4 * 3 * 2 * TILE_M, 2 * CONSUMER_WARPS * STAGED, PAIR // 8
        return smem_bytes(q, k, rows, out, seen, barrier_bytes(STAGES, 1))


def bin_shift(num_rows: int) -> int:
    """Row r falls into bin r >> shift, one of BINS."""
    return max(0, (num_rows - 1).bit_length() - (BINS - 1).bit_length())
