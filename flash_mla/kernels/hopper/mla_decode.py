"""MLA decode on Hopper: out = softmax(scale * Q K^T) V with V = K[:, :512], over a paged cache of one KV head.

Grid: one CTA an SM, persistent, in clusters of 1 or 2. The S_q * Hq query rows of a request are packed (row = head *
S_q + token) and cut into tiles of 64; a CTA computes one row tile against a range of the request's keys. A cluster of
two takes two row tiles of one request against the same keys and loads each block of K once for both (TMA multicast).
Every CTA finds its range from `seq_lens` on the device (`split.py`); `combine.py` adds the pieces of requests that
were split.

Bound. A block of 64 keys costs a CTA 2 * 64 * 64 * (576 + 512) = 8.9 MFLOP, 2176 cycles of an SM's tensor cores, and
64 * 576 * 2 = 73.7 KB of K. One row tile: 121 FLOP a byte, so bytes bound it (the chip's balance is 165 to 200). Two
tiles: 242, tensor cores. Beside them shared memory: Q K^T reads 147 KB, P V 74 KB and TMA writes 74 KB a block, 2300
cycles at 128 bytes a cycle, so the tensor cores are never far ahead of it.

Roles (384 threads; entry 168 registers):
    warpgroup 0   232 registers   S0 = Q K_even^T, softmax, O[:, 0:256]
    warpgroup 1   232 registers   S1 = Q K_odd^T, softmax, O[:, 256:512]
    warp 8         40 registers   TMA of Q and K; L2 prefetch one pair ahead
    warp 9         40 registers   asks L2 for the table; notes the split item for combine
Both consumers need both P: each keeps its own in registers and finds the other's in shared memory, in the rope chunk
of the K buffer that the scores came from, which is dead by then. So Q and two K buffers fill shared memory.

Channels, producer -> consumer (full arrivals / empty arrivals):
    K   warp 8 -> warpgroups 0, 1   4 stages = left, right half of the even, the odd block   1 + bytes / 4 warps a CTA
        Stages 0 and 2 are freed by warpgroup 0, stages 1 and 3 by warpgroup 1, each after its P V; the rope chunk of
        the even block travels with stage 1, of the odd block with stage 2: with the half whose reader reads that P.
    Q   warp 8 -> warpgroups 0, 1   1 stage                                                  1 + bytes / 8 warps
    P0  warpgroup 0 -> 1, P1  warpgroup 1 -> 0   named barriers, with the running max beside P

Steady state, a pair of blocks:
    warpgroup 0   softmax S0 | P0 -> smem | P0 V0 left  | wait P1 | P1 V1 left | S0 of the next pair
    warpgroup 1   S1         | wait P0    | P0 V0 right, softmax S1 under it | P1 -> smem | P1 V1 right
    (cluster 1: P0 V0 right goes before S1)
The running max is shared by the two and moves only when a block exceeds it by 2^8 (`LAZY`): P0 is then final when it is
written, and rescaling O is rare. Exact after normalisation.

Supports BF16 and FP16; D 576 or 512; any row count; any strides that TMA takes (multiples of 16 bytes), a shared pool
too; ragged lengths, 0 included; causal among the S_q tokens. Unused slots may hold NaN: the scores past the end are
masked and the V rows zeroed. Block ids are forced inside the cache, lengths inside the table.

Measured: docs/kernels.md, "Hopper MLA decode".
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
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.combine import combine
from flash_mla.kernels.hopper.softmax import LAZY, LOW, Rows
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

TILE_M = 64
"""Query rows of a CTA."""
BLOCK = 64
"""Keys of a block: one cache page."""
CHUNK = 64
"""Columns of a 64 x 64 chunk: 128 bytes, one row of the 128-byte swizzle."""
DV = 512
HALF = DV // 2
"""Output columns of a consumer warpgroup."""
K_CHUNKS = 9
"""Chunks of a K buffer. The ninth holds K's rope part until Q K^T is done, then P."""
P_CHUNK = 8
CHUNK_ELEMENTS = BLOCK * CHUNK
THREADS = 384
CONSUMERS = 256
WARPS = THREADS // 32

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
"""A thread; (2 * 232 + 40) * 128 = 64512 of the 65536 of an SM. At 240 and 24 the producer spills."""

STAGES = 4
"""Half blocks of a pair: stage 0, 1 = left, right half of the even block, 2, 3 = of the odd block."""
BAR_P0, BAR_P1, BAR_WG, BAR_SUM = 1, 2, 3, 5
"""Named barriers (0 is the CTA's): P of the even block, of the odd block, one per consumer warpgroup, the row sums."""

STAGED = 16 * 32
"""Elements of out that a warp stages: 32 columns of its 16 rows."""

EVICT_FIRST = 0x12F0000000000000
"""TMA cache hint of a cluster's loads: nobody else reads that K."""
START = 2
"""Steps of 128 tokens that beginning an item costs, 3.4 us each."""

