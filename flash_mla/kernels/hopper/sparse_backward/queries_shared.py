"""What the roles of a sparse backward CTA share: the global tensors, and views of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M, WARP
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    EXCHANGED,
    PRODUCER_WARPS,
    Config,
)


class Tensors(NamedTuple):
    """Global memory that TMA does not touch.

    kv: its first row; indices [tokens, topk] and lengths [tokens] int32; lse2, shift and left [Hq, tokens] FP32, as
    `prepare_kernel` of the Triton backward writes them; dq [tokens, Hq, D]; weights [items, item / 2] int32, two
    elements each: dS and P (`item_of`).
    """

    kv: cute.Pointer
    indices: cute.Tensor
    lengths: cute.Tensor
    lse2: cute.Tensor
    shift: cute.Tensor
    left: cute.Tensor
    dq: cute.Tensor
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
    A warp's registers of the queries' kernel are then whole blocks, stored 128 bytes at a time, and the item is an
    operand of wgmma as it lies.
    """
    return (token * ((topk + (BLOCK - 1)) // BLOCK) + key_tile) * 2 + kind


@cute.jit
def tile_of(tensors: Tensors, scalars: Scalars, head_tiles: cutlass.Constexpr, index) -> Tile:
    """The tile of CTA `index`: all head tiles of a token, then those of the next."""
    token = index // head_tiles
    keys = Int32(tensors.indices.shape[1])
    if scalars.has_lengths != 0:
        keys = cutlass.max(0, cutlass.min(tensors.lengths[token], keys))
    return Tile(token, index - token * head_tiles, keys, (keys + (BLOCK - 1)) // BLOCK)


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory.

    sQ [64, D]; sO [64, Dv]: dout; sK [64, D]; exchange: EXCHANGED elements of each consumer; sSeen [producer warp] 16
    bits: which of its keys name a row. Channels: keys, a stage a chunk; queries, once.
    """

    config: Config
    sQ: cute.Tensor
    sO: cute.Tensor
    k: cute.Pointer
    k_address: Int32
    exchange: cute.Pointer
    sSeen: cute.Tensor
    keys: Channel
    queries: Channel

    @staticmethod
    def over(config: Config, storage) -> Shared:
        dtype = DTYPES[config.dtype]

        def tile(memory, columns: int) -> cute.Tensor:
            layout = row_layout(dtype, BLOCK, columns)
            return memory.get_tensor(layout.outer, swizzle=layout.inner)

        exchange = storage.exchange.data_ptr()
        return Shared(
            config=config,
            sQ=tile(storage.sQ, config.D),
            sO=tile(storage.sO, config.Dv),
            k=tile(storage.sK, config.D).iterator,
            k_address=storage.sK.data_ptr().toint(),
            exchange=exchange,
            sSeen=storage.sSeen.get_tensor(cute.make_layout(PRODUCER_WARPS)),
            keys=Channel.over(
                "K",
                storage.k_barriers.data_ptr(),
                config.chunks,
                readers=CONSUMER_WARPS,
                writers=PRODUCER_WARPS * (WARP + 1),
            ),
            queries=Channel.over("Q, dout", storage.q_barriers.data_ptr(), 1, readers=0),
        )

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self.keys, self.queries

    def sK(self, columns: int) -> cute.Tensor:
        """[64, columns] of K."""
        return cute.make_tensor(self.k, row_layout(DTYPES[self.config.dtype], BLOCK, columns).outer)

    def sKt(self, first: int, columns: int) -> cute.Tensor:
        """[columns, 64] of K, transposed; first: the chunk."""
        layout = row_layout(DTYPES[self.config.dtype], BLOCK, columns).outer
        turned = cute.composition(layout, cute.make_layout((columns, BLOCK), stride=(BLOCK, 1)))
        return cute.make_tensor(self.k + first * BLOCK * CHUNK, turned)

    def exchanged(self, side: int, tid, i: int) -> cute.Tensor:
        """Elements 8 i to 8 i + 7 that a thread of consumer `side` hands over."""
        place = self.exchange + side * EXCHANGED + (8 * 128 * i + 8 * tid)
        return cute.make_tensor(place.align(16), cute.make_layout(8))


assert TILE_M == BLOCK
