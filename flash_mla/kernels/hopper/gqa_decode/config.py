"""What the GQA decode kernel takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import (
    ALIGNMENT,
    BLOCK,
    REGISTERS,
    ROW_BYTES,
    SMEM_BYTES,
    TILE_M,
    WARP,
    barrier_bytes,
    smem_bytes,
)

MAX_D = 256
"""D and Dv, at most."""
MAX_S_Q = 128
TILES_N = (8, 16, 32, 64)
"""Query rows of a CTA."""
WIDE_DV = 128
"""Dv that a tile of 64 rows may have, of queries in one term: O of a wider one does not fit into the registers."""

CHUNK_BYTES = BLOCK * ROW_BYTES
WARPS, CONSUMER_WARPS = 12, 8
THREADS, CONSUMERS = WARP * WARPS, WARP * CONSUMER_WARPS
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
assert CONSUMERS * CONSUMER_REGISTERS + (THREADS - CONSUMERS) * PRODUCER_REGISTERS <= REGISTERS
PIECE = 16
"""Pairs of blocks in a piece of a batch-invariant call."""
Q_VECTOR = 8
"""Elements of q in 16 bytes, which a lane of those warps loads at a time."""
QUERY_WARPS = 2
"""Warps that make two rows of every query, beside the two of the producer's warpgroup that have other things to do."""
MAX_STAGES = 12
TEAM_STAGES = 4
"""Of which a pair of blocks takes two; all together hold a CTA's result behind it."""
MAX_Q_STAGES = 4


class Bar(IntEnum):
    """Named barriers: each consumer warpgroup's own (WARPGROUP, WARPGROUP + 1), and both."""

    WARPGROUP = 1
    MERGE = 3


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    dtype of k and v; D, Dv; tile_n, the query rows of a CTA; descale: whether q, k and v have factors; q, the dtype of
    the queries: that of k and v, or 16 bits over FP8 (out: the same, BF16 for FP8); piece: the pairs of blocks that a
    batch-invariant call cuts requests at (0: it is none); masked: there is a bool mask;
    token_major, the order of rows, where there is one KV head; team: whether a CTA has a pair of blocks at most, and a
    cluster of `cluster` CTAs merges an item.
    """

    dtype: Literal["bf16", "fp16", "fp8"]
    D: int
    Dv: int
    tile_n: int
    descale: bool
    q: Literal["bf16", "fp16", "fp8"]
    piece: int = 0
    masked: bool = False
    token_major: bool = False
    team: bool = False
    cluster: int = 1

    latent, threads = False, THREADS

    @property
    def reach(self) -> int:
        """Pairs of blocks that a team has at most."""
        return self.cluster

    @property
    def out(self) -> Literal["bf16", "fp16"]:
        """The dtype of out."""
        return "bf16" if self.q == "fp8" else self.q

    @property
    def q_terms(self) -> int:
        """Rows of the caches' dtype whose sum is a query."""
        return 1 if self.q == self.dtype else 2

    @property
    def q_rows(self) -> int:
        """Rows of a tile of Q in shared memory."""
        return self.tile_n * self.q_terms

    @property
    def fp8(self) -> bool:
        return self.dtype == "fp8"

    @property
    def product(self) -> Literal["bf16", "fp16"]:
        """Dtype of P and of V as an operand."""
        return "fp16" if self.dtype == "fp8" else self.dtype

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return ROW_BYTES if self.fp8 else ROW_BYTES // 2

    @property
    def k_chunks(self) -> int:
        """Chunks of a K block; TMA fills what D does not with zeros."""
        return -(-self.D // self.chunk)

    @property
    def v_chunks(self) -> int:
        """Chunks of a V block."""
        return -(-self.Dv // self.chunk)

    @property
    def k_steps(self) -> int:
        """Instructions of K Q^T: 32 bytes of a row each."""
        return -(-self.D // (self.chunk // 4))

    @property
    def tiles_m(self) -> int:
        """O^T tiles of 64 columns."""
        return -(-self.Dv // TILE_M)

    @property
    def q_stages(self) -> int:
        """Tiles of Q in flight: more where they are small, for short requests."""
        return 1 if self.team else min(MAX_Q_STAGES, 64 // self.tile_n)

    @property
    def wide(self) -> bool:
        """Whether the consumers need registers of the producer's warpgroup."""
        return self.tile_n * self.tiles_m >= 128

    @property
    def fixed_bytes(self) -> int:
        """Shared memory of a CTA without the stages: Q, P, row sums and maxima, work search, barriers."""
        q = self.q_stages * (self.k_chunks * self.q_rows * ROW_BYTES + 4 * self.tile_n * (self.q_terms - 1))
        p = 2 * 2 * self.tile_n * BLOCK * 2
        rows = 4 * (CONSUMER_WARPS + 2) * self.tile_n
        return q + p + rows + 4 * split.scan_words(WARPS) + barrier_bytes(MAX_STAGES, MAX_STAGES, MAX_Q_STAGES)

    @property
    def stage_bytes(self) -> int:
        """A block of K and of V."""
        return CHUNK_BYTES * (self.k_chunks + self.v_chunks)

    @property
    def stages(self) -> int:
        """Blocks of K and V in flight: what fits; of a team few, whose barriers are soon set, but an even number."""
        fit = (SMEM_BYTES - ALIGNMENT - self.fixed_bytes) // self.stage_bytes
        return min(TEAM_STAGES, fit // 2 * 2) if self.team else min(MAX_STAGES, fit)

    @property
    def rows(self) -> int:
        """Query rows of a cluster, which is one CTA."""
        return self.tile_n

    def workspace_words(self, ctas: int, piece_slots: int = 0) -> int:
        """32-bit words of workspace: partial results, their lse, notes of split items."""
        return split.workspace_words(ctas, self.tile_n, self.Dv, piece_slots)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return smem_bytes(self.fixed_bytes, self.stages * self.stage_bytes)
