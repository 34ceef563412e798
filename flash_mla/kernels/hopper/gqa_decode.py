"""GQA, MQA and MHA decode on Hopper: out = softmax(scale * Q K^T) V over paged caches of K and V.

Grid: one CTA an SM, persistent. The query rows of one KV head (row = head of the group * S_q + token) are cut into
tiles of `tile_n`; a CTA computes one tile of one KV head against a range of the request's keys, which it finds from
`seq_lens` on the device (`split.py`); `combine.py` adds the pieces of items that were split.

Bound: bytes. A block of 64 keys of one head is 64 * (D + Dv) * 2 = 32.8 KB at D 128 in BF16; at 4.5 TB/s an SM gets 34
bytes a ns, so a block every 960 ns = 1600 cycles (FP8: 800). Its products are 64 * tile_n * (D + Dv) * 2 FLOP, a few
per cent of that. So keys and output columns are the M of the products, and the few query rows their N:
    S^T [64, tile_n] = K Q^T        O^T [Dv, tile_n] += V^T P^T
Softmax is then 64 * tile_n / 128 elements a thread and a block: 4 at tile_n 8.

Roles (384 threads; up to 168 registers; where O is large the consumers take 232 and leave 40):
    warpgroups 0, 1   alternate blocks of the range, each with its own max, sum and O; merged at the end of the segment
    warp 8            TMA of Q, K and V; then notes the split item for combine

Channels, producer -> consumers (full arrivals / empty arrivals):
    K, V   warp 8 -> warpgroup 0 or 1   `stages` stages of one block    1 + bytes / 4 warps
    Q      warp 8 -> warpgroups 0, 1    `q_stages` stages of one tile   1 + bytes / 8 warps

Steady state of a warpgroup, a block: S^T | P against the max so far -> shared memory | one barrier, which also tells
whether any score exceeds that max by 2^8 (`LAZY`) | O^T. Only when one does, the max is found (shuffles and an exchange
of the four warps) and P made anew. P has two buffers, so that one barrier a block is enough.

FP8: K q^T as it is; V is converted to FP16 on its way to registers, as the A operand, and P is FP16. A transposing
ldmatrix of 16-bit pairs gives a thread two neighbouring columns of V for two neighbouring keys; a byte permutation
separates them. So row r of 16 rows of O^T is column 2 r, or 2 (r - 8) + 1, undone where O is stored.

Supports BF16, FP16, FP8 (e4m3); D and Dv up to 256; any Hq / Hk and S_q; any strides that TMA takes (multiples of 16
bytes), a shared pool too; ragged lengths, 0 included; causal among the S_q tokens; descales and sinks. Unused slots
may hold NaN: the scores past the end are masked and the V rows zeroed. Block ids are forced inside the cache, lengths
inside the table.

Measured: docs/kernels.md, "Hopper GQA decode".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.combine import combine
from flash_mla.kernels.hopper.work import (
    Partials,
    Work,
    find_work,
    first_place,
    note_split,
    place_after,
    scan_words,
    segment_at,
)

# ---------------------------------------------------------------------------------------------------------- Config

BLOCK = 64
"""Keys of a block: one cache page."""
TILES_N = (8, 16, 32, 64)
"""Query rows of a CTA."""
MAX_D = 256
ROW_BYTES = 128
"""Bytes of a row in a chunk of shared memory: one row of the 128-byte swizzle."""
CHUNK_BYTES = BLOCK * ROW_BYTES
TILE_M = 64
"""Output columns of an O^T tile."""
WARPS = 12
CONSUMER_WARPS = 8
CONSUMERS = 32 * CONSUMER_WARPS
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
SMEM_LIMIT = 227 * 1024
MAX_STAGES = 12

BAR_WG, BAR_MERGE = 1, 3
"""Named barriers (0 is the CTA's): one for each consumer warpgroup; both."""

LOW = -1.0e30
"""A running max below every score, finite so that LOW - LOW is 0."""
LAZY = 8.0
"""The running max moves only when a score exceeds it by more than 2^8: exact after normalisation."""

DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp8": Float8E4M3FN}


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    dtype of q, k and v (out: the same, BF16 for FP8); D, Dv; tile_n, the query rows of a CTA; descale: whether q, k and
    v have factors.
    """

    dtype: Literal["bf16", "fp16", "fp8"]
    D: int
    Dv: int
    tile_n: int
    descale: bool

    @property
    def fp8(self) -> bool:
        return self.dtype == "fp8"

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
        return min(4, 64 // self.tile_n)

    @property
    def wide(self) -> bool:
        """Whether the consumers need registers of the producer's warpgroup."""
        return self.tile_n * self.tiles_m >= 128

    @property
    def fixed_bytes(self) -> int:
        """Shared memory of a CTA without the stages: Q, P, row sums and maxima, work search, barriers."""
        q = self.q_stages * self.k_chunks * self.tile_n * ROW_BYTES
        p = 2 * 2 * self.tile_n * BLOCK * 2
        rows = 4 * (CONSUMER_WARPS + 2) * self.tile_n
        return q + p + rows + 4 * scan_words(WARPS) + 8 * (2 * Channel.words(MAX_STAGES) + Channel.words(4))

    @property
    def stages(self) -> int:
        """Blocks of K and V in flight: what fits."""
        free = SMEM_LIMIT - 1024 - self.fixed_bytes
        return min(MAX_STAGES, free // (CHUNK_BYTES * (self.k_chunks + self.v_chunks)))

    @property
    def stride_unit(self) -> int:
        """Elements of the 16 bytes of which TMA's strides are multiples."""
        return 16 if self.fp8 else 8

    def workspace_words(self, ctas: int) -> int:
        """32-bit words of workspace: partial results, their lse, notes of split items."""
        return Partials.words(ctas, self.tile_n, self.Dv)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA, rounded up to the 1024 bytes on which swizzled buffers are aligned."""
        used = self.fixed_bytes + self.stages * CHUNK_BYTES * (self.k_chunks + self.v_chunks)
        return -(-used // 1024) * 1024


# ----------------------------------------------------------------------------------------------------------- Tiles


class Tensors(NamedTuple):
    """Global memory, all but q, k and v, which only TMA reads.

    table [B, table_blocks] and seq_lens [B] int32; sink [Hq] FP32; descales [B, Hk] FP32; out [B, Hq * S_q, Dv]; lse
    [B, Hq * S_q] FP32, natural log; out_partial [2 * CTAs, tile_n, Dv] and lse_partial [2 * CTAs, tile_n] FP32, base 2;
    split_of [CTAs, 4] int32: the split item that begins in a CTA (request, group, last CTA; -1: none).
    """

    table: cute.Tensor
    seq_lens: cute.Tensor
    sink: cute.Tensor
    q_descale: cute.Tensor
    k_descale: cute.Tensor
    v_descale: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    partials: Partials


class Scalars(NamedTuple):
    """scale * log2(e); query tokens a request; whether `sink` counts; rows and row tiles of a KV head; KV heads."""

    scale_log2: Float32
    S_q: Int32
    has_sink: Int32
    rows: Int32
    tiles: Int32
    heads: Int32


class Item(NamedTuple):
    """What a segment belongs to: request, KV head, its row tile."""

    request: Int32
    head: Int32
    tile: Int32


class Range(NamedTuple):
    """A segment's blocks [first, last) and its request's length; what the CTA did before, in blocks and in segments."""

    first: Int32
    last: Int32
    length: Int32
    blocks_before: Int32
    segments_before: Int32


# ----------------------------------------------------------------------------------------------------------- Steps


@cute.jit
def barrier_any(barrier_id, threads: cutlass.Constexpr, predicate):
    """A named barrier; whether the predicate held in any of its threads (int 0 or 1)."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r0}, 0; barrier.cta.red.or.pred.aligned p, {$r1}, {$r2}, p; "
        "selp.s32 {$w0}, 1, 0, p; }",
        write_only_types=[Int32],
        read_only_args=[Int32(predicate), Int32(barrier_id), Int32(threads)],
    )


@cute.jit
def transpose_load(address):
    """Four 8 x 8 matrices of 16-bit elements from shared memory, transposed; lane l gives the address of row l."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )


@cute.jit
def convert_pairs(pairs):
    """e4m3 bytes (key 0, d 0), (0, 1), (1, 0), (1, 1) -> FP16 pairs of keys, for d 0 and for d 1."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, {$r0}, {$r0}, 0x3120; mov.b32 {a, b}, t; "
        "cvt.rn.f16x2.e4m3x2 {$w0}, a; cvt.rn.f16x2.e4m3x2 {$w1}, b; }",
        write_only_types=[Int32, Int32],
        read_only_args=[pairs],
    )