DTYPES = {"bf16": BFloat16, "fp16": Float16}


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    dtype of q, k and out; D, the width of K's rows (576, or 512 without a rope part); cluster, the CTAs that share K.
    """

    dtype: Literal["bf16", "fp16"]
    D: int
    cluster: int

    @property
    def chunks(self) -> int:
        """64-column chunks of a row."""
        return self.D // CHUNK

    @property
    def rows(self) -> int:
        """Query rows of a cluster."""
        return TILE_M * self.cluster

    def stage_chunks(self, stage: int) -> int:
        """Chunks that travel through a stage: four of V, and the rope chunk with stages 1 and 2."""
        return 4 + (stage in (1, 2) and self.chunks == K_CHUNKS)

    def workspace_words(self, clusters: int) -> int:
        """32-bit words of workspace: partial results, their lse, notes of split items."""
        return Partials.words(clusters, self.rows, DV)

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, two K buffers, row max of each block, row sums, staged out, work search, barriers.

        Rounded up to the 1024 bytes on which swizzled buffers are aligned.
        """
        q = 2 * TILE_M * self.D
        k = 2 * 2 * K_CHUNKS * CHUNK_ELEMENTS
        rows = 4 * (2 * TILE_M + 2 * TILE_M)
        out, work = 2 * CONSUMERS // 32 * STAGED, 4 * scan_words(WARPS)
        used = q + k + rows + out + work + 8 * (Channel.words(STAGES) + Channel.words(1))
        return -(-used // 1024) * 1024


# ----------------------------------------------------------------------------------------------------------- Tiles


class Tensors(NamedTuple):
    """Global memory, all but q and k, which only TMA reads.

    table [B, table_blocks] and seq_lens [B] int32; sink [Hq] FP32; out [B, rows, 512]; lse [B, rows] FP32, natural log;
    out_partial [2 * clusters, cluster rows, 512] and lse_partial [2 * clusters, cluster rows] FP32, base 2;
    split_of [clusters, 4] int32: the split item that begins in a cluster (request, group, last cluster; -1: none).
    """

    table: cute.Tensor
    seq_lens: cute.Tensor
    sink: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    partials: Partials


class Scalars(NamedTuple):
    """scale * log2(e); query tokens a request; whether `sink` counts; row groups a request."""

    scale_log2: Float32
    S_q: Int32
    has_sink: Int32
    groups: Int32


@cute.jit
def prefetch_table(table: cute.Tensor, cluster_id, clusters) -> None:
    """Ask L2 for the row of the table that this cluster starts with if all requests are equally long."""
    # NOTE: a short call is a chain of DRAM latencies: lengths, block ids, K; this takes the second out
    request = cluster_id * table.shape[0] // clusters
    first = 32 * cute.arch.lane_idx()
    if first < table.shape[1]:
        address = (table[request, None].iterator + first).toint()
        cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])


