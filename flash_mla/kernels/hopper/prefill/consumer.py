"""A consumer warpgroup of a prefill: scores, softmax, products, and the result of 64 rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from flash_mla.kernels.hopper.barriers import arrive, sync
from flash_mla.kernels.hopper.boxes import zero_rows
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.e4m3 import move_reference, word
from flash_mla.kernels.hopper.lanes import quad_sum
from flash_mla.kernels.hopper.limits import CHUNK, STAGED, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.prefill.config import Bar, Config
from flash_mla.kernels.hopper.prefill.shared import Scalars, Shared, Task, Tensors
from flash_mla.kernels.hopper.softmax import LAZY, LOW, Rows
from flash_mla.kernels.hopper.staging import store_rows


@dataclass(frozen=True)
class Consumer:
    """A consumer warpgroup: 64 rows of the tile.

    Registers of a thread: O [64, Dv] / 128 threads, S [64, TILE_N] / 128, P half of that, Q [64, D] / 256 where it is
    held, the scale of the tile's scores (base 2), and for each of its two rows the running max (base 2), its share of
    the running sum, the factor of the last move of the max, and the last key that the row may see.
    """

    config: Config
    shared: Shared
    wg: Int32
    tid: Int32
    qk: cute.TiledMma
    pv: cute.TiledMma
    rQ: cute.Tensor
    load: cute.TiledCopy | None
    rK: cute.Tensor
    rV: cute.Tensor
    store: cute.TiledCopy
    O: cute.Tensor
    S: cute.Tensor
    P: cute.Tensor
    scale: cute.Tensor
    rows: Rows
    top: cute.Tensor

    @staticmethod
    def over(shared: Shared, wg, tid) -> Consumer:
        """tid: of the thread among all consumers."""
        config = shared.config
        dtype, step, atoms = DTYPES[config.dtype], config.step, (config.consumers, 1, 1)
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        registers = warpgroup.OperandSource.RMEM
        q_source = registers if config.q_held else warpgroup.OperandSource.SMEM
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, atoms, (TILE_M, config.tile_n), q_source)
        major = K if config.fp8 else MN
        pv = sm90.make_trivial_tiled_mma(dtype, dtype, K, major, Float32, atoms, (TILE_M, config.Dv), registers)
        # NOTE: from the warpgroup's number, not the thread's, so that descriptors stay in uniform registers
        qk_slice, pv_slice = qk.get_slice(WARPGROUP * wg), pv.get_slice(WARPGROUP * wg)
        sV = shared.sV
        sVt = shared.sVt if config.fp8 else cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0, 2]))
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), DTYPES[config.out])
        load, rQ = None, None
        if config.q_held:
            load = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), dtype)
            load = cute.make_tiled_copy_A(load, qk).get_slice(tid)
            rQ = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, config.D // step)), dtype)
        else:
            rQ = qk.make_fragment_A(qk_slice.partition_A(shared.sQ))
        return Consumer(
            config=config,
            shared=shared,
            wg=wg,
            tid=tid,
            qk=qk,
            pv=pv,
            rQ=rQ,
            load=load,
            rK=qk.make_fragment_B(qk_slice.partition_B(shared.sK)),
            rV=pv.make_fragment_B(pv_slice.partition_B(sVt)),
            store=cute.make_tiled_copy_C(store, pv).get_slice(tid),
            O=cute.make_rmem_tensor(pv.partition_shape_C((config.tile_m, config.Dv)), Float32),
            S=cute.make_rmem_tensor(qk.partition_shape_C((config.tile_m, config.tile_n)), Float32),
            P=cute.make_rmem_tensor(cute.make_layout(((step // 8, 2, 2), 1, config.tile_n // step)), dtype),
            scale=cute.make_rmem_tensor(1, Float32),
            rows=Rows.over(tid),
            top=cute.make_rmem_tensor(2, Float32),
        )

    @cute.jit
    def hold_q(self, q_stage) -> None:
        """Load this warpgroup's rows of Q, which have come, where it holds them; no product is on its way."""
        if const_expr(self.config.q_held):
            rows = self.load.partition_S(self.shared.sQ[None, None, q_stage])
            cute.copy(self.load, rows, self.load.retile(self.rQ))

    @cute.jit
    def begin(self, tensors: Tensors, scalars: Scalars, tile: Task) -> None:
        """Begin a tile."""
        scale = scalars.scale_log2
        if scalars.has_descale != 0:
            scale = scale * tensors.score_scale[tile.request, tile.kv_head]
        self.scale[0] = scale
        self.rows.start()
        self.top.fill(LOW)
        for r in cutlass.range_constexpr(2):
            last_key = tile.length - 1
            if scalars.causal != 0:
                last_key = cutlass.min(tile.length - 1, tile.start + tile.row0 + self.rows.first + 8 * r)
            self.rows.last_key[r] = last_key

    @cute.jit
    def take_turn(self) -> None:
        if const_expr(self.config.turns):
            sync(Bar.TURN + self.wg, 2 * WARPGROUP)

    @cute.jit
    def pass_turn(self) -> None:
        if const_expr(self.config.turns):
            following = self.wg + 1 if self.wg + 1 < self.config.consumers else 0
            arrive(Bar.TURN + following, 2 * WARPGROUP)

    @cute.jit
    def scores(self, q_stage, stage) -> None:
        """Issue S = Q K^T of a block, as one group."""
        atom = cute.make_mma_atom(self.qk.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k in cutlass.range_constexpr(self.config.D // self.config.step):
            rows = self.rQ[None, None, k] if const_expr(self.config.q_held) else self.rQ[None, None, k, q_stage]
            cute.gemm(atom, self.S, rows, self.rK[None, None, k, stage], self.S)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def values(self, stage, passes: cutlass.Constexpr = False) -> None:
        """Issue O += P V of a block, as one group. passes: the turn is passed on."""
        atom = cute.make_mma_atom(self.pv.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        steps = self.config.tile_n // self.config.step
        for k in cutlass.range_constexpr(steps):
            if const_expr(passes and k == steps - self.config.early):
                self.pass_turn()
            cute.gemm(atom, self.O, self.P[None, None, k], self.rV[None, None, k, stage], self.O)
        if const_expr(passes and self.config.early == 0):
            self.pass_turn()
        warpgroup.commit_group()

    @cute.jit
    def softmax(self) -> None:
        """S = 2^(S - max), the max moved first if it must be; the row sums take S before it is rounded to P."""
        S = self.S
        for r in cutlass.range_constexpr(2):
            peak = self.rows.peak(S, r) * self.scale[0]
            if const_expr(self.config.fp8):
                move_reference(self.rows, self.top, r, peak, exact=False)
            else:
                self.rows.move_max(r, peak if peak > self.rows.max[r] + LAZY else self.rows.max[r])
        for r in cutlass.range_constexpr(2):
            total = self.rows.sum[r] * self.rows.factor[r]
            for j in cutlass.range_constexpr(self.config.tile_n // 8):
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    S[i] = cute.math.exp2(S[i] * self.scale[0] - self.rows.max[r], fastmath=True)
                    total = total + S[i]
            self.rows.sum[r] = total

    @cute.jit
    def round(self) -> None:
        """P = S in the operand's dtype."""
        if const_expr(self.config.fp8):
            words = cute.recast_tensor(self.P, Int32)
            for i in cutlass.range_constexpr(self.config.tile_n // 8):
                first = 8 * (i // 2) + 2 * (i % 2)
                words[i] = word(*(self.S[first + at] for at in (0, 1, 4, 5)))
            return
        for k in cutlass.range_constexpr(self.config.tile_n // 16):
            S = cute.make_tensor(self.S.iterator + 8 * k, cute.make_layout(8))
            P = cute.make_tensor(self.P.iterator + 8 * k, cute.make_layout(8))
            P.store(S.load().to(DTYPES[self.config.dtype]))

    @cute.jit
    def clear_values(self, valid, count) -> None:
        """Zero the V rows of block number `count` from row `valid` on: P is 0 there, but 0 * NaN is NaN."""
        tile_n, shared = self.config.tile_n, self.shared
        if const_expr(self.config.fp8):
            return
        if valid < tile_n:
            stage = count % self.config.stages
            shared.v.wait(stage, count // self.config.stages)
            block = shared.sV.iterator + stage * (tile_n * self.config.Dv)
            zero_rows(block, tile_n, self.config.Dv // CHUNK, valid, self.tid)
            sync(Bar.WARPGROUP + self.wg, WARPGROUP)

    @cute.jit
    def write(
        self, out: cute.Tensor, tensors: Tensors, scalars: Scalars, tile: Task, q_stage, row_max, row_sum
    ) -> None:
        """Normalise O and write it, or put it in place of Q for the storing warp; write lse."""
        scale = self.close(tensors, scalars, tile, row_max, row_sum)
        if const_expr(self.config.staged):
            target = out[tile.request, tile.head - tile.request * scalars.Hq, None, None]
            store_rows(self.O, scale, self.shared.staged + self.tid // 32 * STAGED, target, tile.row0, 0, self.tid)
        else:
            # NOTE: the rows of Q that these overwrite, all four warps' wgmma have read by now
            self.put(scale, self.shared.sO[None, None, q_stage], Bar.WARPGROUP + self.wg)
            self.shared.out.arrive_warp(q_stage)

    @cute.jit
    def close(self, tensors: Tensors, scalars: Scalars, tile: Task, row_max, row_sum) -> cute.Tensor:
        """Write lse; returns the factors of O, [2]."""
        P, global_lse, sink = tensors.lse.shape[1], tensors.lse, tensors.sink
        scale = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            total = quad_sum(row_sum[r])
            row = tile.row0 + self.rows.first + 8 * r
            if self.tid % 4 == 0 and row < P:
                lse = (row_max[r] + cute.math.log2(total, fastmath=True)) * math.log(2.0)
                global_lse[tile.head, row] = lse if total > 0.0 else -Float32.inf
            denominator = total
            if scalars.has_sink != 0:
                sink_log2 = sink[tile.head - tile.request * scalars.Hq] * math.log2(math.e)
                denominator = denominator + cute.math.exp2(sink_log2 - row_max[r], fastmath=True)
            factor = cute.arch.rcp_approx(denominator) if total > 0.0 else Float32(0.0)
            if scalars.has_descale != 0:
                factor = factor * tensors.value_scale[tile.request, tile.kv_head]
            scale[r] = factor
        return scale

    @cute.jit
    def put(self, scale: cute.Tensor, sO: cute.Tensor, bar) -> None:
        """O, scaled, to sO [64, Dv] in shared memory, for TMA. bar: of the warpgroup, whose warps have read what is
        overwritten once all have arrived."""
        O = self.O
        rounded = cute.make_rmem_tensor(O.layout, DTYPES[self.config.out])
        for i in cutlass.range_constexpr(self.config.Dv // 2):
            O[i] = O[i] * scale[(i // 2) % 2]
        rounded.store(O.load().to(DTYPES[self.config.out]))
        sync(bar, WARPGROUP)
        cute.copy(self.store, self.store.retile(rounded), self.store.partition_D(sO))
        cute.arch.fence_view_async_shared()
