"""What the prefill kernel takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from flash_mla.kernels.hopper.limits import BLOCK, STAGED, TILE_M, WARPGROUP, barrier_bytes, smem_bytes

TASK, TASK_STAGES = 8, 2
"""Words of a tile's description; descriptions in flight."""

REGISTERS = {1: (216, 40), 2: (240, 24), 3: (160, 32)}
"""A consumer's and the last warpgroup's, by consumer warpgroups."""


class Bar(IntEnum):
    """Named barriers of up to three consumer warpgroups each: its turn to issue products (TURN + number), its own."""

    TURN = 1
    WARPGROUP = 4


class Sizes(NamedTuple):
    """TILE_M, TILE_N; tiles whose Q is in shared memory at a time; blocks of K and of V in flight."""

    m: int
    n: int
    q_stages: int
    stages: int


TILES = {
    (64, 64): Sizes(192, 128, 2, 3),
    (128, 128): Sizes(128, 128, 2, 2),
    (192, 128): Sizes(128, 128, 1, 2),
    (256, 256): Sizes(128, 64, 1, 2),
}
"""By (D, Dv), where all keys count."""
WIDTHS = tuple(TILES)
SPARSE_TILES = {
    (64, 64): Sizes(64, 64, 2, 2),
    (128, 128): Sizes(64, 64, 2, 2),
    (192, 128): Sizes(64, 64, 1, 2),
    (256, 256): Sizes(64, 64, 1, 2),
}
"""By (D, Dv), where blocks are listed: each tile has a list of its own, and two CTAs share an SM (one at 256/256)."""
ROW_LIMITS, BITS = 1, 2
"""Flags of a listed block, in the low bits of its first key: mask the keys past each row's last; apply mask bits."""
NOWHERE = 1 << 30
"""First key of the block that stands in for an empty list: past every row's last key."""


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    dtype of q, k, v and out; D and Dv, their widths; paged: k and v are cache pages behind a table; sparse: a map says
    which 64 x 64 blocks count.
    """

    dtype: Literal["bf16", "fp16"]
    D: int
    Dv: int
    paged: bool
    sparse: bool

    @property
    def sizes(self) -> Sizes:
        return (SPARSE_TILES if self.sparse else TILES)[self.D, self.Dv]

    @property
    def tile_m(self) -> int:
        """Query rows of a CTA: 64 a consumer warpgroup."""
        return self.sizes.m

    @property
    def tile_n(self) -> int:
        """Keys of a block: whole pages."""
        return self.sizes.n

    @property
    def q_stages(self) -> int:
        return self.sizes.q_stages

    @property
    def stages(self) -> int:
        """Blocks of K and of V in flight."""
        return self.sizes.stages

    @property
    def staged(self) -> bool:
        """Whether consumers write out through a staging of their warps: where its place in Q is the next tile's."""
        return self.q_stages == 1

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.tile_m // TILE_M

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.consumers + 1)

    @property
    def box_rows(self) -> int:
        """Keys that one TMA box brings."""
        return BLOCK if self.paged else self.tile_n

    @property
    def turns(self) -> bool:
        """Whether the warpgroups take turns to issue products: where three of them are bound by exp2 (5 % at D 64)."""
        return self.consumers == 3

    @property
    def ctas_sm(self) -> int:
        """CTAs that share an SM."""
        return 2 if self.sparse and self.D < 256 else 1

    @property
    def staged_elements(self) -> int:
        """Elements of out that the consumer warps stage."""
        return 4 * self.consumers * STAGED if self.staged else 0

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, K, V, staged out, descriptions of tiles and blocks, barriers."""
        q = 2 * self.q_stages * self.tile_m * self.D
        kv = 2 * self.stages * self.tile_n * (self.D + self.Dv)
        staged = 2 * self.staged_elements
        descriptions = 4 * (TASK_STAGES * TASK + self.stages)
        barriers = barrier_bytes(TASK_STAGES, self.q_stages, self.stages, self.stages, self.q_stages)
        return smem_bytes(q, kv, staged, descriptions, barriers)