# ----------------------------------------------------------------------------------------------------------- Steps


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it)."""

    sQ: cute.Tensor
    k_buffers: cute.Pointer
    sMax: cute.Tensor
    sSum: cute.Tensor
    sScan: cute.Tensor
    staged: cute.Pointer
    k: Channel
    q: Channel
    row_layout: Callable[[int], cute.ComposedLayout]

    @staticmethod
    def over(config: Config, storage, row_layout: Callable[[int], cute.ComposedLayout]) -> Shared:
        rows, buffers = row_layout(config.chunks), row_layout(2 * K_CHUNKS)
        return Shared(
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            sMax=storage.sMax.get_tensor(cute.make_layout((TILE_M, 2))),
            sSum=storage.sSum.get_tensor(cute.make_layout((TILE_M, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            staged=storage.staged.data_ptr(),
            k=Channel.over(storage.k_barriers.data_ptr(), STAGES, 4 * config.cluster, config.cluster),
            q=Channel.over(storage.q_barriers.data_ptr(), 1, CONSUMERS // 32),
            row_layout=row_layout,
        )

    def chunks(self, block: int, first: int) -> cute.Pointer:
        """Where chunk `first` of the even (0) or odd (1) block's buffer lies."""
        return self.k_buffers + (block * K_CHUNKS + first) * CHUNK_ELEMENTS

    def sK(self, block: int) -> cute.Tensor:
        """[64, 576] K of a block."""
        return cute.make_tensor(self.chunks(block, 0), self.row_layout(K_CHUNKS).outer)

    def sV(self, block: int, half: int) -> cute.Tensor:
        """[256, 64] half of V of a block, transposed."""
        layout = cute.composition(self.row_layout(K_CHUNKS).outer, cute.make_layout((HALF, BLOCK), stride=(BLOCK, 1)))
        return cute.make_tensor(self.chunks(block, 4 * half), layout)

    def sP(self, block: int) -> cute.Tensor:
        """[64, 64] P of a block, in its dead rope chunk."""
        return cute.make_tensor(self.chunks(block, P_CHUNK), self.row_layout(1).outer)


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: scores of the even (0) or odd (1) blocks, and left (0) or right (1) half of the output.

    Registers of a thread: O [64, 256] / 128 threads = 128, S [64, 64] = 32, P = 16, and for each of its two rows the
    running max (base 2), its share of the running sum, the factor of the last move of the max, the max of the block at
    hand, and the last key that the row may see.
    """

    config: Config
    shared: Shared
    side: int
    tid: Int32
    scale_log2: Float32
    qk: cute.TiledMma
    pv: cute.TiledMma
    pv_own: cute.TiledMma
    rQ: cute.Tensor
    rK: cute.Tensor
    rV: list[cute.Tensor]
    rP_other: cute.Tensor
    store: cute.TiledCopy
    O: cute.Tensor
    S: cute.Tensor
    P: cute.Tensor
    rows: Rows
    peak: cute.Tensor

    @staticmethod
    def over(config: Config, shared: Shared, side: int, tid, scale_log2: Float32) -> Consumer:
        dtype, one = DTYPES[config.dtype], (1, 1, 1)
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, one, (TILE_M, BLOCK))
        pv = sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, one, (TILE_M, HALF))
        registers = warpgroup.OperandSource.RMEM
        pv_own = sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, one, (TILE_M, HALF), registers)
        qk_slice, pv_slice = qk.get_slice(0), pv.get_slice(0)
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), dtype)
        return Consumer(
            config=config,
            shared=shared,
            side=side,
            tid=tid,
            scale_log2=scale_log2,
            qk=qk,
            pv=pv,
            pv_own=pv_own,
            rQ=qk.make_fragment_A(qk_slice.partition_A(shared.sQ)),
            rK=qk.make_fragment_B(qk_slice.partition_B(shared.sK(side))),
            rV=[pv.make_fragment_B(pv_slice.partition_B(shared.sV(block, side))) for block in range(2)],
            rP_other=pv.make_fragment_A(pv_slice.partition_A(shared.sP(1 - side))),
            store=cute.make_tiled_copy_C(store, qk).get_slice(tid),
            O=cute.make_rmem_tensor(pv.partition_shape_C((TILE_M, HALF)), Float32),
            S=cute.make_rmem_tensor(qk.partition_shape_C((TILE_M, BLOCK)), Float32),
            P=cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, 4)), dtype),
            rows=Rows.over(tid),
            peak=cute.make_rmem_tensor(2, Float32),
        )

    @cute.jit
    def start(self, row0, length, S_q) -> None:
        """Begin a segment whose first row is row `row0` of the request."""
        self.O.fill(0.0)
        self.rows.max.fill(LOW)
        self.rows.sum.fill(0.0)
        for r in cutlass.range_constexpr(2):
            self.rows.last_key[r] = length - S_q + (row0 + self.rows.first + 8 * r) % S_q

    @cute.jit
    def scores(self, chunks: cutlass.Constexpr, first: cutlass.Constexpr) -> None:
        """S (+)= Q K^T over some chunks, as one group."""
        atom = cute.make_mma_atom(self.qk.op)
        atom.set(warpgroup.Field.ACCUMULATE, not first)
        warpgroup.fence()
        for chunk in chunks:
            for k in cutlass.range_constexpr(4):
                i = 4 * chunk + k
                cute.gemm(atom, self.S, self.rQ[None, None, i], self.rK[None, None, i], self.S)
                atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def values(self, block: cutlass.Constexpr) -> None:
        """O += P V of a block, as one group; P of the own block from registers, of the other from shared memory."""
        own = const_expr(block == self.side)
        mma = self.pv_own if const_expr(own) else self.pv
        rP = self.P if const_expr(own) else self.rP_other
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(4):
            cute.gemm(atom, self.O, rP[None, None, k], self.rV[block][None, None, k], self.O)
        warpgroup.commit_group()

    @cute.jit
    def find_peak(self, r: cutlass.Constexpr) -> None:
        """The largest score of a row in this block, base 2."""
        self.peak[r] = self.rows.peak(self.S, r) * self.scale_log2

    @cute.jit
    def raise_max(self, r: cutlass.Constexpr) -> None:
        """Move the running max to the block's, if that is far above it."""
        self.move_max(r, self.peak[r] if self.peak[r] > self.rows.max[r] + LAZY else self.rows.max[r])

    @cute.jit
    def move_max(self, r: cutlass.Constexpr, new_max) -> None:
        """Set the running max; `factor` is what the sums and O are off by since."""
        self.rows.move_max(r, new_max)
        self.rows.sum[r] = self.rows.sum[r] * self.rows.factor[r]

    @cute.jit
    def exponentials(self) -> None:
        """P = 2^(S - max) in the operand's dtype; the row sums take it before it is rounded."""
        for r in cutlass.range_constexpr(2):
            total = Float32(0.0)
            for j in cutlass.range_constexpr(8):
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    self.S[i] = cute.math.exp2(self.S[i] * self.scale_log2 - self.rows.max[r], fastmath=True)
                    total = total + self.S[i]
            self.rows.sum[r] = self.rows.sum[r] + total
        cute.make_tensor(self.P.iterator, self.S.layout).store(self.S.load().to(DTYPES[self.config.dtype]))

    @cute.jit
    def publish(self, bar: cutlass.Constexpr) -> None:
        """P and the running max to shared memory, for the other warpgroup."""
        # NOTE: P overwrites the rope chunk, which the four warps' wgmma have all read by now
        cute.arch.barrier(barrier_id=BAR_WG + self.side, number_of_threads=128)
        rP = cute.make_tensor(self.P.iterator, self.S.layout)
        cute.copy(self.store, self.store.retile(rP), self.store.partition_D(self.shared.sP(self.side)))
        sMax = self.shared.sMax
        if self.tid % 4 == 0:
            for r in cutlass.range_constexpr(2):
                sMax[self.rows.first + 8 * r, self.side] = self.rows.max[r]
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=bar, number_of_threads=CONSUMERS)

    @cute.jit
    def receive(self, bar: cutlass.Constexpr) -> None:
        """Wait for the other warpgroup's P; take over its running max."""
        cute.arch.barrier(barrier_id=bar, number_of_threads=CONSUMERS)
        for r in cutlass.range_constexpr(2):
            self.move_max(r, self.shared.sMax[self.rows.first + 8 * r, 1 - self.side])

    @cute.jit
    def clear_values(self, block: cutlass.Constexpr, valid, round) -> None:
        """Zero the V rows of a block from row `valid` on: P is 0 there, but 0 * NaN is NaN."""
        if valid < BLOCK:
            self.shared.k.wait(2 * block + self.side, round)
            chunks = cute.make_tensor(
                cute.recast_ptr(self.shared.chunks(block, 4 * self.side), dtype=Int32),
                cute.make_layout((32, BLOCK, 4), stride=(1, 32, BLOCK * 32)),
            )
            # NOTE: a pair's odd block may lie wholly past the end: valid is negative then
            for row in cutlass.range(cutlass.max(valid, 0) + self.tid // 32, BLOCK, 4, unroll=1):
                for c in cutlass.range_constexpr(4):
                    chunks[self.tid % 32, row, c] = Int32(0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BAR_WG + self.side, number_of_threads=128)


# ----------------------------------------------------------------------------------------------------------- Roles


@dataclass(frozen=True)
class Producer:
    """One warp that fills the K stages and Q by TMA; in a cluster it loads its share of every stage for all CTAs.

    sQ [chunk], gQ [row tile, chunk, request] and sK [buffer chunk], gK [chunk, block, request], each of 64 x 64 boxes;
    pages [64, D, blocks, requests] is the cache itself.
    """

    config: Config
    shared: Shared
    rank: Int32
    tma_q: cute.CopyAtom
    tma_k: cute.CopyAtom
    sQ: cute.Tensor
    gQ: cute.Tensor
    sK: cute.Tensor
    gK: cute.Tensor
    pages: cute.Tensor

    @staticmethod
    def over(config: Config, shared: Shared, rank, tma_q, tQ, tma_k, tK, pages) -> Producer:
        def boxes(tma, pointer, tensor, tiler, coordinate):
            chunks = cute.make_layout(2 * K_CHUNKS, stride=CHUNK_ELEMENTS)
            smem = cute.make_tensor(pointer, cute.append(shared.row_layout(1).outer, chunks))
            gmem = cute.local_tile(tensor, tiler, coordinate)
            one_cta = cute.make_layout(1)
            return cpasync.tma_partition(tma, 0, one_cta, cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2))

        sQ, gQ = boxes(tma_q, shared.sQ.iterator, tQ, (TILE_M, CHUNK), (None, None, None))
        sK, gK = boxes(tma_k, shared.k_buffers, tK, (BLOCK, CHUNK), (0, None, None, None))
        return Producer(config, shared, rank, tma_q, tma_k, sQ, gQ, sK, gK, pages)

    @cute.jit
    def load_q(self, row_tile, request, count) -> None:
        """The CTA's query rows; rows past the request's arrive as zeros."""
        q = self.shared.q
        q.acquire(0, count)
        with cute.arch.elect_one():
            q.expect(0, self.config.chunks * 2 * CHUNK_ELEMENTS)
        for chunk in cutlass.range_constexpr(self.config.chunks):
            cute.copy(self.tma_q, self.gQ[None, row_tile, chunk, request], self.sQ[None, chunk], tma_bar_ptr=q.full)

    @cute.jit
    def load_half(self, stage: cutlass.Constexpr, block, request, count) -> None:
        """One half of a block: this CTA's share of its chunks, to every CTA of the cluster."""
        config, k, buffer = self.config, self.shared.k, stage // 2
        k.acquire(stage, count)
        with cute.arch.elect_one():
            k.expect(stage, config.stage_chunks(stage) * 2 * CHUNK_ELEMENTS)
        first = 4 * (stage % 2)
        if const_expr(config.cluster == 1):
            for i in cutlass.range_constexpr(4):
                self.load_chunk(stage, first + i, block, request)
            if const_expr(config.stage_chunks(stage) == 5):
                self.load_chunk(stage, P_CHUNK, block, request)
        else:
            for i in cutlass.range_constexpr(0, 4, config.cluster):
                self.load_chunk(stage, first + i + self.rank, block, request)
            if const_expr(config.stage_chunks(stage) == 5):  # noqa: SIM102
                if self.rank == buffer:
                    self.load_chunk(stage, P_CHUNK, block, request)

    @cute.jit
    def load_chunk(self, stage: cutlass.Constexpr, chunk, block, request) -> None:
        buffer = stage // 2
        gK, sK = self.gK[None, chunk, block, request], self.sK[None, buffer * K_CHUNKS + chunk]
        bar = self.shared.k.full + stage
        if const_expr(self.config.cluster == 1):
            # NOTE: without the hint: 4.27 against 4.18 TB/s at 16 heads, S 32768
            cute.copy(self.tma_k, gK, sK, tma_bar_ptr=bar)
        else:
            everyone, hint = cutlass.Int16((1 << self.config.cluster) - 1), Int64(EVICT_FIRST)
            cute.copy(self.tma_k, gK, sK, tma_bar_ptr=bar, mcast_mask=everyone, cache_policy=hint)

    @cute.jit
    def load_segment(self, table: cute.Tensor, row_tile, request, first, last, length, segments, count) -> None:
        """Q, and every pair of a segment, half block by half block in the order in which the consumers free them."""
        last_block = (length + BLOCK - 1) // BLOCK - 1
        pool_request = cutlass.min(request, self.pages.shape[3] - 1)
        even = self.block_id(table, request, 2 * first)
        odd = self.block_id(table, request, cutlass.min(2 * first + 1, last_block))
        self.load_q(row_tile, request, segments)
        for pair in cutlass.range(first, last, unroll=1):
            # read the next ids while this pair is loaded
            next_even = self.block_id(table, request, cutlass.min(2 * pair + 2, last_block))
            next_odd = self.block_id(table, request, cutlass.min(2 * pair + 3, last_block))
            turn = count + pair - first
            self.prefetch(next_even, next_odd, pool_request)
            self.load_half(0, even, pool_request, turn)
            self.load_half(1, even, pool_request, turn)
            self.load_half(2, odd, pool_request, turn)
            self.load_half(3, odd, pool_request, turn)
            even, odd = next_even, next_odd

    @cute.jit
    def prefetch(self, even, odd, request) -> None:
        """Ask L2 for a pair of blocks, each in one piece; in a cluster each CTA asks for one."""
        # NOTE: the TMA boxes of a block are 128-byte pieces of its rows; whole blocks keep DRAM pages open
        if const_expr(self.config.cluster > 1):  # noqa: SIM102
            if self.pages.stride[0] == self.config.D:
                self.prefetch_block(even if self.rank == 0 else odd, request)

    @cute.jit
    def prefetch_block(self, block, request) -> None:
        address = self.pages[None, None, block, request].iterator.toint()
        with cute.arch.elect_one():
            cute.arch.inline_ptx(
                "cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};",
                read_only_args=[address, Int32(2 * BLOCK * self.config.D)],
            )

    @cute.jit
    def block_id(self, table: cute.Tensor, request, logical):
        """The physical block, forced inside the cache."""
        return cutlass.max(0, cutlass.min(table[request, logical], self.pages.shape[2] - 1))


