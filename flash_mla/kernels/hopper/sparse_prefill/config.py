"""What a variant of the sparse prefill is, and the shared memory that it takes. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TILE_M = 64
"""Heads of a CTA's tile."""
BLOCK = 64
"""Keys of a block."""
PAIR = 2 * BLOCK
"""Keys of a step."""
CHUNK = 64
"""Columns of a 64 x 64 chunk: 128 bytes, one row of the 128-byte swizzle."""
CHUNK_BYTES = 2 * BLOCK * CHUNK
DV = 512
K_CHUNKS = 9
"""Chunks of a K buffer. The ninth holds K's rope part until Q K^T is done, then P."""
STAGES = 4
"""Half blocks of a pair: stage 0, 1 = left, right half of the even block, 2, 3 = of the odd block."""
CONSUMERS, PRODUCERS = 256, 128
THREADS = CONSUMERS + PRODUCERS
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 216, 72
"""A thread; (2 * 216 + 72) * 128 = 64512 of the 65536 of an SM."""
STAGED = 16 * 32
"""Elements of out that a warp stages: 32 columns of its 16 rows."""


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
        """Shared memory of a CTA: Q, two K buffers, staged out, row max, sums and tops, masks, barriers.

        Rounded up to the 1024 bytes on which swizzled buffers are aligned.
        """
        q, k = 2 * TILE_M * self.D, 2 * K_CHUNKS * CHUNK_BYTES
        staged, rows, masks = 2 * CONSUMERS // 32 * STAGED, 3 * 4 * 2 * TILE_M, 2 * BLOCK // 8
        used = q + k + staged + rows + masks + 8 * 2 * (STAGES + 1)
        return -(-used // 1024) * 1024


def pairs(keys: int) -> int:
    """Steps that a token with so many indices takes."""
    return -(-keys // PAIR)


BINS, ORDER_WARPS = 32, 8
"""Ranges of rows that ids are ordered by (a bin a lane), and warps that order a token's."""
MAX_ORDERED = 8192
"""Ids of a token that fit into 32 KB of shared memory."""


def bin_shift(num_rows: int) -> int:
    """Row r falls into bin r >> shift, one of BINS."""
    return max(0, (num_rows - 1).bit_length() - 5)
