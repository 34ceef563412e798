"""The consumer warpgroups of sparse decode with fewer than 64 heads a CTA: those of GQA decode.

Keys and output columns are the M of the products and heads their N, so that no product is paid for 64 heads:
    S^T [64, heads] = K Q^T        O^T [512, heads] += V^T P^T
Warpgroup 0 takes the even blocks, warpgroup 1 the odd ones, each with its own max, sum and O; they merge in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8

from flash_mla.kernels.hopper import gqa_decode
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.gqa_decode import BAR_WG, LAZY, Item, barrier_any
from flash_mla.kernels.hopper.sparse_decode.config import (
    BLOCK,
    CHUNK_BYTES,
    CONSUMER_WARPS,
    DV,
    K_CHUNKS,
    PRODUCER_WARPS,
    STAGES,
    WARPS,
    Config,
    scan_words,
)
from flash_mla.kernels.hopper.sparse_decode.many import Align, MemRange, allocate


@dataclass(frozen=True)
class Shape:
    """What GQA decode's consumer reads of a config."""

    tile_n: int
    D: int
    dtype: str = "bf16"
    fp8: bool = False
    Dv: int = DV
    tiles_m: int = DV // 64
    stages: int = 2

    @property
    def k_steps(self) -> int:
        """Instructions of K Q^T: 16 columns each."""
        return self.D // 16


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory.

    sQ [heads, D, 1], sK [64, D, block of a pair], sV its first 512 columns, sP [heads, 64, buffer] with buffer = 2 *
    warpgroup + parity; sSum [heads, warp], sMax [heads, warpgroup]; exchange: sP's memory, where O is merged; sLive: a
    bit for each key of the even, the odd block, set where it is there.
    """

    sQ: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sP: cute.Tensor
    k_buffers: cute.Pointer
    exchange: cute.Tensor
    sSum: cute.Tensor
    sMax: cute.Tensor
    sScan: cute.Tensor
    sLive: cute.Tensor
    k: Channel
    q: Channel
    row_layout: Callable[..., cute.ComposedLayout]

    @staticmethod
    def of(config: Config, row_layout: Callable[..., cute.ComposedLayout]) -> Shared:
        """Allocate it."""
        heads = config.tile_heads

        storage = allocate(
            config,
            sQ=Align[MemRange[BFloat16, heads * config.D], 1024],
            sK=Align[MemRange[BFloat16, K_CHUNKS * CHUNK_BYTES], 1024],
            sP=Align[MemRange[BFloat16, 4 * heads * BLOCK], 1024],
            sSum=MemRange[Float32, CONSUMER_WARPS * heads],
            sMax=MemRange[Float32, 2 * heads],
            sScan=MemRange[Int32, scan_words(WARPS)],
            sLive=Align[MemRange[Uint8, 2 * BLOCK // 8], 8],
            k_barriers=MemRange[Int64, Channel.words(STAGES)],
            q_barriers=MemRange[Int64, Channel.words(1)],
        )

        def view(field, rows: int, columns: int, count: int, apart: int) -> cute.Tensor:
            one = row_layout(columns // 64, rows)
            return field.get_tensor(cute.append(one.outer, cute.make_layout(count, stride=apart)), swizzle=one.inner)

        block = K_CHUNKS * CHUNK_BYTES // 2
        sK = view(storage.sK, BLOCK, config.D, 2, block)
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        return Shared(
            sQ=view(storage.sQ, heads, config.D, 1, heads * config.D),
            sK=sK,
            sV=view(storage.sK, BLOCK, DV, 2, block),
            sP=view(storage.sP, heads, BLOCK, 4, heads * BLOCK),
            k_buffers=sK.iterator,
            exchange=cute.make_tensor(
                cute.recast_ptr(storage.sP.data_ptr(), dtype=Float32),
                cute.make_layout((128, heads // 2, 2), stride=(1, 128, 128 * heads // 2)),
            ),
            sSum=storage.sSum.get_tensor(cute.make_layout((heads, CONSUMER_WARPS))),
            sMax=storage.sMax.get_tensor(cute.make_layout((heads, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            sLive=storage.sLive.get_tensor(cute.make_layout(2 * BLOCK // 8)),
            # NOTE: each stage has one reader, the warpgroup of its block
            k=Channel.over("k", k_barriers, STAGES, readers=CONSUMER_WARPS // 2, writers=PRODUCER_WARPS),
            q=Channel.over("q", q_barriers, 1, readers=CONSUMER_WARPS),
            row_layout=row_layout,
        )


@dataclass(frozen=True)
class Consumer(gqa_decode.Consumer):
    """A consumer warpgroup, 0 or 1 (`side`, a run-time value: both run the same code)."""

    @staticmethod
    def of(config: Config, shared: Shared, side, tid) -> Consumer:
        made = gqa_decode.Consumer.over(Shape(config.tile_heads, config.D), shared, side, tid)
        return Consumer(**{name: getattr(made, name) for name in made.__dataclass_fields__})

    def begin(self) -> None:
        """Begin a segment."""
        self.start()

    @cute.jit
    def hide(self) -> None:
        """S = -inf where a key of the own block is not there."""
        live = cute.make_tensor(cute.recast_ptr(self.shared.sLive.iterator, dtype=Int32), cute.make_layout(4))
        bits = live[2 * self.side + self.key // 32] >> (self.key % 32)
        if (bits & 0x101) != 0x101:
            hide_keys(self.S, bits)

    @cute.jit
    def compute(self, scalars, pairs, count) -> None:
        """The warpgroup's block of each pair of a segment; `count` pairs were computed before."""
        k, side = self.shared.k, self.side
        for pair in cutlass.range(pairs, unroll=1):
            turn, buffer = count + pair, 2 * side + (count + pair) % 2
            # scores
            k.wait(2 * side, turn)
            k.wait(2 * side + 1, turn)
            self.scores(side, 0, scalars.scale_log2)
            self.hide()

            # P against the max so far; made anew if that is too low
            largest = self.exponentials()
            self.publish(buffer)
            if barrier_any(BAR_WG + side, 128, largest > LAZY) != 0:
                self.raise_max()
                self.exponentials()
                self.publish(buffer)
                cute.arch.barrier(barrier_id=BAR_WG + side, number_of_threads=128)
            self.add_sums()

            # output
            self.values(side, buffer)
            k.release(2 * side)
            k.release(2 * side + 1)
        self.shared.q.release(0)

    @cute.jit
    def write(self, tensors, scalars, token, tile, whole, slot) -> None:
        """The result of a segment: final if it is `whole`, else to a partial slot."""
        item = Item(token, Int32(0), tile)
        gqa_decode.write_result(self, tensors, scalars, item, Float32(1.0), whole, slot)

    @cute.jit
    def write_nothing(self, tensors, scalars, token, tile) -> None:
        """A token without keys: out 0, lse -inf."""
        gqa_decode.write_nothing(self, tensors, scalars, Item(token, Int32(0), tile))


@cute.jit
def hide_keys(S: cute.Tensor, bits) -> None:
    """S = -inf for a thread's first key unless bit 0 is set, for its second unless bit 8 is."""
    first, second = (bits & 1) != 0, (bits & 256) != 0
    for i in cutlass.range_constexpr(cute.size(S) // 4):
        for e in cutlass.range_constexpr(2):
            S[4 * i + e] = S[4 * i + e] if first else -Float32.inf
            S[4 * i + 2 + e] = S[4 * i + 2 + e] if second else -Float32.inf
