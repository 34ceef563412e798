"""16-bit queries over an FP8 cache in GQA decode: two rows of e4m3 each, made by two warps, added up in the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.e4m3 import split_row
from flash_mla.kernels.hopper.gqa_decode import consumer
from flash_mla.kernels.hopper.gqa_decode.config import Q_VECTOR, QUERY_WARPS, Config
from flash_mla.kernels.hopper.gqa_decode.shared import Item, Scalars, Shared
from flash_mla.kernels.hopper.limits import BLOCK, ROW_BYTES
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class Queries:
    """A warp that fills the stages of Q; `number`: which of QUERY_WARPS. q [rows, D, KV head, request]."""

    config: Config
    shared: Shared
    scalars: Scalars
    q: cute.Tensor
    number: Int32

    @staticmethod
    def over(shared: Shared, scalars: Scalars, q: cute.Tensor, number) -> Queries:
        shared.q.written_by("queries", QUERY_WARPS)
        return Queries(shared.config, shared, scalars, q, number)

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """The query rows of a segment; rows past the KV head's are zeros."""
        config, channel = self.config, self.shared.q
        if part.last > part.first:
            item = Item.at(place, self.scalars)
            stage = done.segments % config.q_stages
            channel.acquire(stage, done.segments // config.q_stages)
            for row in cutlass.range(self.number, config.tile_n, QUERY_WARPS, unroll=2):
                self.load_row(item, row, stage)
            cute.arch.fence_view_async_shared()
            channel.arrive_warp(stage)
            done = done.plus(0)
        return done

    @cute.jit
    def load_row(self, item: Item, row, stage) -> None:
        """One row, as two; a lane has one piece at most."""
        config, lane, sUnit = self.config, cute.arch.lane_idx(), self.shared.sUnit
        values = cute.make_rmem_tensor(Q_VECTOR, self.q.element_type)
        values.fill(0.0)
        head_row = item.tile * config.tile_n + row
        if head_row < self.q.shape[0] and lane < config.D // Q_VECTOR:
            source = self.q[head_row, None, item.head, item.request]
            cute.autovec_copy(cute.local_tile(source, (Q_VECTOR,), (lane,)), values)
        high, low, unit = split_row(values)
        if lane == 0:
            sUnit[row, stage] = unit
        # NOTE: 16 bytes c of row i lie at place c ^ i % 8 of its 128 bytes, and tile_n is a multiple of 8
        address = self.shared.sQ.iterator.toint() + (stage * config.k_chunks + lane // 16) * (config.q_rows * ROW_BYTES)
        address = address + row * ROW_BYTES + ((lane % 16 // 2) ^ (row % 8)) * 16 + lane % 2 * 8
        if lane < 16 * config.k_chunks:
            for words, term in ((high, 0), (low, 1)):
                cute.arch.inline_ptx(
                    "st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};",
                    read_only_args=[address + term * (config.tile_n * ROW_BYTES), *words],
                )


@dataclass(frozen=True)
class Consumer(consumer.Consumer):
    """A consumer warpgroup. raw [64, 2 tile_n] / 128 threads: products with both terms of every row."""

    raw: cute.Tensor

    @classmethod
    def over(cls, shared: Shared, side, tid) -> Self:
        config, K = shared.config, OperandMajorMode.K
        dtype = DTYPES[config.dtype]
        qk = sm90.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, (1, 1, 1), (BLOCK, config.q_rows))
        fields = {
            **vars(consumer.Consumer.over(shared, side, tid)),
            "qk": qk,
            "rQ": qk.make_fragment_B(qk.get_slice(0).partition_B(shared.sQ)),
            "raw": cute.make_rmem_tensor(qk.partition_shape_C((BLOCK, config.q_rows)), Float32),
        }
        return cls(**fields)

    @cute.jit
    def scores(self, stage, q_stage, scale_log2) -> None:
        """S^T = scale * K Q^T of a block, base 2."""
        atom, terms = cute.make_mma_atom(self.qk.op), self.config.tile_n // 2
        atom.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k in cutlass.range_constexpr(self.config.k_steps):
            cute.gemm(atom, self.raw, self.rK[None, None, k, stage], self.rQ[None, None, k, q_stage], self.raw)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        for c in cutlass.range_constexpr(self.config.tile_n // 4):
            scale = scale_log2 * self.shared.sUnit[self.row(c), q_stage]
            for i in (4 * (c // 2) + c % 2, 4 * (c // 2) + c % 2 + 2):
                self.S[i] = (self.raw[i] + self.raw[i + terms]) * scale
