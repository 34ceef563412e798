"""A consumer warpgroup of the keys' kernel: dK and dV of 64 keys, and dS of every query tile that sees them."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from flash_mla.kernels.hopper.backward.config import CONSUMERS, TILE, TILE_N, TILE_Q, WARPS, Bar, Config
from flash_mla.kernels.hopper.backward.keys_shared import KeysShared
from flash_mla.kernels.hopper.backward.shared import (
    Scalars,
    Tensors,
    key_tile_of,
    live_of,
    place_of,
    query_tiles,
    span_of,
)
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.boxes import zero_rows
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.lanes import column_of, row_of
from flash_mla.kernels.hopper.limits import CHUNK, STAGED, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.staging import store_rows

K_STEP = 16
"""Elements that one wgmma sums over."""


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: 64 keys of the tile.

    Registers of a thread: dK [64, D] / 128 threads, dV [64, Dv] / 128, S and dP [64 keys, step queries] / 128 each,
    P and dS half of that; the first query that each of its two keys is seen by. rQ, rO: the queries of a step as
    columns of S and dP, a tensor a step; rQt, rOt: as what dK and dV sum over.
    """

    config: Config
    shared: KeysShared
    wg: Int32
    tid: Int32
    scores: cute.TiledMma
    dk_mma: cute.TiledMma
    dv_mma: cute.TiledMma
    rK: cute.Tensor
    rV: cute.Tensor
    rQ: tuple
    rO: tuple
    rQt: cute.Tensor
    rOt: cute.Tensor
    dK: cute.Tensor
    dV: cute.Tensor
    S: cute.Tensor
    dP: cute.Tensor
    P: cute.Tensor
    dS: cute.Tensor
    first_query: cute.Tensor

    @staticmethod
    def over(shared: KeysShared, wg, tid) -> Consumer:
        """tid: of the thread among all consumers."""
        config = shared.config
        dtype, step = DTYPES[config.dtype], config.sizes.step
        K, MN, atoms = OperandMajorMode.K, OperandMajorMode.MN, (CONSUMERS, 1, 1)

        def sums(columns: int) -> cute.TiledMma:
            registers = warpgroup.OperandSource.RMEM
            return sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, atoms, (TILE_M, columns), registers)

        def steps(sX: cute.Tensor, columns: int) -> tuple:
            parts = (cute.local_tile(sX, (step, columns), (i, 0, None)) for i in range(TILE_Q // step))
            return tuple(scores.make_fragment_B(part.partition_B(tile)) for tile in parts)

        def turned(mma: cute.TiledMma, sX: cute.Tensor) -> cute.Tensor:
            view = cute.make_tensor(sX.iterator, cute.select(sX.layout, mode=[1, 0, 2]))
            return mma.make_fragment_B(mma.get_slice(WARPGROUP * wg).partition_B(view))

        scores = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, atoms, (TILE_M, step))
        dk_mma, dv_mma = sums(config.D), sums(config.Dv)
        # NOTE: from the warpgroup's number, not the thread's, so that descriptors stay in uniform registers
        part = scores.get_slice(WARPGROUP * wg)
        operand = cute.make_layout(((2, 2, 2), 1, step // K_STEP))
        tile = scores.partition_shape_C((TILE_N, step))
        for channel in (shared.q, shared.d_out):
            channel.read_by("consumers", WARPS)
        return Consumer(
            config=config,
            shared=shared,
            wg=wg,
            tid=tid,
            scores=scores,
            dk_mma=dk_mma,
            dv_mma=dv_mma,
            rK=scores.make_fragment_A(part.partition_A(shared.sK)),
            rV=scores.make_fragment_A(part.partition_A(shared.sV)),
            rQ=steps(shared.sQ, config.D),
            rO=steps(shared.sO, config.Dv),
            rQt=turned(dk_mma, shared.sQ),
            rOt=turned(dv_mma, shared.sO),
            dK=cute.make_rmem_tensor(dk_mma.partition_shape_C((TILE_N, config.D)), Float32),
            dV=cute.make_rmem_tensor(dv_mma.partition_shape_C((TILE_N, config.Dv)), Float32),
            S=cute.make_rmem_tensor(tile, Float32),
            dP=cute.make_rmem_tensor(tile, Float32),
            P=cute.make_rmem_tensor(operand, dtype),
            dS=cute.make_rmem_tensor(operand, dtype),
            first_query=cute.make_rmem_tensor(2, Int32),
        )

    @cute.jit
    def product(self, mma: cutlass.Constexpr, C: cute.Tensor, A: cute.Tensor, B: cute.Tensor) -> None:
        """Issue C = A B^T, as one group."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k in cutlass.range_constexpr(cute.size(A, mode=[2])):
            cute.gemm(atom, C, A[None, None, k], B[None, None, k], C)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def add(self, mma: cutlass.Constexpr, C: cute.Tensor, A: cute.Tensor, B: cute.Tensor, number: cutlass.Constexpr):
        """Issue C += A B^T for the queries of step `number`, A in registers, as one group."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        steps = self.config.sizes.step // K_STEP
        warpgroup.fence()
        for k in cutlass.range_constexpr(steps):
            cute.gemm(atom, C, A[None, None, k], B[None, None, number * steps + k], C)
        warpgroup.commit_group()

    @cute.jit
    def pair(self, kind: cutlass.Constexpr, stage, j: cutlass.Constexpr):
        """The numbers of this thread's two columns in columns 8 j to 8 j + 7 of the tile of queries."""
        place = self.shared.row_values(kind, stage) + 8 * j + column_of(self.tid)
        return cute.make_tensor(place.align(8), cute.make_layout(2)).load()

    @cute.jit
    def weigh(self, stage, row0, number: cutlass.Constexpr, scale_log2, masked: cutlass.Constexpr) -> None:
        """S = P before its factor, and P in the operand's dtype."""
        S, columns = self.S, self.config.sizes.step // 8
        for j in cutlass.range_constexpr(columns):
            lse2 = self.pair(0, stage, number * columns + j)
            for e in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    p = cute.math.exp2(S[i] * scale_log2 - lse2[e], fastmath=True)
                    if const_expr(masked):
                        room = self.first_query[r] - row0 - column_of(self.tid)
                        p = p if 8 * (number * columns + j) + e >= room else Float32(0.0)
                    S[i] = p
        self.round(self.S, self.P, stage, number)

    @cute.jit
    def round(self, S: cute.Tensor, P: cute.Tensor, stage, number: cutlass.Constexpr) -> None:
        """P = S in the operand's dtype, times the rows' factors where there is a sink."""
        dtype = DTYPES[self.config.dtype]
        for k in cutlass.range_constexpr(self.config.sizes.step // K_STEP):
            part = cute.make_rmem_tensor(8, Float32)
            for i in cutlass.range_constexpr(8):
                part[i] = S[8 * k + i]
            if const_expr(self.config.sink):
                for j in cutlass.range_constexpr(2):
                    left = self.pair(2, stage, number * (self.config.sizes.step // 8) + 2 * k + j)
                    for r in cutlass.range_constexpr(2):
                        for e in cutlass.range_constexpr(2):
                            part[4 * j + 2 * r + e] = part[4 * j + 2 * r + e] * left[e]
            target = cute.make_tensor(P.iterator + 8 * k, cute.make_layout(8))
            target.store(part.load().to(dtype))

    @cute.jit
    def differentiate(self, stage, number: cutlass.Constexpr) -> None:
        """dS = P (dP - shift), in the operand's dtype."""
        S, dP, columns = self.S, self.dP, self.config.sizes.step // 8
        for j in cutlass.range_constexpr(columns):
            shift = self.pair(1, stage, number * columns + j)
            if const_expr(self.config.sink):
                left = self.pair(2, stage, number * columns + j)
            part = cute.make_rmem_tensor(4, Float32)
            for r in cutlass.range_constexpr(2):
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    slope = dP[i]
                    if const_expr(self.config.sink):
                        slope = slope * left[e]
                    part[2 * r + e] = S[i] * (slope - shift[e])
            target = cute.make_tensor(self.dS.iterator + 4 * j, cute.make_layout(4))
            target.store(part.load().to(DTYPES[self.config.dtype]))

    @cute.jit
    def keep(self, ds: cute.Tensor, place, number: cutlass.Constexpr) -> None:
        """Write dS of a step to tile `place` of the workspace: 8 x 8 blocks, each key's 8 queries side by side."""
        words = cute.recast_tensor(self.dS, Int32)
        columns = self.config.sizes.step // 8
        block = place * (TILE // 2) + self.tid // 32 * (2 * 8 * 32) + number * columns * 32 + self.tid % 32
        for j in cutlass.range_constexpr(columns):
            for r in cutlass.range_constexpr(2):
                target = cute.make_tensor(ds.iterator + block + (r * 8 + j) * 32, cute.make_layout(1))
                target[0] = words[2 * j + r]

    @cute.jit
    def visit(
        self, tensors: Tensors, scalars: Scalars, place, query_tile, live, count, masked: cutlass.Constexpr
    ) -> None:
        """Query tile number `count` of the CTA."""
        config, shared = self.config, self.shared
        stages, row0 = config.sizes.query_stages, query_tile * TILE_Q
        stage, round = count % stages, count // stages
        shared.q.wait(stage, round)
        shared.d_out.wait(stage, round)
        if row0 + TILE_Q > live:
            # NOTE: weights are 0 there, but 0 * NaN is NaN
            for sX, columns in ((shared.sQ, config.D), (shared.sO, config.Dv)):
                memory = sX.iterator + stage * (TILE_Q * columns)
                zero_rows(memory, TILE_Q, columns // CHUNK, live - row0, self.tid)
            sync(Bar.WARPGROUP + self.wg, WARPGROUP)
        for number in cutlass.range_constexpr(TILE_Q // config.sizes.step):
            rQ, rO = self.rQ[number], self.rO[number]
            self.product(self.scores, self.S, self.rK, rQ[None, None, None, stage])
            self.product(self.scores, self.dP, self.rV, rO[None, None, None, stage])
            warpgroup.wait_group(1)
            self.weigh(stage, row0, number, scalars.scale_log2, masked)
            self.add(self.dv_mma, self.dV, self.P, self.rOt[None, None, None, stage], number)
            warpgroup.wait_group(1)
            self.differentiate(stage, number)
            self.add(self.dk_mma, self.dK, self.dS, self.rQt[None, None, None, stage], number)
            self.keep(tensors.ds, place, number)
            warpgroup.wait_group(0)
        shared.q.release(stage)
        shared.d_out.release(stage)

    @cute.jit
    def run(self, tensors: Tensors, scalars: Scalars) -> None:
        """Go through the query tiles of all heads of the group."""
        index, _, _ = cute.arch.block_idx()
        key_tile, kv_head, request = key_tile_of(scalars, index)
        span = span_of(tensors, scalars, request)
        config, key0 = self.config, key_tile * TILE_N
        self.dK.fill(0.0)
        self.dV.fill(0.0)
        for r in cutlass.range_constexpr(2):
            key = key0 + row_of(self.tid) + 8 * r
            first = Int32(0)
            if scalars.causal != 0:
                first = key - span.start
            self.first_query[r] = first if key < span.keys else Int32(1 << 30)
        self.shared.kv.wait(0, 0)
        if key0 + TILE_N > span.keys:
            for sX, columns in ((self.shared.sK, config.D), (self.shared.sV, config.Dv)):
                zero_rows(sX.iterator, TILE_N, columns // CHUNK, span.keys - key0, self.tid)
            sync(Bar.WARPGROUP + self.wg, WARPGROUP)
        ratio, count = scalars.Hq // scalars.Hk, Int32(0)
        for i in cutlass.range(ratio, unroll=1):
            head = kv_head * ratio + i
            live = live_of(tensors, scalars, request * scalars.Hq + head)
            begin, whole, end = query_tiles(scalars, span, live, key0)
            place = place_of(scalars, (request * scalars.Hk + kv_head - scalars.first) * ratio + i, key_tile, 0)
            whole = cutlass.max(begin, cutlass.min(whole, end))
            for n in cutlass.range(begin, whole, unroll=1):
                self.visit(tensors, scalars, place + n, n, live, count + n - begin, True)
            for n in cutlass.range(whole, end, unroll=1):
                self.visit(tensors, scalars, place + n, n, live, count + n - begin, False)
            count = count + cutlass.max(0, end - begin)

    @cute.jit
    def write(self, dk: cute.Tensor, dv: cute.Tensor, scalars: Scalars) -> None:
        """Write dK, scaled, and dV; keys past the request's length have 0."""
        index, _, _ = cute.arch.block_idx()
        key_tile, kv_head, request = key_tile_of(scalars, index)
        key0 = key_tile * TILE_N
        factor = cute.make_rmem_tensor(2, Float32)
        staged = self.shared.staged + self.tid // 32 * STAGED
        factor.fill(1.0)
        store_rows(self.dV, factor, staged, dv[request, kv_head, None, None], key0, 0, self.tid)
        factor.fill(scalars.scale)
        store_rows(self.dK, factor, staged, dk[request, kv_head, None, None], key0, 0, self.tid)
