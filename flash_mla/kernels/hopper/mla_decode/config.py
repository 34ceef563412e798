"""What the MLA decode kernel takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, REGISTERS, STAGED, TILE_M, WARP, barrier_bytes, smem_bytes

WIDTHS = ((576, 512), (512, 512))
"""(D, Dv): the latent with and without a rope part."""
MAX_S_Q = 128
DV = 512
HALF = DV // 2
"""Output columns of a consumer warpgroup."""
K_CHUNKS = 9
"""Chunks of a K buffer. The ninth holds K's rope part until Q K^T is done, then P."""
P_CHUNK = 8
CHUNK_ELEMENTS = BLOCK * CHUNK
STAGES = 4
"""Half blocks of a pair: stage 0, 1 = left, right half of the even block, 2, 3 = of the odd block."""

WARPS, CONSUMER_WARPS = 12, 8
THREADS, CONSUMERS = WARP * WARPS, WARP * CONSUMER_WARPS
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
"""A thread. At 240 and 24 the producer spills."""
assert CONSUMERS * CONSUMER_REGISTERS + (THREADS - CONSUMERS) * PRODUCER_REGISTERS <= REGISTERS

START = 2
"""Steps of 128 tokens that beginning an item costs, 3.4 us each."""
HALF_TILE = TILE_M // 2
"""Query rows of a CTA in a short call, if all of them fit: the tensor cores are half empty, but an SM has half of Q to
load and half of the output to store, which is what such a call waits for."""
TEAM_SHAPES = ((1, HALF_TILE), (2, HALF_TILE), (1, TILE_M), (2, TILE_M), (4, HALF_TILE))
"""(pairs of blocks, query rows) of a CTA of a team; the first that fits is taken. One request of 4096 tokens and 128
heads took 19.1 us with (2, 32), 19.4 with (1, 64), and 20.4 without teams."""
MOST_PARTS = 64
"""CTAs that compute parts of one item, if fewer would cost little: the others are there for combine by then."""
PIECES = (16, 32, 64)
"""Pairs of blocks in a piece of a batch-invariant call: of less than 64 query rows, of more, and of a cluster of two.
What a piece costs (a start, a partial result) goes with the rows, and its work with the pairs: 128 heads of 8192 tokens
took 1.15 times as long in pieces of 32."""


class Bar(IntEnum):
    """Named barriers: P of the even and of the odd block, each consumer warpgroup's own, the row sums."""

    P_EVEN = 1
    P_ODD = 2
    LEFT = 3
    RIGHT = 4
    SUMS = 5


@dataclass(frozen=True)
class Config(split.Clustered):
    """What is compiled: everything else is an argument of the kernel.

    dtype of q, k and out; D, the width of K's rows (576, or 512 without a rope part); cluster, the CTAs of one, which
    share K or are a team; piece, the pairs of blocks that a batch-invariant call cuts requests at (0: it is none);
    masked, whether there is a bool mask; token_major, the order of rows; team, the pairs of blocks that a CTA of a team
    has at most (0: there are no teams); tile_m, query rows of a CTA.
    """

    dtype: Literal["bf16", "fp16"]
    D: int
    cluster: int
    piece: int = 0
    masked: bool = False
    token_major: bool = False
    team: int = 0
    tile_m: int = TILE_M

    Dv = DV
    latent, descale = True, False
    threads = THREADS

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    @property
    def short(self) -> bool:
        """Whether a CTA has a pair of blocks at most."""
        return self.team == 1

    @property
    def rows(self) -> int:
        """Query rows of a cluster."""
        return self.tile_m * self.sharers

    def stage_chunks(self, stage: int) -> int:
        """Chunks that travel through a stage: four of V, and the rope chunk with stages 1 and 2."""
        return 4 + (stage in (1, 2) and self.chunks == K_CHUNKS)

    def workspace_words(self, clusters: int, piece_slots: int = 0) -> int:
        """32-bit words of workspace: partial results, their lse, notes of split items."""
        return split.workspace_words(clusters, self.rows, DV, piece_slots)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, two K buffers, max and sum of each row, staged out, work search, barriers."""
        q = 2 * TILE_M * self.D
        k = 2 * 2 * K_CHUNKS * CHUNK_ELEMENTS
        rows = 4 * (2 * TILE_M + 2 * TILE_M)
        out, scan = 2 * CONSUMER_WARPS * STAGED, 4 * split.scan_words(WARPS)
        return smem_bytes(q, k, rows, out, scan, barrier_bytes(STAGES, 1))
