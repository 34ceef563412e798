"""What the roles of a sparse prefill CTA share: the global tensors, and views of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP
from flash_mla.kernels.hopper.mla_decode.config import CONSUMER_WARPS, K_CHUNKS, STAGES
from flash_mla.kernels.hopper.mla_decode.shared import Buffers
from flash_mla.kernels.hopper.sparse_prefill.config import PAIR, PRODUCER_WARPS, Config


class Tensors(NamedTuple):
    """Global memory, all but q, which only TMA reads.

    kv: its first row; indices [tokens, topk] and lengths [tokens] int32; sink [Hq] FP32; out [tokens, Hq, 512]; lse and
    max_logits [tokens, Hq] FP32, natural log.
    """

    kv: cute.Pointer
    indices: cute.Tensor
    lengths: cute.Tensor
    sink: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    max_logits: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); lse of a token without keys; bytes from row to row of kv, and its rows; tiles in all, and a
    token; whether `lengths` and `sink` count.
    """

    scale_log2: Float32
    empty_lse: Float32
    row_bytes: Int64
    num_rows: Int32
    tiles: Int32
    head_tiles: Int32
    has_lengths: Int32
    has_sink: Int32


class Tile(NamedTuple):
    """A tile: the token, which group of its heads, how many of the token's ids count, and the steps that they take."""

    token: Int32
    group: Int32
    keys: Int32
    pairs: Int32


@cute.jit
def tile_at(tensors: Tensors, scalars: Scalars, index) -> Tile:
    """The tile with this number: all head tiles of a token, then those of the next; past the last, one without keys."""
    token = index // scalars.head_tiles
    keys = Int32(tensors.indices.shape[1])
    if index >= scalars.tiles:
        keys = Int32(0)
    elif scalars.has_lengths != 0:
        keys = cutlass.max(0, cutlass.min(tensors.lengths[token], keys))
    return Tile(token, index - token * scalars.head_tiles, keys, (keys + (PAIR - 1)) // PAIR)


@dataclass(frozen=True)
class Shared(Buffers):
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it).

    sMax, sSum, sTop [64, 2] FP32: of each row and consumer, the running max, the sum, and the greatest score; sSeen
    [2, 4] 16 bits: of each block and producer warp, which of its keys name a row.
    """

    k_address: Int32
    sQ: cute.Tensor
    sMax: cute.Tensor
    sSum: cute.Tensor
    sTop: cute.Tensor
    sSeen: cute.Tensor
    staged: cute.Pointer
    k: Channel
    q: Channel

    @staticmethod
    def fields(config: Config) -> dict[str, Any]:
        """The memory of this kind of CTA alone."""
        array = cute.struct.MemRange
        return {
            "staged": cute.struct.Align[array[DTYPES[config.dtype], CONSUMER_WARPS * STAGED], 128],
            "sMax": array[Float32, 2 * TILE_M],
            "sSum": array[Float32, 2 * TILE_M],
            "sTop": array[Float32, 2 * TILE_M],
        }

    @staticmethod
    def over(config: Config, storage) -> Shared:
        dtype = DTYPES[config.dtype]
        rows, buffers = row_layout(dtype, BLOCK, config.D), row_layout(dtype, BLOCK, 2 * K_CHUNKS * CHUNK)
        k_barriers, q_barriers = storage.k_barriers.data_ptr(), storage.q_barriers.data_ptr()
        two = cute.make_layout((TILE_M, 2))
        return Shared(
            config=config,
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            k_address=storage.sK.data_ptr().toint(),
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            sMax=storage.sMax.get_tensor(two),
            sSum=storage.sSum.get_tensor(two),
            sTop=storage.sTop.get_tensor(two),
            sSeen=storage.sSeen.get_tensor(cute.make_layout((2, PRODUCER_WARPS), stride=(PRODUCER_WARPS, 1))),
            staged=storage.staged.data_ptr(),
            # every producer thread arrives when its copies have landed, and a lane of each warp when it has said what
            # is seen
            k=Channel.over("K", k_barriers, STAGES, readers=CONSUMER_WARPS // 2, writers=PRODUCER_WARPS * (WARP + 1)),
            q=Channel.over("Q", q_barriers, 1, readers=CONSUMER_WARPS),
        )