@cute.jit
def consume_left(consumer: Consumer, first, last, length, S_q, count) -> None:
    """Warpgroup 0: scores of the even blocks, left half of the output."""
    k = consumer.shared.k
    k.wait(0, count)
    consumer.scores(range(4), True)
    k.wait(1, count)
    consumer.scores(range(4, consumer.config.chunks), False)
    warpgroup.wait_group(0)
    for pair in cutlass.range(first, last - 1, unroll=1):
        step_left(consumer, pair, length, S_q, count + pair - first, True)
    consumer.shared.q.release(0)
    step_left(consumer, last - 1, length, S_q, count + last - 1 - first, False)


@cute.jit
def step_left(consumer: Consumer, pair, length, S_q, turn, follow: cutlass.Constexpr) -> None:
    """One pair, whose even block's scores are there; `follow`: then the scores of the next pair's even block."""
    k, key0 = consumer.shared.k, pair * split.PAIR
    # softmax of the even block
    if key0 + BLOCK > length - S_q + 1:
        consumer.rows.mask(consumer.S, key0)
    for r in cutlass.range_constexpr(2):
        consumer.find_peak(r)
        consumer.raise_max(r)
    consumer.exponentials()
    if const_expr(consumer.config.chunks < K_CHUNKS):
        k.acquire(1, turn)
    consumer.publish(BAR_P0)

    # P V of the even block
    consumer.rows.rescale(consumer.O)
    if const_expr(not follow):
        consumer.clear_values(0, length - key0, turn)
    consumer.values(0)
    warpgroup.wait_group(0)
    k.release(0)

    # P V of the odd block, and the next scores
    consumer.receive(BAR_P1)
    consumer.rows.rescale(consumer.O)
    if const_expr(not follow):
        consumer.clear_values(1, length - key0 - BLOCK, turn)
    consumer.values(1)
    if const_expr(follow):
        # NOTE: freed before the next scores are issued: their wait for K would hold the odd block back (5 % at S 8192)
        warpgroup.wait_group(0)
        k.release(2)
        k.wait(0, turn + 1)
        consumer.scores(range(4), True)
        k.wait(1, turn + 1)
        consumer.scores(range(4, consumer.config.chunks), False)
        warpgroup.wait_group(0)
    else:
        warpgroup.wait_group(0)
        k.release(2)


