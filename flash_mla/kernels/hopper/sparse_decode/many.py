"""The consumer warpgroups of sparse decode with 64 heads a CTA: those of MLA decode, but for keys that are not there.

Any key of a block may be missing. The producer zeroes its row, so that P V needs no care, and says so in a mask, from
which its scores are made -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import mla_decode
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.mla_decode import BAR_P0, BAR_P1
from flash_mla.kernels.hopper.softmax import LOW
from flash_mla.kernels.hopper.sparse_decode.config import (
    BLOCK,
    CONSUMER_WARPS,
    CHUNK_BYTES,
    K_CHUNKS,
    PRODUCER_WARPS,
    STAGED,
    STAGES,
    TILE_M,
    WARPS,
    Config,
    scan_words,
)


Align, MemRange = cute.struct.Align, cute.struct.MemRange


@dataclass(frozen=True)
class Shared(mla_decode.Shared):
    """Views of a CTA's shared memory; sLive: a bit for each key of the even, the odd block, set where it is there."""

    sLive: cute.Tensor

    @staticmethod
    def of(config: Config, row_layout: Callable[[int], cute.ComposedLayout]) -> Shared:
        """Allocate it."""

        storage = allocate(
            config,
            sQ=Align[MemRange[BFloat16, TILE_M * config.D], 1024],
            sK=Align[MemRange[BFloat16, K_CHUNKS * CHUNK_BYTES], 1024],
            staged=Align[MemRange[BFloat16, CONSUMER_WARPS * STAGED], 128],
            sMax=MemRange[Float32, 2 * TILE_M],
            sSum=MemRange[Float32, 2 * TILE_M],
            sScan=MemRange[Int32, scan_words(WARPS)],
            sLive=Align[MemRange[Uint8, 2 * BLOCK // 8], 8],
            k_barriers=MemRange[Int64, Channel.words(STAGES)],
            q_barriers=MemRange[Int64, Channel.words(1)],
        )
        rows, buffers = row_layout(config.chunks), row_layout(2 * K_CHUNKS)
        readers, writers = 4 * config.cluster, PRODUCER_WARPS
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        return Shared(
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            sMax=storage.sMax.get_tensor(cute.make_layout((TILE_M, 2))),
            sSum=storage.sSum.get_tensor(cute.make_layout((TILE_M, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            staged=storage.staged.data_ptr(),
            k=Channel.over("k", k_barriers, STAGES, readers=readers, writers=writers, cluster=config.cluster),
            q=Channel.over("q", q_barriers, 1, readers=CONSUMER_WARPS),
            row_layout=row_layout,
            sLive=storage.sLive.get_tensor(cute.make_layout(2 * BLOCK // 8)),
        )


def allocate(config: Config, **fields):
    """Shared memory of a kernel with these fields, as much as its config's ledger says."""
    Storage = cute.struct(type("Storage", (), {"__annotations__": fields}))
    allocated = -(-Storage.size_in_bytes() // 1024) * 1024
    assert allocated == config.smem_bytes(), (
        f"{config} allocates {allocated} bytes, its ledger says {config.smem_bytes()}"
    )
    return utils.SmemAllocator().allocate(Storage)


@dataclass(frozen=True)
class Consumer(mla_decode.Consumer):
    """A consumer warpgroup: scores of the even (0) or odd (1) blocks, and left (0) or right (1) half of the output."""

    @staticmethod
    def of(config: Config, shared: Shared, side: int, tid, scale_log2: Float32) -> Consumer:
        made = mla_decode.Consumer.over(Shape("bf16", config.chunks), shared, side, tid, scale_log2)
        return Consumer(**{name: getattr(made, name) for name in made.__dataclass_fields__})

    @cute.jit
    def begin(self) -> None:
        """Begin a segment."""
        self.O.fill(0.0)
        self.rows.max.fill(LOW)
        self.rows.sum.fill(0.0)

    @cute.jit
    def hide(self) -> None:
        """S = -inf where a key of the own block is not there."""
        live = cute.make_tensor(cute.recast_ptr(self.shared.sLive.iterator, dtype=Int32), cute.make_layout(4))
        halves = live[2 * self.side], live[2 * self.side + 1]
        if (halves[0] & halves[1]) != -1:
            hide_keys(self.S, halves, self.rows.column)


    @cute.jit
    def compute(self, scalars, pairs, count) -> None:
        """The pairs of a segment; `count` were computed before."""
        if const_expr(self.side == 0):
            consume_left(self, pairs, count)
        else:
            consume_right(self, self.shared.k.cluster == 1, pairs, count)

    @cute.jit
    def write(self, tensors, scalars, token, tile, whole, slot) -> None:
        """The result of a segment: final if it is `whole`, else to a partial slot."""
        rank = tile % self.shared.k.cluster
        mla_decode.write_result(self, tensors, scalars, token, tile * TILE_M, rank, whole, slot, True)

    @cute.jit
    def write_nothing(self, tensors, scalars, token, tile) -> None:
        """A token without keys: out 0, lse -inf."""
        if const_expr(self.side == 0):
            mla_decode.write_nothing(self, tensors, token, tile * TILE_M)


@cute.jit
def hide_keys(S: cute.Tensor, halves, column) -> None:
    """S = -inf where a bit is not set; halves: the bits of columns 0 to 31 and of 32 to 63."""
    for half in cutlass.range_constexpr(2):
        bits = halves[half] >> column
        for j in cutlass.range_constexpr(4):
            for e in cutlass.range_constexpr(2):
                there = (bits & (1 << (8 * j + e))) != 0
                for r in cutlass.range_constexpr(2):
                    i = 4 * (4 * half + j) + 2 * r + e
                    S[i] = S[i] if there else -Float32.inf


@dataclass(frozen=True)
class Shape:
    """What MLA decode's consumer reads of a config."""

    dtype: str
    chunks: int


@cute.jit
def consume_left(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 0: scores of the even blocks, left half of the output."""
    score_even(consumer, count)
    for pair in cutlass.range(0, pairs - 1, unroll=1):
        step_left(consumer, count + pair, True)
    consumer.shared.q.release(0)
    step_left(consumer, count + pairs - 1, False)


@cute.jit
def score_even(consumer: Consumer, turn) -> None:
    """Scores of a pair's even block."""
    k = consumer.shared.k
    k.wait(0, turn)
    consumer.scores(range(4), True)
    k.wait(1, turn)
    consumer.scores(range(4, consumer.config.chunks), False)
    warpgroup.wait_group(0)


@cute.jit
def step_left(consumer: Consumer, turn, follow: cutlass.Constexpr) -> None:
    """One pair, whose even block's scores are there; `follow`: then the scores of the next pair's even block."""
    k = consumer.shared.k
    # softmax of the even block
    consumer.hide()
    for r in cutlass.range_constexpr(2):
        consumer.find_peak(r)
        consumer.raise_max(r)
    consumer.exponentials()
    if const_expr(consumer.config.chunks < K_CHUNKS):
        k.acquire(1, turn)
    consumer.publish(BAR_P0)

    # P V of the even block
    consumer.rows.rescale(consumer.O)
    consumer.values(0)
    warpgroup.wait_group(0)
    k.release(0)

    # P V of the odd block, and the next scores
    consumer.receive(BAR_P1)
    consumer.rows.rescale(consumer.O)
    consumer.values(1)
    warpgroup.wait_group(0)
    k.release(2)
    if const_expr(follow):
        score_even(consumer, turn + 1)


@cute.jit
def consume_right(consumer: Consumer, early: cutlass.Constexpr, pairs, count) -> None:
    """Warpgroup 1: scores of the odd blocks, right half of the output.

    The P V of the even block hides the softmax of the odd one, or, `early`, goes before its scores.
    """
    k = consumer.shared.k
    for pair in cutlass.range(pairs, unroll=1):
        turn = count + pair
        if const_expr(early):
            multiply_even(consumer)
            warpgroup.wait_group(0)
            k.release(1)

        # scores of the odd block
        k.wait(2, turn)
        consumer.scores((0, 1, 2, 3, *range(8, consumer.config.chunks)), True)
        k.wait(3, turn)
        consumer.scores(range(4, 8), False)
        warpgroup.wait_group(0)
        if pair == pairs - 1:
            consumer.shared.q.release(0)
        consumer.hide()
        for r in cutlass.range_constexpr(2):
            consumer.find_peak(r)
        if const_expr(not early):
            multiply_even(consumer)

        # softmax of the odd block
        for r in cutlass.range_constexpr(2):
            consumer.raise_max(r)
        consumer.exponentials()
        if const_expr(consumer.config.chunks < K_CHUNKS):
            k.acquire(2, turn)
        consumer.publish(BAR_P1)
        if const_expr(not early):
            warpgroup.wait_group(0)
            k.release(1)

        # P V of the odd block
        consumer.rows.rescale(consumer.O)
        consumer.values(1)
        warpgroup.wait_group(0)
        k.release(3)


@cute.jit
def multiply_even(consumer: Consumer) -> None:
    """Warpgroup 1 takes over P and the running max of the even block and starts its P V."""
    consumer.receive(BAR_P0)
    consumer.rows.rescale(consumer.O)
    consumer.values(0)
