"""Sparse decode on Hopper: how rows lie in a cache, what is compiled, and the ledger of shared memory. No DSL here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, REGISTERS, TILE_M, WARP, barrier_bytes, smem_bytes
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, STAGED, STAGES

TILES = (8, 16, 64)
"""Query heads of a CTA: as the N of the products, 64 as their M."""
DV = 512
CHUNK_BYTES = 2 * BLOCK * CHUNK
SPLIT_COST = 1
"""Steps that splitting costs a call: about 5 us, at 4.5 to 7 us a step."""
ROPE_CHUNK = 8

RAW_GROUP = 128
"""Columns of one scale, where rows stay raw: two tiles of O^T."""
RAW_BLOCKS = 4
"""Blocks in shared memory there."""

GRANULE = 4
"""Rows that a producer warp's ring holds together."""
GRANULES = 4
"""Granules of a warp's rows of a pair of blocks."""

CONSUMER_WARPS = 8
"""Two warpgroups; in front of the producers."""


@dataclass(frozen=True)
class RowLayout:
    """How a token's row lies in a cache: `codes` chunks of 64 e4m3, then `wide` chunks of 64 BF16 from byte `wide_at`.

    scale: kind of the stored scales, one for `group` columns, from byte `scale_at` of the row on. apart: bytes of a
    row's scales where they lie apart, behind the `row_bytes` of all rows of the page.
    """

    codes: int
    wide: int
    wide_at: int = 0
    scale: Literal["fp32", "e8m0"] | None = None
    group: int = 0
    scale_at: int = 0
    apart: int = 0
    row_bytes: int = 0

    @property
    def D(self) -> int:
        """Columns of a row."""
        return CHUNK * (self.codes + self.wide)

    @property
    def raw(self) -> bool:
        """Whether a CTA of its own reads rows as they are: those of one FP32 scale for 128 columns."""
        return self.scale == "fp32" and self.group == RAW_GROUP

    def scale_word(self, chunk: int) -> int:
        """Which 32-bit word of a row's scales holds those of a chunk."""
        return CHUNK * chunk // self.group if self.scale == "fp32" else CHUNK * chunk // self.group // 4


ROWS = {
    "fp8_ds_mla": RowLayout(codes=8, wide=1, wide_at=528, scale="fp32", group=128, scale_at=512, row_bytes=656),
    "fp8_token": RowLayout(codes=8, wide=1, wide_at=512, scale="fp32", group=512, apart=4, row_bytes=640),
    "model1": RowLayout(codes=7, wide=1, wide_at=448, scale="e8m0", group=64, apart=8, row_bytes=576),
    "v4.1": RowLayout(codes=8, wide=0, scale="e8m0", group=32, scale_at=512, row_bytes=528),
    "flat": RowLayout(codes=9, wide=0, row_bytes=576),
    "bf16_576": RowLayout(codes=0, wide=9, row_bytes=1152),
    "bf16_512": RowLayout(codes=0, wide=8, row_bytes=1024),
}
"""The rows of `quant.FORMATS`, and plain BF16 ones."""


