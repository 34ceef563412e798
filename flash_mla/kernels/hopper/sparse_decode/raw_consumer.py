"""The consumers of sparse decode over raw rows (`raw.py`): codes to registers, products, scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.absent import hide_rows
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.e4m3 import powers
from flash_mla.kernels.hopper.gqa_decode import consumer as gqa
from flash_mla.kernels.hopper.gqa_decode import result
from flash_mla.kernels.hopper.gqa_decode.config import CONSUMERS, Bar
from flash_mla.kernels.hopper.gqa_decode.shared import Item
from flash_mla.kernels.hopper.lanes import warp_max
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, ROW_BYTES, TILE_M, WARP
from flash_mla.kernels.hopper.sparse_decode.config import CONSUMER_WARPS, DV, RAW_GROUP
from flash_mla.kernels.hopper.sparse_decode.raw import Shared
from flash_mla.kernels.hopper.sparse_decode.ring import read_vector
from flash_mla.kernels.hopper.sparse_decode.rows import fp32_of, store_vector
from flash_mla.kernels.hopper.transpose import matrix_load, transpose_load
from flash_mla.kernels.hopper.walk import Done, Place

GROUPS = DV // RAW_GROUP
"""Scales of a row."""
STEPS = RAW_GROUP // 16
"""Instructions of K q^T over the columns of a scale."""
GROUP_TILES = RAW_GROUP // TILE_M
"""Tiles of O^T over the columns of a scale."""
LEAST = 2.0**-126
"""The least unit: FP32's least normal number."""


