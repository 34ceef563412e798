"""A values warpgroup of an FP8 MLA decode: half of O^T = V^T P^T, with V transposed on its way to registers."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float8E4M3FN, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.e4m3 import separate
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.mla_decode.config import HALF
from flash_mla.kernels.hopper.mla_decode_fp8.config import CHUNK, CHUNKS, P_STAGES, WARPS_A_GROUP, Bar
from flash_mla.kernels.hopper.mla_decode_fp8.query import load_query
from flash_mla.kernels.hopper.mla_decode_fp8.role import Role
from flash_mla.kernels.hopper.transpose import transpose_load
from flash_mla.kernels.hopper.walk import Done, Place, block_range

TILES = HALF // TILE_M
"""O^T tiles of 64 columns of out."""


@dataclass(frozen=True)
class Values(Role):
    """The warpgroup that holds 256 columns of out, O^T [256, tile_n] in four tiles; `side`: which half.

    product: what wgmma adds to: O, or in exact configs a block's part of it. wgmma keeps some 14 bits of sums of e4m3
    products, which over 32768 keys costs as much as rounding P does.
    q [B, rows, D]: read where it is not FP8.
    A thread's rows of tile t are columns `column(t)` and the next.
    """

    q: cute.Tensor
    side: Int32
    pv: cute.TiledMma
    rV: list[cute.Tensor]
    rP: cute.Tensor
    O: list[cute.Tensor]
    product: list[cute.Tensor]

    @staticmethod
    def over(role: Role, q: cute.Tensor, side) -> Values:
        shared, dtype, K, N = role.shared, Float8E4M3FN, OperandMajorMode.K, role.config.tile_n
        registers = warpgroup.OperandSource.RMEM
        pv = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (TILE_M, N), registers)
        for channel in (shared.k, shared.p, shared.scale):
            channel.read_by("values", 2 * WARPS_A_GROUP)
        if shared.config.q_terms == 2:
            shared.q.written_by("values", 2 * WARPS_A_GROUP)

        def tiles() -> list[cute.Tensor]:
            return [cute.make_rmem_tensor(pv.partition_shape_C((TILE_M, N)), Float32) for _ in range(TILES)]

        O = tiles()
        return Values(
            **vars(role),
            q=q,
            side=side,
            pv=pv,
            rV=[cute.make_rmem_tensor(cute.make_layout(((4, 2, 2), 1, 2)), dtype) for _ in range(2)],
            rP=pv.make_fragment_B(pv.get_slice(0).partition_B(shared.sP)),
            O=O,
            product=tiles() if shared.config.exact else O,
        )

    @cute.jit
    def segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """All blocks of a segment, and their result."""
        if part.last > part.first:
            first, last = block_range(part, length)
            if const_expr(self.config.q_terms == 2):
                self.shared.q.acquire(0, done.segments)
                warp_id = WARPS_A_GROUP * self.side + self.tid // 32
                load_query(self.shared, self.q, place.request, self.row0(place), warp_id)
                self.shared.q.arrive_warp(0)
            for t in cutlass.range_constexpr(TILES):
                self.O[t].fill(0.0)
            for block in cutlass.range(first, last, unroll=1):
                self.add_block(done.items + block - first, length - block * BLOCK)
            self.write_result(place, part.whole, split.SLOTS * self.cluster_id + part.slot, done.segments)
            done = done.plus(last - first)
        return done

    @cute.jit
    def add_block(self, number, valid) -> None:
        """O^T += V^T P^T of a block, of whose keys `valid` exist."""
        config, k, p = self.config, self.shared.k, self.shared.p
        stage, p_stage = number % config.stages, number % P_STAGES
        k.wait(stage, number // config.stages)
        if valid < BLOCK:
            self.clear(stage, valid)
        self.load(stage, 0)
        self.load(stage, 1)
        p.wait(p_stage, number // P_STAGES)
        self.rescale(p_stage)
        atom = cute.make_mma_atom(self.pv.op)
        for t in cutlass.range_constexpr(TILES):
            if const_expr(t > 1):
                warpgroup.wait_group(1)
                self.load(stage, t)
            atom.set(warpgroup.Field.ACCUMULATE, not config.exact)
            warpgroup.fence()
            for i in cutlass.range_constexpr(2):
                for part in cutlass.range_constexpr(config.p_parts):
                    rV, rP = self.rV[t % 2][None, None, i], self.rP[None, None, i, config.p_parts * p_stage + part]
                    cute.gemm(atom, self.product[t], rV, rP, self.product[t])
                    atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        k.release(stage)
        warpgroup.wait_group(0)
        p.release(p_stage)
        if const_expr(config.exact):
            for t in cutlass.range_constexpr(TILES):
                self.O[t].store(self.O[t].load() + self.product[t].load())

    @cute.jit
    def rescale(self, p_stage) -> None:
        """Multiply O by the factors that came with P, if there are any."""
        moved = cute.make_rmem_tensor(WARPS_A_GROUP, Int32)
        cute.autovec_copy(self.shared.sMoved[None, p_stage], moved)
        for w in cutlass.range_constexpr(self.config.tile_n // self.config.warp_rows):
            if moved[w] != 0:
                self.rescale_rows(w, p_stage)

    @cute.jit
    def rescale_rows(self, w: cutlass.Constexpr, p_stage) -> None:
        """Multiply the rows of warp w of the scores."""
        two = cute.make_rmem_tensor(2, Float32)
        groups = self.config.warp_rows // 8
        for j in cutlass.range_constexpr(groups * w, groups * (w + 1)):
            pair = cute.local_tile(self.shared.sFactor[None, p_stage], (2,), (4 * j + self.tid % 4,))
            cute.autovec_copy(pair, two)
            for t in cutlass.range_constexpr(TILES):
                for i in cutlass.range_constexpr(4):
                    self.O[t][4 * j + i] = self.O[t][4 * j + i] * two[i % 2]

    @cute.jit
    def clear(self, stage, valid) -> None:
        """Zero this warpgroup's half of V's rows from `valid` on: P is 0 there, but 0 * NaN is NaN."""
        words = cute.make_tensor(
            cute.recast_ptr(self.shared.sK.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Int32),
            cute.make_layout((32, BLOCK, CHUNKS * self.config.stages), stride=(1, 32, 32 * BLOCK)),
        )
        for row in cutlass.range(valid + self.tid // 32, BLOCK, WARPS_A_GROUP, unroll=1):
            for c in cutlass.range_constexpr(2):
                words[self.tid % 32, row, CHUNKS * stage + 2 * self.side + c] = Int32(0)
        # NOTE: TMA writes the stage next, behind stores of another proxy
        cute.arch.fence_view_async_shared()
        sync(Bar.LEFT + self.side, WARPGROUP)

    @cute.jit
    def load(self, stage, t: cutlass.Constexpr) -> None:
        """Tile t of V^T as the A operand."""
        lane, warp_id = self.tid % 32, self.tid // 32
        words = cute.recast_tensor(self.rV[t % 2], Int32)
        # 16 columns of 32 keys at a time, where the swizzle has put them
        chunk = CHUNKS * stage + 2 * self.side + warp_id // 2
        place = (4 * (warp_id % 2) + t) ^ (lane % 8)
        base = self.shared.sK.iterator.toint() + chunk * (BLOCK * CHUNK) + lane * CHUNK + place * 16
        for i in cutlass.range_constexpr(2):
            matrices = transpose_load(base + 32 * CHUNK * i)
            for half in cutlass.range_constexpr(2):
                even, odd = separate(matrices[2 * half], matrices[2 * half + 1])
                words[4 * i + 2 * half] = even
                words[4 * i + 2 * half + 1] = odd

    def column(self, t: int):
        """The first of this thread's two columns of out in tile t."""
        return HALF * self.side + self.tid // 32 * 64 + 16 * t + self.tid % 32 // 4 * 2

    @cute.jit
    def write_result(self, place: Place, whole, slot, segments) -> None:
        """O, scaled: to out if the segment is a whole item, else to its slot."""
        shared, tensors, N = self.shared, self.tensors, self.config.tile_n
        row0 = self.row0(place)
        rows = tensors.out.shape[1] - row0
        scales = cute.make_rmem_tensor(N // 4, Float32)
        shared.scale.wait(0, segments)
        for j in cutlass.range_constexpr(N // 8):
            for e in cutlass.range_constexpr(2):
                scales[2 * j + e] = shared.sScale[8 * j + 2 * (self.tid % 4) + e]
        shared.scale.release(0)
        if const_expr(self.config.team):
            # NOTE: a team's results lie where K lies: both warpgroups must have read it
            sync(Bar.MERGE, 2 * WARPGROUP)
        if whole:
            self.store(tensors.out, place.request, row0, rows, scales)
        else:
            self.store(tensors.partials.out, slot, self.rank * N, rows, scales)

    @cute.jit
    def store(self, target: cute.Tensor, index, row0, rows, scales: cute.Tensor) -> None:
        """O to target[index, row0 + row, column]; a warp writes 16 columns of four rows at a time."""
        for j in cutlass.range_constexpr(self.config.tile_n // 8):
            for e in cutlass.range_constexpr(2):
                row = 8 * j + 2 * (self.tid % 4) + e
                if row < rows:
                    self.store_row(target[index, row0 + row, None], j, e, scales[2 * j + e])

    @cute.jit
    def store_row(self, row: cute.Tensor, j: cutlass.Constexpr, e: cutlass.Constexpr, scale) -> None:
        """One row's part of this thread, scaled: two columns of each tile."""
        two = cute.make_rmem_tensor(2, row.element_type)
        for t in cutlass.range_constexpr(TILES):
            for r in cutlass.range_constexpr(2):
                two[r] = (self.O[t][4 * j + 2 * r + e] * scale).to(row.element_type)
            cute.autovec_copy(two, cute.local_tile(row, (2,), (self.column(t) // 2,)))
