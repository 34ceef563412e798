"""Tiles in shared memory as TMA writes and wgmma reads them: chunks of 128-byte (or 64-byte) rows, swizzled."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync, warpgroup

from flash_mla.kernels.hopper.limits import ROW_BYTES

SWIZZLES = {128: warpgroup.SmemLayoutAtomKind.K_SW128, 64: warpgroup.SmemLayoutAtomKind.K_SW64}
"""By the bytes of a chunk's row."""


def row_layout(
    dtype, rows: int, columns: int, stages: int | None = None, row_bytes: int = ROW_BYTES
) -> cute.ComposedLayout:
    """[rows, columns] or [rows, columns, stages]: chunks one after another, each `rows` rows of swizzled bytes."""
    atom = warpgroup.make_smem_layout_atom(SWIZZLES[row_bytes], dtype)
    shape = (rows, columns) if stages is None else (rows, columns, stages)
    return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))


class Tma(NamedTuple):
    """TMA between a tensor in global memory and shared memory: the copy, and the coordinates by which it is asked."""

    atom: cute.CopyAtom
    tensor: cute.Tensor


def load_of(tensor: cute.Tensor, rows: int, columns: int, multicast: bool = False) -> Tma:
    """Loads of boxes [rows, columns], one chunk each; multicast: to several CTAs of a cluster."""
    op = cpasync.CopyBulkTensorTileG2SMulticastOp() if multicast else cpasync.CopyBulkTensorTileG2SOp()
    return tma_of(op, tensor, rows, columns)


def store_of(tensor: cute.Tensor, rows: int, columns: int) -> Tma:
    """Stores of boxes [rows, columns], one chunk each."""
    return tma_of(cpasync.CopyBulkTensorTileS2GOp(), tensor, rows, columns)


def tma_of(op: Any, tensor: cute.Tensor, rows: int, columns: int) -> Tma:
    """Copies of boxes [rows, columns], one chunk each."""
    dtype = tensor.element_type
    layout = row_layout(dtype, rows, columns, row_bytes=columns * dtype.width // 8)
    return Tma(*cpasync.make_tiled_tma_atom(op, tensor, layout, (rows, columns)))


def tma_boxes(tma: cute.CopyAtom, memory: cute.Pointer, many: cute.Layout, tensor: cute.Tensor, box, coordinate):
    """(shared, global) tensors of boxes for `cute.copy(tma, ...)`, the box itself in mode 0.

    memory: the first box in shared memory; many: the layout of the boxes there; box: (rows, columns), one chunk;
    coordinate: the tiles of `tensor`, the tensor that came with the TMA atom, as `cute.local_tile` takes it.
    """
    layout = row_layout(memory.dtype, *box, row_bytes=box[1] * memory.dtype.width // 8)
    smem = cute.make_tensor(memory, cute.append(layout.outer, many))
    gmem = cute.local_tile(tensor, box, coordinate)
    one_cta = cute.make_layout(1)
    return cpasync.tma_partition(tma, 0, one_cta, cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2))


@cute.jit
def zero_rows(memory: cute.Pointer, rows: cutlass.Constexpr, chunks: cutlass.Constexpr, first, tid) -> None:
    """Zero rows [first, rows) of `chunks` chunks from `memory` on, by one warpgroup; first may be negative.

    A V tile's rows past the last key: P is 0 there, but 0 * NaN is NaN. wgmma may read them behind the fence, which is
    here, and a barrier of the warpgroup, which is the caller's.
    """
    # NOTE: whole rows, so the swizzle, which trades 16-byte pieces within a row, may be left out
    words = cute.make_tensor(
        cute.recast_ptr(memory, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Int32),
        cute.make_layout((32, rows, chunks), stride=(1, 32, 32 * rows)),
    )
    for row in cutlass.range(cutlass.max(first, 0) + tid % 128 // 32, rows, 4, unroll=1):
        for chunk in cutlass.range_constexpr(chunks):
            words[tid % 32, row, chunk] = Int32(0)
    cute.arch.fence_view_async_shared()
