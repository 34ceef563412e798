"""Products of sparse decode over raw rows with 64 heads a CTA: scales are multiplied into the operands.

Beside O of 64 heads there are registers for one accumulator of the scores, not for one a scale (`raw_consumer.py`):

    S^T [64, heads] = unit[key] * (K q^T),   K = codes * scales / unit[key], BF16 columns / unit[key]
    O^T [512, heads] += V^T P^T,             V likewise, P = P * unit[key] / unit

`unit[key]` is a power of two: at or below the largest scale of the row, or more where its BF16 columns would leave
FP16. `unit` is the largest of them so far. So K, V and P are FP16 whatever the scales are: a scaled code is rounded
once, to 11 bits, and what is lost lies below 2^-24 of its row's unit. q is FP16 in all columns, times a power of two of
its head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from flash_mla.kernels.hopper.lanes import quad_max
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M, WARP
from flash_mla.kernels.hopper.sparse_decode.config import CONSUMER_WARPS, DV, RAW_GROUP
from flash_mla.kernels.hopper.sparse_decode.folded_words import (
    larger_bf16,
    read_twice,
    scaled_columns,
    scaled_halves,
)
from flash_mla.kernels.hopper.sparse_decode.raw import Shared
from flash_mla.kernels.hopper.sparse_decode.raw_consumer import (
    GROUPS,
    RawRows,
    inverse_power,
    part_of,
    power_below,
    two_bf16,
    two_fp16,
)
from flash_mla.kernels.hopper.sparse_decode.ring import read_vector, read_word
from flash_mla.kernels.hopper.sparse_decode.rows import fp32_of
from flash_mla.kernels.hopper.transpose import matrix_load, transpose_load

CHUNKS = DV // CHUNK
"""Chunks of codes, and tiles of O^T."""
STEPS = CHUNK // 16
"""Instructions over a chunk."""
K_STEPS = 2
"""Instructions of K q^T whose operand is made at once: at 4 the wgmma are serialised."""
WIDE_UNIT = 2.0**-14
"""BF16 columns are below 2^15 in units of their key."""


@dataclass(frozen=True)
class Consumer(RawRows):
    """A consumer warpgroup, which scores every second block and has half of O's columns.

    Registers of a thread beside O [256, 64] / 128 and S: K and V as they lie in shared memory and as A operands, two
    groups each; the units of its two keys, and that of the CTA.
    """

    codes: cute.Tensor
    tile: cute.Layout
    key_unit: cute.Tensor
    unit: cute.Tensor

    @classmethod
    def over(cls, shared: Shared, side, tid) -> Self:
        config, N, K = shared.config, shared.config.tile_n, OperandMajorMode.K
        registers = warpgroup.OperandSource.RMEM
        product = sm90.make_trivial_tiled_mma(Float16, Float16, K, K, Float32, (1, 1, 1), (TILE_M, N), registers)
        store = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=True, num_matrices=4), Float16)
        store = cute.make_tiled_copy_C(store, product).get_slice(tid)
        sPt = cute.composition(shared.sP, cute.make_layout((BLOCK, N, config.p_buffers), stride=(N, 1, N * BLOCK)))
        S = cute.make_rmem_tensor(product.partition_shape_C((BLOCK, N)), Float32)
        shared.q.read_by("consumer warpgroups", CONSUMER_WARPS)
        shared.k.read_by("consumer warpgroups", CONSUMER_WARPS)

        def operand(steps: int) -> cute.Tensor:
            return cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, steps, 2)), Float16)

        return cls(
            config=config,
            shared=shared,
            side=side,
            tid=tid,
            qk=product,
            pv=product,
            rK=operand(K_STEPS),
            rQ=product.make_fragment_B(product.get_slice(0).partition_B(shared.sQ16)),
            rV=operand(STEPS),
            rP=product.make_fragment_B(product.get_slice(0).partition_B(shared.sP)),
            store=store,
            sP_store=store.partition_D(sPt),
            O=cute.make_rmem_tensor(product.partition_shape_C((DV // 2, N)), Float32),
            S=S,
            E=S,
            P=cute.make_rmem_tensor(S.layout, Float16),
            # max and sums of the heads lie in shared memory; a thread sums two of them
            row_max=None,
            row_sum=cute.make_rmem_tensor(2, Float32),
            block_sum=None,
            factor=None,
            codes=cute.make_rmem_tensor((4, 2, 2), Int32),
            tile=S.layout,
            key_unit=cute.make_rmem_tensor(2, Float32),
            unit=cute.make_rmem_tensor(1, Float32),
        )

    def scales_at(self, buffer, key):
        """Where the scales of a block's keys lie from `key` on, those of the first columns."""
        place = key % 8 // 2 * 16 + key // 8 * 2 + key % 2
        return self.shared.sScale.iterator.toint() + 2 * (buffer * GROUPS * BLOCK + place)

    # scores

    @cute.jit
    def read_scales(self, stage, buffer, peaks) -> None:
        """The scales of the warp's keys to shared memory, as multiples of each key's unit, in FP16.

        A thread makes one of each of its two keys. peaks: the largest of its BF16 columns of each.
        """
        layout, sScale, lane = self.config.layout, self.shared.sScale, self.tid % 4
        for half in cutlass.range_constexpr(2):
            key = self.key + 8 * half
            word = read_word(self.block(stage) + key * layout.row_bytes + layout.scale_at + 4 * lane)
            scale = fp32_of(word)
            top = cute.arch.fmax(cute.arch.fmax(scale, -scale), peaks[half] * WIDE_UNIT)
            self.key_unit[half] = power_below(quad_max(top))
            sScale[key, lane, buffer] = (scale * inverse_power(self.key_unit[half])).to(Float16)
        cute.arch.sync_warp()

    @cute.jit
    def fetch_keys(self, base, group: cutlass.Constexpr) -> None:
        """Start to read 32 columns of the warp's 16 keys; base: where the lane reads 16 bytes of a row."""
        matrices = matrix_load(base + 16 * K_STEPS * group)
        for m in cutlass.range_constexpr(4):
            self.codes[m, 0, group % 2] = matrices[m]

    @cute.jit
    def convert_keys(self, scales_at, group: cutlass.Constexpr) -> None:
        """What was read of them, as the A operand."""
        words = words_of(self.rK, K_STEPS)
        at = 2 * BLOCK * (16 * K_STEPS * group // RAW_GROUP)
        scales = (read_twice(scales_at, at), read_twice(scales_at, at + 4))
        for m in cutlass.range_constexpr(4):
            low, high = scaled_halves(self.codes[m, 0, group % 2], scales[m % 2])
            words[m % 2, 0, m // 2, group % 2] = low
            words[m % 2, 1, m // 2, group % 2] = high

    @property
    def wide_words(self) -> cute.Tensor:
        """BF16 columns of K as an operand, in words [row half, column half, step]: both buffers."""
        return cute.make_tensor(cute.recast_tensor(self.rK, Int32).iterator, cute.make_layout((2, 2, STEPS)))

    @cute.jit
    def load_wide(self, base):
        """The BF16 columns of the warp's 16 keys; returns the largest of each of the thread's two keys."""
        words, tops = self.wide_words, [Int32(0), Int32(0)]
        for i in cutlass.range_constexpr(STEPS):
            matrices = matrix_load(base + (self.config.layout.wide_at + 32 * i))
            for m in cutlass.range_constexpr(4):
                words[m % 2, m // 2, i] = matrices[m]
                tops[m % 2] = larger_bf16(tops[m % 2], matrices[m])
        return [cute.arch.fmax(*two_bf16(top)) for top in tops]

    @cute.jit
    def convert_wide(self) -> None:
        """Those columns in units of their keys, in FP16."""
        words = self.wide_words
        for half in cutlass.range_constexpr(2):
            inverse = inverse_power(self.key_unit[half])
            for i in cutlass.range_constexpr(STEPS):
                for column in cutlass.range_constexpr(2):
                    low, high = two_bf16(words[half, column, i])
                    words[half, column, i] = two_fp16(low * inverse, high * inverse)

    @cute.jit
    def score(self, stage, buffer, scale_log2) -> None:
        """S^T = scale * K q^T of a block, base 2: BF16 columns first, in two groups as codes are."""
        layout, lane = self.config.layout, self.tid % WARP
        row = self.tid // WARP * 16 + lane % 16
        base = self.block(stage) + row * layout.row_bytes + lane // 16 * 16
        atom, groups = cute.make_mma_atom(self.qk.op), CHUNKS * STEPS // K_STEPS
        self.read_scales(stage, buffer, self.load_wide(base))
        scales_at = self.scales_at(buffer, self.key)
        self.fetch_keys(base, 0)
        self.convert_wide()
        atom.set(warpgroup.Field.ACCUMULATE, False)
        for group in cutlass.range_constexpr(-STEPS // K_STEPS, groups):
            if const_expr(group >= 0):
                # the products before the last have read their registers
                warpgroup.wait_group(1)
                if const_expr(group + 1 < groups):
                    self.fetch_keys(base, group + 1)
                self.convert_keys(scales_at, group)
            warpgroup.fence()
            for i in cutlass.range_constexpr(K_STEPS):
                rQ = self.rQ[None, None, K_STEPS * (group % (groups + STEPS // K_STEPS)) + i, 0]
                cute.gemm(atom, self.S, self.rK[None, None, i, group % 2], rQ, self.S)
                atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        warpgroup.wait_group(0)
        keys = [self.key_unit[half] * scale_log2 for half in range(2)]
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            head = self.shared.sUnit[self.row(c)]
            for half in cutlass.range_constexpr(2):
                i = 4 * (c // 2) + c % 2 + 2 * half
                self.S[i] = (self.S[i] * keys[half]) * head

    # output

    @cute.jit
    def fetch_values(self, base, tile: cutlass.Constexpr) -> None:
        """Start to read V^T of 64 columns of a block; base: where the lane reads 16 bytes of a row."""
        for half in cutlass.range_constexpr(2):
            matrices = transpose_load(base + (32 * half * self.config.layout.row_bytes + CHUNK * tile))
            for i in cutlass.range_constexpr(4):
                self.codes[i, half, tile % 2] = matrices[i]

    @cute.jit
    def convert_values(self, scales_at, tile: cutlass.Constexpr) -> None:
        """What was read of them, as the A operand."""
        words, at = words_of(self.rV, STEPS), 2 * BLOCK * (CHUNK * tile // RAW_GROUP)
        scales = [*read_vector(scales_at, at), *read_vector(scales_at, at + 16)]
        for half in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(4):
                even, odd = scaled_columns(self.codes[i, half, tile % 2], scales[4 * half + i])
                words[0, i % 2, 2 * half + i // 2, tile % 2] = even
                words[1, i % 2, 2 * half + i // 2, tile % 2] = odd

    @cute.jit
    def add_half(self, stage, buffer, p_buffer: cutlass.Constexpr) -> None:
        """The warpgroup's half of O^T += V^T P^T of a block of the pair."""
        layout, lane, warp_id = self.config.layout, self.tid % WARP, self.tid // WARP
        base = self.block(stage) + lane * layout.row_bytes + 16 * warp_id + DV // 2 * self.side
        scales_at = self.scales_at(buffer, 2 * (lane % 4)) + 2 * BLOCK * (GROUPS // 2) * self.side
        atom = cute.make_mma_atom(self.pv.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        self.fetch_values(base, 0)
        for tile in cutlass.range_constexpr(CHUNKS // 2):
            if const_expr(tile + 1 < CHUNKS // 2):
                self.fetch_values(base, tile + 1)
            warpgroup.wait_group(1)
            self.convert_values(scales_at, tile)
            warpgroup.fence()
            target = part_of(self.O, self.tile, tile)
            for k in cutlass.range_constexpr(STEPS):
                rP = self.rP[None, None, k, p_buffer]
                cute.gemm(atom, target, self.rV[None, None, k, tile % 2], rP, target)
            warpgroup.commit_group()


def words_of(operand: cute.Tensor, steps: int) -> cute.Tensor:
    """An A operand of two buffers as words [row half, column half, step, buffer]."""
    return cute.make_tensor(cute.recast_tensor(operand, Int32).iterator, cute.make_layout((2, 2, steps, 2)))
