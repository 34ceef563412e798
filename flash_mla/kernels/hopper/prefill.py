"""Prefill on Hopper: out = softmax(scale * Q K^T) V for P query tokens a request, dense or over cache pages.

Grid: one CTA an SM, persistent. A tile is TILE_M query rows of one head; tiles are handed out heaviest first by a
counter in global memory (`schedule.py`).

Bound. A block of N keys costs a tile of M rows 2 * M * N * (D + Dv) FLOP, at 4096 a cycle and SM: 2048 cycles for
128 x 128 x (128 + 128), in which the softmax takes 1024 of exp2 (16 a cycle) and about 580 issue slots of each
scheduler, TMA writes 64 KB, and wgmma reads 96 bytes a cycle of Q and K, 64 of V, of the 128 that shared memory gives.
So the tensor cores bound it, if the softmax of one warpgroup runs under the products of the others.

Roles (entry registers: 65536 / threads, rounded down to 8):
    warpgroups 0 to consumers - 1   64 rows each: S = Q K^T, softmax, O += P V, out and lse
    warp 0 of the last warpgroup    takes tiles; TMA of Q, K, V
    warp 1 of the last warpgroup    TMA of out

Channels, producer -> consumer (full arrivals / empty arrivals):
    work   loader -> all      2 stages        1 / consumer warps + 1 (the storing warp)
    Q      loader -> all      q_stages        1 + bytes / 1, by the storing warp
    K, V   loader -> all      2 stages each   1 + bytes / consumer warps
    out    consumers -> storing warp: a warp arrives when its rows lie in shared memory, in place of the tile's dead Q

Steady state of a consumer warpgroup, block n of a tile:
    wait for its turn | issue S' = Q K[n+1]^T | issue O += P V[n] | pass the turn on | softmax of S' under P V[n],
    and under the other warpgroups' products
With two Q stages this runs on across tiles: S' of a tile's last block is the first of the next tile, and O is written
under the other warpgroups' products. With one (192/128 and 256/256, whose Q is too large), tiles begin afresh.
The running max moves only when a block exceeds it by 2^8 (`LAZY`), so rescaling O is rare. Exact after normalisation.

Supports BF16 and FP16; D/Dv 64/64, 128/128, 192/128, 256/256; any row and key counts; any strides that TMA takes; GQA;
ragged lengths, 0 included; causal from any start; pages of 64 tokens behind a table. Unused slots may hold NaN: scores
past the end are masked and V rows zeroed. Block ids are forced inside the cache, lengths inside the table.

Measured: docs/kernels.md, "Hopper prefill".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_mla.kernels.hopper import schedule
from flash_mla.kernels.hopper.channel import Channel

# ---------------------------------------------------------------------------------------------------------- Config

PAGE = 64
"""Tokens of a cache page."""
CHUNK = 64
"""Columns of a shared-memory chunk: 128 bytes, one row of the 128-byte swizzle."""
STAGES = 2
"""Key blocks in flight, of K and of V."""
WORK = 8
"""Words of a tile's description."""

REGISTERS = {1: (216, 40), 2: (240, 24), 3: (160, 32)}
"""A consumer's and the last warpgroup's, by consumer warpgroups."""
BAR_TURN, BAR_WG = 1, 4
"""Named barriers (0 is the CTA's): a consumer warpgroup's turn to issue products; its own threads."""

LOW = -1.0e30
"""A running max below every score, finite so that LOW - LOW is 0."""
LAZY = 8.0
"""The running max moves only when it grows by more than 2^8: exact after normalisation, and P stays below 2^8."""

DTYPES = {"bf16": BFloat16, "fp16": Float16}
TILES = {(64, 64): (192, 128, 2), (128, 128): (128, 128, 2), (192, 128): (128, 128, 1), (256, 256): (128, 64, 1)}
"""TILE_M, TILE_N and Q stages by (D, Dv), where all keys count."""
SPARSE_Q_STAGES = {(64, 64): 2, (128, 128): 2, (192, 128): 1, (256, 256): 1}
"""Where blocks are listed: tiles of one warpgroup, 64 x 64, and two CTAs an SM."""
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
    def tile_m(self) -> int:
        """Query rows of a CTA: 64 a consumer warpgroup."""
        return 64 if self.sparse else TILES[self.D, self.Dv][0]

    @property
    def tile_n(self) -> int:
        """Keys of a block: whole pages."""
        return 64 if self.sparse else TILES[self.D, self.Dv][1]

    @property
    def q_stages(self) -> int:
        """Tiles whose Q is there at a time."""
        return SPARSE_Q_STAGES[self.D, self.Dv] if self.sparse else TILES[self.D, self.Dv][2]

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
        """Whether the warpgroups take turns: for short blocks of work, where they would otherwise collide."""
        return self.D <= 128 and self.consumers > 1

    @property
    def ctas_sm(self) -> int:
        """CTAs that share an SM."""
        return 2 if self.sparse else 1

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, K, V, descriptions of tiles and blocks, barriers.

        Rounded up to the 1024 bytes on which swizzled buffers are aligned.
        """
        q = 2 * self.q_stages * self.tile_m * self.D
        kv = 2 * STAGES * self.tile_n * (self.D + self.Dv)
        words = 3 * Channel.words(STAGES) + 2 * Channel.words(self.q_stages)
        used = q + kv + 4 * STAGES * (WORK + 1) + 8 * words
        return -(-used // 1024) * 1024


# ----------------------------------------------------------------------------------------------------------- Tiles


class Tensors(NamedTuple):
    """Global memory, all but q, k, v and out, which only TMA touches.

    table [B, table_blocks], seq_lens [B] and start_pos [B] int32; sink [Hq] FP32; lse [B * Hq, P] FP32, natural log;
    counter [1] int32, zero before the launch: tiles handed out beyond the first of each CTA; block_map [B or 1, Hq or 1,
    ceil(P / 64), ceil(S_kv / 64)] uint8: 0 skip the block, 1 take it, 2 take it with mask_bits [B or 1, Hq or 1, P,
    2 * ceil(S_kv / 64)] int32, a bit a key.
    """

    table: cute.Tensor
    seq_lens: cute.Tensor
    start_pos: cute.Tensor
    sink: cute.Tensor
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


# ----------------------------------------------------------------------------------------------------------- Steps


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
            sK=rows(storage.sK, config.tile_n, config.D, STAGES),
            sV=rows(storage.sV, config.tile_n, config.Dv, STAGES),
            sWork=storage.sWork.get_tensor(cute.make_layout((WORK, STAGES))),
            sKeys=storage.sKeys.get_tensor(cute.make_layout(STAGES)),
            work=Channel.over(storage.work_barriers.data_ptr(), STAGES, warps + 1),
            q=Channel.over(storage.q_barriers.data_ptr(), config.q_stages, 1),
            k=Channel.over(storage.k_barriers.data_ptr(), STAGES, warps),
            v=Channel.over(storage.v_barriers.data_ptr(), STAGES, warps),
            out=Channel.over(storage.out_barriers.data_ptr(), config.q_stages, 1),
        )


def row_layout(config: Config, rows: int, columns: int, stages: int) -> cute.ComposedLayout:
    """[rows, columns, stages]: chunks of 64 columns one after another, each `rows` rows of 128 swizzled bytes."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, DTYPES[config.dtype])
    return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))