@cute.jit
def consume_right(consumer: Consumer, first, last, length, S_q, count) -> None:
    """Warpgroup 1: scores of the odd blocks, right half of the output.

    The P V of the even block hides the softmax of the odd one where the tensor cores bound (clusters). Where memory
    does, it goes first and frees the even block one load earlier.
    """
    k, early = consumer.shared.k, const_expr(consumer.config.cluster == 1)
    for pair in cutlass.range(first, last, unroll=1):
        turn, key0 = count + pair - first, pair * split.PAIR + BLOCK
        if const_expr(early):
            multiply_even(consumer, length - key0 + BLOCK, turn)
            warpgroup.wait_group(0)
            k.release(1)

        # scores of the odd block
        k.wait(2, turn)
        consumer.scores((0, 1, 2, 3, *range(8, consumer.config.chunks)), True)
        k.wait(3, turn)
        consumer.scores(range(4, 8), False)
        warpgroup.wait_group(0)
        if pair == last - 1:
            consumer.shared.q.release(0)
        if key0 + BLOCK > length - S_q + 1:
            consumer.rows.mask(consumer.S, key0)
        for r in cutlass.range_constexpr(2):
            consumer.find_peak(r)
        if const_expr(not early):
            multiply_even(consumer, length - key0 + BLOCK, turn)

        # softmax of the odd block
        for r in cutlass.range_constexpr(2):
            consumer.raise_max(r)
        consumer.exponentials()
        if const_expr(consumer.config.chunks < K_CHUNKS):
            k.acquire(2, turn)
        consumer.publish(BAR_P1)
        if const_expr(not early):
            warpgroup.wait_group(0)
            k.release(1)

        # P V of the odd block
        consumer.rows.rescale(consumer.O)
        consumer.clear_values(1, length - key0, turn)
        consumer.values(1)
        warpgroup.wait_group(0)
        k.release(3)