class Batch(NamedTuple):
    """What a thread loads at once: its columns of some chunks, of all its rows, for a stage."""

    stage: int
    chunks: list[int]


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    rows: a name of ROWS; caches: 1, or 2 (a token's keys lie in both); tile_heads: query heads of a CTA, 64 as the M of
    the products or fewer as their N; cluster: CTAs of 64 heads of a token side by side, or of a team; halves: 64 heads
    as the N, over raw rows, one CTA, each consumer with half of O's columns; team: whether a cluster merges what its
    CTAs compute of one tile of heads (`kernels/hopper/team.py`).
    """

    rows: str
    caches: int
    tile_heads: int
    cluster: int = 1
    halves: bool = False
    team: bool = False

    @property
    def few(self) -> bool:
        """Whether the heads are the N of the products."""
        return self.tile_heads < TILE_M or self.halves

    @property
    def layout(self) -> RowLayout:
        return ROWS[self.rows]

    @property
    def D(self) -> int:
        return self.layout.D

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    @property
    def blocks(self) -> int:
        """Blocks in shared memory."""
        return 3 if self.halves else RAW_BLOCKS if self.raw else 2

    @property
    def k_bytes(self) -> int:
        """Their bytes."""
        return self.blocks * (BLOCK * self.layout.row_bytes if self.raw else K_CHUNKS * CHUNK_BYTES)

    @property
    def p_buffers(self) -> int:
        """Buffers of P, beside few heads: two a warpgroup, each of them once, or once for each scale of a row.

        Beside 64 heads one a warpgroup, once.
        """
        if self.halves:
            return 2
        return 4 * (DV // RAW_GROUP if self.raw else 1)

    @property
    def raw(self) -> bool:
        """Whether rows stay as they are in shared memory, and the consumers convert them in registers.

        That takes one FP32 scale for 128 columns, which the products are multiplied by: `raw.py`.
        """
        return self.few and self.layout.raw

    @property
    def copied(self) -> bool:
        """Whether rows are copied as they are to where wgmma reads them, all of them by each CTA of a cluster."""
        return self.layout.codes == 0

    @property
    def sharers(self) -> int:
        """CTAs of a cluster that share a token's keys."""
        return 1 if self.team else self.cluster

    @property
    def sharing(self) -> int:
        """CTAs that fill and free each stage together."""
        return 1 if self.copied else self.sharers

    @property
    def exchanges_rope(self) -> bool:
        """Whether the CTAs of a cluster copy rows of the rope chunk to each other."""
        return self.sharing > 1 and self.chunks == K_CHUNKS

    @property
    def producer_warps(self) -> int:
        """Warps that fill the rows of a block; CTAs that share rows fill half of the block each."""
        # NOTE: 8 leave 128 registers on entry, too few for O of 32 heads, or of 64 in two halves
        return 8 if self.few and not self.raw and not self.copied else 4

    @property
    def k_writers(self) -> int:
        """Arrivals that fill a stage: of each producer warp, and of each of its lanes where its copies arrive."""
        return self.producer_warps * (WARP + 1 if self.copied else 1)

    @property
    def thread_rows(self) -> int:
        """Rows of a block that a thread fills a part of; a warp fills 8 at a time."""
        return BLOCK // (8 * self.producer_warps * self.sharing)

    @property
    def warps(self) -> int:
        """Of a CTA."""
        return CONSUMER_WARPS + self.producer_warps

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def entry_registers(self) -> int:
        """What every thread has on entry."""
        return REGISTERS // self.threads // 8 * 8

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's and of a producer's thread."""
        if self.ringed and self.tile_heads == 16:
            # NOTE: at 128 each the consumers of 16 heads spill; at 112 the producers beside 8
            return 144, 112
        if self.producer_warps == 8:
            return self.entry_registers, self.entry_registers
        if self.halves:
            return 232, 40
        if self.raw and self.tile_heads == 8:
            # NOTE: at 88 the producers spill
            return 200, 104
        # NOTE: at 200 the consumers' wgmma are serialised
        return 208, 88

    @property
    def vectors_in_batch(self) -> int:
        """16-byte loads of a thread in a batch. Two batches are in registers: one in flight, one converted."""
        return 6 if self.sharing == 2 else 4

    def vectors(self, chunks: list[int]) -> int:
        """16-byte loads of a thread for 16 columns of each of these chunks, of all its rows."""
        return self.thread_rows * sum(1 if chunk < self.layout.codes else 2 for chunk in chunks)

    def batches(self) -> list[Batch]:
        """A pair of blocks, in the order in which it is loaded."""
        batches = []
        for stage in range(STAGES):
            batch = Batch(stage, [])
            for chunk in self.stage_chunks(stage):
                if batch.chunks and self.vectors([*batch.chunks, chunk]) > self.vectors_in_batch:
                    batches.append(batch)
                    batch = Batch(stage, [])
                batch.chunks.append(chunk)
            batches.append(batch)
        return batches

    @property
    def ringed(self) -> bool:
        """Whether producer warps have rings of raw rows."""
        return self.producer_warps == 8 and self.layout.codes > 0

    @property
    def row_pieces(self) -> int:
        """16-byte pieces of a row."""
        return self.layout.row_bytes // 16

    @property
    def granule_bytes(self) -> int:
        """Of a ring: rows as they lie in the cache, and behind them scales that lie apart."""
        return GRANULE * (self.layout.row_bytes + self.layout.apart)

    @property
    def ring(self) -> int:
        """Granules of a warp's ring: what shared memory has room for, beside 8 heads 3, beside 16 heads 2."""
        return 0 if not self.ringed else 3 if self.tile_heads == 8 else 2

    @property
    def ring_bytes(self) -> int:
        """Of a CTA's rings."""
        return self.producer_warps * self.ring * self.granule_bytes

    @property
    def code_steps(self) -> int:
        """16 codes a lane: steps to convert 4 rows, two chunks a step."""
        return -(-self.layout.codes // 2)

    @property
    def tile_rows(self) -> int:
        """Query heads of a cluster."""
        return self.tile_heads * self.sharers

    def stage_chunks(self, stage: int) -> list[int]:
        """Chunks that travel through a stage: four of V, and the rope chunk with stages 1 and 2."""
        first = 4 * (stage % 2)
        rope = [ROPE_CHUNK] if stage in (1, 2) and self.chunks == K_CHUNKS else []
        return [*range(first, first + 4), *rope]

    @property
    def batch_vectors(self) -> int:
        """Of the largest batch."""
        return max(self.vectors(batch.chunks) for batch in self.batches())

    def workspace_words(self, clusters: int) -> int:
        """32-bit words of workspace: partial results, their lse, notes of split items."""
        return split.workspace_words(clusters, self.tile_rows, DV)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, two K buffers, what the consumers exchange, live keys, work search, barriers."""
        q, k = 2 * self.tile_heads * self.D, self.k_bytes
        if self.few:
            # P; row sums of each warp, row max of each warpgroup; rings, or units of the heads and peaks of scales
            rest = 2 * self.p_buffers * self.tile_heads * BLOCK + 4 * self.tile_heads * (CONSUMER_WARPS + 2)
            rest += 4 * (self.tile_heads + CONSUMER_WARPS) if self.raw else self.ring_bytes
            # scales of two pairs of blocks
            rest += 2 * 4 * BLOCK * DV // RAW_GROUP if self.halves else 0
        else:
            # row max of each block, row sums; staged out
            rest = 4 * (2 * TILE_M + 2 * TILE_M) + CONSUMER_WARPS * 2 * STAGED
        return smem_bytes(
            q,
            k,
            rest,
            self.blocks * BLOCK // 8,
            4 * split.scan_words(self.warps),
            barrier_bytes(STAGES, 1, 2 if self.exchanges_rope else 0),
        )

    # what the consumers of MLA decode and of GQA decode read of their configs

    @property
    def dtype(self) -> Literal["bf16"]:
        """Dtype of q, of the rows once converted, and of out."""
        return "bf16"

    @property
    def product(self) -> Literal["bf16", "fp16"]:
        """Dtype of P and of V as an operand."""
        return "fp16" if self.raw else "bf16"

    @property
    def fp8(self) -> bool:
        """Whether V is converted on its way to registers, which trades rows of O^T."""
        return self.raw

    @property
    def stages(self) -> int:
        """Blocks in shared memory."""
        return self.blocks

    q_stages = 1
    Dv = DV
    tiles_m = DV // TILE_M

    @property
    def tile_n(self) -> int:
        return self.tile_heads

    @property
    def k_steps(self) -> int:
        """Instructions of K Q^T: 16 columns each."""
        return self.D // 16
