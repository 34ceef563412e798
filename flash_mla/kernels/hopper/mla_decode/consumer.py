"""A consumer warpgroup of an MLA decode: scores of every second block, half of the output's columns."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from flash_mla.kernels.hopper import packing, split
from flash_mla.kernels.hopper.barriers import arrive, sync
from flash_mla.kernels.hopper.boxes import zero_rows
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.mla_decode.config import CONSUMER_WARPS, CONSUMERS, HALF, K_CHUNKS, Bar, Config
from flash_mla.kernels.hopper.mla_decode.shared import Shared
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

    @cute.jit
    def start(self, row0, length, S_q) -> None:
        """Begin a segment whose first row is row `row0` of the request."""
        self.O.fill(0.0)
        self.rows.start()
        for r in cutlass.range_constexpr(2):
            self.rows.last_key[r] = packing.last_key(row0 + self.rows.first + 8 * r, length, S_q)

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
    consumer.publish(Bar.P_EVEN)

    # P V of the even block
    consumer.rows.rescale(consumer.O)
    if const_expr(not follow):
        consumer.clear_values(0, length - key0, turn)
    consumer.values(0)
    warpgroup.wait_group(0)
    k.release(0)

    # P V of the odd block, and the next scores
    consumer.receive(Bar.P_ODD)
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
        consumer.publish(Bar.P_ODD)
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
    consumer.receive(Bar.P_EVEN)
    consumer.rows.rescale(consumer.O)
    consumer.clear_values(0, valid, turn)
    consumer.values(0)
