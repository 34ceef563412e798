"""What the roles of a sparse prefill share: its tensors, its numbers, its shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.sparse_prefill.config import BLOCK, CONSUMERS, DV, K_CHUNKS, TILE_M, Config

CHUNK_ELEMENTS = BLOCK * 64
HALF = DV // 2


class Tensors(NamedTuple):
    """Global memory, all but q, which only TMA reads.

    rows: the first row of kv; indices [tokens, topk] and lengths [requests] int32; sink [Hq] FP32; out [tokens, Hq,
    512]; lse, max_logits [tokens, Hq] FP32, natural log.
    """

    rows: cute.Pointer
    indices: cute.Tensor
    lengths: cute.Tensor
    sink: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    max_logits: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); bytes between rows of kv, and rows; tiles in all, head tiles and query tokens a request; whether
    `lengths` and `sink` count.
    """

    scale_log2: cutlass.Float32
    row_bytes: Int64
    num_rows: Int32
    tiles: Int32
    head_tiles: Int32
    S_q: Int32
    has_lengths: Int32
    has_sink: Int32


@cute.jit
def keys_of(tensors: Tensors, scalars: Scalars, token):
    """How many of a token's indices count."""
    keys = tensors.indices.shape[1]
    if scalars.has_lengths != 0:
        keys = cutlass.max(0, cutlass.min(tensors.lengths[token // scalars.S_q], keys))
    return keys


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it)."""

    sQ: cute.Tensor
    k_buffers: cute.Pointer
    k_address: Int32
    sMax: cute.Tensor
    sSum: cute.Tensor
    sTop: cute.Tensor
    sSeen: cute.Tensor
    staged: cute.Pointer
    k: Channel
    q: Channel
    row_layout: Callable[[int], cute.ComposedLayout]

    @staticmethod
    def over(config: Config, storage, row_layout: Callable[[int], cute.ComposedLayout]) -> Shared:
        rows, buffers = row_layout(config.chunks), row_layout(2 * K_CHUNKS)
        per_row = cute.make_layout((TILE_M, 2))
        return Shared(
            sQ=storage.sQ.get_tensor(rows.outer, swizzle=rows.inner),
            k_buffers=storage.sK.get_tensor(buffers.outer, swizzle=buffers.inner).iterator,
            k_address=storage.sK.data_ptr().toint(),
            sMax=storage.sMax.get_tensor(per_row),
            sSum=storage.sSum.get_tensor(per_row),
            sTop=storage.sTop.get_tensor(per_row),
            sSeen=storage.sSeen.get_tensor(cute.make_layout((2, 4), stride=(4, 1))),
            staged=storage.staged.data_ptr(),
            k=Channel.over(storage.k_barriers.data_ptr(), 4, 4),
            q=Channel.over(storage.q_barriers.data_ptr(), 1, CONSUMERS // 32),
            row_layout=row_layout,
        )

    def chunks(self, block: int, first: int) -> cute.Pointer:
        """Where chunk `first` of the even (0) or odd (1) block's buffer lies."""
        return self.k_buffers + (block * K_CHUNKS + first) * CHUNK_ELEMENTS

    def sK(self, block: int) -> cute.Tensor:
        """[64, 576] K of a block."""
        return cute.make_tensor(self.chunks(block, 0), self.row_layout(K_CHUNKS).outer)

    def sV(self, block: int, half: int) -> cute.Tensor:
        """[256, 64] half of V of a block, transposed."""
        layout = cute.composition(self.row_layout(K_CHUNKS).outer, cute.make_layout((HALF, BLOCK), stride=(BLOCK, 1)))
        return cute.make_tensor(self.chunks(block, 4 * half), layout)

    def sP(self, block: int) -> cute.Tensor:
        """[64, 64] P of a block, in its dead rope chunk."""
        return cute.make_tensor(self.chunks(block, K_CHUNKS - 1), self.row_layout(1).outer)
