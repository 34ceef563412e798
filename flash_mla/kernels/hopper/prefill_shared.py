"""What the roles of a prefill CTA share: its config, the global tensors, the views of shared memory, a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper.channel import Channel

# ---------------------------------------------------------------------------------------------------------- Config

PAGE = 64
"""Tokens of a cache page."""
CHUNK = 64
"""Columns of a shared-memory chunk: 128 bytes, one row of the 128-byte swizzle."""
WORK, WORK_STAGES = 8, 2
"""Words of a tile's description; descriptions in flight."""

REGISTERS = {1: (216, 40), 2: (240, 24), 3: (160, 32)}
"""A consumer's and the last warpgroup's, by consumer warpgroups."""
BAR_TURN, BAR_WG = 1, 4
"""Named barriers (0 is the CTA's): a consumer warpgroup's turn to issue products; its own threads."""

DTYPES = {"bf16": BFloat16, "fp16": Float16}


class Tile(NamedTuple):
    """TILE_M, TILE_N; tiles whose Q is in shared memory at a time; blocks of K and of V in flight."""

    m: int
    n: int
    q_stages: int
    stages: int


TILES = {
    (64, 64): Tile(192, 128, 2, 3),
    (128, 128): Tile(128, 128, 2, 2),
    (192, 128): Tile(128, 128, 1, 2),
    (256, 256): Tile(128, 64, 1, 2),
}
"""By (D, Dv), where all keys count."""
SPARSE_TILES = {
    (64, 64): Tile(64, 64, 2, 2),
    (128, 128): Tile(64, 64, 2, 2),
    (192, 128): Tile(64, 64, 1, 2),
    (256, 256): Tile(64, 64, 1, 2),
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
    def tile(self) -> Tile:
        return (SPARSE_TILES if self.sparse else TILES)[self.D, self.Dv]

    @property
    def tile_m(self) -> int:
        """Query rows of a CTA: 64 a consumer warpgroup."""
        return self.tile.m

    @property
    def tile_n(self) -> int:
        """Keys of a block: whole pages."""
        return self.tile.n

    @property
    def q_stages(self) -> int:
        return self.tile.q_stages

    @property
    def stages(self) -> int:
        """Blocks of K and of V in flight."""
        return self.tile.stages

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.tile_m // 64

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def box_rows(self) -> int:
        """Keys that one TMA box brings."""
        return PAGE if self.paged else self.tile_n

    @property
    def turns(self) -> bool:
        """Whether the warpgroups take turns to issue products: where three of them are bound by exp2 (5 % at D 64)."""
        return self.consumers == 3

    @property
    def ctas_sm(self) -> int:
        """CTAs that share an SM."""
        return 2 if self.sparse and self.D < 256 else 1

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, K, V, descriptions of tiles and blocks, barriers.

        Rounded up to the 1024 bytes on which swizzled buffers are aligned.
        """
        q = 2 * self.q_stages * self.tile_m * self.D
        kv = 2 * self.stages * self.tile_n * (self.D + self.Dv)
        words = 2 * Channel.words(self.stages) + 2 * Channel.words(self.q_stages) + Channel.words(WORK_STAGES)
        used = q + kv + 4 * (WORK_STAGES * WORK + self.stages) + 8 * words
        return -(-used // 1024) * 1024


# ----------------------------------------------------------------------------------------------------------- Tiles


class Tensors(NamedTuple):
    """Global memory, all but q, k, v and out, which only TMA touches.

    table [B, table_blocks], seq_lens [B] and start_pos [B] int32; sink [Hq] FP32; score_scale and value_scale [B, Hk]
    FP32: factors of Q K^T and of V; lse [B * Hq, P] FP32, natural log;
    counter [1] int32, zero before the launch: tiles handed out beyond the first of each CTA; block_map [B or 1, Hq or
    1, ceil(P / 64), ceil(S_kv / 64)] uint8: 0 skip the block, 1 take it, 2 take it with mask_bits [B or 1, Hq or 1, P,
    2 * ceil(S_kv / 64)] int32, a bit a key.
    """

    table: cute.Tensor
    seq_lens: cute.Tensor
    start_pos: cute.Tensor
    sink: cute.Tensor
    score_scale: cute.Tensor
    value_scale: cute.Tensor
    lse: cute.Tensor
    counter: cute.Tensor
    block_map: cute.Tensor
    mask_bits: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); dims; heads of a section; 0 or 1: whether the call is causal, and which inputs count."""

    scale_log2: Float32
    Hq: Int32
    Hk: Int32
    S_kv: Int32
    section: Int32
    causal: Int32
    has_lens: Int32
    has_start: Int32
    has_sink: Int32
    has_descale: Int32


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it).

    sQ [TILE_M, D, q_stages]; sO [TILE_M, Dv, q_stages], over it; sK [TILE_N, D, 2]; sV [TILE_N, Dv, 2].
    """

    sQ: cute.Tensor
    sO: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sWork: cute.Tensor
    sKeys: cute.Tensor
    work: Channel
    q: Channel
    k: Channel
    v: Channel
    out: Channel

    @staticmethod
    def over(config: Config, storage) -> Shared:
        def rows(memory, count: int, columns: int, stages: int) -> cute.Tensor:
            layout = row_layout(config, count, columns, stages)
            return memory.get_tensor(layout.outer, swizzle=layout.inner)

        warps = 4 * config.consumers
        sQ = rows(storage.sQ, config.tile_m, config.D, config.q_stages)
        # NOTE: chunk after chunk, so that a warpgroup's rows of out lie where its own rows of Q lay
        stages = cute.make_layout(config.q_stages, stride=config.tile_m * config.D)
        sO = cute.make_tensor(
            sQ.iterator, cute.append(cute.select(row_layout(config, config.tile_m, config.Dv, 1).outer, [0, 1]), stages)
        )
        return Shared(
            sQ=sQ,
            sO=sO,
            sK=rows(storage.sK, config.tile_n, config.D, config.stages),
            sV=rows(storage.sV, config.tile_n, config.Dv, config.stages),
            sWork=storage.sWork.get_tensor(cute.make_layout((WORK, WORK_STAGES))),
            sKeys=storage.sKeys.get_tensor(cute.make_layout(config.stages)),
            work=Channel.over(storage.work_barriers.data_ptr(), WORK_STAGES, warps + 1),
            q=Channel.over(storage.q_barriers.data_ptr(), config.q_stages, 1),
            k=Channel.over(storage.k_barriers.data_ptr(), config.stages, warps),
            v=Channel.over(storage.v_barriers.data_ptr(), config.stages, warps),
            out=Channel.over(storage.out_barriers.data_ptr(), config.q_stages, 1),
        )


def row_layout(config: Config, rows: int, columns: int, stages: int) -> cute.ComposedLayout:
    """[rows, columns, stages]: chunks of 64 columns one after another, each `rows` rows of 128 swizzled bytes."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, DTYPES[config.dtype])
    return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))


class Work(NamedTuple):
    """A tile: its first row, head (request * Hq + head), request and KV head; the request's keys, and the position of
    its first query.

    blocks: key blocks to compute; 0 marks the end, there is no tile then. whole: how many of them, at the beginning,
    need no mask (where all blocks count).
    """

    row0: Int32
    head: Int32
    request: Int32
    kv_head: Int32
    length: Int32
    start: Int32
    blocks: Int32
    whole: Int32


@cute.jit
def receive(shared: Shared, count) -> Work:
    """Wait for the description of the CTA's tile number `count`."""
    stage = count % WORK_STAGES
    shared.work.wait(stage, count // WORK_STAGES)
    words = [shared.sWork[i, stage] for i in range(len(Work._fields))]
    cute.arch.sync_warp()
    shared.work.release(stage)
    return Work(*words)