class Work(NamedTuple):
    """A tile: its first row, head (request * Hq + head), request, the request's keys and its first query's position.

    blocks: key blocks to compute; 0 marks the end, there is no tile then. whole: how many of them, at the beginning,
    need no mask (where all blocks count).
    """

    row0: Int32
    head: Int32
    request: Int32
    length: Int32
    start: Int32
    blocks: Int32
    whole: Int32


@cute.jit
def receive(shared: Shared, count) -> Work:
    """Wait for the description of the CTA's tile number `count`."""
    stage = count % STAGES
    shared.work.wait(stage, count // STAGES)
    words = [shared.sWork[i, stage] for i in range(len(Work._fields))]
    cute.arch.sync_warp()
    shared.work.release(stage)
    return Work(*words)


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: 64 rows of the tile.

    Registers of a thread: O [64, Dv] / 128 threads, S [64, TILE_N] / 128, P half of that, and for each of its two rows
    the running max (base 2), its share of the running sum, the factor of the last move of the max, and the last key
    that the row may see.
    """

    config: Config
    shared: Shared
    wg: Int32
    tid: Int32
    scale_log2: Float32
    qk: cute.TiledMma
    pv: cute.TiledMma
    rQ: cute.Tensor
    rK: cute.Tensor
    rV: cute.Tensor
    store: cute.TiledCopy
    O: cute.Tensor
    S: cute.Tensor
    P: cute.Tensor
    row_max: cute.Tensor
    row_sum: cute.Tensor
    factor: cute.Tensor
    last_key: cute.Tensor

    @staticmethod
    def over(config: Config, shared: Shared, wg, tid, scale_log2: Float32) -> Consumer:
        """tid: of the thread among all consumers."""
        dtype, atoms = DTYPES[config.dtype], (config.consumers, 1, 1)
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        registers = warpgroup.OperandSource.RMEM
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, atoms, (64, config.tile_n))
        # NOTE: one wgmma of 256 columns does not fit the 128 registers of a thread at entry where two CTAs share an SM
        columns = min(config.Dv, 128) if config.sparse else config.Dv
        pv = sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, atoms, (64, columns), registers)
        # NOTE: from the warpgroup's number, not the thread's, so that descriptors stay in uniform registers
        qk_slice, pv_slice = qk.get_slice(128 * wg), pv.get_slice(128 * wg)
        sV = shared.sV
        sVt = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0, 2]))
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), dtype)
        return Consumer(
            config=config,
            shared=shared,
            wg=wg,
            tid=tid,
            scale_log2=scale_log2,
            qk=qk,
            pv=pv,
            rQ=qk.make_fragment_A(qk_slice.partition_A(shared.sQ)),
            rK=qk.make_fragment_B(qk_slice.partition_B(shared.sK)),
            rV=pv.make_fragment_B(pv_slice.partition_B(sVt)),
            store=cute.make_tiled_copy_C(store, pv).get_slice(tid),
            O=cute.make_rmem_tensor(pv.partition_shape_C((config.tile_m, config.Dv)), Float32),
            S=cute.make_rmem_tensor(qk.partition_shape_C((config.tile_m, config.tile_n)), Float32),
            P=cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, config.tile_n // 16)), dtype),
            row_max=cute.make_rmem_tensor(2, Float32),
            row_sum=cute.make_rmem_tensor(2, Float32),
            factor=cute.make_rmem_tensor(2, Float32),
            last_key=cute.make_rmem_tensor(2, Int32),
        )

    @property
    def row(self):
        """The first of this thread's rows in the tile; the second is 8 below."""
        return (self.tid // 32) * 16 + (self.tid % 32) // 4

    @property
    def column(self):
        """The first of this thread's columns in every 8."""
        return 2 * (self.tid % 4)

    @cute.jit
    def begin(self, tile: Work, causal) -> None:
        """Begin a tile."""
        self.row_max.fill(LOW)
        self.row_sum.fill(0.0)
        for r in cutlass.range_constexpr(2):
            last_key = tile.length - 1
            if causal != 0:
                last_key = cutlass.min(tile.length - 1, tile.start + tile.row0 + self.row + 8 * r)
            self.last_key[r] = last_key

    @cute.jit
    def take_turn(self) -> None:
        if const_expr(self.config.turns):
            cute.arch.barrier(barrier_id=BAR_TURN + self.wg, number_of_threads=256)

    @cute.jit
    def pass_turn(self) -> None:
        if const_expr(self.config.turns):
            following = self.wg + 1 if self.wg + 1 < self.config.consumers else 0
            cute.arch.barrier_arrive(barrier_id=BAR_TURN + following, number_of_threads=256)

    @cute.jit
    def scores(self, q_stage, stage) -> None:
        """Issue S = Q K^T of a block, as one group."""
        atom = cute.make_mma_atom(self.qk.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k in cutlass.range_constexpr(self.config.D // 16):
            cute.gemm(atom, self.S, self.rQ[None, None, k, q_stage], self.rK[None, None, k, stage], self.S)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def values(self, stage) -> None:
        """Issue O += P V of a block, as one group."""
        atom = cute.make_mma_atom(self.pv.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(self.config.tile_n // 16):
            cute.gemm(atom, self.O, self.P[None, None, k], self.rV[None, None, k, stage], self.O)
        warpgroup.commit_group()

    @cute.jit
    def mask(self, key0) -> None:
        """S = -inf past each row's last key; the block starts at key `key0`."""
        for r in cutlass.range_constexpr(2):
            room = self.last_key[r] - key0 - self.column
            for j in cutlass.range_constexpr(self.config.tile_n // 8):
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    self.S[i] = self.S[i] if 8 * j + e <= room else -Float32.inf

    @cute.jit
    def mask_listed(self, tensors: Tensors, Hq, tile: Work, word) -> None:
        """Mask a listed block as its flags say."""
        S = self.S
        if word % PAGE != 0:
            key0 = word // PAGE * PAGE
            self.mask(key0)
            if word & BITS != 0:
                bits = tensors.mask_bits
                request = cutlass.min(tile.request, bits.shape[0] - 1)
                head = cutlass.min(tile.head - tile.request * Hq, bits.shape[1] - 1)
                for r in cutlass.range_constexpr(2):
                    row = cutlass.min(tile.row0 + self.row + 8 * r, bits.shape[2] - 1)
                    for half in cutlass.range_constexpr(2):
                        keep = bits[request, head, row, key0 // 32 + half] >> self.column
                        for j in cutlass.range_constexpr(4):
                            for e in cutlass.range_constexpr(2):
                                i = 16 * half + 4 * j + 2 * r + e
                                S[i] = S[i] if (keep >> (8 * j + e)) & 1 != 0 else -Float32.inf

    @cute.jit
    def softmax(self) -> None:
        """S = 2^(S - max), the max moved first if it must be; the row sums take S before it is rounded to P."""
        S, fmax = self.S, cute.arch.fmax
        for r in cutlass.range_constexpr(2):
            # the largest score of the row, by the four threads that share it
            a, b = fmax(S[2 * r], S[2 * r + 1]), fmax(S[4 + 2 * r], S[5 + 2 * r])
            for j in cutlass.range_constexpr(2, self.config.tile_n // 8, 2):
                a = fmax(a, fmax(S[4 * j + 2 * r], S[4 * j + 2 * r + 1]))
                b = fmax(b, fmax(S[4 * j + 4 + 2 * r], S[4 * j + 5 + 2 * r]))
            a = fmax(a, b)
            a = fmax(a, cute.arch.shuffle_sync_bfly(a, offset=1))
            peak = fmax(a, cute.arch.shuffle_sync_bfly(a, offset=2)) * self.scale_log2
            new_max = peak if peak > self.row_max[r] + LAZY else self.row_max[r]
            self.factor[r] = cute.math.exp2(self.row_max[r] - new_max, fastmath=True)
            self.row_max[r] = new_max
        for r in cutlass.range_constexpr(2):
            total = self.row_sum[r] * self.factor[r]
            for j in cutlass.range_constexpr(self.config.tile_n // 8):
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    S[i] = cute.math.exp2(S[i] * self.scale_log2 - self.row_max[r], fastmath=True)
                    total = total + S[i]
            self.row_sum[r] = total

    @cute.jit
    def round(self) -> None:
        """P = S in the operand's dtype."""
        for k in cutlass.range_constexpr(self.config.tile_n // 16):
            S = cute.make_tensor(self.S.iterator + 8 * k, cute.make_layout(8))
            P = cute.make_tensor(self.P.iterator + 8 * k, cute.make_layout(8))
            P.store(S.load().to(DTYPES[self.config.dtype]))

    @cute.jit
    def rescale(self) -> None:
        """O *= factor, skipped when no row of the warp moved its max."""
        O, factor = self.O, self.factor
        if cute.arch.vote_any_sync((factor[0] != 1.0) | (factor[1] != 1.0)):
            for i in cutlass.range_constexpr(self.config.Dv // 2):
                O[i] = O[i] * factor[(i // 2) % 2]

    @cute.jit
    def clear_values(self, valid, count) -> None:
        """Zero the V rows of block number `count` from row `valid` on: P is 0 there, but 0 * NaN is NaN."""
        tile_n, shared = self.config.tile_n, self.shared
        if valid < tile_n:
            stage = count % STAGES
            shared.v.wait(stage, count // STAGES)
            chunks = cute.make_tensor(
                cute.recast_ptr(shared.sV.iterator, dtype=Int32),
                cute.make_layout(
                    (32, tile_n, self.config.Dv // CHUNK, STAGES),
                    stride=(1, 32, 32 * tile_n, tile_n * self.config.Dv // 2),
                ),
            )
            for row in cutlass.range(cutlass.max(valid, 0) + self.tid % 128 // 32, tile_n, 4, unroll=1):
                for c in cutlass.range_constexpr(self.config.Dv // CHUNK):
                    chunks[self.tid % 32, row, c, stage] = Int32(0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BAR_WG + self.wg, number_of_threads=128)

    @cute.jit
    def write(self, tensors: Tensors, scalars: Scalars, tile: Work, q_stage, row_max, row_sum) -> None:
        """Normalise O, put it in place of Q for the storing warp, and write lse."""
        O, P = self.O, tensors.lse.shape[1]
        global_lse, sink = tensors.lse, tensors.sink
        scale = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            total = row_sum[r]
            total = total + cute.arch.shuffle_sync_bfly(total, offset=1)
            total = total + cute.arch.shuffle_sync_bfly(total, offset=2)
            row = tile.row0 + self.row + 8 * r
            if self.tid % 4 == 0 and row < P:
                lse = (row_max[r] + cute.math.log2(total, fastmath=True)) * math.log(2.0)
                global_lse[tile.head, row] = lse if total > 0.0 else -Float32.inf
            denominator = total
            if scalars.has_sink != 0:
                sink_log2 = sink[tile.head - tile.request * scalars.Hq] * math.log2(math.e)
                denominator = denominator + cute.math.exp2(sink_log2 - row_max[r], fastmath=True)
            scale[r] = cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)
        rounded = cute.make_rmem_tensor(O.layout, DTYPES[self.config.dtype])
        for i in cutlass.range_constexpr(self.config.Dv // 2):
            O[i] = O[i] * scale[(i // 2) % 2]
        rounded.store(O.load().to(DTYPES[self.config.dtype]))
        # NOTE: the rows of Q that these overwrite, all four warps' wgmma have read by now
        cute.arch.barrier(barrier_id=BAR_WG + self.wg, number_of_threads=128)
        sO = self.shared.sO[None, None, q_stage]
        cute.copy(self.store, self.store.retile(rounded), self.store.partition_D(sO))
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.shared.out.full + q_stage)


@cute.jit
def step(
    consumer: Consumer,
    tensors: Tensors,
    Hq,
    tile: Work,
    count,
    q_stage,
    masked: cutlass.Constexpr,
    key0,
    crossing: cutlass.Constexpr = False,
) -> Int32:
    """P V of block number `count` beside the scores and softmax of the next, a block of `tile`.

    key0: the next block's first key; returned. Where blocks are listed, the list says it, and whether to mask.
    crossing: the next block is the first of the next tile, whose factor is none of this tile's O.
    """
    k, v, following = consumer.shared.k, consumer.shared.v, count + 1
    k.wait(following % STAGES, following // STAGES)
    if const_expr(consumer.config.sparse):
        key0 = consumer.shared.sKeys[following % STAGES]
    consumer.take_turn()
    consumer.scores(q_stage, following % STAGES)
    v.wait(count % STAGES, count // STAGES)
    consumer.values(count % STAGES)
    consumer.pass_turn()
    warpgroup.wait_group(1)
    k.release(following % STAGES)
    if const_expr(consumer.config.sparse):
        consumer.mask_listed(tensors, Hq, tile, key0)
    elif const_expr(masked):
        consumer.mask(key0)
    consumer.softmax()
    warpgroup.wait_group(0)
    v.release(count % STAGES)
    consumer.round()
    if const_expr(not crossing):
        consumer.rescale()
    return key0


@cute.jit
def first(consumer: Consumer, tensors: Tensors, Hq, tile: Work, count, q_stage, q_round) -> Int32:
    """Scores and softmax of a tile's first block, with nothing beside them; returns its first key as `step` does."""
    k, key0 = consumer.shared.k, Int32(0)
    consumer.shared.q.wait(q_stage, q_round)
    k.wait(count % STAGES, count // STAGES)
    if const_expr(consumer.config.sparse):
        key0 = consumer.shared.sKeys[count % STAGES]
    consumer.take_turn()
    consumer.scores(q_stage, count % STAGES)
    consumer.pass_turn()
    warpgroup.wait_group(0)
    k.release(count % STAGES)
    if const_expr(consumer.config.sparse):
        consumer.mask_listed(tensors, Hq, tile, key0)
    else:
        consumer.mask(key0)
    consumer.softmax()
    consumer.round()
    return key0


@cute.jit
def last(consumer: Consumer, count, valid) -> None:
    """P V of a tile's last block, with nothing beside it."""
    v = consumer.shared.v
    consumer.clear_values(valid, count)
    v.wait(count % STAGES, count // STAGES)
    consumer.take_turn()
    consumer.values(count % STAGES)
    consumer.pass_turn()
    warpgroup.wait_group(0)
    v.release(count % STAGES)


# ----------------------------------------------------------------------------------------------------------- Roles


class Source(NamedTuple):
    """Where a tile's K and V are: the table, the request, its KV head and its keys."""

    table: cute.Tensor
    request: Int32
    kv_head: Int32
    length: Int32


@dataclass(frozen=True)
class Loader:
    """The warp that takes tiles and fills Q, K and V by TMA.

    sQ [box, chunk, q_stage]; gQ [box, row tile, chunk, head, request]; sK, sV [box, box of the block, chunk, stage];
    gK, gV [box, block, chunk, KV head, request], or of pages [box, chunk, page, KV head, request].
    """

    config: Config
    shared: Shared
    tma_q: cute.CopyAtom
    tma_k: cute.CopyAtom
    tma_v: cute.CopyAtom
    sQ: cute.Tensor
    gQ: cute.Tensor
    sK: cute.Tensor
    gK: cute.Tensor
    sV: cute.Tensor
    gV: cute.Tensor

    @staticmethod
    def over(config: Config, shared: Shared, tma_q, tQ, tma_k, tK, tma_v, tV) -> Loader:
        def boxes(tma, sX, rows: int, box_rows: int, columns: int, stages: int, tensor, coordinate):
            box = cute.select(row_layout(config, box_rows, CHUNK, 1).outer, [0, 1])
            counts = (rows // box_rows, columns // CHUNK, stages)
            many = cute.make_layout(counts, stride=(box_rows * CHUNK, rows * CHUNK, rows * columns))
            smem = cute.make_tensor(sX.iterator, cute.append(box, many))
            gmem = cute.local_tile(tensor, (box_rows, CHUNK), coordinate)
            one = cute.make_layout(1)
            return cpasync.tma_partition(tma, 0, one, cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2))

        free = (None, None, None, None)
        key = (0, *free) if config.paged else free
        m, n, box = config.tile_m, config.tile_n, config.box_rows
        sQ, gQ = boxes(tma_q, shared.sQ, m, m, config.D, config.q_stages, tQ, free)
        sK, gK = boxes(tma_k, shared.sK, n, box, config.D, STAGES, tK, key)
        sV, gV = boxes(tma_v, shared.sV, n, box, config.Dv, STAGES, tV, key)
        return Loader(config, shared, tma_q, tma_k, tma_v, sQ, gQ, sK, gK, sV, gV)

    @cute.jit
    def load_q(self, row_tile, head, request, count) -> None:
        """The tile's query rows; rows past the last arrive as zeros."""
        q, stages = self.shared.q, self.config.q_stages
        stage = count % stages
        q.acquire(stage, count // stages)
        with cute.arch.elect_one():
            q.expect(stage, 2 * self.config.tile_m * self.config.D)
        for chunk in cutlass.range_constexpr(self.config.D // CHUNK):
            source = self.gQ[None, row_tile, chunk, head, request]
            cute.copy(self.tma_q, source, self.sQ[None, (0, chunk, stage)], tma_bar_ptr=q.full + stage)

    @cute.jit
    def load_block(self, values: cutlass.Constexpr, source: Source, pages: cute.Tensor, block, count, word) -> None:
        """Block number `count` of the CTA: of K, or of V; keys past the last arrive as zeros, or as a page holds them.

        word: what a list says of the block (K only).
        """
        config, shared = self.config, self.shared
        channel = shared.v if const_expr(values) else shared.k
        tma, sX, gX = (self.tma_v, self.sV, self.gV) if const_expr(values) else (self.tma_k, self.sK, self.gK)
        columns = config.Dv if const_expr(values) else config.D
        # NOTE: a broadcast dim has one element
        head = cutlass.min(source.kv_head, cute.size(gX, mode=[3]) - 1)
        request = cutlass.min(source.request, cute.size(gX, mode=[4]) - 1)
        stage, sKeys = count % STAGES, shared.sKeys
        channel.acquire(stage, count // STAGES)
        with cute.arch.elect_one():
            if const_expr(config.sparse and not values):
                sKeys[stage] = word
            channel.expect(stage, 2 * config.tile_n * columns)
        bar = channel.full + stage
        for chunk in cutlass.range_constexpr(columns // CHUNK):
            if const_expr(config.paged):
                for i in cutlass.range_constexpr(config.tile_n // PAGE):
                    target = sX[None, (i, chunk, stage)]
                    cute.copy(tma, gX[None, chunk, pages[i], head, request], target, tma_bar_ptr=bar)
            else:
                cute.copy(tma, gX[None, block, chunk, head, request], sX[None, (0, chunk, stage)], tma_bar_ptr=bar)

    @cute.jit
    def find_pages(self, source: Source, block, pages: cute.Tensor) -> None:
        """The physical pages of a block, forced inside the cache; past the request's last page, that page again."""
        if const_expr(self.config.paged):
            table, many = source.table, self.config.tile_n // PAGE
            last = cutlass.max(0, (source.length + PAGE - 1) // PAGE - 1)
            for i in cutlass.range_constexpr(many):
                page = table[source.request, cutlass.min(block * many + i, last)]
                pages[i] = cutlass.max(0, cutlass.min(page, cute.size(self.gK, mode=[2]) - 1))

    @cute.jit
    def load_all(self, source: Source, blocks, count) -> None:
        """The first `blocks` blocks, K one ahead of V."""
        pages, before = self.page_ids(), self.page_ids()
        self.find_pages(source, 0, before)
        self.load_block(False, source, before, 0, count, 0)
        for n in cutlass.range(1, blocks, unroll=1):
            self.find_pages(source, n, pages)
            self.load_block(False, source, pages, n, count + n, 0)
            self.load_block(True, source, before, n - 1, count + n - 1, 0)
            before.store(pages.load())
        self.load_block(True, source, before, blocks - 1, count + blocks - 1, 0)

    def page_ids(self) -> cute.Tensor:
        """Room for the page numbers of a block."""
        return cute.make_rmem_tensor(self.config.tile_n // PAGE, Int32)

    @cute.jit
    def load_listed(self, source: Source, row: cute.Tensor, blocks, limit, count) -> None:
        """Those of the first `blocks` blocks that `row` of the map names, K one ahead of V, or one nowhere.

        limit: keys that all rows see.
        """
        pages, before = self.page_ids(), self.page_ids()
        taken, last_block = Int32(0), Int32(0)
        for base in cutlass.range(0, blocks, 32, unroll=1):
            flag, bits = self.listed(row, base, blocks)
            while bits != 0:
                lane = cute.arch.popc(~bits & (bits - 1))
                block, kind = base + lane, cute.arch.shuffle_sync(flag, lane)
                bits = bits & (bits - 1)
                word = block * PAGE
                if word + PAGE > limit:
                    word = word | ROW_LIMITS
                if kind == 2:
                    word = word | BITS
                self.find_pages(source, block, pages)
                self.load_block(False, source, pages, block, count + taken, word)
                if taken > 0:
                    self.load_block(True, source, before, last_block, count + taken - 1, 0)
                before.store(pages.load())
                taken, last_block = taken + 1, block
        if taken == 0:
            self.find_pages(source, 0, before)
            self.load_block(False, source, before, 0, count, Int32(NOWHERE | ROW_LIMITS))
            taken = taken + 1
        self.load_block(True, source, before, last_block, count + taken - 1, 0)

    @cute.jit
    def listed(self, row: cute.Tensor, base, blocks):
        """32 blocks of a row of the map: this lane's byte, and which are not 0."""
        block, flag = base + cute.arch.lane_idx(), Int32(0)
        if block < cutlass.min(blocks, row.shape[0]):
            flag = Int32(row[block])
        return flag, Int32(cute.arch.vote_ballot_sync(flag != 0))

    @cute.jit
    def count_listed(self, row: cute.Tensor, blocks):
        """How many of the first `blocks` blocks `row` of the map names; at least the one nowhere."""
        total = Int32(0)
        for base in cutlass.range(0, blocks, 32, unroll=1):
            _, bits = self.listed(row, base, blocks)
            total = total + cute.arch.popc(bits)
        return cutlass.max(total, 1)


# ---------------------------------------------------------------------------------------------------------- Kernel


class Prefill:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, P, D]
        k: cute.Tensor,  # [B, Hk, S_kv, D], or pages [B or 1, Hk, Nblk, 64, D]
        v: cute.Tensor,  # [B, Hk, S_kv, Dv], or pages [B or 1, Hk, Nblk, 64, Dv]
        out: cute.Tensor,  # [B, Hq, P, Dv]
        tensors: Tensors,
        scalars: Scalars,
        ctas: Int32,
        stream,
    ):
        config = self.config

        def rows_first(x: cute.Tensor, paged: bool) -> cute.Tensor:
            order = [3, 4, 2, 1, 0] if paged else [2, 3, 1, 0]
            return cute.make_tensor(x.iterator, cute.select(x.layout, mode=order))

        def box(rows: int) -> cute.ComposedLayout:
            return cute.select(row_layout(config, rows, CHUNK, 1), mode=[0, 1])

        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        m, n = config.tile_m, config.box_rows
        tma_q, tQ = cpasync.make_tiled_tma_atom(load, rows_first(q, False), box(m), (m, CHUNK))
        tma_k, tK = cpasync.make_tiled_tma_atom(load, rows_first(k, config.paged), box(n), (n, CHUNK))
        tma_v, tV = cpasync.make_tiled_tma_atom(load, rows_first(v, config.paged), box(n), (n, CHUNK))
        tma_o, tO = cpasync.make_tiled_tma_atom(store, rows_first(out, False), box(m), (m, CHUNK))
        self.kernel(tma_q, tQ, tma_k, tK, tma_v, tV, tma_o, tO, tensors, scalars).launch(
            grid=(ctas, 1, 1),
            block=(config.threads, 1, 1),
            smem=config.smem_bytes(),
            min_blocks_per_mp=config.ctas_sm,
            # NOTE: without it the DSL asks a driver for the default, and compiling wants a GPU
            preferred_smem_carveout=100,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        tQ: cute.Tensor,
        tma_k: cute.CopyAtom,
        tK: cute.Tensor,
        tma_v: cute.CopyAtom,
        tV: cute.Tensor,
        tma_o: cute.CopyAtom,
        tO: cute.Tensor,
        tensors: Tensors,
        scalars: Scalars,
    ):
        config = self.config
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, config.q_stages * config.tile_m * config.D], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, STAGES * config.tile_n * config.D], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[dtype, STAGES * config.tile_n * config.Dv], 1024]
            sWork: cute.struct.MemRange[Int32, STAGES * WORK]
            sKeys: cute.struct.MemRange[Int32, STAGES]
            work_barriers: cute.struct.MemRange[Int64, Channel.words(STAGES)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(config.q_stages)]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(STAGES)]
            v_barriers: cute.struct.MemRange[Int64, Channel.words(STAGES)]
            out_barriers: cute.struct.MemRange[Int64, Channel.words(config.q_stages)]

        allocated = -(-Storage.size_in_bytes() // 1024) * 1024
        assert allocated == config.smem_bytes(), (
            f"{config} allocates {allocated} bytes, its ledger says {config.smem_bytes()}"
        )
        storage = utils.SmemAllocator().allocate(Storage)
        shared = Shared.over(config, storage)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())

        if warp_id == 0:
            for tma in (tma_q, tma_k, tma_v, tma_o):
                cpasync.prefetch_descriptor(tma)
            with cute.arch.elect_one():
                for channel in (shared.work, shared.q, shared.k, shared.v):
                    channel.init()
                for stage in cutlass.range_constexpr(config.q_stages):
                    cute.arch.mbarrier_init(shared.out.full + stage, 4 * config.consumers)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        registers, few_registers = REGISTERS[config.consumers]
        loader_warp = 4 * config.consumers
        if warp_id >= loader_warp:
            cute.arch.setmaxregister_decrease(few_registers)
            if warp_id == loader_warp:
                self.load(Loader.over(config, shared, tma_q, tQ, tma_k, tK, tma_v, tV), tensors, scalars, tQ)
            elif warp_id == loader_warp + 1:
                self.store(shared, tma_o, tO, scalars)
        else:
            cute.arch.setmaxregister_increase(registers)
            tidx, _, _ = cute.arch.thread_idx()
            consumer = Consumer.over(config, shared, warp_id // 4, tidx, scalars.scale_log2)
            self.consume(consumer, tensors, scalars)

    @cute.jit
    def load(self, loader: Loader, tensors: Tensors, scalars: Scalars, tQ: cute.Tensor) -> None:
        """Take tiles, describe them to the others, and load them."""
        config, sWork, work = self.config, loader.shared.sWork, loader.shared.work
        P, heads = cute.size(tQ, mode=[0]), cute.size(tQ, mode=[2]) * cute.size(tQ, mode=[3])
        row_tiles = (P + config.tile_m - 1) // config.tile_m
        tiles = row_tiles * heads
        index, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        count, done = Int32(0), Int32(0)
        while index < tiles:
            following = tiles
            if tiles > ctas:
                following = self.take(tensors.counter) + ctas
            row_tile, head = schedule.tile(index, row_tiles, heads, scalars.section, cutlass.min)
            request = head // scalars.Hq
            q_head, row0 = head - request * scalars.Hq, row_tile * config.tile_m
            start, length = self.span(tensors, scalars, request, P)
            total, whole = self.blocks(scalars, row0, length, start)
            source = Source(tensors.table, request, q_head // (scalars.Hq // scalars.Hk), length)
            blocks = total
            block_map = tensors.block_map
            map_request = cutlass.min(request, block_map.shape[0] - 1)
            map_row = block_map[map_request, cutlass.min(q_head, block_map.shape[1] - 1), row_tile, None]
            if const_expr(config.sparse):
                blocks = loader.count_listed(map_row, total)

            stage = done % STAGES
            work.acquire(stage, done // STAGES)
            with cute.arch.elect_one():
                for i, word in enumerate(Work(row0, head, request, length, start, blocks, whole)):
                    sWork[i, stage] = word
                cute.arch.mbarrier_arrive(work.full + stage)
            loader.load_q(row_tile, q_head, request, done)
            if const_expr(config.sparse):
                loader.load_listed(source, map_row, total, whole * config.tile_n, count)
            else:
                loader.load_all(source, blocks, count)
            count, done, index = count + blocks, done + 1, following
        stage = done % STAGES
        work.acquire(stage, done // STAGES)
        with cute.arch.elect_one():
            sWork[Work._fields.index("blocks"), stage] = Int32(0)
            cute.arch.mbarrier_arrive(work.full + stage)

    @cute.jit
    def span(self, tensors: Tensors, scalars: Scalars, request, P):
        """The position of a request's first query, and its keys."""
        start, length = Int32(0), scalars.S_kv
        if scalars.has_start != 0:
            start = tensors.start_pos[request]
        if const_expr(self.config.paged):
            length = cutlass.min(length, start + P)
        if scalars.has_lens != 0:
            length = cutlass.min(length, tensors.seq_lens[request])
        return start, cutlass.max(0, length)

    @cute.jit
    def take(self, counter: cute.Tensor):
        """The next number of the counter, for the whole warp."""
        number = Int32(0)
        if cute.arch.lane_idx() == 0:
            number = cute.arch.atomic_add(counter.iterator, Int32(1))
        return cute.arch.shuffle_sync(number, offset=0)

    @cute.jit
    def blocks(self, scalars: Scalars, row0, length, start) -> schedule.Blocks:
        """The key blocks of a tile."""
        config, least, most = self.config, cutlass.min, cutlass.max
        total, whole = schedule.blocks(length, start + row0, config.tile_m, False, config.tile_n, least, most)
        if scalars.causal != 0:
            total, whole = schedule.blocks(length, start + row0, config.tile_m, True, config.tile_n, least, most)
        return schedule.Blocks(total, whole)

    @cute.jit
    def store(self, shared: Shared, tma_o: cute.CopyAtom, tO: cute.Tensor, scalars: Scalars) -> None:
        """Store each tile's out when all warps have written it, then free its Q stage."""
        config = self.config
        gmem = cute.local_tile(tO, (config.tile_m, CHUNK), (None, None, None, None))
        box = cute.select(row_layout(config, config.tile_m, CHUNK, 1).outer, [0, 1])
        counts = (config.Dv // CHUNK, config.q_stages)
        many = cute.make_layout(counts, stride=(config.tile_m * CHUNK, config.tile_m * config.D))
        smem = cute.make_tensor(shared.sQ.iterator, cute.append(box, many))
        one = cute.make_layout(1)
        sO, gO = cpasync.tma_partition(tma_o, 0, one, cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2))
        done = Int32(0)
        row0, head, request, length, start, blocks, whole = receive(shared, done)
        while blocks != 0:
            stage = done % config.q_stages
            shared.out.wait(stage, done // config.q_stages)
            for chunk in cutlass.range_constexpr(config.Dv // CHUNK):
                target = gO[None, row0 // config.tile_m, chunk, head - request * scalars.Hq, request]
                cute.copy(tma_o, sO[None, (chunk, stage)], target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            shared.q.release(stage)
            done = done + 1
            row0, head, request, length, start, blocks, whole = receive(shared, done)

    @cute.jit
    def consume(self, consumer: Consumer, tensors: Tensors, scalars: Scalars) -> None:
        """Compute tile after tile."""
        config, shared = self.config, consumer.shared
        stages, tile_n, Hq = config.q_stages, config.tile_n, scalars.Hq
        if const_expr(config.turns):
            if consumer.wg == config.consumers - 1:
                consumer.pass_turn()
        row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        count, done, key0 = Int32(0), Int32(0), Int32(0)
        row0, head, request, length, start, blocks, whole = receive(shared, done)
        if blocks != 0:
            tile = Work(row0, head, request, length, start, blocks, whole)
            consumer.O.fill(0.0)
            consumer.begin(tile, scalars.causal)
            key0 = first(consumer, tensors, Hq, tile, count, 0, 0)
        while blocks != 0:
            tile = Work(row0, head, request, length, start, blocks, whole)
            q_stage, end = done % stages, blocks - 1
            if const_expr(config.sparse):
                for n in cutlass.range(end, unroll=1):
                    key0 = step(consumer, tensors, Hq, tile, count + n, q_stage, True, key0)
            else:
                clear = cutlass.max(whole - 1, 0)
                for n in cutlass.range(clear, unroll=1):
                    step(consumer, tensors, Hq, tile, count + n, q_stage, False, 0)
                for n in cutlass.range(clear, end, unroll=1):
                    step(consumer, tensors, Hq, tile, count + n, q_stage, True, (n + 1) * tile_n)
                key0 = end * tile_n
            count, done = count + end, done + 1
            valid = length - key0
            row0, head, request, length, start, blocks, whole = receive(shared, done)
            following = Work(row0, head, request, length, start, blocks, whole)
            for r in cutlass.range_constexpr(2):
                row_max[r], row_sum[r] = consumer.row_max[r], consumer.row_sum[r]
            if const_expr(stages == 1):
                last(consumer, count, valid)
                consumer.write(tensors, scalars, tile, q_stage, row_max, row_sum)
                consumer.O.fill(0.0)
                if blocks != 0:
                    consumer.begin(following, scalars.causal)
                    key0 = first(consumer, tensors, Hq, following, count + 1, 0, done)
            elif blocks != 0:
                consumer.clear_values(valid, count)
                shared.q.wait(done % stages, done // stages)
                consumer.begin(following, scalars.causal)
                key0 = step(consumer, tensors, Hq, following, count, done % stages, True, Int32(0), True)
                consumer.write(tensors, scalars, tile, q_stage, row_max, row_sum)
                consumer.O.fill(0.0)
            else:
                last(consumer, count, valid)
                consumer.write(tensors, scalars, tile, q_stage, row_max, row_sum)
            count = count + 1


# ---------------------------------------------------------------------------------------------------------- Launch


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `Prefill.__call__`, for compiling without a GPU."""
    dtype = DTYPES[config.dtype]

    def tensor(columns: int, *dims: int) -> cute.Tensor:
        shape = (*(cute.sym_int32() for _ in range(3 - len(dims))), *dims, columns)
        strides = (*(cute.sym_int64(divisibility=8) for _ in shape[1:]), 1)
        return make_fake_tensor(dtype, shape, strides, assumed_align=16)

    def keys(columns: int) -> cute.Tensor:
        if not config.paged:
            return tensor(columns)
        shape = (cute.sym_int32(), cute.sym_int32(), cute.sym_int32(), PAGE, columns)
        strides = (*(cute.sym_int64(divisibility=8) for _ in range(4)), 1)
        return make_fake_tensor(dtype, shape, strides, assumed_align=16)

    def vector(kind, size=None) -> cute.Tensor:
        return make_fake_tensor(kind, (cute.sym_int32() if size is None else size,), (1,), assumed_align=4)

    dims, strides = [cute.sym_int32() for _ in range(4)], [cute.sym_int64() for _ in range(3)]
    tensors = Tensors(
        table=make_fake_tensor(Int32, (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), 1), assumed_align=4),
        seq_lens=vector(Int32),
        start_pos=vector(Int32),
        sink=vector(Float32),
        lse=make_fake_tensor(Float32, (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), 1), assumed_align=4),
        counter=vector(Int32, 1),
        block_map=make_fake_tensor(Uint8, dims, (*strides, 1), assumed_align=1),
        mask_bits=make_fake_tensor(Int32, dims, (*strides, 1), assumed_align=4),
    )
    scalars = Scalars(Float32(1.0), *(Int32(1) for _ in Scalars._fields[1:]))
    return tensor(config.D), keys(config.D), keys(config.Dv), tensor(config.Dv), tensors, scalars, Int32(1)


def build(config: Config, options: str = ""):
    """Compile the kernel for sm_90a; takes seconds."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(Prefill(config), *arguments(config), stream, options=f"--enable-tvm-ffi {options}")