@dataclass(frozen=True)
class RawRows(gqa.Consumer):
    """A consumer warpgroup over raw rows."""

    def block(self, stage):
        """Its first byte."""
        return self.shared.raw + stage * (BLOCK * self.config.layout.row_bytes)

    @cute.jit
    def convert_queries(self, chunks: cutlass.Constexpr) -> None:
        """The heads of Q that are this warp's: these many chunks of them in FP16, times a power of two, those that meet
        codes in the order of the columns of K.

        A lane has 16 columns of a row, which K has in one step, and writes them where they were.
        """
        shared, lane, heads = self.shared, self.tid % WARP, self.config.tile_heads
        for i in cutlass.range(heads // CONSUMER_WARPS, unroll=1):
            head = CONSUMER_WARPS * i + 4 * self.side + self.tid // WARP
            # NOTE: 16 bytes c of row i lie at place c ^ i % 8 of its 128 bytes
            row = shared.sQ.iterator.toint() + head * ROW_BYTES
            near, far = (((2 * (lane % 4) + place) ^ (head % 8)) * 16 for place in range(2))
            peak, rows = Float32(0.0), []
            for first in cutlass.range_constexpr(0, chunks, 8):
                # NOTE: lanes past the last chunk read it again
                at = row + cutlass.min(first + lane // 4, chunks - 1) * (heads * ROW_BYTES)
                pairs = [two_bf16(word) for word in (*read_vector(at + near, 0), *read_vector(at + far, 0))]
                rows.append((first, at, pairs))
                for pair in pairs:
                    for number in pair:
                        peak = cute.arch.fmax(peak, cute.arch.fmax(number, -number))
            factor, unit = powers(warp_max(peak))
            for first, at, pairs in rows:
                words = [two_fp16(low * factor, high * factor) for low, high in pairs]
                codes = const_expr(first < self.config.layout.codes)
                store_vector(at + near, 0, words[0::2] if codes else words[:4])
                store_vector(at + far, 0, words[1::2] if codes else words[4:])
            sUnit = shared.sUnit
            if lane == 0:
                sUnit[head] = unit
        cute.arch.fence_view_async_shared()
        sync(Bar.MERGE, CONSUMERS)

    @cute.jit
    def hide_absent(self, stage) -> None:
        """S = -inf where a key of the block is not there."""
        words = cute.make_tensor(
            cute.recast_ptr(self.shared.sLive.iterator, dtype=Int32), cute.make_layout(2 * self.config.blocks)
        )
        hide_rows(self.S, words[2 * stage + self.key // 32] >> (self.key % 32))


@dataclass(frozen=True)
class Consumer(RawRows):
    """A consumer warpgroup.

    Registers of a thread beside those of GQA decode: K and V as A operands, two groups of columns each; the products
    with each group of K; `weight`: the scales of the thread's two keys, then what P is multiplied by; the largest of
    them, and the warpgroup's unit.
    """

    qk_rope: cute.TiledMma
    rRope: cute.Tensor
    rQ_rope: cute.Tensor
    raw: cute.Tensor
    tiles: cute.Layout
    scale: cute.Tensor
    top: cute.Tensor
    unit: cute.Tensor

    @classmethod
    def over(cls, shared: Shared, side, tid) -> Self:
        config, N, K = shared.config, shared.config.tile_n, OperandMajorMode.K

        def product(dtype):
            registers = warpgroup.OperandSource.RMEM
            return sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (TILE_M, N), registers)

        def operand(dtype, *shape: int) -> cute.Tensor:
            return cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), *shape)), dtype)

        half, rope = product(Float16), product(BFloat16)
        matrices = warp.StMatrix8x8x16bOp(transpose=True, num_matrices=2 if N == 8 else 4)
        store = cute.make_tiled_copy_C(cute.make_copy_atom(matrices, Float16), half).get_slice(tid)
        sPt = cute.composition(shared.sP, cute.make_layout((BLOCK, N, config.p_buffers), stride=(N, 1, N * BLOCK)))
        S = cute.make_rmem_tensor(half.partition_shape_C((BLOCK, N)), Float32)
        rows = {name: cute.make_rmem_tensor(N // 4, Float32) for name in ("row_max", "row_sum", "block_sum", "factor")}
        shared.q.read_by("consumer warpgroups", CONSUMER_WARPS)
        shared.k.read_by("consumer warpgroups", CONSUMER_WARPS // 2)
        return cls(
            config=config,
            shared=shared,
            side=side,
            tid=tid,
            qk=half,
            pv=half,
            rK=operand(Float16, 1, STEPS, 2),
            rQ=half.make_fragment_B(half.get_slice(0).partition_B(shared.sQ16)),
            rV=operand(Float16, GROUP_TILES, 4, 2),
            rP=half.make_fragment_B(half.get_slice(0).partition_B(shared.sP)),
            store=store,
            sP_store=store.partition_D(sPt),
            O=cute.make_rmem_tensor(half.partition_shape_C((DV, N)), Float32),
            S=S,
            E=cute.make_rmem_tensor(S.layout, Float32),
            P=cute.make_rmem_tensor(S.layout, Float16),
            **rows,
            qk_rope=rope,
            rRope=operand(BFloat16, 1, CHUNK // 16),
            rQ_rope=rope.make_fragment_B(rope.get_slice(0).partition_B(shared.sQ)),
            raw=cute.make_rmem_tensor((N // 2, GROUPS), Float32),
            tiles=cute.make_rmem_tensor(half.partition_shape_C((RAW_GROUP, N)), Float32).layout,
            scale=cute.make_rmem_tensor((2, GROUPS), Float32),
            top=cute.make_rmem_tensor(1, Float32),
            unit=cute.make_rmem_tensor(1, Float32),
        )

    # a segment

    @cute.jit
    def start(self) -> None:
        """Begin a segment."""
        gqa.Consumer.start(self)
        self.unit[0] = Float32(LEAST)

    @cute.jit
    def finish(self) -> None:
        """O in units of 1."""
        for i in cutlass.range_constexpr(cute.size(self.O)):
            self.O[i] = self.O[i] * self.unit[0]

    # a block

    @cute.jit
    def read_scales(self, stage) -> None:
        """The scales of the thread's two keys, and the largest of them."""
        layout = self.config.layout
        top = Float32(0.0)
        for half in cutlass.range_constexpr(2):
            words = read_vector(self.block(stage) + (self.key + 8 * half) * layout.row_bytes, layout.scale_at)
            for g in cutlass.range_constexpr(GROUPS):
                scale = fp32_of(words[g])
                self.scale[half, g] = scale
                top = cute.arch.fmax(top, cute.arch.fmax(scale, -scale))
        self.top[0] = top

    @cute.jit
    def load_keys(self, base, group: cutlass.Constexpr) -> None:
        """128 columns of the warp's 16 keys as the A operand; base: where the lane reads 16 bytes of a row."""
        words = cute.recast_tensor(self.rK, Int32)
        words = cute.make_tensor(words.iterator, cute.make_layout((4, STEPS, 2)))
        for i in cutlass.range_constexpr(STEPS // 2):
            matrices = matrix_load(base + (RAW_GROUP * group + 32 * i))
            for m in cutlass.range_constexpr(4):
                low, high = two_halves(matrices[m])
                words[m % 2, 2 * i + m // 2, group % 2] = low
                words[m % 2 + 2, 2 * i + m // 2, group % 2] = high

    @cute.jit
    def score(self, stage, scale_log2) -> None:
        """S^T = scale * K q^T of a block, base 2."""
        layout, lane = self.config.layout, self.tid % WARP
        row = self.tid // WARP * 16 + lane % 16
        base = self.block(stage) + row * layout.row_bytes + lane // 16 * 16
        words = cute.recast_tensor(self.rRope, Int32)
        words = cute.make_tensor(words.iterator, cute.make_layout((4, CHUNK // 16)))
        for i in cutlass.range_constexpr(CHUNK // 16):
            matrices = matrix_load(base + (layout.wide_at + 32 * i))
            for m in cutlass.range_constexpr(4):
                words[m, i] = matrices[m]
        atom, rope_atom = cute.make_mma_atom(self.qk.op), cute.make_mma_atom(self.qk_rope.op)
        for g in cutlass.range_constexpr(GROUPS):
            if g >= 2:
                # the products before the last have read their registers
                warpgroup.wait_group(1)
            self.load_keys(base, g)
            warpgroup.fence()
            if g == 0:
                rope_atom.set(warpgroup.Field.ACCUMULATE, False)
                for i in cutlass.range_constexpr(CHUNK // 16):
                    rQ = self.rQ_rope[None, None, GROUPS * STEPS + i, 0]
                    cute.gemm(rope_atom, self.S, self.rRope[None, None, i], rQ, self.S)
                    rope_atom.set(warpgroup.Field.ACCUMULATE, True)
            target = part_of(self.raw, self.S.layout, g)
            atom.set(warpgroup.Field.ACCUMULATE, False)
            for i in cutlass.range_constexpr(STEPS):
                cute.gemm(atom, target, self.rK[None, None, i, g % 2], self.rQ[None, None, STEPS * g + i, 0], target)
                atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        self.read_scales(stage)
        warpgroup.wait_group(0)
        self.load_values(self.values_at(stage), 0)
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            unit = self.shared.sUnit[self.row(c)]
            for half in cutlass.range_constexpr(2):
                i = 4 * (c // 2) + c % 2 + 2 * half
                total = self.raw[i, 0] * self.scale[half, 0]
                for g in cutlass.range_constexpr(1, GROUPS):
                    total = total + self.raw[i, g] * self.scale[half, g]
                self.S[i] = (self.S[i] + total * unit) * scale_log2

    @cute.jit
    def exponentials(self):
        """As in GQA decode; infinity where a scale has outgrown the unit."""
        largest = gqa.Consumer.exponentials(self)
        return largest if self.top[0] < 2.0 * self.unit[0] else Float32.inf

    @cute.jit
    def publish(self, buffer) -> None:
        """P times the scales of each group of columns to shared memory, for the tensor cores."""
        inverse = inverse_power(self.unit[0])
        for g in cutlass.range_constexpr(GROUPS):
            weights = [self.scale[half, g] * inverse for half in range(2)]
            for i in cutlass.range_constexpr(self.config.tile_n // 2):
                self.P[i] = (self.E[i] * weights[i // 2 % 2]).to(Float16)
            target = self.sP_store[None, None, None, GROUPS * buffer + g]
            cute.copy(self.store, self.store.retile(self.P), target)
        cute.arch.fence_view_async_shared()

    @cute.jit
    def raise_max(self) -> None:
        """Move the running max and the unit where the block's are larger, and rescale the sums and O."""
        sPeak = self.shared.sPeak
        peak = self.top[0]
        for offset in (4, 8, 16):
            peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, offset=offset))
        if self.tid % WARP == 0:
            sPeak[4 * self.side + self.tid // WARP] = peak
        # its barrier shows the peaks to all warps
        gqa.Consumer.raise_max(self)
        for w in cutlass.range_constexpr(4):
            peak = cute.arch.fmax(peak, sPeak[4 * self.side + w])
        unit = cute.arch.fmax(self.unit[0], power_below(peak))
        factor = self.unit[0] * inverse_power(unit)
        self.unit[0] = unit
        for i in cutlass.range_constexpr(cute.size(self.O)):
            self.O[i] = self.O[i] * factor

    @cute.jit
    def load_values(self, base, group: cutlass.Constexpr) -> None:
        """V^T of 128 columns of a block as the A operand; base: where the lane reads 16 bytes of a row."""
        words = cute.recast_tensor(self.rV, Int32)  # [row half, key half, tile, 16 keys, buffer]
        words = cute.make_tensor(words.iterator, cute.make_layout((2, 2, GROUP_TILES, 4, 2)))
        for m in cutlass.range_constexpr(GROUP_TILES):
            for half in cutlass.range_constexpr(2):
                offset = 32 * half * self.config.layout.row_bytes + RAW_GROUP * group + TILE_M * m
                matrices = transpose_load(base + offset)
                for i in cutlass.range_constexpr(4):
                    even, odd = gqa.convert_pairs(matrices[i])
                    words[0, i % 2, m, 2 * half + i // 2, group % 2] = even
                    words[1, i % 2, m, 2 * half + i // 2, group % 2] = odd

    def values_at(self, stage):
        """Where the lane reads 16 bytes of a row of V."""
        return self.block(stage) + self.tid % WARP * self.config.layout.row_bytes + self.tid // WARP * 16

    @cute.jit
    def add_values(self, stage, buffer) -> None:
        """O^T += V^T P^T of a block."""
        base = self.values_at(stage)
        atom = cute.make_mma_atom(self.pv.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        for g in cutlass.range_constexpr(GROUPS):
            if g >= 2:
                warpgroup.wait_group(1)
            if g >= 1:
                self.load_values(base, g)
            warpgroup.fence()
            tiles = part_of(self.O, self.tiles, g)
            for k in cutlass.range_constexpr(4):
                rP = self.rP[None, None, k, GROUPS * buffer + g]
                cute.gemm(atom, tiles, self.rV[None, None, k, g % 2], rP, tiles)
            warpgroup.commit_group()
        self.shared.k.release(stage)
        warpgroup.wait_group(0)


@dataclass(frozen=True)
class Segments(result.Segments):
    """A consumer warpgroup's way through the segments of its CTA."""

    @cute.jit
    def compute(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Compute a segment and write its result; of a token without keys, zeros."""
        consumer, item = self.consumer, Item(place.request, Int32(0), place.group)
        if part.last > part.first:
            pairs = part.last - part.first
            consumer.start()
            consumer.shared.q.wait(0, done.segments)
            consumer.convert_queries(consumer.config.layout.codes)
            for pair in cutlass.range(pairs, unroll=1):
                number = done.items + pair
                stage, buffer = 2 * (number % 2) + consumer.side, 2 * consumer.side + number % 2
                consumer.shared.k.wait(stage, number // 2)
                consumer.score(stage, self.scalars.scale_log2)
                consumer.hide_absent(stage)
                consumer.weigh(buffer)
                consumer.add_values(stage, buffer)
            consumer.shared.q.release(0)
            consumer.finish()
            self.write_result(item, Float32(1.0), part.whole, split.SLOTS * self.cta + part.slot)
            done = done.plus(pairs)
        elif part.whole:
            self.write_nothing(item)
        return done


def part_of(tensor: cute.Tensor, layout: cute.Layout, i: int) -> cute.Tensor:
    """Part number i of registers, each laid out so."""
    return cute.make_tensor(tensor.iterator + i * cute.size(layout), layout)


@cute.jit
def power_below(number):
    """The power of two at or below a positive number, from LEAST to 2^126."""
    return cute.arch.inline_ptx(
        "{ .reg .s32 e; shr.u32 e, {$r0}, 23; max.s32 e, e, 1; min.s32 e, e, 253; shl.b32 {$w0}, e, 23; }",
        write_only_types=[Float32],
        read_only_args=[number],
    )


@cute.jit
def inverse_power(power):
    """1 over a power of two from LEAST to 2^126."""
    return cute.arch.inline_ptx(
        "{ .reg .s32 e; sub.s32 e, 0x7f000000, {$r0}; mov.b32 {$w0}, e; }",
        write_only_types=[Float32],
        read_only_args=[power],
    )


@cute.jit
def two_halves(codes):
    """Four e4m3 of a word as FP16 pairs: the first two, the last two."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 a, b; mov.b32 {a, b}, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, a; cvt.rn.f16x2.e4m3x2 {$w1}, b; }",
        write_only_types=[Int32, Int32],
        read_only_args=[codes],
    )


@cute.jit
def two_bf16(word):
    """The BF16 pair of a word as FP32."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 a, b; shl.b32 a, {$r0}, 16; and.b32 b, {$r0}, 0xffff0000; mov.b32 {$w0}, a; mov.b32 {$w1}, b; }",
        write_only_types=[Float32, Float32],
        read_only_args=[word],
    )


@cute.jit
def two_fp16(low, high):
    """Two FP32 as a word of FP16."""
    return cute.arch.inline_ptx(
        "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[low, high]
    )