@cute.jit
def prefetch_table(table: cute.Tensor, thread) -> None:
    """Ask L2 for a 128-byte line of the table, one a thread of the grid: which entries to read is known 1 us later."""
    first = thread * (128 // 4)
    if first < (table.shape[0] - 1) * table.stride[0] + table.shape[1]:
        address = table.iterator.toint() + 4 * Int64(first)
        cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it).

    sQ [tile_n, D, q stage], sK [64, D, stage], sV [64, Dv, stage], sP [tile_n, 64, buffer] with buffer = 2 * warpgroup
    + parity; sSum [tile_n, warp], sMax [tile_n, warpgroup]; exchange: sP's memory, where O is merged.
    """

    sQ: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sP: cute.Tensor
    exchange: cute.Tensor
    sSum: cute.Tensor
    sMax: cute.Tensor
    sScan: cute.Tensor
    q: Channel
    k: Channel
    v: Channel

    @staticmethod
    def over(config: Config, storage, layout: Callable[..., cute.ComposedLayout]) -> Shared:
        def view(field, rows: int, columns: int, count: int, dtype) -> cute.Tensor:
            one = layout(rows, columns, dtype)
            stacked = cute.append(one.outer, cute.make_layout(count, stride=rows * columns))
            return field.get_tensor(stacked, swizzle=one.inner)

        dtype, product = DTYPES[config.dtype], product_dtype(config)
        width = config.tile_n // 2
        return Shared(
            sQ=view(storage.sQ, config.tile_n, config.chunk * config.k_chunks, config.q_stages, dtype),
            sK=view(storage.sK, BLOCK, config.chunk * config.k_chunks, config.stages, dtype),
            sV=view(storage.sV, BLOCK, config.chunk * config.v_chunks, config.stages, dtype),
            sP=view(storage.sP, config.tile_n, BLOCK, 4, product),
            exchange=cute.make_tensor(
                cute.recast_ptr(storage.sP.data_ptr(), dtype=Float32),
                cute.make_layout((128, width, 2), stride=(1, 128, 128 * width)),
            ),
            sSum=storage.sSum.get_tensor(cute.make_layout((config.tile_n, CONSUMER_WARPS))),
            sMax=storage.sMax.get_tensor(cute.make_layout((config.tile_n, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            q=Channel.over(storage.q_barriers.data_ptr(), config.q_stages, CONSUMER_WARPS),
            k=Channel.over(storage.k_barriers.data_ptr(), config.stages, CONSUMER_WARPS // 2),
            v=Channel.over(storage.v_barriers.data_ptr(), config.stages, CONSUMER_WARPS // 2),
        )


def product_dtype(config: Config):
    """Dtype of P and of V as an operand."""
    return Float16 if config.fp8 else DTYPES[config.dtype]


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup, 0 or 1 (`side`, a run-time value: both run the same code).

    Registers of a thread: O^T [Dv, tile_n] / 128, S^T and P^T [64, tile_n] / 128; and for each of its tile_n / 4 rows
    (columns of the tiles) the running max (base 2), its share of the running sum, its sum of the block at hand, and the
    factor of the last move of the max.
    """

    config: Config
    shared: Shared
    side: Int32
    tid: Int32
    qk: cute.TiledMma
    pv: cute.TiledMma
    rK: cute.Tensor
    rQ: cute.Tensor
    rV: cute.Tensor
    rP: cute.Tensor
    store: cute.TiledCopy
    sP_store: cute.Tensor
    O: cute.Tensor
    S: cute.Tensor
    E: cute.Tensor
    P: cute.Tensor
    row_max: cute.Tensor
    row_sum: cute.Tensor
    block_sum: cute.Tensor
    factor: cute.Tensor

    @staticmethod
    def over(config: Config, shared: Shared, side, tid) -> Consumer:
        dtype, product, one, N = DTYPES[config.dtype], product_dtype(config), (1, 1, 1), config.tile_n
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, one, (BLOCK, N))
        columns = config.tiles_m * TILE_M
        if const_expr(config.fp8):
            registers = warpgroup.OperandSource.RMEM
            pv = sm90.make_trivial_tiled_mma(product, product, K, K, Float32, one, (TILE_M, N), registers)
            rV = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), config.tiles_m, 4)), product)
        else:
            pv = sm90.make_trivial_tiled_mma(product, product, MN, K, Float32, one, (TILE_M, N))
            transposed = cute.make_layout((columns, BLOCK, config.stages), stride=(BLOCK, 1, BLOCK * columns))
            sVt = cute.composition(shared.sV, transposed)
            rV = pv.make_fragment_A(pv.get_slice(0).partition_A(sVt))
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=True, num_matrices=2 if N == 8 else 4), product)
        store = cute.make_tiled_copy_C(store, qk).get_slice(tid)
        sPt = cute.composition(shared.sP, cute.make_layout((BLOCK, N, 4), stride=(N, 1, N * BLOCK)))
        S = cute.make_rmem_tensor(qk.partition_shape_C((BLOCK, N)), Float32)
        return Consumer(
            config=config,
            shared=shared,
            side=side,
            tid=tid,
            qk=qk,
            pv=pv,
            rK=qk.make_fragment_A(qk.get_slice(0).partition_A(shared.sK)),
            rQ=qk.make_fragment_B(qk.get_slice(0).partition_B(shared.sQ)),
            rV=rV,
            rP=pv.make_fragment_B(pv.get_slice(0).partition_B(shared.sP)),
            store=store,
            sP_store=store.partition_D(sPt),
            O=cute.make_rmem_tensor(pv.partition_shape_C((columns, N)), Float32),
            S=S,
            E=cute.make_rmem_tensor(S.layout, Float32),
            P=cute.make_rmem_tensor(S.layout, product),
            row_max=cute.make_rmem_tensor(N // 4, Float32),
            row_sum=cute.make_rmem_tensor(N // 4, Float32),
            block_sum=cute.make_rmem_tensor(N // 4, Float32),
            factor=cute.make_rmem_tensor(N // 4, Float32),
        )

    @property
    def key(self):
        """The first of this thread's two keys in a block; the second is 8 on."""
        return (self.tid // 32) * 16 + (self.tid % 32) // 4

    def row(self, c: int):
        """This thread's row number c in the tile."""
        return 8 * (c // 2) + 2 * (self.tid % 4) + c % 2

    @cute.jit
    def start(self) -> None:
        """Begin a segment."""
        self.O.fill(0.0)
        self.row_max.fill(LOW)
        self.row_sum.fill(0.0)

    @cute.jit
    def scores(self, stage, q_stage, scale_log2) -> None:
        """S^T = scale * K Q^T of a block, base 2."""
        atom = cute.make_mma_atom(self.qk.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k in cutlass.range_constexpr(self.config.k_steps):
            cute.gemm(atom, self.S, self.rK[None, None, k, stage], self.rQ[None, None, k, q_stage], self.S)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        for i in cutlass.range_constexpr(self.config.tile_n // 2):
            self.S[i] = self.S[i] * scale_log2

    @cute.jit
    def mask(self, key0, length, row0, S_q) -> None:
        """S = -inf past each row's last key; the block starts at key `key0`, the tile at row `row0` of its KV head."""
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            room = length - S_q + (row0 + self.row(c)) % S_q - key0 - self.key
            for half in cutlass.range_constexpr(2):
                i = 4 * (c // 2) + c % 2 + 2 * half
                self.S[i] = self.S[i] if 8 * half <= room else -Float32.inf

    @cute.jit
    def exponentials(self):
        """P = 2^(S - max) in the operand's dtype, its sums before rounding; returns the largest exponent."""
        largest = -Float32.inf
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i = 4 * (c // 2) + c % 2
            a, b = self.S[i] - self.row_max[c], self.S[i + 2] - self.row_max[c]
            largest = cute.arch.fmax(largest, cute.arch.fmax(a, b))
            self.E[i], self.E[i + 2] = cute.math.exp2(a, fastmath=True), cute.math.exp2(b, fastmath=True)
            self.block_sum[c] = self.E[i] + self.E[i + 2]
        self.P.store(self.E.load().to(product_dtype(self.config)))
        return largest

    @cute.jit
    def add_sums(self) -> None:
        """The block's sums to the running sums."""
        self.row_sum.store(self.row_sum.load() + self.block_sum.load())

    @cute.jit
    def publish(self, buffer) -> None:
        """P to shared memory, for the tensor cores."""
        cute.copy(self.store, self.store.retile(self.P), self.sP_store[None, None, None, buffer])
        cute.arch.fence_view_async_shared()

    @cute.jit
    def raise_max(self) -> None:
        """Move the running max to the block's where that is larger, and rescale the sums and O."""
        sPeak, lane, warp_id = self.shared.sSum, self.tid % 32, 4 * self.side + self.tid // 32
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i = 4 * (c // 2) + c % 2
            peak = cute.arch.fmax(self.S[i], self.S[i + 2])
            for offset in (4, 8, 16):
                peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, offset=offset))
            if lane < 4:
                sPeak[self.row(c), warp_id] = peak
        cute.arch.barrier(barrier_id=BAR_WG + self.side, number_of_threads=128)
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            new_max = self.row_max[c]
            for w in cutlass.range_constexpr(4):
                new_max = cute.arch.fmax(new_max, sPeak[self.row(c), 4 * self.side + w])
            self.factor[c] = cute.math.exp2(self.row_max[c] - new_max, fastmath=True)
            self.row_max[c] = new_max
            self.row_sum[c] = self.row_sum[c] * self.factor[c]
        for m in cutlass.range_constexpr(self.config.tiles_m):
            for i in cutlass.range_constexpr(self.config.tile_n // 2):
                o = m * self.config.tile_n // 2 + i
                self.O[o] = self.O[o] * self.factor[2 * (i // 4) + i % 2]

    @cute.jit
    def clear_values(self, stage, valid) -> None:
        """Zero a V block's rows from `valid` on: P is 0 there, but 0 * NaN is NaN."""
        words = cute.make_tensor(
            cute.recast_ptr(self.shared.sV.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Int32),
            cute.make_layout((32, BLOCK, self.config.v_chunks * self.config.stages), stride=(1, 32, BLOCK * 32)),
        )
        for row in cutlass.range(valid + self.tid // 32, BLOCK, 4, unroll=1):
            for c in cutlass.range_constexpr(self.config.v_chunks):
                words[self.tid % 32, row, stage * self.config.v_chunks + c] = Int32(0)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_WG + self.side, number_of_threads=128)

    @cute.jit
    def load_values(self, stage) -> None:
        """V^T of a block as the A operand, FP8 to FP16 in registers."""
        tiles = self.config.tiles_m
        words = cute.recast_tensor(self.rV, Int32)  # [row half, key half, tile, 16 keys]
        words = cute.make_tensor(words.iterator, cute.make_layout((2, 2, tiles, 4), stride=(1, 2, 4, 4 * tiles)))
        lane, warp_id = self.tid % 32, self.tid // 32
        base = self.shared.sV.iterator.toint() + stage * (self.config.v_chunks * CHUNK_BYTES) + lane * ROW_BYTES
        for m in cutlass.range_constexpr(tiles):
            # 16 bytes of a row: where the swizzle has put them
            column = ((4 * (m % 2) + warp_id) ^ (lane % 8)) * 16
            for half in cutlass.range_constexpr(2):
                matrices = transpose_load(base + (m // 2 * CHUNK_BYTES + half * 32 * ROW_BYTES) + column)
                for i in cutlass.range_constexpr(4):
                    even, odd = convert_pairs(matrices[i])
                    words[0, i % 2, m, 2 * half + i // 2] = even
                    words[1, i % 2, m, 2 * half + i // 2] = odd

    @cute.jit
    def values(self, stage, buffer) -> None:
        """O^T += V^T P^T of a block."""
        atom = cute.make_mma_atom(self.pv.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        if const_expr(self.config.fp8):
            self.load_values(stage)
        warpgroup.fence()
        for k in cutlass.range_constexpr(4):
            rV = self.rV[None, None, k] if const_expr(self.config.fp8) else self.rV[None, None, k, stage]
            cute.gemm(atom, self.O, rV, self.rP[None, None, k, buffer], self.O)
        warpgroup.commit_group()
        warpgroup.wait_group(0)


# ----------------------------------------------------------------------------------------------------------- Roles


@dataclass(frozen=True)
class Producer:
    """One warp that fills the stages by TMA.

    sQ [chunk], gQ [row tile, chunk, KV head, request]; sK, sV [chunk of a stage], gK, gV [chunk, KV head, block,
    request]; each of one box. blocks, requests: of the caches.
    """

    config: Config
    shared: Shared
    tma: tuple[cute.CopyAtom, cute.CopyAtom, cute.CopyAtom]
    sQ: cute.Tensor
    gQ: cute.Tensor
    sK: cute.Tensor
    gK: cute.Tensor
    sV: cute.Tensor
    gV: cute.Tensor
    blocks: Int32
    requests: Int32

    @staticmethod
    def over(config: Config, shared: Shared, layout, tma, tQ, tK, tV) -> Producer:
        dtype = DTYPES[config.dtype]

        def boxes(atom, smem: cute.Tensor, rows: int, count: int, tensor, coordinate):
            chunks = cute.make_layout(count, stride=rows * config.chunk)
            smem = cute.make_tensor(smem.iterator, cute.append(layout(rows, config.chunk, dtype).outer, chunks))
            gmem = cute.local_tile(tensor, (rows, config.chunk), coordinate)
            one_cta = cute.make_layout(1)
            return cpasync.tma_partition(atom, 0, one_cta, cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2))

        tiles, page = (None, None, None, None), (0, None, None, None, None)
        sQ, gQ = boxes(tma[0], shared.sQ, config.tile_n, config.q_stages * config.k_chunks, tQ, tiles)
        sK, gK = boxes(tma[1], shared.sK, BLOCK, config.stages * config.k_chunks, tK, page)
        sV, gV = boxes(tma[2], shared.sV, BLOCK, config.stages * config.v_chunks, tV, page)
        return Producer(config, shared, tma, sQ, gQ, sK, gK, sV, gV, tK.shape[3], tK.shape[4])

    @cute.jit
    def load_q(self, item: Item, count) -> None:
        """The item's query rows; rows past the KV head's arrive as zeros."""
        config, q = self.config, self.shared.q
        stage, turn = count % config.q_stages, count // config.q_stages
        q.acquire(stage, turn)
        with cute.arch.elect_one():
            q.expect(stage, config.k_chunks * config.tile_n * ROW_BYTES)
        for c in cutlass.range_constexpr(config.k_chunks):
            cute.copy(
                self.tma[0],
                self.gQ[None, item.tile, c, item.head, item.request],
                self.sQ[None, stage * config.k_chunks + c],
                tma_bar_ptr=q.full + stage,
            )

    @cute.jit
    def load_page(self, channel: Channel, atom, gmem, smem, chunks: cutlass.Constexpr, page, count) -> None:
        """A block of K or V into stage `count` of its ring; page: (KV head, block, request)."""
        stages = self.config.stages
        stage, turn = count % stages, count // stages
        channel.acquire(stage, turn)
        with cute.arch.elect_one():
            channel.expect(stage, chunks * CHUNK_BYTES)
        head, block, request = page
        for c in cutlass.range_constexpr(chunks):
            cute.copy(
                atom,
                gmem[None, c, head, block, request],
                smem[None, stage * chunks + c],
                tma_bar_ptr=channel.full + stage,
            )

    @cute.jit
    def load_segment(self, table: cute.Tensor, item: Item, first, last, count) -> None:
        """Blocks [first, last) of the item's request; `count` blocks were loaded before."""
        config, lane = self.config, cute.arch.lane_idx()
        request = cutlass.min(item.request, self.requests - 1)
        ids = Int32(0)
        for block in cutlass.range(first, last, unroll=1):
            # 32 block ids at a time, one a lane; forced inside the cache
            if (block - first) % 32 == 0:
                ids = table[item.request, cutlass.min(block + lane, last - 1)]
                ids = cutlass.max(0, cutlass.min(ids, self.blocks - 1))
            page = (item.head, cute.arch.shuffle_sync(ids, offset=(block - first) % 32), request)
            turn = count + block - first
            self.load_page(self.shared.k, self.tma[1], self.gK, self.sK, config.k_chunks, page, turn)
            self.load_page(self.shared.v, self.tma[2], self.gV, self.sV, config.v_chunks, page, turn)


@cute.jit
def consume_segment(consumer: Consumer, scalars: Scalars, item: Item, scale, part: Range) -> None:
    """This warpgroup's blocks of the range: every second one."""
    config, shared, side = consumer.config, consumer.shared, consumer.side
    first, last, length, count = part.first, part.last, part.length, part.blocks_before
    q_stage = part.segments_before % config.q_stages
    shared.q.wait(q_stage, part.segments_before // config.q_stages)
    for block in cutlass.range(first + side, last, 2, unroll=1):
        number = count + block - first
        stage, turn, buffer = number % config.stages, number // config.stages, 2 * side + block // 2 % 2
        # scores
        shared.k.wait(stage, turn)
        consumer.scores(stage, q_stage, scale)
        shared.k.release(stage)
        key0 = block * BLOCK
        if key0 + BLOCK > length - scalars.S_q + 1:
            consumer.mask(key0, length, item.tile * config.tile_n, scalars.S_q)

        # P against the max so far; made anew if that is too low
        largest = consumer.exponentials()
        consumer.publish(buffer)
        if barrier_any(BAR_WG + side, 128, largest > LAZY) != 0:
            consumer.raise_max()
            consumer.exponentials()
            consumer.publish(buffer)
            cute.arch.barrier(barrier_id=BAR_WG + side, number_of_threads=128)
        consumer.add_sums()

        # output
        shared.v.wait(stage, turn)
        if length - key0 < BLOCK:
            consumer.clear_values(stage, length - key0)
        consumer.values(stage, buffer)
        shared.v.release(stage)
    shared.q.release(q_stage)


@cute.jit
def write_result(consumer: Consumer, tensors: Tensors, scalars: Scalars, item: Item, v_scale, whole, slot) -> None:
    """Merge the two warpgroups, normalise, and write: to out and lse if the segment is a whole item, else to its slot.

    Each warpgroup gives every second O^T tile to the other and finishes the rest.
    """
    config, shared, side, tid = consumer.config, consumer.shared, consumer.side, consumer.tid
    tiles, N = config.tiles_m, config.tile_n
    sSum, sMax, exchange = shared.sSum, shared.sMax, shared.exchange
    global_lse, lse_partial = tensors.lse, tensors.partials.lse
    lane, warp_id = tid % 32, tid // 32
    # row maxima and sums of all warps
    for c in cutlass.range_constexpr(N // 4):
        total = consumer.row_sum[c]
        for offset in (4, 8, 16):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
        if lane < 4:
            sSum[consumer.row(c), 4 * side + warp_id] = total
            if warp_id == 0:
                sMax[consumer.row(c), side] = consumer.row_max[c]
    cute.arch.barrier(barrier_id=BAR_MERGE, number_of_threads=CONSUMERS)
    inverse = cute.make_rmem_tensor(N // 4, Float32)
    for c in cutlass.range_constexpr(N // 4):
        row, head_row = consumer.row(c), item.tile * N + consumer.row(c)
        max0, max1 = sMax[row, 0], sMax[row, 1]
        row_max = cute.arch.fmax(max0, max1)
        sum0, sum1 = sSum[row, 0], sSum[row, 4]
        for w in cutlass.range_constexpr(1, 4):
            sum0, sum1 = sum0 + sSum[row, w], sum1 + sSum[row, 4 + w]
        total = sum0 * cute.math.exp2(max0 - row_max, fastmath=True)
        total = total + sum1 * cute.math.exp2(max1 - row_max, fastmath=True)
        consumer.factor[c] = cute.math.exp2(consumer.row_max[c] - row_max, fastmath=True)
        lse = row_max + cute.math.log2(total, fastmath=True) if total > 0.0 else -Float32.inf
        denominator = total
        if head_row < scalars.rows:
            if side == 0 and warp_id == 0 and lane < 4:
                if whole:
                    global_lse[item.request, item.head * scalars.rows + head_row] = lse * math.log(2.0)
                else:
                    lse_partial[slot, row] = lse
            if whole and scalars.has_sink != 0:
                sink = tensors.sink[(item.head * scalars.rows + head_row) // scalars.S_q] * math.log2(math.e)
                denominator = denominator + cute.math.exp2(sink - row_max, fastmath=True)
        inverse[c] = v_scale * cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)

    # trade O^T tiles in pairs
    kept = cute.make_rmem_tensor(N // 2, Float32)
    for pair in cutlass.range_constexpr((tiles + 1) // 2):
        if const_expr(pair > 0):
            cute.arch.barrier(barrier_id=BAR_MERGE, number_of_threads=CONSUMERS)
        for i in cutlass.range_constexpr(N // 2):
            c = 2 * (i // 4) + i % 2
            left, right = consumer.O[pair * N + i], Float32(0.0)
            if const_expr(2 * pair + 1 < tiles):
                right = consumer.O[pair * N + N // 2 + i]
            kept[i] = (left if side == 0 else right) * consumer.factor[c]
            exchange[tid, i, side] = (right if side == 0 else left) * consumer.factor[c]
        cute.arch.barrier(barrier_id=BAR_MERGE, number_of_threads=CONSUMERS)
        tile = 2 * pair + side
        if tile < tiles:
            for i in cutlass.range_constexpr(N // 2):
                kept[i] = (kept[i] + exchange[tid, i, 1 - side]) * inverse[2 * (i // 4) + i % 2]
            if whole:
                store_tile(consumer, tensors.out, item.request, item.head * scalars.rows, item, scalars, tile, kept)
            else:
                store_tile(consumer, tensors.partials.out, slot, -item.tile * N, item, scalars, tile, kept)
    # NOTE: the exchange is P's memory: the next segment may write P only when both warpgroups have read it
    cute.arch.barrier(barrier_id=BAR_MERGE, number_of_threads=CONSUMERS)


@cute.jit
def store_tile(consumer: Consumer, target, index, row0, item: Item, scalars: Scalars, tile, kept) -> None:
    """One O^T tile to target[index, row0 + row of the KV head, column]."""
    config, lane, warp_id = consumer.config, consumer.tid % 32, consumer.tid // 32
    group = tile * TILE_M + warp_id * 16
    two = cute.make_rmem_tensor(2, target.element_type)
    for c in cutlass.range_constexpr(config.tile_n // 4):
        head_row = item.tile * config.tile_n + consumer.row(c)
        i = 4 * (c // 2) + c % 2
        if head_row < scalars.rows:
            if const_expr(config.fp8):
                if group + lane // 4 * 2 < config.Dv:
                    two[0], two[1] = kept[i].to(target.element_type), kept[i + 2].to(target.element_type)
                    cute.autovec_copy(
                        two, cute.local_tile(target[index, row0 + head_row, None], (2,), (group // 2 + lane // 4,))
                    )
            else:
                for half in cutlass.range_constexpr(2):
                    column = group + lane // 4 + 8 * half
                    if column < config.Dv:
                        target[index, row0 + head_row, column] = kept[i + 2 * half].to(target.element_type)


@cute.jit
def write_nothing(consumer: Consumer, tensors: Tensors, scalars: Scalars, item: Item) -> None:
    """An empty request: out 0, lse -inf."""
    config, out, lse = consumer.config, tensors.out, tensors.lse
    row0 = item.head * scalars.rows + item.tile * config.tile_n
    rows = cutlass.min(config.tile_n, scalars.rows - item.tile * config.tile_n)
    for i in cutlass.range(128 * consumer.side + consumer.tid, rows * config.Dv, CONSUMERS, unroll=1):
        out[item.request, row0 + i // config.Dv, i % config.Dv] = Float32(0.0).to(out.element_type)
        if i % config.Dv == 0:
            lse[item.request, row0 + i // config.Dv] = -Float32.inf


# ---------------------------------------------------------------------------------------------------------- Kernel


class GqaDecode:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def layout(self, rows: int, columns: int, dtype):
        """[rows, columns] in shared memory: chunks one after another, each `rows` rows of 128 swizzled bytes."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)
        return cute.tile_to_shape(atom, (rows, columns), order=(0, 1))

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, S_q, D]
        k: cute.Tensor,  # [B, Hk, Nblk, 64, D]
        v: cute.Tensor,  # [B, Hk, Nblk, 64, Dv]
        table: cute.Tensor,  # [B, table_blocks] int32
        seq_lens: cute.Tensor,  # [B] int32
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        q_descale: cute.Tensor,  # [B, Hk] FP32; anything if not config.descale
        k_descale: cute.Tensor,
        v_descale: cute.Tensor,
        out: cute.Tensor,  # [B, Hq, S_q, Dv], contiguous
        lse: cute.Tensor,  # [B, Hq, S_q] FP32, contiguous
        workspace: cute.Tensor,  # [workspace_words(ctas)] FP32
        scale_log2: Float32,
        has_sink: Int32,
        q_row: Int64,  # elements between the packed query rows of a KV head
        k_requests: Int32,  # with pages of their own: B, or 1 where they share them
        v_requests: Int32,
        ctas: Int32,
        stream,
    ):
        config = self.config
        dtype = DTYPES[config.dtype]
        B, heads, S_q = q.shape[0], k.shape[1], q.shape[2]
        ratio = q.shape[1] // heads
        rows, q_row = ratio * S_q, cute.assume(q_row, divby=config.stride_unit)
        q_head = cute.assume(ratio * q.stride[1], divby=config.stride_unit)
        # [rows, D, Hk, B] and [64, D, Hk, Nblk, requests]
        gQ = cute.make_tensor(
            q.iterator, cute.make_layout((rows, config.D, heads, B), stride=(q_row, 1, q_head, q.stride[0]))
        )
        gK, gV = self.pages(k, k_requests), self.pages(v, v_requests)
        all_rows, Dv = heads * rows, config.Dv
        tensors = Tensors(
            table,
            seq_lens,
            sink,
            q_descale,
            k_descale,
            v_descale,
            cute.make_tensor(out.iterator, cute.make_layout((B, all_rows, Dv), stride=(all_rows * Dv, Dv, 1))),
            cute.make_tensor(lse.iterator, cute.make_layout((B, all_rows), stride=(all_rows, 1))),
            Partials.over(workspace, ctas, config.tile_n, Dv),
        )
        load, N, chunk = cpasync.CopyBulkTensorTileG2SOp(), config.tile_n, config.chunk
        tma_q, tQ = cpasync.make_tiled_tma_atom(load, gQ, self.layout(N, chunk, dtype), (N, chunk))
        tma_k, tK = cpasync.make_tiled_tma_atom(load, gK, self.layout(BLOCK, chunk, dtype), (BLOCK, chunk))
        tma_v, tV = cpasync.make_tiled_tma_atom(load, gV, self.layout(BLOCK, chunk, dtype), (BLOCK, chunk))
        scalars = Scalars(scale_log2, S_q, has_sink, rows, (rows + (N - 1)) // N, heads)
        self.kernel(tma_q, tQ, tma_k, tK, tma_v, tV, tensors, scalars).launch(
            grid=(ctas, 1, 1),
            block=(32 * WARPS, 1, 1),
            smem=config.smem_bytes(),
            min_blocks_per_mp=1,
            stream=stream,
        )
        combine(
            tensors.out,
            tensors.lse,
            tensors.partials.out,
            tensors.partials.lse,
            tensors.partials.split_of,
            tensors.sink,
            has_sink,
            S_q,
            heads,
            stream,
        )

    def pages(self, cache: cute.Tensor, requests) -> cute.Tensor:
        """A cache as [64, width, Hk, Nblk, requests]."""
        request, head, block, row, _ = cache.stride
        shape = (BLOCK, cache.shape[4], cache.shape[1], cache.shape[2], requests)
        return cute.make_tensor(cache.iterator, cute.make_layout(shape, stride=(row, 1, head, block, request)))

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        tQ: cute.Tensor,
        tma_k: cute.CopyAtom,
        tK: cute.Tensor,
        tma_v: cute.CopyAtom,
        tV: cute.Tensor,
        tensors: Tensors,
        scalars: Scalars,
    ):
        config = self.config
        dtype = DTYPES[config.dtype]
        chunk_elements = BLOCK * config.chunk

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[
                cute.struct.MemRange[dtype, config.q_stages * config.k_chunks * config.tile_n * config.chunk], 1024
            ]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * config.k_chunks * chunk_elements], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * config.v_chunks * chunk_elements], 1024]
            sP: cute.struct.Align[cute.struct.MemRange[product_dtype(config), 4 * config.tile_n * BLOCK], 1024]
            sSum: cute.struct.MemRange[Float32, CONSUMER_WARPS * config.tile_n]
            sMax: cute.struct.MemRange[Float32, 2 * config.tile_n]
            sScan: cute.struct.MemRange[Int32, scan_words(WARPS)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(4)]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(MAX_STAGES)]
            v_barriers: cute.struct.MemRange[Int64, Channel.words(MAX_STAGES)]

        allocated = -(-Storage.size_in_bytes() // 1024) * 1024
        assert allocated == config.smem_bytes(), (
            f"{config} allocates {allocated} bytes, its ledger says {config.smem_bytes()}"
        )
        storage = utils.SmemAllocator().allocate(Storage)
        shared = Shared.over(config, storage, self.layout)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()

        tidx, _, _ = cute.arch.thread_idx()

        # barriers, and the work of this CTA
        prefetch_table(tensors.table, cta * 32 * WARPS + tidx)
        if warp_id == 0:
            cpasync.prefetch_descriptor(tma_q)
            cpasync.prefetch_descriptor(tma_k)
            cpasync.prefetch_descriptor(tma_v)
            with cute.arch.elect_one():
                shared.q.init()
                shared.k.init()
                shared.v.init()
            cute.arch.mbarrier_init_fence()
        groups = scalars.heads * scalars.tiles
        work = find_work(tensors.table, tensors.seq_lens, groups, cta, ctas, WARPS, shared.sScan)
        cute.arch.griddepcontrol_launch_dependents()

        if warp_id >= CONSUMER_WARPS:
            if const_expr(config.wide):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMER_WARPS:
                producer = Producer.over(config, shared, self.layout, (tma_q, tma_k, tma_v), tQ, tK, tV)
                self.produce(producer, tensors, scalars, work)
            elif warp_id == CONSUMER_WARPS + 1:
                note_split(tensors.partials, work, tensors.table, tensors.seq_lens, groups, cta)
        else:
            if const_expr(config.wide):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            consumer = Consumer.over(config, shared, warp_id // 4, tidx % 128)
            self.consume(consumer, tensors, scalars, work, cta)

    @cute.jit
    def produce(self, producer: Producer, tensors: Tensors, scalars: Scalars, work: Work) -> None:
        """Walk the CTA's segments and load them."""
        place, blocks_done, segments_done = first_place(work), Int32(0), Int32(0)
        while place.left > 0:
            length, part = segment_at(place, work, tensors.table, tensors.seq_lens)
            if part.last > part.first:
                item = Item(place.request, place.group // scalars.tiles, place.group % scalars.tiles)
                first, last = 2 * part.first, cutlass.min(2 * part.last, (length + (BLOCK - 1)) // BLOCK)
                producer.load_q(item, segments_done)
                producer.load_segment(tensors.table, item, first, last, blocks_done)
                segments_done = segments_done + 1
                blocks_done = blocks_done + last - first
            place = place_after(place, part, scalars.heads * scalars.tiles)

    @cute.jit
    def consume(self, consumer: Consumer, tensors: Tensors, scalars: Scalars, work: Work, cta) -> None:
        """Walk the CTA's segments, compute and write them."""
        place, blocks_done, segments_done = first_place(work), Int32(0), Int32(0)
        while place.left > 0:
            length, part = segment_at(place, work, tensors.table, tensors.seq_lens)
            item = Item(place.request, place.group // scalars.tiles, place.group % scalars.tiles)
            if part.last > part.first:
                first, last = 2 * part.first, cutlass.min(2 * part.last, (length + (BLOCK - 1)) // BLOCK)
                scale, v_scale = scalars.scale_log2, Float32(1.0)
                if const_expr(self.config.descale):
                    scale = (
                        scale * tensors.q_descale[item.request, item.head] * tensors.k_descale[item.request, item.head]
                    )
                    v_scale = tensors.v_descale[item.request, item.head]
                consumer.start()
                consume_segment(consumer, scalars, item, scale, Range(first, last, length, blocks_done, segments_done))
                write_result(consumer, tensors, scalars, item, v_scale, part.whole, split.SLOTS * cta + part.slot)
                segments_done = segments_done + 1
                blocks_done = blocks_done + last - first
            else:
                write_nothing(consumer, tensors, scalars, item)
            place = place_after(place, part, scalars.heads * scalars.tiles)


# ---------------------------------------------------------------------------------------------------------- Launch


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `GqaDecode.__call__`, for compiling without a GPU."""
    dtype = DTYPES[config.dtype]
    B, Hq, Hk, S_q = (cute.sym_int32() for _ in range(4))
    blocks, fp32 = cute.sym_int32(), functools.partial(make_fake_tensor, Float32)

    def some():
        return cute.sym_int64()

    def wide():
        return cute.sym_int64(divisibility=config.stride_unit)

    def pages(width: int):
        shape = (B, Hk, blocks, BLOCK, width)
        return make_fake_tensor(dtype, shape, (wide(), wide(), wide(), wide(), 1), assumed_align=16)

    def descale():
        if config.descale:
            return fp32((B, Hk), (some(), some()), assumed_align=4)
        return fp32((cute.sym_int32(),), (1,), assumed_align=4)

    out_dtype = BFloat16 if config.fp8 else dtype
    return (
        make_fake_tensor(dtype, (B, Hq, S_q, config.D), (wide(), some(), some(), 1), assumed_align=16),
        pages(config.D),
        pages(config.Dv),
        make_fake_tensor(Int32, (B, cute.sym_int32()), (some(), 1), assumed_align=4),
        make_fake_tensor(Int32, (B,), (1,), assumed_align=4),
        fp32((cute.sym_int32(),), (1,), assumed_align=4),
        descale(),
        descale(),
        descale(),
        make_fake_tensor(out_dtype, (B, Hq, S_q, config.Dv), (some(), some(), some(), 1), assumed_align=16),
        fp32((B, Hq, S_q), (some(), some(), some()), assumed_align=4),
        fp32((cute.sym_int32(),), (1,), assumed_align=16),
        Float32(1.0),
        Int32(0),
        Int64(config.stride_unit),
        Int32(1),
        Int32(1),
        Int32(1),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine for sm_90a; takes seconds."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(GqaDecode(config), *arguments(config), stream, options=f"--enable-tvm-ffi {options}")
