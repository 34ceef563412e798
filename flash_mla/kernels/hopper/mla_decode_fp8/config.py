"""What the MLA decode kernel over an FP8 cache takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import (
    ALIGNMENT,
    BLOCK,
    REGISTERS,
    SMEM_BYTES,
    TILE_M,
    WARP,
    WARPGROUP,
    barrier_bytes,
    smem_bytes,
)
from flash_mla.kernels.hopper.mla_decode.config import DV

ROPE = 64
"""Columns of the rope part, if there is one."""
CHUNK = 128
"""Columns of a chunk: 128 bytes."""
CHUNKS = DV // CHUNK
TILES_N = (16, 32, 64)
"""Query rows of a CTA."""

WARPS, WARPS_A_GROUP = 16, WARPGROUP // WARP
THREADS = WARP * WARPS
SCORES_REGISTERS, VALUES_REGISTERS, PRODUCER_REGISTERS = 120, 184, 24
"""A thread of the scores warpgroup, the two values warpgroups and the producer's. At 152 and 168 the values spill."""
TEAM_SCORES_REGISTERS, TEAM_PRODUCER_REGISTERS = 112, 32
"""The same in a call of teams."""
assert WARPGROUP * (SCORES_REGISTERS + 2 * VALUES_REGISTERS + PRODUCER_REGISTERS) <= REGISTERS

MAX_S_Q = 8
MAX_STAGES = 6
"""Blocks of K in flight, at most."""
P_STAGES = 2
"""Blocks of P between the scores and the values."""
START = 2
"""Steps of 128 tokens that beginning an item costs."""
TEAM_SHAPES = ((1, 32), (2, 32), (1, 64), (2, 64), (4, 32))
"""(pairs of blocks, query rows at most) of a CTA of a team; the first that fits is taken."""


class Bar(IntEnum):
    """Named barriers: of each values warpgroup alone, of both."""

    LEFT = 1
    RIGHT = 2
    MERGE = 3


@dataclass(frozen=True)
class Config(split.Clustered):
    """What is compiled: everything else is an argument of the kernel.

    q, the dtype of the queries (out: the same, BF16 for FP8); D, the width of K's rows (576, or 512 without a rope
    part); tile_n, the query rows of a CTA; cluster, the CTAs of one, which share K or are a team; descale: whether q, k
    and v have factors; token_major, the order of rows; team, the pairs of blocks that a CTA of a team has at most (0:
    there are no teams).
    """

    q: Literal["fp8", "bf16", "fp16"]
    D: int
    tile_n: int
    cluster: int
    descale: bool
    token_major: bool = False
    team: int = 0

    Dv = DV
    latent = True
    piece, masked = 0, False
    threads = THREADS

    @property
    def out(self) -> Literal["bf16", "fp16"]:
        """The dtype of out."""
        return "bf16" if self.q == "fp8" else self.q

    @property
    def rope(self) -> int:
        """Columns of K's rope part."""
        return self.D - DV

    @property
    def rows(self) -> int:
        """Query rows of a cluster."""
        return self.tile_n * self.sharers

    @property
    def q_terms(self) -> int:
        """Rows of e4m3 whose sum is a query."""
        return 1 if self.q == "fp8" else 2

    @property
    def q_tiles(self) -> int:
        """Tiles of 64 rows that hold all terms: one where both terms of a row find room in it."""
        return self.q_terms if self.tile_n == TILE_M else 1

    @property
    def exact(self) -> bool:
        """Whether P has two terms and its products with V are added up in FP32: where bytes bound the kernel."""
        return self.tile_n < TILE_M

    @property
    def thread_rows(self) -> int:
        """Queries of a thread of the scores. Where they are few, its second row is free for a second term."""
        return 1 if self.tile_n < TILE_M else 2

    @property
    def warp_rows(self) -> int:
        """Queries of a warp of the scores."""
        return 8 * self.thread_rows

    def tile_row(self, query: Any) -> Any:
        """The row of sQ that holds a query of the tile."""
        return query // self.warp_rows * 16 + query % self.warp_rows

    @property
    def q_box(self) -> int:
        """Queries that lie behind each other in sQ."""
        return TILE_M if self.thread_rows == 2 else 8

    @property
    def p_parts(self) -> int:
        """Terms of e4m3 whose sum is P."""
        return 2 if self.exact else 1

    @property
    def fixed_bytes(self) -> int:
        """Shared memory of a CTA beside K: Q, P, what goes with P, scales of rows, work search, barriers."""
        q, p = self.q_tiles * TILE_M * self.D, P_STAGES * self.p_parts * self.tile_n * BLOCK
        notes = 4 * P_STAGES * (TILE_M + WARPS_A_GROUP)
        return q + p + notes + 4 * 2 * TILE_M + 4 * split.scan_words(WARPS) + barrier_bytes(MAX_STAGES, P_STAGES, 1, 1)

    @property
    def stages(self) -> int:
        """Blocks of K in flight: what fits."""
        return min(MAX_STAGES, (SMEM_BYTES - ALIGNMENT - self.fixed_bytes) // (BLOCK * self.D))

    def workspace_words(self, clusters: int, piece_slots: int = 0) -> int:
        """32-bit words of workspace: partial results, their lse, notes of split items."""
        return split.workspace_words(clusters, self.rows, DV, piece_slots)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return smem_bytes(self.fixed_bytes, self.stages * BLOCK * self.D)
