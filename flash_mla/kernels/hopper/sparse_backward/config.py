"""What the two kernels of the sparse backward take, and what one compiled variant of them is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP, WARPGROUP, barrier_bytes, smem_bytes

WIDTHS = ((576, 512), (512, 512))
"""(D, Dv)."""
HEADS = (TILE_M, 2 * TILE_M)
"""Of a token, up to a whole tile: the gradients' kernel holds their Q and dout, of a third of the columns."""
PIECE = BLOCK * TILE_M
"""Elements of P or dS of 64 keys and 64 heads, which lie together in the workspace (`item_of`)."""

CONSUMERS = 2 * WARPGROUP
CONSUMER_WARPS, PRODUCER_WARPS = 8, 4
THREADS = WARP * (CONSUMER_WARPS + PRODUCER_WARPS)
REGISTERS = (232, 40)
"""Of a consumer's and of a producer's thread."""

# the weights' kernel

EXCHANGED = TILE_M * BLOCK
"""Elements of P that one consumer warpgroup hands to the other one a step."""
ROW_STAGES = 3
"""64 rows of Q, dout or K in shared memory."""

# the gradients' kernel

THIRD = 192
"""Columns of dq and dkv that a CTA of a token has."""
PARTS = 3
"""Such CTAs."""
STAGES = 2
"""A third of 64 rows of K, and dS and P of them and all heads, so often in shared memory."""


class Bar(IntEnum):
    """Named barriers of the weights' consumers: the first may issue its product, the second may; P is written, read."""

    SCORES = 1
    SLOPES = 2
    WRITTEN = 3
    READ = 4


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

    def weights_bytes(self) -> int:
        """Shared memory of a CTA of the weights' kernel: stages of Q, dout or K; P that is handed over; seen keys;
        barriers."""
        rows = 2 * ROW_STAGES * BLOCK * self.D
        seen = 2 * PRODUCER_WARPS * ROW_STAGES
        return smem_bytes(rows, 2 * EXCHANGED, seen, barrier_bytes(ROW_STAGES))

    def gradients_bytes(self) -> int:
        """Shared memory of a CTA of the gradients' kernel: Q, dout; stages of K, dS and P; staged dq; barriers."""
        heads, stage = 2 * self.heads * 2 * THIRD, 2 * (BLOCK * THIRD + 2 * self.item)
        return smem_bytes(heads, STAGES * stage, 2 * CONSUMER_WARPS * STAGED, barrier_bytes(1, STAGES, STAGES, STAGES))
