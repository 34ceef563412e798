"""What the queries' kernel of the sparse backward takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP, WARPGROUP, barrier_bytes, smem_bytes

WIDTHS = ((576, 512), (512, 512))
"""(D, Dv)."""
TILE_N = 32
"""Keys of a step."""
STAGES = BLOCK // TILE_N
"""Steps in shared memory: the halves of a gathered block."""
HALF = 256
"""Columns of dq that a consumer warpgroup has, and the second one those of the rope part."""
CONSUMERS = 2 * WARPGROUP
CONSUMER_WARPS, PRODUCER_WARPS = 8, 4
THREADS = WARP * (CONSUMER_WARPS + PRODUCER_WARPS)
REGISTERS = (232, 40)
"""Of a consumer's and of a producer's thread."""
EXCHANGED = TILE_M * TILE_N
"""Values that a consumer warpgroup hands to the other one a step."""


class Bar(IntEnum):
    """Named barriers of the consumers: both have written; the second has read what the first wrote, and the reverse."""

    WRITTEN = 1
    LEFT_READ = 2
    RIGHT_READ = 3


@dataclass(frozen=True)
class Config:
    """What is compiled: dtype of q, kv, dout, dq and the workspace; D, the width of q, kv and dq, of which the first
    512 columns are V's; sink: whether weights have a factor a head."""

    dtype: Literal["bf16", "fp16"]
    D: int
    sink: bool = False

    Dv = 512

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    @property
    def rope(self) -> bool:
        """Whether there are columns beside V's."""
        return self.D > self.Dv

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, dout, K; what the consumers swap, in which they stage dq; seen keys, barriers."""
        rows = 2 * (TILE_M * (self.D + self.Dv) + BLOCK * self.D)
        return smem_bytes(rows, 4 * 2 * EXCHANGED, 2 * 2 * STAGES, barrier_bytes(STAGES, 1))


assert 2 * CONSUMER_WARPS * STAGED <= 4 * 2 * EXCHANGED
