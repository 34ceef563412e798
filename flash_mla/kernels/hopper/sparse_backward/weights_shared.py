"""What the roles of a CTA of the sparse backward's weights share: the global tensors, and views of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gather import count_keys
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M, WARP, WARPGROUP
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    PRODUCER_WARPS,
    ROW_STAGES,
    Config,
)


class Tensors(NamedTuple):
    """Global memory that TMA does not touch.

    kv: its first row; indices [tokens, topk] and lengths [tokens] int32; lse2, shift and left [Hq, tokens] FP32, as
    `prepare_kernel` of the Triton backward writes them; weights [items, item / 2] int32, two elements each: dS and P
    (`item_of`).
    """

    kv: cute.Pointer
    indices: cute.Tensor
    lengths: cute.Tensor
    lse2: cute.Tensor
    shift: cute.Tensor
    left: cute.Tensor
    weights: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); scale; bytes from row to row of kv, and its rows; whether `lengths` counts."""

    scale_log2: Float32
    scale: Float32
    row_bytes: Int64
    num_rows: Int32
    has_lengths: Int32


class Tile(NamedTuple):
    """A CTA's tile: the token, which group of its heads, how many of its ids count, and the steps that they take."""

    token: Int32
    group: Int32
    keys: Int32
    steps: Int32


@cute.jit
def item_of(token, topk, key_tile, kind: cutlass.Constexpr):
    """The number of an item of the workspace: dS (0) or P (1) of 64 keys and all heads of a token.

    It consists of pieces of 64 heads, and they of 8 x 8 blocks, a head's 8 keys side by side, those of the keys first.
    A warp's registers of the weights' kernel are then whole blocks, stored 128 bytes at a time, and the item is an
    operand of wgmma as it lies.
    """
    return (token * ((topk + (BLOCK - 1)) // BLOCK) + key_tile) * 2 + kind


@cute.jit
def tile_of(tensors: Tensors, scalars: Scalars, head_tiles: cutlass.Constexpr, index) -> Tile:
    """The tile of CTA `index`: all head tiles of a token, then those of the next."""
    token = index // head_tiles
    keys = count_keys(tensors.indices, tensors.lengths, scalars.has_lengths, token)
    return Tile(token, index - token * head_tiles, keys, (keys + (BLOCK - 1)) // BLOCK)


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory.

    ring [64, D, stages]: Q, then dout of a tile, then K of its steps; exchange: P that side 0 hands over; sSeen [stage,
    producer warp] 16 bits: which of its keys name a row. Channel: what comes by the ring (`item` counts it).
    """

    config: Config
    ring: cute.Pointer
    address: Int32
    exchange: cute.Pointer
    sSeen: cute.Tensor
    rows: Channel

    @staticmethod
    def over(config: Config, storage) -> Shared:
        layout = row_layout(DTYPES[config.dtype], BLOCK, config.D)
        return Shared(
            config=config,
            ring=storage.ring.get_tensor(layout.outer, swizzle=layout.inner).iterator,
            address=storage.ring.data_ptr().toint(),
            exchange=storage.exchange.data_ptr(),
            sSeen=storage.sSeen.get_tensor(cute.make_layout(ROW_STAGES * PRODUCER_WARPS)),
            rows=Channel.over(
                "Q, dout, K",
                storage.barriers.data_ptr(),
                ROW_STAGES,
                readers=CONSUMER_WARPS,
                writers=PRODUCER_WARPS * (WARP + 1),
            ),
        )

    def sK(self, columns: int) -> cute.Tensor:
        """[64, columns, stages] of K."""
        rows = row_layout(DTYPES[self.config.dtype], BLOCK, self.config.D * ROW_STAGES).outer
        shape = (BLOCK, columns, ROW_STAGES)
        view = cute.make_layout(shape, stride=(1, BLOCK, BLOCK * self.config.D))
        return cute.make_tensor(self.ring, cute.composition(rows, view))

    def exchanged(self, tid, i: int) -> cute.Tensor:
        """Elements 8 i to 8 i + 7 that a thread hands over."""
        place = self.exchange + (8 * WARPGROUP * i + 8 * tid)
        return cute.make_tensor(place.align(16), cute.make_layout(8))


assert TILE_M == BLOCK
