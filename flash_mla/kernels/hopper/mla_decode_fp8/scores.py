"""The scores warpgroup of an FP8 MLA decode: S = Q K^T, softmax, and P in e4m3 for the values warpgroups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float8E4M3FN, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.e4m3 import move_reference, pack, pack_twice, sum_pairs
from flash_mla.kernels.hopper.lanes import quad_sum
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M
from flash_mla.kernels.hopper.mla_decode_fp8.config import DV, P_STAGES, WARPS_A_GROUP
from flash_mla.kernels.hopper.mla_decode_fp8.role import Role
from flash_mla.kernels.hopper.softmax import LOW, Rows
from flash_mla.kernels.hopper.walk import Done, Place, block_range


@dataclass(frozen=True)
class Scores(Role):
    """The warpgroup that computes S [64, 64] of every block.

    Of each of a thread's rows (`config.thread_rows`): the reference `rows.max` (base 2), P = 2^(S - reference); its
    shares of the running sums of P, exact in `rows.sum` and rounded in `rounded`; the largest score so far in `top`.
    """

    qk: cute.TiledMma
    rQ: cute.Tensor
    rQ_rope: cute.Tensor | None
    rK: cute.Tensor
    rK_rope: cute.Tensor | None
    raw: cute.Tensor
    S: cute.Tensor
    rows: Rows
    rounded: cute.Tensor
    top: cute.Tensor

    @staticmethod
    def over(role: Role) -> Scores:
        shared, dtype, K = role.shared, Float8E4M3FN, OperandMajorMode.K
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (TILE_M, BLOCK))
        own, rope = qk.get_slice(0), shared.config.rope > 0
        shared.q.read_by("scores", WARPS_A_GROUP)
        shared.p.written_by("scores", WARPS_A_GROUP)
        shared.scale.written_by("scores", WARPS_A_GROUP)
        return Scores(
            **vars(role),
            qk=qk,
            rQ=qk.make_fragment_A(own.partition_A(shared.sQ)),
            rQ_rope=qk.make_fragment_A(own.partition_A(shared.sQ_rope)) if rope else None,
            rK=qk.make_fragment_B(own.partition_B(shared.sK)),
            rK_rope=qk.make_fragment_B(own.partition_B(shared.sK_rope)) if rope else None,
            raw=cute.make_rmem_tensor(qk.partition_shape_C((TILE_M, BLOCK)), Float32),
            S=cute.make_rmem_tensor(qk.partition_shape_C((TILE_M, BLOCK)), Float32),
            rows=Rows.over(role.tid),
            rounded=cute.make_rmem_tensor(2, Float32),
            top=cute.make_rmem_tensor(2, Float32),
        )

    @cute.jit
    def segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """The scores of all blocks of a segment, and their lse; of an empty request, zeros."""
        S_q, request, row0 = self.scalars.packing.S_q, place.request, self.row0(place)
        if part.last > part.first:
            first, last = block_range(part, length)
            scale, v_scale = self.scalars.scale_log2, Float32(1.0)
            if const_expr(self.config.descale):
                scale = scale * self.tensors.q_descale[request, 0] * self.tensors.k_descale[request, 0]
                v_scale = self.tensors.v_descale[request, 0]
            self.start(row0, length)
            self.shared.q.wait(0, done.segments)
            scales = self.units(scale)
            self.multiply(done.items)
            for block in cutlass.range(first, last, unroll=1):
                number, key0 = done.items + block - first, block * BLOCK
                warpgroup.wait_group(0)
                self.take(scales)
                if block + 1 < last:
                    self.multiply(number + 1)
                self.publish(number, key0, key0 + BLOCK > length - S_q + 1)
            self.shared.q.release(0)
            self.finish(request, row0, v_scale, part.whole, split.SLOTS * self.cluster_id + part.slot, done.segments)
            done = done.plus(last - first)
        elif part.whole:
            self.write_nothing(request, row0)
        return done

    @cute.jit
    def start(self, row0, length) -> None:
        """Begin a segment whose first row is row `row0` of the request."""
        self.rows.start()
        self.rounded.fill(0.0)
        self.top.fill(LOW)
        for r in cutlass.range_constexpr(self.config.thread_rows):
            self.rows.last_key[r] = self.scalars.packing.last_key(row0 + self.row(r), length)

    def row(self, r: int):
        """This thread's row number r in the tile."""
        return self.tid // 32 * self.config.warp_rows + self.tid % 32 // 4 + 8 * r

    @cute.jit
    def units(self, scale):
        """What each of this thread's rows of the product is multiplied by."""
        scales = cute.make_rmem_tensor(2, Float32)
        scales.fill(scale)
        if const_expr(self.config.q_terms == 2):
            for r in cutlass.range_constexpr(self.config.thread_rows):
                scales[r] = scale * self.shared.sUnit[self.row(r)]
        return scales

    def active(self):
        """Whether this warp has rows."""
        return self.tid // 32 * self.config.warp_rows < self.config.tile_n

    @cute.jit
    def multiply(self, number) -> None:
        """Q K^T of a block, as one group."""
        k, stage = self.shared.k, number % self.config.stages
        k.wait(stage, number // self.config.stages)
        atom = cute.make_mma_atom(self.qk.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for tile in cutlass.range_constexpr(self.config.q_tiles):
            for i in cutlass.range_constexpr(DV // 32):
                cute.gemm(atom, self.raw, self.rQ[None, None, i, tile], self.rK[None, None, i, stage], self.raw)
                atom.set(warpgroup.Field.ACCUMULATE, True)
            for i in cutlass.range_constexpr(self.config.rope // 32):
                rQ, rK = self.rQ_rope[None, None, i, tile], self.rK_rope[None, None, i, stage]
                cute.gemm(atom, self.raw, rQ, rK, self.raw)
        warpgroup.commit_group()

    @cute.jit
    def take(self, scales: cute.Tensor) -> None:
        """S, base 2, from the product, whose registers are then free for the next block's."""
        for i in cutlass.range_constexpr(cute.size(self.S)):
            if const_expr(self.config.thread_rows == 2):
                self.S[i] = self.raw[i] * scales[i // 2 % 2]
            elif const_expr(i // 2 % 2 == 0):
                second = self.raw[i + 2] if const_expr(self.config.q_terms == 2) else Float32(0.0)
                self.S[i] = (self.raw[i] + second) * scales[0]

    @cute.jit
    def publish(self, number, key0, masked) -> None:
        """P of a block, and what O must be multiplied by before it, to the values warpgroups."""
        p, stage = self.shared.p, number % P_STAGES
        if masked:
            self.rows.mask(self.S, key0)
        for r in cutlass.range_constexpr(self.config.thread_rows):
            move_reference(self.rows, self.top, r, self.rows.peak(self.S, r))
            self.rows.sum[r] = self.rows.sum[r] * self.rows.factor[r]
            self.rounded[r] = self.rounded[r] * self.rows.factor[r]
        p.acquire(stage, number // P_STAGES)
        self.note_factors(stage)
        # NOTE: no branch where all warps have rows, so that ptxas may mix the exponentials with what is before them
        if const_expr(self.config.tile_n == TILE_M):  # noqa: SIM114
            self.store(stage)
        elif self.active():
            self.store(stage)
        cute.arch.fence_view_async_shared()
        p.arrive_warp(stage)

    @cute.jit
    def note_factors(self, stage) -> None:
        """The factors of the last move, if a row of this warp has moved."""
        factor, sFactor, sMoved = self.rows.factor, self.shared.sFactor, self.shared.sMoved
        moved = factor[0] != 1.0
        if const_expr(self.config.thread_rows == 2):
            moved = moved | (factor[1] != 1.0)
        moved = cute.arch.vote_any_sync(moved)
        if moved and self.tid % 4 == 0:
            for r in cutlass.range_constexpr(self.config.thread_rows):
                sFactor[self.row(r), stage] = factor[r]
        if self.tid % 32 == 0:
            sMoved[self.tid // 32, stage] = Int32(moved)

    @cute.jit
    def store(self, stage) -> None:
        """P = 2^(S - reference) in e4m3 to shared memory, with the running sums."""
        config, S, rows = self.config, self.S, self.rows
        for r in cutlass.range_constexpr(config.thread_rows):
            words, rest, total = [], [], Float32(0.0)
            for j in cutlass.range_constexpr(0, 8, 2):
                e = []
                for i in (4 * j + 2 * r, 4 * j + 2 * r + 1, 4 * j + 4 + 2 * r, 4 * j + 5 + 2 * r):
                    e.append(cute.math.exp2(S[i] - rows.max[r], fastmath=True))
                total = total + ((e[0] + e[1]) + (e[2] + e[3]))
                word, more = pack(*e) if const_expr(config.p_parts == 1) else pack_twice(*e)
                words.append(word)
                rest.append(more)
            rows.sum[r] = rows.sum[r] + total
            self.store_rows(config.p_parts * stage, r, words)
            if const_expr(config.p_parts == 1):
                self.rounded[r] = self.rounded[r] + sum_pairs(*rest)
            else:
                self.rounded[r] = self.rounded[r] + total
                self.store_rows(config.p_parts * stage + 1, r, rest)

    @cute.jit
    def store_rows(self, index, r: cutlass.Constexpr, words) -> None:
        """Eight rows of one part of P, 16 bytes a thread."""
        lane = self.tid % 32
        row = self.tid // 32 * self.config.warp_rows + 8 * r + lane % 8
        # NOTE: 64-byte rows, swizzled: piece c of row i lies at place c ^ (i / 2) % 4
        place = (lane // 8) ^ (row // 2 % 4)
        address = self.shared.sP.iterator.toint() + (index * self.config.tile_n + row) * BLOCK + place * 16
        cute.arch.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[address, *words],
        )

    @cute.jit
    def finish(self, request, row0, v_scale, whole, slot, segments) -> None:
        """The lse of the segment's rows, to lse or to the partial slot, and what turns O into out."""
        rows, scale, sScale, sink = self.rows, self.shared.scale, self.shared.sScale, self.tensors.sink
        global_lse, lse_partial = self.tensors.lse, self.tensors.partials.lse
        packing = self.scalars.packing
        scale.acquire(0, segments)
        for r in cutlass.range_constexpr(self.config.thread_rows):
            tile_row = self.row(r)
            row = row0 + tile_row
            total, rounded = quad_sum(rows.sum[r]), quad_sum(self.rounded[r])
            lse = rows.max[r] + cute.math.log2(total, fastmath=True)
            lse = lse if total > 0.0 else -Float32.inf
            out_scale = v_scale * cute.arch.rcp_approx(rounded) if rounded > 0.0 else Float32(0.0)
            if self.tid % 4 == 0 and tile_row < self.config.tile_n:
                if whole:
                    if row < global_lse.shape[1]:
                        natural = lse * math.log(2.0) if total > 0.0 else self.scalars.empty_lse
                        global_lse[request, packing.lse_of(row)] = natural
                        if self.scalars.has_sink != 0:
                            sunk = sink[packing.head_of(row)] * math.log2(math.e)
                            sunk = cute.math.exp2(sunk - rows.max[r], fastmath=True)
                            out_scale = out_scale * (total * cute.arch.rcp_approx(total + sunk))
                else:
                    lse_partial[slot, self.rank * self.config.tile_n + tile_row] = lse
                sScale[tile_row] = out_scale
        scale.arrive_warp(0)

    @cute.jit
    def write_nothing(self, request, row0) -> None:
        """An empty request: out 0, lse as the call wants it."""
        out, lse, tid = self.tensors.out, self.tensors.lse, self.tid
        zeros = cute.make_rmem_tensor(8, out.element_type)
        zeros.fill(0.0)
        for i in cutlass.range(self.config.tile_n // 2, unroll=1):
            row = row0 + 2 * i + tid // 64
            if row < out.shape[1]:
                cute.autovec_copy(zeros, cute.local_tile(out[request, row, None], (8,), (tid % 64,)))
                if tid % 64 == 0:
                    lse[request, self.scalars.packing.lse_of(row)] = self.scalars.empty_lse
