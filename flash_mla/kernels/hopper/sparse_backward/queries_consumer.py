"""A consumer warpgroup of a sparse backward: scores or their slopes, and half of dq."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from flash_mla.kernels.hopper.barriers import arrive, sync
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.lanes import column_of, row_of
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP
from flash_mla.kernels.hopper.sparse_backward.config import CONSUMER_WARPS, CONSUMERS, HALF, Bar, Config
from flash_mla.kernels.hopper.sparse_backward.queries_shared import Scalars, Shared, Tensors, Tile, item_of
from flash_mla.kernels.hopper.staging import store_rows

K_STEPS = BLOCK // 16
"""Instructions that dq += dS K of a step takes."""
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Consumer:
    """Side 0: scores, and columns 0 to 255 of dq; side 1: dP, and the other columns.

    Registers of a thread: dq [64, 256] / 128 threads and on side 1 the rope part [64, 64]; S [64, 64]: scores, then P,
    or slopes, scale (f dP - g); other: what the other side has of the same elements, rounded; dS; kept: what this side
    hands over, then on side 0 f P; numbers of each of its two heads.
    """

    config: Config
    shared: Shared
    side: int
    tid: Int32
    product_mma: cute.TiledMma
    sum_mma: cute.TiledMma
    rope_mma: cute.TiledMma
    rA: cute.Tensor
    rK: cute.Tensor
    rKt: cute.Tensor
    rRope: cute.Tensor
    dQ: cute.Tensor
    dRope: cute.Tensor
    S: cute.Tensor
    other: cute.Tensor
    dS: cute.Tensor
    kept: cute.Tensor
    lse2: cute.Tensor
    shift: cute.Tensor
    left: cute.Tensor

    @staticmethod
    def over(shared: Shared, side: int, tid) -> Consumer:
        config = shared.config
        dtype, one = DTYPES[config.dtype], (1, 1, 1)
        K, MN = OperandMajorMode.K, OperandMajorMode.MN

        def sums(columns: int) -> cute.TiledMma:
            registers = warpgroup.OperandSource.RMEM
            return sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, one, (TILE_M, columns), registers)

        def keys(mma: cute.TiledMma, first: int, columns: int) -> cute.Tensor:
            return mma.make_fragment_B(mma.get_slice(0).partition_B(shared.sKt(first, columns)))

        product_mma = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, one, (TILE_M, BLOCK))
        sum_mma, rope_mma = sums(HALF), sums(CHUNK)
        part = product_mma.get_slice(0)
        rows, columns = (shared.sQ, config.D) if side == 0 else (shared.sO, config.Dv)
        tile = product_mma.partition_shape_C((TILE_M, BLOCK))
        operand = cute.make_layout(((2, 2, 2), 1, K_STEPS))
        shared.keys.read_by(f"warpgroup {side}", CONSUMER_WARPS // 2)
        return Consumer(
            config=config,
            shared=shared,
            side=side,
            tid=tid,
            product_mma=product_mma,
            sum_mma=sum_mma,
            rope_mma=rope_mma,
            rA=product_mma.make_fragment_A(part.partition_A(rows)),
            rK=product_mma.make_fragment_B(part.partition_B(shared.sK(columns))),
            rKt=keys(sum_mma, side * (HALF // CHUNK), HALF),
            # NOTE: without a rope part any chunk: nothing reads it
            rRope=keys(rope_mma, config.Dv // CHUNK if config.rope else 0, CHUNK),
            dQ=cute.make_rmem_tensor(sum_mma.partition_shape_C((TILE_M, HALF)), Float32),
            dRope=cute.make_rmem_tensor(rope_mma.partition_shape_C((TILE_M, CHUNK)), Float32),
            S=cute.make_rmem_tensor(tile, Float32),
            other=cute.make_rmem_tensor(operand, dtype),
            dS=cute.make_rmem_tensor(operand, dtype),
            kept=cute.make_rmem_tensor(operand, dtype),
            lse2=cute.make_rmem_tensor(2, Float32),
            shift=cute.make_rmem_tensor(2, Float32),
            left=cute.make_rmem_tensor(2, Float32),
        )

    @property
    def has_rope(self) -> bool:
        """Whether this side has the rope part of dq."""
        return self.side == 1 and self.config.rope

    @cute.jit
    def start(self, tensors: Tensors, tile: Tile) -> None:
        """Read the heads' numbers; those past the last get lse2 = inf, so that their weights are 0."""
        self.dQ.fill(0.0)
        if const_expr(self.has_rope):
            self.dRope.fill(0.0)
        for r in cutlass.range_constexpr(2):
            head = tile.group * TILE_M + row_of(self.tid) + 8 * r
            lse2, shift, left = Float32.inf, Float32(0.0), Float32(1.0)
            if head < tensors.dq.shape[1]:
                lse2, shift = tensors.lse2[head, tile.token], tensors.shift[head, tile.token]
                if const_expr(self.config.sink):
                    left = tensors.left[head, tile.token]
            self.lse2[r], self.shift[r], self.left[r] = lse2, shift, left

    @cute.jit
    def product(self, step) -> None:
        """Issue S = Q K^T or dout V^T, chunk after chunk as they come."""
        atom = cute.make_mma_atom(self.product_mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        for chunk in cutlass.range_constexpr(cute.size(self.rA, mode=[2]) // 4):
            self.shared.keys.wait(chunk, step)
            warpgroup.fence()
            for k in cutlass.range_constexpr(4 * chunk, 4 * chunk + 4):
                cute.gemm(atom, self.S, self.rA[None, None, k], self.rK[None, None, k], self.S)
                atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()

    @cute.jit
    def add(self) -> None:
        """Issue dq += dS K, as one group."""
        warpgroup.fence()
        self.sum(self.sum_mma, self.dQ, self.rKt)
        if const_expr(self.has_rope):
            self.sum(self.rope_mma, self.dRope, self.rRope)
        warpgroup.commit_group()

    @cute.jit
    def sum(self, mma: cutlass.Constexpr, C: cute.Tensor, B: cute.Tensor) -> None:
        """Issue C += dS K."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        for k in cutlass.range_constexpr(K_STEPS):
            cute.gemm(atom, C, self.dS[None, None, k], B[None, None, k], C)

    @cute.jit
    def weigh(self, scale_log2) -> None:
        """S = P before its factor, 0 where a key names no row."""
        words = cute.recast_tensor(self.shared.sSeen, Int32)
        for j in cutlass.range_constexpr(BLOCK // 8):
            seen = words[j // 4] >> column_of(self.tid)
            for e in cutlass.range_constexpr(2):
                there = (seen & (1 << (8 * (j % 4) + e))) != 0
                for r in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    p = cute.math.exp2(self.S[i] * scale_log2 - self.lse2[r], fastmath=True)
                    self.S[i] = p if there else Float32(0.0)

    @cute.jit
    def slope(self, scale) -> None:
        """S = scale (f dP - g)."""
        for i in cutlass.range_constexpr(cute.size(self.S)):
            r = i // 2 % 2
            dP = self.S[i] * self.left[r] if const_expr(self.config.sink) else self.S[i]
            slope = (dP - self.shift[r]) * scale
            if const_expr(self.config.dtype == "fp16"):
                # NOTE: past FP16's greatest where the weight is small, it would be infinite
                slope = cute.arch.fmax(cute.arch.fmin(slope, Float32(FP16_MAX)), Float32(-FP16_MAX))
            self.S[i] = slope

    @cute.jit
    def swap(self, step) -> None:
        """Hand S, rounded, to the other side and take over its own."""
        mine, theirs = (Bar.LEFT_READ, Bar.RIGHT_READ) if self.side == 0 else (Bar.RIGHT_READ, Bar.LEFT_READ)
        if step > 0:
            sync(mine, CONSUMERS)
        for i in cutlass.range_constexpr(BLOCK // 16):
            values = cute.make_tensor(self.S.iterator + 8 * i, cute.make_layout(8))
            packed = cute.make_tensor(self.kept.iterator + 8 * i, cute.make_layout(8))
            packed.store(values.load().to(DTYPES[self.config.dtype]))
            cute.autovec_copy(packed, self.shared.exchanged(self.side, self.tid, i))
        sync(Bar.WRITTEN, CONSUMERS)
        for i in cutlass.range_constexpr(BLOCK // 16):
            values = cute.make_tensor(self.other.iterator + 8 * i, cute.make_layout(8))
            cute.autovec_copy(self.shared.exchanged(1 - self.side, self.tid, i), values)
        arrive(theirs, CONSUMERS)

    @cute.jit
    def differentiate(self) -> None:
        """dS = P scale (f dP - g); kept: what side 0 writes, f P."""
        dtype = DTYPES[self.config.dtype]
        for i in cutlass.range_constexpr(BLOCK // 8):
            own = cute.make_tensor(self.S.iterator + 4 * i, cute.make_layout(4)).load()
            other = cute.make_tensor(self.other.iterator + 4 * i, cute.make_layout(4)).load().to(Float32)
            cute.make_tensor(self.dS.iterator + 4 * i, cute.make_layout(4)).store((own * other).to(dtype))
            if const_expr(self.side == 0 and self.config.sink):
                weights = cute.make_rmem_tensor(4, Float32)
                for e in cutlass.range_constexpr(4):
                    weights[e] = self.S[4 * i + e] * self.left[e // 2]
                cute.make_tensor(self.kept.iterator + 4 * i, cute.make_layout(4)).store(weights.load().to(dtype))

    @cute.jit
    def keep(self, tensors: Tensors, tile: Tile, step) -> None:
        """Write f P or dS of a step, as `item_of` says."""
        words = cute.recast_tensor(self.kept if const_expr(self.side == 0) else self.dS, Int32)
        item = item_of(tile.token, tensors.indices.shape[1], step, 1 - self.side)
        block = tile.group * (TILE_M // 8) + self.tid // WARP * 2
        for r in cutlass.range_constexpr(2):
            for j in cutlass.range_constexpr(BLOCK // 8):
                place = (block + r) * (BLOCK // 8) + j
                tensors.weights[item, place * WARP + self.tid % WARP] = words[2 * j + r]

    @cute.jit
    def run(self, tensors: Tensors, scalars: Scalars, tile: Tile) -> None:
        """Go through the token's keys."""
        self.start(tensors, tile)
        self.shared.queries.wait(0, 0)
        for step in cutlass.range(tile.steps, unroll=1):
            self.product(step)
            warpgroup.wait_group(0)
            if const_expr(self.side == 0):
                self.weigh(scalars.scale_log2)
            else:
                self.slope(scalars.scale)
            self.swap(step)
            self.differentiate()
            if const_expr(self.has_rope):
                self.shared.keys.wait(self.config.chunks - 1, step)
            self.add()
            self.keep(tensors, tile, step)
            warpgroup.wait_group(0)
            for chunk in cutlass.range_constexpr(self.config.chunks):
                self.shared.keys.release(chunk)

    @cute.jit
    def write(self, tensors: Tensors, tile: Tile) -> None:
        """Write dq of the tile's heads."""
        if tile.steps > 0:
            # NOTE: results are staged where the other side may still read
            sync(Bar.LEFT_READ if self.side == 0 else Bar.RIGHT_READ, CONSUMERS)
        factor = cute.make_rmem_tensor(2, Float32)
        factor.fill(1.0)
        staged = self.shared.exchange + (self.side * (CONSUMER_WARPS // 2) + self.tid // 32) * STAGED
        target, row0 = tensors.dq[tile.token, None, None], tile.group * TILE_M
        store_rows(self.dQ, factor, staged, target, row0, self.side * HALF, self.tid)
        if const_expr(self.has_rope):
            store_rows(self.dRope, factor, staged, target, row0, self.config.Dv, self.tid)
