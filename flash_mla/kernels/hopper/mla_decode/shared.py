"""What the roles of an MLA decode CTA share: the scalars of a call, and views of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M
from flash_mla.kernels.hopper.mla_decode.config import (
    CHUNK_ELEMENTS,
    CONSUMER_WARPS,
    HALF,
    K_CHUNKS,
    P_CHUNK,
    STAGES,
    WARPS,
    Config,
)
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.split import scan_words


class Scalars(NamedTuple):
    """scale * log2(e); the order of rows; whether `sink` counts; lse of a row without keys; row groups a request."""

    scale_log2: Float32
    packing: Packing
    has_sink: Int32
    empty_lse: Float32
    groups: Int32


@dataclass(frozen=True)
class Buffers:
    """The K buffers of an even and an odd block, as the products read them. config: has dtype and D."""

    config: Config
    k_buffers: cute.Pointer

    def rows_of(self, chunks: int) -> cute.Layout:
        """[64, 64 * chunks] from the pointer of a chunk on, which knows the swizzle."""
        return row_layout(DTYPES[self.config.dtype], BLOCK, CHUNK * chunks).outer

    def chunks(self, block: int, first: int) -> cute.Pointer:
        """Where chunk `first` of the even (0) or odd (1) block's buffer lies."""
        return self.k_buffers + (block * K_CHUNKS + first) * CHUNK_ELEMENTS

    def sK(self, block: int) -> cute.Tensor:
        """[64, 576] K of a block."""
        return cute.make_tensor(self.chunks(block, 0), self.rows_of(K_CHUNKS))

    def sV(self, block: int, half: int) -> cute.Tensor:
        """[256, 64] half of V of a block, transposed."""
        layout = cute.composition(self.rows_of(K_CHUNKS), cute.make_layout((HALF, BLOCK), stride=(BLOCK, 1)))
        return cute.make_tensor(self.chunks(block, 4 * half), layout)

    def sP(self, block: int) -> cute.Tensor:
        """[64, 64] P of a block, in its dead rope chunk."""
        return cute.make_tensor(self.chunks(block, P_CHUNK), self.rows_of(1))


@dataclass(frozen=True)
class Shared(Buffers):
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it)."""

    sQ: cute.Tensor
    sMax: cute.Tensor
    sSum: cute.Tensor
    sScan: cute.Tensor
    staged: cute.Pointer
    k: Channel
    q: Channel

    @staticmethod
    def over(config: Config, storage) -> Shared:
        dtype = DTYPES[config.dtype]
        rows, buffers = row_layout(dtype, BLOCK, config.D), row_layout(dtype, BLOCK, 2 * K_CHUNKS * CHUNK)
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        return Shared(
            config=config,
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            sMax=storage.sMax.get_tensor(cute.make_layout((TILE_M, 2))),
            sSum=storage.sSum.get_tensor(cute.make_layout((TILE_M, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            staged=storage.staged.data_ptr(),
            k=Channel.over(
                "K", k_barriers, STAGES, readers=CONSUMER_WARPS // 2 * config.sharers, cluster=config.sharers
            ),
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
        )

    @property
    def free_words(self) -> cute.Pointer:
        """The K buffers as FP32 words, for when nobody reads them any more."""
        return cute.recast_ptr(self.chunks(0, 0), swizzle_=cute.make_swizzle(0, 4, 3), dtype=Float32)

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self.q, self.k
