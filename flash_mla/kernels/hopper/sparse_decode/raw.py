"""Sparse decode with few heads over rows of one FP32 scale for 128 codes: rows stay raw in shared memory.

A block lies there as in the cache, one row of 656 bytes behind the other: 8 rows have each 16-byte piece in other
banks. Four producer warps only start copies, one bulk copy a row; four blocks are in shared memory. The consumers read
codes by `ldmatrix` and make them FP16, which holds every e4m3, as the A operand of their products, in registers:

    S^T [64, heads] = sum over scales g of scale[key, g] * (K_g q_g^T), and the rope part, in BF16
    O^T [128 g.., heads] += V_g^T P_g^T,  P_g = P * scale[key, g] / unit

So a block crosses shared memory three times as bytes, where converted rows would cross it once as bytes and three times
as BF16, and no scale is multiplied into a code.

A thread of `ldmatrix` gets four neighbouring codes of a key, so that a step of 16 columns has them in the order 0, 1,
4, 5, 8, 9, 12, 13, 2, 3, ..: q is put in that order, and made FP16 times a power of two of its head's own. V is read as
GQA decode over e4m3 reads it. `unit` is a power of two near the largest scale so far, one a warpgroup, so that P_g is
FP16 whatever the scales are; it moves where the running max does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Uint8

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.gqa_decode import shared
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.sparse_decode.config import CONSUMER_WARPS, DV, RAW_GROUP, Config
from flash_mla.kernels.hopper.sparse_decode.producer import Copying, Producer
from flash_mla.kernels.hopper.sparse_decode.rows import store_vector
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.walk import Done, walk


@dataclass(frozen=True)
class Shared(shared.Shared):
    """Views of a CTA's shared memory. sQ [heads, D] BF16 as it arrives; sQ16: the same bytes as FP16, once they are.

    sP [heads, 64, buffer], GROUPS buffers for each that is in use, so that all of O fits into the exchange; raw: the
    first byte of the blocks; sLive: a bit for each key of each; sPeak: the largest scale of each consumer warp.
    """

    sQ16: cute.Tensor
    raw: Int32
    sLive: cute.Tensor
    sPeak: cute.Tensor
    sScale: cute.Tensor | None

    @staticmethod
    def fields(config: Config) -> dict:
        """Those of this kind of CTA alone."""
        align, array, heads, scales = cute.struct.Align, cute.struct.MemRange, config.tile_heads, DV // RAW_GROUP
        return {
            "sP": align[array[Float16, config.p_buffers * heads * BLOCK], 1024],
            "sSum": array[Float32, CONSUMER_WARPS * heads],
            "sMax": array[Float32, 2 * heads],
            "sUnit": array[Float32, heads],
            "sPeak": array[Float32, CONSUMER_WARPS],
            **({"sScale": align[array[Float16, 4 * scales * BLOCK], 16]} if config.halves else {}),
        }

    @staticmethod
    def over(config: Config, storage) -> Shared:
        def view(field, dtype, columns: int, count: int) -> cute.Tensor:
            one = row_layout(dtype, heads, columns)
            stacked = cute.append(one.outer, cute.make_layout(count, stride=heads * columns))
            return field.get_tensor(stacked, swizzle=one.inner, dtype=dtype)

        heads, scales = config.tile_heads, DV // RAW_GROUP
        k = Channel.over(
            "K",
            storage.k_barriers.data_ptr(),
            config.blocks,
            readers=CONSUMER_WARPS if config.halves else CONSUMER_WARPS // 2,
            writers=config.k_writers,
        )
        return Shared(
            config=config,
            sQ=view(storage.sQ, BFloat16, config.D, 1),
            sQ16=view(storage.sQ, Float16, config.D, 1),
            sK=None,
            sV=None,
            sP=view(storage.sP, Float16, BLOCK, config.p_buffers),
            exchange=cute.make_tensor(
                cute.recast_ptr(storage.sP.data_ptr(), dtype=Float32),
                cute.make_layout((128, heads // 2, 2, scales), stride=(1, 128, 128 * heads // 2, 128 * heads)),
            ),
            sSum=storage.sSum.get_tensor(cute.make_layout((heads, CONSUMER_WARPS))),
            sMax=storage.sMax.get_tensor(cute.make_layout((heads, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(config.warps))),
            sUnit=storage.sUnit.get_tensor(cute.make_layout(heads)),
            q=Channel.over("Q", storage.q_barriers.data_ptr(), 1, readers=CONSUMER_WARPS),
            k=k,
            v=k,
            raw=storage.sK.data_ptr().toint(),
            sLive=storage.sLive.get_tensor(cute.make_layout(config.blocks * BLOCK // 8)),
            sPeak=storage.sPeak.get_tensor(cute.make_layout(CONSUMER_WARPS)),
            sScale=storage.sScale.get_tensor(
                cute.make_layout(((2, 4, 8), scales, 4), stride=((1, 16, 2), BLOCK, BLOCK * scales))
            )
            if config.halves
            else None,
        )


ROWS = 16
"""Rows of a block that a warp copies, a lane each."""


@dataclass(frozen=True)
class RawProducer(Copying):
    """One of the warps that have rows copied, 16 of each block: lanes 0 to 15 of the even one, 16 to 31 of the odd."""

    @classmethod
    def over(cls, shared, lengths, rank, warp, tma_q, tQ) -> Self:
        made = Producer.over(shared, lengths, rank, warp, tma_q, tQ)
        return cls(**vars(made))

    @cute.jit
    def clear(self, target) -> None:
        """Zeros in place of a row that is not there: its P is 0, but 0 * NaN is NaN."""
        zero = Int32(0)
        for piece in cutlass.range(self.config.row_pieces, unroll=1):
            store_vector(target + 16 * piece, 0, (zero, zero, zero, zero))

    @cute.jit
    def fill_pair(self, turn) -> None:
        """Start to copy a pair of blocks."""
        k, row_bytes = self.shared.k, self.config.layout.row_bytes
        votes = cute.arch.vote_ballot_sync(self.row[0] != 0)
        for side in cutlass.range_constexpr(2):
            block = 2 * turn + side
            stage = block % self.config.blocks
            k.acquire(stage, block // self.config.blocks)
            target = self.shared.raw + (BLOCK * stage + ROWS * self.warp + self.lane % ROWS) * row_bytes
            mine, sLive = self.side == side, self.shared.sLive
            if mine and self.row[0] == 0:
                self.clear(target)
            if mine and self.lane % 8 == 0:
                sLive[8 * stage + self.octet] = Uint8((votes >> self.lane) & 255)
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                k.expect(stage, row_bytes * cute.arch.popc((votes >> (ROWS * side)) & 0xFFFF))
            cute.arch.sync_warp()
            if mine and self.row[0] != 0:
                copy_row(target, self.row[0], row_bytes, k.bar(stage).toint())

    @cute.jit
    def run(self, groups, work) -> None:
        """Fill the stages for the CTA's segments."""
        done = walk(work, self.lengths, self.lengths, groups, self.load_segment, Done.nothing())
        # a CTA must outlive its copies
        blocks = self.config.blocks
        for stage in cutlass.range_constexpr(blocks):
            self.shared.k.acquire(stage, (2 * done.items + (blocks - 1 - stage)) // blocks)


@cute.jit
def copy_row(target, source, num_bytes: cutlass.Constexpr, bar) -> None:
    """Start to copy bytes to shared memory, where a barrier counts them."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[{{$r0}}], [{{$r1}}], {num_bytes}, [{{$r2}}];",
        read_only_args=[target, source, bar],
    )