@cute.jit
def multiply_even(consumer: Consumer, valid, turn) -> None:
    """Warpgroup 1 takes over P and the running max of the even block and starts its P V."""
    consumer.receive(BAR_P0)
    consumer.rows.rescale(consumer.O)
    consumer.clear_values(0, valid, turn)
    consumer.values(0)


@cute.jit
def write_result(
    consumer: Consumer, tensors: Tensors, scalars: Scalars, request, row0, rank, whole, slot, real
) -> None:
    """Normalise O and write it: to out and lse if the segment is a whole item, else to the partial slot.

    Nothing leaves unless `real`.
    """
    tid, side, sSum = consumer.tid, consumer.side, consumer.shared.sSum
    global_lse, lse_partial = tensors.lse, tensors.partials.lse
    rows = tensors.out.shape[1] if real else 0
    # add the sums of the four threads of a row, and of the two warpgroups
    for r in cutlass.range_constexpr(2):
        total = consumer.rows.sum[r]
        total = total + cute.arch.shuffle_sync_bfly(total, offset=1)
        total = total + cute.arch.shuffle_sync_bfly(total, offset=2)
        if tid % 4 == 0:
            sSum[consumer.rows.first + 8 * r, side] = total
    cute.arch.barrier(barrier_id=BAR_SUM, number_of_threads=CONSUMERS)
    scales = cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        tile_row = consumer.rows.first + 8 * r
        row = row0 + tile_row
        total = sSum[tile_row, 0] + sSum[tile_row, 1]
        lse = consumer.rows.max[r] + cute.math.log2(total, fastmath=True)
        lse = lse if total > 0.0 else -Float32.inf
        writes = side == 0 and tid % 4 == 0
        if whole:
            if row < rows:
                if writes:
                    global_lse[request, row] = lse * math.log(2.0)
                if scalars.has_sink != 0:
                    sink = tensors.sink[row // scalars.S_q] * math.log2(math.e)
                    total = total + cute.math.exp2(sink - consumer.rows.max[r], fastmath=True)
        elif writes and real:
            lse_partial[slot, rank * TILE_M + tile_row] = lse
        # NOTE: a row without keys has O = 0 and, with a sink, a total above 0; without, 0 * inf would be NaN
        scales[r] = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
    if whole:
        store_out(consumer, tensors.out, request, row0, rows, scales)
    else:
        for r in cutlass.range_constexpr(2):
            tile_row = consumer.rows.first + 8 * r
            part = tensors.partials.out[slot, rank * TILE_M + tile_row, None]
            store_partial(consumer, r, part, scales[r], row0 + tile_row < rows)
    # NOTE: the sums may be overwritten by the next segment only when both warpgroups have read them
    cute.arch.barrier(barrier_id=BAR_SUM, number_of_threads=CONSUMERS)


@cute.jit
def store_partial(consumer: Consumer, r: cutlass.Constexpr, row: cute.Tensor, scale, inside) -> None:
    """One row's part of this thread, scaled, if the row is `inside`: 8 bytes of it, 32 of the row, an instruction."""
    address = (row.iterator + HALF * consumer.side + consumer.rows.column).toint()
    for j in cutlass.range_constexpr(HALF // 8):
        a, b = consumer.O[4 * j + 2 * r] * scale, consumer.O[4 * j + 2 * r + 1] * scale
        # NOTE: a predicate an instruction, not a branch around them: a rehearsal must fetch them
        cute.arch.inline_ptx(
            f"st.global.v2.f32 [{{$r0}} + {32 * j}], {{{{$r1}}, {{$r2}}}};",
            read_only_args=[address, a, b],
            predicate=inside,
        )


@cute.jit
def store_out(consumer: Consumer, out: cute.Tensor, request, row0, rows, scales: cute.Tensor) -> None:
    """O, scaled, to out, 32 columns at a time: staged by the warp, so that 64 bytes of a row leave together."""
    # NOTE: straight from registers they would be 16 bytes of 8 rows an instruction, four times the instructions
    lane, warp_row = consumer.tid % 32, consumer.tid // 32 * 16
    staged = consumer.shared.staged + (4 * consumer.side + consumer.tid // 32) * STAGED
    dtype = out.element_type
    # 16 rows of four 16-byte pieces, piece c of row i at place c ^ (i / 2) % 4: neither side then has bank conflicts
    written, read = (lane // 8) % 2 * 8 + lane % 8, lane // 4
    packed = cute.make_rmem_tensor(8, dtype)
    words = cute.recast_tensor(packed, Int32)
    piece = cute.make_rmem_tensor(8, dtype)
    for group in cutlass.range_constexpr(HALF // 32):
        for side in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(8):
                packed[i] = (consumer.O[16 * group + 8 * side + i] * scales[(i // 2) % 2]).to(dtype)
            place = (2 * side + lane // 16) ^ ((written // 2) % 4)
            address = (staged + 32 * written + 8 * place).toint()
            cute.arch.inline_ptx(
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[address, words[0], words[1], words[2], words[3]],
            )
        cute.arch.sync_warp()
        for r in cutlass.range_constexpr(2):
            i, row = read + 8 * r, row0 + warp_row + read + 8 * r
            place = (lane % 4) ^ ((i // 2) % 4)
            cute.autovec_copy(cute.make_tensor((staged + 32 * i + 8 * place).align(16), cute.make_layout(8)), piece)
            if row < rows:
                columns = HALF // 8 * consumer.side + 4 * group + lane % 4
                cute.autovec_copy(piece, cute.local_tile(out[request, row, None], (8,), (columns,)))
        cute.arch.sync_warp()


@cute.jit
def write_nothing(consumer: Consumer, tensors: Tensors, request, row0) -> None:
    """An empty request: out 0, lse -inf."""
    zeros = cute.make_rmem_tensor(8, tensors.out.element_type)
    zeros.fill(0.0)
    lse = tensors.lse
    for i in cutlass.range(TILE_M // 2, unroll=1):
        row = row0 + 2 * i + consumer.tid // 64
        if row < tensors.out.shape[1]:
            cute.autovec_copy(zeros, cute.local_tile(tensors.out[request, row, None], (8,), (consumer.tid % 64,)))
            if consumer.tid % 64 == 0:
                lse[request, row] = -Float32.inf


# ---------------------------------------------------------------------------------------------------------- Kernel


class MlaDecode:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def row_layout(self, chunks: int):
        """[64, 64 * chunks] in shared memory: chunks of 8 KiB one after another, each 64 rows of 128 swizzled bytes."""
        kind = warpgroup.SmemLayoutAtomKind.K_SW128
        atom = warpgroup.make_smem_layout_atom(kind, DTYPES[self.config.dtype])
        return cute.tile_to_shape(atom, (BLOCK, CHUNK * chunks), order=(0, 1))

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, S_q, D]
        k: cute.Tensor,  # [B, 1, Nblk, 64, D]
        table: cute.Tensor,  # [B, table_blocks] int32
        seq_lens: cute.Tensor,  # [B] int32
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        out: cute.Tensor,  # [B, Hq, S_q, 512], contiguous
        lse: cute.Tensor,  # [B, Hq, S_q] FP32, contiguous
        workspace: cute.Tensor,  # [workspace_words(clusters)] FP32
        scale_log2: Float32,
        has_sink: Int32,
        q_row: Int64,  # elements between packed query rows
        requests: Int32,  # with a cache of their own: B, or 1 where they share it
        clusters: Int32,
        stream,
    ):
        config = self.config
        B, Hq, S_q = q.shape[0], q.shape[1], q.shape[2]
        rows, D, q_row = Hq * S_q, config.D, cute.assume(q_row, divby=8)
        # [rows, D, B] and [64, D, Nblk, requests]
        gQ = cute.make_tensor(q.iterator, cute.make_layout((rows, D, B), stride=(q_row, 1, q.stride[0])))
        k_strides = (k.stride[3], 1, k.stride[2], k.stride[0])
        gK = cute.make_tensor(k.iterator, cute.make_layout((BLOCK, D, k.shape[2], requests), stride=k_strides))
        tensors = Tensors(
            table=table,
            seq_lens=seq_lens,
            sink=sink,
            out=cute.make_tensor(out.iterator, cute.make_layout((B, rows, DV), stride=(rows * DV, DV, 1))),
            lse=cute.make_tensor(lse.iterator, cute.make_layout((B, rows), stride=(rows, 1))),
            partials=Partials.over(workspace, clusters, config.rows, DV),
        )
        chunk = self.row_layout(1)
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_q, tQ = cpasync.make_tiled_tma_atom(load, gQ, chunk, (TILE_M, CHUNK))
        if const_expr(config.cluster > 1):
            load = cpasync.CopyBulkTensorTileG2SMulticastOp()
        tma_k, tK = cpasync.make_tiled_tma_atom(load, gK, chunk, (BLOCK, CHUNK))
        groups = (rows + (config.rows - 1)) // config.rows
        self.kernel(tma_q, tQ, tma_k, tK, gK, tensors, Scalars(scale_log2, S_q, has_sink, groups)).launch(
            grid=(clusters * config.cluster, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(config.cluster, 1, 1) if const_expr(config.cluster > 1) else None,
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
            Int32(1),
            stream,
        )

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        tQ: cute.Tensor,
        tma_k: cute.CopyAtom,
        tK: cute.Tensor,
        pages: cute.Tensor,
        tensors: Tensors,
        scalars: Scalars,
    ):
        config = self.config
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, TILE_M * config.D], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, 2 * K_CHUNKS * CHUNK_ELEMENTS], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[dtype, CONSUMERS // 32 * STAGED], 128]
            sMax: cute.struct.MemRange[Float32, 2 * TILE_M]
            sSum: cute.struct.MemRange[Float32, 2 * TILE_M]
            sScan: cute.struct.MemRange[Int32, scan_words(WARPS)]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(STAGES)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(1)]

        allocated = -(-Storage.size_in_bytes() // 1024) * 1024
        assert allocated == config.smem_bytes(), (
            f"{config} allocates {allocated} bytes, its ledger says {config.smem_bytes()}"
        )
        storage = utils.SmemAllocator().allocate(Storage)
        shared = Shared.over(config, storage, self.row_layout)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        bidx, _, _ = cute.arch.block_idx()
        gdim, _, _ = cute.arch.grid_dim()
        rank, cluster_id, clusters = bidx % config.cluster, bidx // config.cluster, gdim // config.cluster

        # barriers, and the work of this cluster
        if warp_id == 0:
            cpasync.prefetch_descriptor(tma_q)
            cpasync.prefetch_descriptor(tma_k)
            with cute.arch.elect_one():
                shared.k.init()
                shared.q.init()
            cute.arch.mbarrier_init_fence()
        if const_expr(config.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        if warp_id == CONSUMERS // 32 + 1:
            prefetch_table(tensors.table, cluster_id, clusters)
        table, seq_lens, sScan = tensors.table, tensors.seq_lens, shared.sScan
        work = find_work(table, seq_lens, scalars.groups, cluster_id, clusters, WARPS, sScan, START)
        if const_expr(config.cluster > 1):
            cute.arch.cluster_wait()
        cute.arch.griddepcontrol_launch_dependents()

        if warp_id >= CONSUMERS // 32:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMERS // 32:
                producer = Producer.over(config, shared, rank, tma_q, tQ, tma_k, tK, pages)
                self.produce(producer, tensors, scalars, work, rank)
            elif warp_id == CONSUMERS // 32 + 1:  # noqa: SIM102
                if rank == 0:
                    note_split(tensors.partials, work, table, seq_lens, scalars.groups, cluster_id)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            tidx, _, _ = cute.arch.thread_idx()
            if warp_id < 4:
                consumer = Consumer.over(config, shared, 0, tidx, scalars.scale_log2)
                self.consume(consumer, tensors, scalars, work, rank, cluster_id)
            else:
                consumer = Consumer.over(config, shared, 1, tidx - 128, scalars.scale_log2)
                self.consume(consumer, tensors, scalars, work, rank, cluster_id)

    @cute.jit
    def produce(self, producer: Producer, tensors: Tensors, scalars: Scalars, work: Work, rank) -> None:
        """Walk the cluster's segments and load them."""
        place, pairs_done, segments_done = first_place(work), Int32(0), Int32(0)
        while place.left > 0:
            length, part = segment_at(place, work, tensors.table, tensors.seq_lens)
            if part.last > part.first:
                row_tile = place.group * self.config.cluster + rank
                producer.load_segment(
                    tensors.table, row_tile, place.request, part.first, part.last, length, segments_done, pairs_done
                )
                segments_done = segments_done + 1
                pairs_done = pairs_done + part.last - part.first
            place = place_after(place, part, scalars.groups)
        # a CTA must outlive its peer's arrivals on its barriers; the bytes that it gets, its consumers have waited for
        # NOTE: a cluster barrier in its place would flush every write first
        for stage in cutlass.range_constexpr(STAGES):
            producer.shared.k.acquire(stage, pairs_done)

    @cute.jit
    def consume(self, consumer: Consumer, tensors: Tensors, scalars: Scalars, work: Work, rank, cluster_id) -> None:
        """Walk the cluster's segments, compute and write them."""
        place, pairs_done, segments_done = first_place(work), Int32(0), Int32(0)
        real = cute.arch.make_warp_uniform(Int32(0)) > 0
        while place.left > 0:
            length, part = segment_at(place, work, tensors.table, tensors.seq_lens)
            row0 = (place.group * self.config.cluster + rank) * TILE_M
            if part.last > part.first:
                consumer.start(row0, length, scalars.S_q)
                if real:
                    consumer.shared.q.wait(0, segments_done)
                    if const_expr(consumer.side == 0):
                        consume_left(consumer, part.first, part.last, length, scalars.S_q, pairs_done)
                    else:
                        consume_right(consumer, part.first, part.last, length, scalars.S_q, pairs_done)
                    segments_done = segments_done + 1
                    pairs_done = pairs_done + part.last - part.first
                slot = split.SLOTS * cluster_id + part.slot
                write_result(consumer, tensors, scalars, place.request, row0, rank, part.whole, slot, real)
            elif const_expr(consumer.side == 0):  # noqa: SIM102
                if part.whole:
                    write_nothing(consumer, tensors, place.request, row0)
            if real:
                place = place_after(place, part, scalars.groups)
            real = Boolean(True)


# ---------------------------------------------------------------------------------------------------------- Launch


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `MlaDecode.__call__`, for compiling without a GPU."""
    dtype = DTYPES[config.dtype]

    def wide():
        return cute.sym_int64(divisibility=8)  # a stride in elements, of 16 bytes

    def some():
        return cute.sym_int64()

    B, Hq, S_q = cute.sym_int32(), cute.sym_int32(), cute.sym_int32()
    blocks = cute.sym_int32()
    fp32 = functools.partial(make_fake_tensor, Float32)
    return (
        make_fake_tensor(dtype, (B, Hq, S_q, config.D), (wide(), some(), some(), 1), assumed_align=16),
        make_fake_tensor(dtype, (B, 1, blocks, BLOCK, config.D), (wide(), some(), wide(), wide(), 1), assumed_align=16),
        make_fake_tensor(Int32, (B, cute.sym_int32()), (some(), 1), assumed_align=4),
        make_fake_tensor(Int32, (B,), (1,), assumed_align=4),
        fp32((cute.sym_int32(),), (1,), assumed_align=4),
        make_fake_tensor(dtype, (B, Hq, S_q, DV), (some(), some(), some(), 1), assumed_align=16),
        fp32((B, Hq, S_q), (some(), some(), some()), assumed_align=4),
        fp32((cute.sym_int32(),), (1,), assumed_align=16),
        Float32(1.0),
        Int32(0),
        Int64(8),
        Int32(1),
        Int32(1),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine for sm_90a; takes seconds."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(MlaDecode(config), *arguments(config), stream, options=f"--enable-tvm-ffi {options}")
