"""A consumer warpgroup of the sparse backward's weights: P, or dS."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from flash_mla.kernels.hopper.barriers import arrive, sync
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gather import CHUNK_BYTES
from flash_mla.kernels.hopper.lanes import column_of, row_of
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, ROW_BYTES, TILE_M, WARP
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    CONSUMERS,
    PRODUCER_WARPS,
    ROW_STAGES,
    Bar,
    Config,
)
from flash_mla.kernels.hopper.sparse_backward.weights_shared import Scalars, Shared, Tensors, Tile, item_of
from flash_mla.kernels.hopper.transpose import matrix_load

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Consumer:
    """Side 0: P; side 1: dS.

    Registers of a thread: rows, the operand Q or dout [64, D or Dv] / 128 threads; S [64, 64]: scores, then P, or
    slopes, scale (f dP - g); P: rounded, in the end on side 0 f P; dS; numbers of each of its two heads.
    """

    config: Config
    shared: Shared
    side: int
    tid: Int32
    mma: cute.TiledMma
    rows: cute.Tensor
    rK: cute.Tensor
    S: cute.Tensor
    P: cute.Tensor
    dS: cute.Tensor
    lse2: cute.Tensor
    shift: cute.Tensor
    left: cute.Tensor

    @staticmethod
    def over(shared: Shared, side: int, tid) -> Consumer:
        config = shared.config
        dtype, K = DTYPES[config.dtype], OperandMajorMode.K
        registers = warpgroup.OperandSource.RMEM
        mma = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (TILE_M, BLOCK), registers)
        columns = config.D if side == 0 else config.Dv

        def operand(columns: int) -> cute.Tensor:
            return cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, columns // 16)), dtype)

        shared.rows.read_by(f"warpgroup {side}", CONSUMER_WARPS // 2)
        return Consumer(
            config=config,
            shared=shared,
            side=side,
            tid=tid,
            mma=mma,
            rows=operand(columns),
            rK=mma.make_fragment_B(mma.get_slice(0).partition_B(shared.sK(columns))),
            S=cute.make_rmem_tensor(mma.partition_shape_C((TILE_M, BLOCK)), Float32),
            P=operand(BLOCK),
            dS=operand(BLOCK),
            lse2=cute.make_rmem_tensor(2, Float32),
            shift=cute.make_rmem_tensor(2, Float32),
            left=cute.make_rmem_tensor(2, Float32),
        )

    @cute.jit
    def start(self, tensors: Tensors, tile: Tile, item) -> None:
        """Take over the tile's Q or dout, and its heads' numbers; those past the last get lse2 = inf, so that their
        weights are 0."""
        for r in cutlass.range_constexpr(2):
            head = tile.group * TILE_M + row_of(self.tid) + 8 * r
            lse2, shift, left = Float32.inf, Float32(0.0), Float32(1.0)
            if head < tensors.lse2.shape[0]:
                lse2, shift = tensors.lse2[head, tile.token], tensors.shift[head, tile.token]
                if const_expr(self.config.sink):
                    left = tensors.left[head, tile.token]
            self.lse2[r], self.shift[r], self.left[r] = lse2, shift, left
        for side in cutlass.range_constexpr(2):
            stage, round = (item + side) % ROW_STAGES, (item + side) // ROW_STAGES
            self.shared.rows.wait(stage, round)
            if const_expr(side == self.side):
                self.take_rows(stage)
            self.shared.rows.release(stage)

    @cute.jit
    def take_rows(self, stage) -> None:
        """Load the operand from the ring."""
        lane, words = self.tid % WARP, cute.recast_tensor(self.rows, Int32)
        row = self.tid // WARP * 16 + lane % 16
        first = self.shared.address + stage * (2 * BLOCK * self.config.D) + ROW_BYTES * row
        for k in cutlass.range_constexpr(cute.size(self.rows) // 8):
            piece = 2 * (k % (CHUNK // 16)) + lane // 16
            place = first + CHUNK_BYTES * (k // (CHUNK // 16)) + 16 * (piece ^ (row % 8))
            for i, word in enumerate(matrix_load(place)):
                words[4 * k + i] = word

    @cute.jit
    def product(self, stage) -> None:
        """Issue S = Q K^T or dout V^T."""
        atom = cute.make_mma_atom(self.mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k in cutlass.range_constexpr(cute.size(self.rows, mode=[2])):
            cute.gemm(atom, self.S, self.rows[None, None, k], self.rK[None, None, k, stage], self.S)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def weigh(self, scale_log2, stage) -> None:
        """S = P before its factor, 0 where a key names no row."""
        words = cute.recast_tensor(self.shared.sSeen, Int32)
        for j in cutlass.range_constexpr(BLOCK // 8):
            seen = words[stage * (PRODUCER_WARPS // 2) + j // 4] >> column_of(self.tid)
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
    def round(self, factor: cute.Tensor | None) -> None:
        """P = S, times a factor a head if there is one, rounded."""
        for i in cutlass.range_constexpr(BLOCK // 8):
            weights = cute.make_rmem_tensor(4, Float32)
            for e in cutlass.range_constexpr(4):
                weights[e] = self.S[4 * i + e] if const_expr(factor is None) else self.S[4 * i + e] * factor[e // 2]
            four = cute.make_tensor(self.P.iterator + 4 * i, cute.make_layout(4))
            four.store(weights.load().to(DTYPES[self.config.dtype]))

    @cute.jit
    def differentiate(self) -> None:
        """dS = P S, of slopes."""
        for i in cutlass.range_constexpr(BLOCK // 8):
            S, P, dS = (cute.make_tensor(x.iterator + 4 * i, cute.make_layout(4)) for x in (self.S, self.P, self.dS))
            dS.store((S.load() * P.load().to(Float32)).to(DTYPES[self.config.dtype]))

    @cute.jit
    def keep(self, tensors: Tensors, tile: Tile, step) -> None:
        """Write f P or dS of a step, as `item_of` says."""
        words = cute.recast_tensor(self.P if const_expr(self.side == 0) else self.dS, Int32)
        item = item_of(tile.token, tensors.indices.shape[1], step, 1 - self.side)
        first = (tile.group * (TILE_M // 8) + self.tid // WARP * 2) * (BLOCK // 8 * WARP) + self.tid % WARP
        blocks = cute.make_layout((2, BLOCK // 8), stride=(BLOCK // 8 * WARP, WARP))
        # NOTE: one address, to which the blocks are constants: sixteen of them would spill
        target = cute.make_tensor(tensors.weights[item, None].iterator + first, blocks)
        for r in cutlass.range_constexpr(2):
            for j in cutlass.range_constexpr(BLOCK // 8):
                target[r, j] = words[2 * j + r]

    @cute.jit
    def open(self) -> None:
        """Side 1: let side 0 begin."""
        if const_expr(self.side == 1):
            arrive(Bar.SCORES, CONSUMERS)
            arrive(Bar.READ, CONSUMERS)

    @cute.jit
    def close(self) -> None:
        """Side 0: take what side 1 arrived last."""
        if const_expr(self.side == 0):
            sync(Bar.SCORES, CONSUMERS)
            sync(Bar.READ, CONSUMERS)

    @cute.jit
    def run(self, tensors: Tensors, scalars: Scalars, tile: Tile, item) -> None:
        """Go through the keys of a tile, from item `item` of the ring on.

        The sides issue their products in turn: while one computes, the other's are in the tensor cores.
        """
        mine, other = (Bar.SCORES, Bar.SLOPES) if self.side == 0 else (Bar.SLOPES, Bar.SCORES)
        self.start(tensors, tile, item)
        for step in cutlass.range(tile.steps, unroll=1):
            n = item + 2 + step
            stage = n % ROW_STAGES
            self.shared.rows.wait(stage, n // ROW_STAGES)
            sync(mine, CONSUMERS)
            self.product(stage)
            arrive(other, CONSUMERS)
            warpgroup.wait_group(0)
            if const_expr(self.side == 0):
                self.weigh(scalars.scale_log2, stage)
                self.shared.rows.release(stage)
                self.round(None)
                sync(Bar.READ, CONSUMERS)
                for i in cutlass.range_constexpr(BLOCK // 16):
                    packed = cute.make_tensor(self.P.iterator + 8 * i, cute.make_layout(8))
                    cute.autovec_copy(packed, self.shared.exchanged(self.tid, i))
                arrive(Bar.WRITTEN, CONSUMERS)
                if const_expr(self.config.sink):
                    self.round(self.left)
            else:
                self.shared.rows.release(stage)
                self.slope(scalars.scale)
                sync(Bar.WRITTEN, CONSUMERS)
                for i in cutlass.range_constexpr(BLOCK // 16):
                    packed = cute.make_tensor(self.P.iterator + 8 * i, cute.make_layout(8))
                    cute.autovec_copy(self.shared.exchanged(self.tid, i), packed)
                arrive(Bar.READ, CONSUMERS)
                self.differentiate()
            self.keep(tensors, tile, step)
