"""A consumer warpgroup of a GQA decode: scores, softmax and products of every second block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from flash_mla.kernels.hopper.barriers import any_of, sync
from flash_mla.kernels.hopper.boxes import zero_rows
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gqa_decode.config import CHUNK_BYTES, CONSUMER_WARPS, Bar, Config
from flash_mla.kernels.hopper.gqa_decode.shared import Item, Scalars, Shared
from flash_mla.kernels.hopper.lanes import column_of, row_of
from flash_mla.kernels.hopper.limits import BLOCK, ROW_BYTES, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.masks import Mask, needs_mask, sees
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.softmax import LAZY, LOW
from flash_mla.kernels.hopper.transpose import transpose_load
from flash_mla.kernels.hopper.walk import Done


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

    @classmethod
    def over(cls, shared: Shared, side, tid) -> Self:
        config, one = shared.config, (1, 1, 1)
        dtype, product, N = DTYPES[config.dtype], DTYPES[config.product], config.tile_n
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
        role = "consumer warpgroups"
        shared.q.read_by(role, CONSUMER_WARPS)
        for channel in (shared.k, shared.v):  # of which they take stages in turn
            channel.read_by(role, CONSUMER_WARPS // 2)
        return cls(
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
        return row_of(self.tid)

    @property
    def bar(self):
        """The named barrier of this warpgroup alone."""
        return Bar.WARPGROUP + self.side

    def row(self, c: int):
        """This thread's row number c in the tile."""
        return 8 * (c // 2) + column_of(self.tid) + c % 2

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
    def mask(self, key0, length, row0, packing: Packing) -> None:
        """S = -inf past each row's last key; the block starts at key `key0`, the tile at row `row0` of its KV head."""
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            room = packing.last_key(row0 + self.row(c), length) - key0 - self.key
            for half in cutlass.range_constexpr(2):
                i = 4 * (c // 2) + c % 2 + 2 * half
                self.S[i] = self.S[i] if 8 * half <= room else -Float32.inf

    @cute.jit
    def mask_by(self, mask: Mask, request, row0, key0, first, length) -> None:
        """S = -inf where a mask, whose first column is key `first`, hides a key; the tile starts at row `row0`."""
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            line = mask.line(request, row0 + self.row(c), self.config.token_major)
            for half in cutlass.range_constexpr(2):
                i = 4 * (c // 2) + c % 2 + 2 * half
                key = key0 + self.key + 8 * half
                self.S[i] = self.S[i] if sees(line, key, first, length) else -Float32.inf

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
        self.P.store(self.E.load().to(DTYPES[self.config.product]))
        return largest

    @cute.jit
    def weigh(self, buffer) -> None:
        """P of a block to shared memory and to the sums: against the max so far, made anew if that is too low."""
        largest = self.exponentials()
        self.publish(buffer)
        if any_of(self.bar, WARPGROUP, largest > LAZY) != 0:
            self.raise_max()
            self.exponentials()
            self.publish(buffer)
            sync(self.bar, WARPGROUP)
        self.row_sum.store(self.row_sum.load() + self.block_sum.load())

    @cute.jit
    def weigh_once(self, buffer) -> None:
        """The same of the only block: there is no max so far."""
        self.raise_max()
        self.exponentials()
        self.publish(buffer)
        sync(self.bar, WARPGROUP)
        self.row_sum.store(self.block_sum.load())

    @cute.jit
    def publish(self, buffer) -> None:
        """P to shared memory, for the tensor cores."""
        cute.copy(self.store, self.store.retile(self.P), self.sP_store[None, None, None, buffer])
        cute.arch.fence_view_async_shared()

    @cute.jit
    def show_peaks(self) -> None:
        """The warp's largest score of each row of the block to shared memory, where its sums will be."""
        sPeak, lane, warp_id = self.shared.sSum, self.tid % 32, 4 * self.side + self.tid // 32
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            i = 4 * (c // 2) + c % 2
            peak = cute.arch.fmax(self.S[i], self.S[i + 2])
            for offset in (4, 8, 16):
                peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, offset=offset))
            if lane < 4:
                sPeak[self.row(c), warp_id] = peak

    @cute.jit
    def raise_max(self) -> None:
        """Move the running max to the block's where that is larger, and rescale the sums and O."""
        sPeak = self.shared.sSum
        self.show_peaks()
        sync(self.bar, WARPGROUP)
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
        config = self.config
        block = self.shared.sV.iterator + stage * (BLOCK * config.chunk * config.v_chunks)
        zero_rows(block, BLOCK, config.v_chunks, valid, self.tid)
        sync(self.bar, WARPGROUP)

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


@cute.jit
def consume(
    consumer: Consumer, scalars: Scalars, item: Item, scale, first, last, length, done: Done, mask: Mask | None
) -> None:
    """This warpgroup's blocks of [first, last): every second one. `done`: what the CTA did before."""
    config, shared, side = consumer.config, consumer.shared, consumer.side
    q_stage = done.segments % config.q_stages
    shared.q.wait(q_stage, done.segments // config.q_stages)
    for block in cutlass.range(first + side, last, 2, unroll=1):
        number = done.items + block - first
        stage, turn, buffer = number % config.stages, number // config.stages, 2 * side + block // 2 % 2
        # scores
        if const_expr(config.stages % 2 == 1):
            # NOTE: the other warpgroup had this stage last. Until its block has landed, the parity of our round still
            # tells of the round before it; its release says that it has
            shared.k.acquire(stage, turn)
        shared.k.wait(stage, turn)
        consumer.scores(stage, q_stage, scale)
        shared.k.release(stage)
        key0 = block * BLOCK
        if const_expr(config.masked):
            column0 = mask.first(length)
            if needs_mask(key0, column0):
                row0 = item.head * scalars.rows + item.tile * config.tile_n
                consumer.mask_by(mask, item.request, row0, key0, column0, length)
        elif key0 + BLOCK > length - scalars.packing.S_q + 1:
            consumer.mask(key0, length, item.tile * config.tile_n, scalars.packing)

        if const_expr(config.team):
            consumer.weigh_once(buffer)
        else:
            consumer.weigh(buffer)

        # output
        if const_expr(config.stages % 2 == 1):
            shared.v.acquire(stage, turn)
        shared.v.wait(stage, turn)
        if length - key0 < BLOCK:
            consumer.clear_values(stage, length - key0)
        consumer.values(stage, buffer)
        shared.v.release(stage)
    shared.q.release(q_stage)


@cute.jit
def convert_pairs(pairs):
    """e4m3 bytes (key 0, d 0), (0, 1), (1, 0), (1, 1) -> FP16 pairs of keys, for d 0 and for d 1."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, {$r0}, {$r0}, 0x3120; mov.b32 {a, b}, t; "
        "cvt.rn.f16x2.e4m3x2 {$w0}, a; cvt.rn.f16x2.e4m3x2 {$w1}, b; }",
        write_only_types=[Int32, Int32],
        read_only_args=[pairs],
    )
