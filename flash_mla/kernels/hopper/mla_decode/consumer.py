"""A consumer warpgroup of an MLA decode: scores of every second block, half of the output's columns."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from flash_mla.kernels.hopper.barriers import arrive, sync
from flash_mla.kernels.hopper.boxes import zero_rows
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.mla_decode.config import CONSUMER_WARPS, CONSUMERS, HALF, Bar, Config
from flash_mla.kernels.hopper.mla_decode.shared import Shared
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.softmax import LAZY, Rows


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
    def over(shared: Shared, side: int, tid, scale_log2: Float32) -> Consumer:
        dtype, one = DTYPES[shared.config.dtype], (1, 1, 1)
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, one, (TILE_M, BLOCK))
        pv = sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, one, (TILE_M, HALF))
        registers = warpgroup.OperandSource.RMEM
        pv_own = sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, one, (TILE_M, HALF), registers)
        qk_slice, pv_slice = qk.get_slice(0), pv.get_slice(0)
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), dtype)
        role = f"warpgroup {side}"
        shared.q.read_by(role, CONSUMER_WARPS // 2)
        shared.k.read_by(role, CONSUMER_WARPS // 2, stages=(side, 2 + side))
        return Consumer(
            config=shared.config,
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

    @property
    def bar(self) -> Bar:
        """The named barrier of this warpgroup alone."""
        return (Bar.LEFT, Bar.RIGHT)[self.side]

    @property
    def early(self) -> bool:
        """Whether warpgroup 1 takes P V of the even block before it scores the odd one (see `pairs.consume_right`)."""
        return self.config.cluster == 1

    @cute.jit
    def start(self, row0, length, packing: Packing, zero: cutlass.Constexpr = True) -> None:
        """Begin a segment whose first row is row `row0` of the request; zero: O."""
        if const_expr(zero):
            self.O.fill(0.0)
        self.rows.start()
        for r in cutlass.range_constexpr(2):
            self.rows.last_key[r] = packing.last_key(row0 + self.rows.first + 8 * r, length)

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
    def values(self, block: cutlass.Constexpr, first: cutlass.Constexpr = False) -> None:
        """O (+)= P V of a block, as one group; P of the own block from registers, of the other from shared memory."""
        own = const_expr(block == self.side)
        mma = self.pv_own if const_expr(own) else self.pv
        rP = self.P if const_expr(own) else self.rP_other
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, not first)
        warpgroup.fence()
        for k in cutlass.range_constexpr(4):
            cute.gemm(atom, self.O, rP[None, None, k], self.rV[block][None, None, k], self.O)
            atom.set(warpgroup.Field.ACCUMULATE, True)
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
        sync(self.bar, WARPGROUP)
        rP = cute.make_tensor(self.P.iterator, self.S.layout)
        cute.copy(self.store, self.store.retile(rP), self.store.partition_D(self.shared.sP(self.side)))
        sMax = self.shared.sMax
        if self.tid % 4 == 0:
            for r in cutlass.range_constexpr(2):
                sMax[self.rows.first + 8 * r, self.side] = self.rows.max[r]
        cute.arch.fence_view_async_shared()
        arrive(bar, CONSUMERS)

    @cute.jit
    def receive(self, bar: cutlass.Constexpr) -> None:
        """Wait for the other warpgroup's P; take over its running max."""
        sync(bar, CONSUMERS)
        for r in cutlass.range_constexpr(2):
            self.move_max(r, self.shared.sMax[self.rows.first + 8 * r, 1 - self.side])

    @cute.jit
    def clear_values(self, block: cutlass.Constexpr, valid, round) -> None:
        """Zero the V rows of a block from row `valid` on: P is 0 there, but 0 * NaN is NaN."""
        if valid < BLOCK:
            self.shared.k.wait(2 * block + self.side, round)
            # NOTE: a pair's odd block may lie wholly past the end: valid is negative then
            zero_rows(self.shared.chunks(block, 4 * self.side), BLOCK, 4, valid, self.tid)
            sync(self.bar, WARPGROUP)
