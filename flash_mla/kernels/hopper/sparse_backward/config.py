"""What the two kernels of the sparse backward take, and what one compiled variant of them is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP, WARPGROUP, barrier_bytes, smem_bytes

WIDTHS = ((576, 512), (512, 512))
"""(D, Dv)."""
HEADS = (TILE_M, 2 * TILE_M)
"""Of a token, up to a whole tile: the keys' kernel holds their Q and dout, of half of the columns."""
PIECE = BLOCK * TILE_M
"""Elements of P or dS of 64 keys and 64 heads, which lie together in the workspace (`item_of`)."""

# the queries' kernel

HALF = 256
"""Columns of dq that a consumer warpgroup has, the second one also those of the rope part; of dkv likewise a CTA."""
CONSUMERS = 2 * WARPGROUP
CONSUMER_WARPS, PRODUCER_WARPS = 8, 4
THREADS = WARP * (CONSUMER_WARPS + PRODUCER_WARPS)
REGISTERS = (232, 40)
"""Of a consumer's and of a producer's thread."""
EXCHANGED = TILE_M * BLOCK
"""Elements that a consumer warpgroup hands to the other one a step."""

# the keys' kernel

KEYS_STAGES = 4
"""P or dS of 64 keys and all heads, so often in shared memory."""


class Bar(IntEnum):
    """Named barriers of the consumers: both have written; the second has read what the first wrote, and the reverse."""

    WRITTEN = 1
    LEFT_READ = 2
    RIGHT_READ = 3


@dataclass(frozen=True)
class Config:
    """What is compiled: dtype of q, kv, dout, dq, P and dS; D, the width of q, kv and dq, whose first 512 columns are
    V's; heads, those of a token, up to a whole tile; sink: whether weights have a factor a head."""

    dtype: Literal["bf16", "fp16"]
    D: int
    heads: int = 128
    sink: bool = False

    Dv = 512

    @property
    def head_tiles(self) -> int:
        """64-head tiles of a token."""
        return self.heads // TILE_M

    @property
    def item(self) -> int:
        """Elements of P or dS of 64 keys and all heads."""
        return self.head_tiles * PIECE

    @property
    def columns(self) -> int:
        """Columns of q of a CTA of the keys' kernel."""
        return self.D - HALF

    @property
    def wide(self) -> bool:
        """Whether partial rows of dkv are FP32: rounded to FP16 each, they would miss its budget."""
        return self.dtype == "fp16"

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    @property
    def rope(self) -> bool:
        """Whether there are columns beside V's."""
        return self.D > self.Dv

    def queries_bytes(self) -> int:
        """Shared memory of a CTA of the queries' kernel: Q, dout, K; what the consumers swap, in which they stage dq;
        seen keys; barriers."""
        rows = 2 * (TILE_M * (self.D + self.Dv) + BLOCK * self.D)
        return smem_bytes(rows, 2 * 2 * EXCHANGED, 2 * PRODUCER_WARPS, barrier_bytes(self.chunks, 1))

    def keys_bytes(self) -> int:
        """Shared memory of a CTA of the keys' kernel: Q, dout, stages of P or dS; staged dkv; barriers."""
        rows = 2 * self.heads * (self.columns + HALF)
        return smem_bytes(rows, 2 * KEYS_STAGES * self.item, 2 * CONSUMER_WARPS * STAGED, barrier_bytes(1, KEYS_STAGES))


assert CONSUMER_WARPS * STAGED <= 2 * EXCHANGED
