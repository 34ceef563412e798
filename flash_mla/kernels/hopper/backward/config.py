"""What the backward's two kernels take, and what one compiled variant of them is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from flash_mla.kernels.hopper.limits import STAGED, TILE_M, WARPGROUP, barrier_bytes, smem_bytes

TILE_N = 128
"""Keys of a tile."""
TILE_Q = 64
"""Query rows that are loaded together."""
TILE = TILE_N * TILE_Q
"""Elements of dS of a tile of keys and one of queries."""
CONSUMERS = 2
"""Consumer warpgroups: 64 keys each, or 64 queries."""
THREADS = WARPGROUP * (CONSUMERS + 1)
WARPS = 4 * CONSUMERS
"""Consumer warps."""
REGISTERS = (240, 24)
"""A consumer's and the last warpgroup's, of the keys' kernel."""


class Bar(IntEnum):
    """Named barriers of the consumer warpgroups: its own."""

    WARPGROUP = 1


class Sizes(NamedTuple):
    """Queries of a step; tiles of queries in flight (keys' kernel), tiles of keys in flight (queries' kernel)."""

    step: int
    query_stages: int
    key_stages: int


SIZES = {(128, 128): Sizes(64, 3, 3), (192, 128): Sizes(32, 3, 2)}
"""By (D, Dv). NOTE: dK and dV of 192/128 take 160 registers of a thread, S and dP of 64 queries 64 more."""
WIDTHS = tuple(SIZES)


@dataclass(frozen=True)
class Config:
    """What is compiled: dtype of q, k, v and their gradients; D and Dv, their widths; sink: whether weights have a
    factor a row."""

    dtype: Literal["bf16", "fp16"]
    D: int
    Dv: int
    sink: bool = False

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.D, self.Dv]

    @property
    def row_values(self) -> int:
        """FP32 numbers that come with a query row."""
        return 3 if self.sink else 2

    def keys_bytes(self) -> int:
        """Shared memory of a CTA of the keys' kernel: K, V; Q, dout and the rows' numbers; staged results; barriers."""
        stages, columns = self.sizes.query_stages, self.D + self.Dv
        rows = stages * TILE_Q * (2 * columns + 4 * self.row_values)
        return smem_bytes(2 * TILE_N * columns, rows, 2 * WARPS * STAGED, barrier_bytes(1, stages, stages))

    def queries_bytes(self) -> int:
        """Shared memory of a CTA of the queries' kernel: tiles of K and of dS; staged results; barriers."""
        stages = self.sizes.key_stages
        tiles = stages * (TILE_N * self.D + CONSUMERS * TILE)
        return smem_bytes(2 * tiles, 2 * WARPS * STAGED, barrier_bytes(stages))


assert TILE_N == TILE_M * CONSUMERS
