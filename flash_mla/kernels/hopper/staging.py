"""Rows of an accumulator to global memory, through a piece of shared memory that each warp has for itself.

A thread holds two neighbouring columns of a row in every eight: stored from registers they would be 16 bytes of 8 rows
an instruction. By way of the staging a warp writes 64 bytes of 8 rows, with a quarter of the instructions.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

TILE_PITCH = 256 + 8
"""Elements between the rows of `store_tile`: neither side then has bank conflicts."""
TILE_STAGED = 16 * TILE_PITCH


@cute.jit
def store_rows(
    O: cute.Tensor,  # [64, columns] / 128 threads
    scales: cute.Tensor,  # [2]: of this thread's two rows
    staged: cute.Pointer,  # STAGED elements of this warp
    out: cute.Tensor,  # [rows, at least column0 + columns], columns contiguous
    row0,
    column0: cutlass.Constexpr,
    tid,
) -> None:
    """O, scaled, to the rows of `out` from row `row0` on that it has, 32 columns at a time.

    tid: of the thread among those that hold the tile.
    """
    lane, warp_row = tid % 32, tid // 32 * 16
    # 16 rows of four 16-byte pieces, piece c of row i at place c ^ (i / 2) % 4: neither side then has bank conflicts
    written, read = lane % 16, lane // 4
    piece = cute.make_rmem_tensor(8, out.element_type)
    for group in cutlass.range_constexpr(cute.size(O) // 16):
        for half in cutlass.range_constexpr(2):
            place = (2 * half + lane // 16) ^ ((written // 2) % 4)
            store_eight(O, 2 * group + half, scales, staged + 32 * written + 8 * place, out.element_type)
        cute.arch.sync_warp()
        for r in cutlass.range_constexpr(2):
            i, row = read + 8 * r, row0 + warp_row + read + 8 * r
            place = (lane % 4) ^ ((i // 2) % 4)
            cute.autovec_copy(cute.make_tensor((staged + 32 * i + 8 * place).align(16), cute.make_layout(8)), piece)
            if row < out.shape[0]:
                columns = column0 // 8 + 4 * group + lane % 4
                cute.autovec_copy(piece, cute.local_tile(out[row, None], (8,), (columns,)))
        cute.arch.sync_warp()


@cute.jit
def store_tile(
    O: cute.Tensor,  # [64, 256] / 128 threads
    scales: cute.Tensor,  # [2]: of this thread's two rows
    staged: cute.Pointer,  # TILE_STAGED elements of this warp
    out: cute.Tensor,  # [rows, at least column0 + 256], columns contiguous
    row0,
    column0: cutlass.Constexpr,
    tid,
) -> None:
    """As `store_rows`, through a piece that holds all that a warp has: one wait, and whole rows an instruction."""
    lane, warp_row = tid % 32, tid // 32 * 16
    written = staged + TILE_PITCH * (lane % 16) + 8 * (lane // 16)
    for eight in cutlass.range_constexpr(cute.size(O) // 8):
        store_eight(O, eight, scales, written + 16 * eight, out.element_type)
    cute.arch.sync_warp()
    pieces = cute.make_rmem_tensor((8, 4), out.element_type)
    for first in cutlass.range_constexpr(0, 16, 4):
        for r in cutlass.range_constexpr(4):
            source = (staged + TILE_PITCH * (first + r) + 8 * lane).align(16)
            cute.autovec_copy(cute.make_tensor(source, cute.make_layout(8)), pieces[None, r])
        for r in cutlass.range_constexpr(4):
            row = row0 + warp_row + first + r
            if row < out.shape[0]:
                cute.autovec_copy(pieces[None, r], cute.local_tile(out[row, None], (8,), (column0 // 8 + lane,)))


@cute.jit
def late(value):
    """The same value, opaque: addresses made of it are not made ahead of a loop, in registers that the loop lacks."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[Int32(value)])


@cute.jit
def store_eight(O: cute.Tensor, eight: cutlass.Constexpr, scales: cute.Tensor, place: cute.Pointer, dtype) -> None:
    """Eight elements of each thread, scaled: 16 rows of 16 columns. place: of eight columns of row `lane % 16`."""
    packed = cute.make_rmem_tensor(8, dtype)
    words = cute.recast_tensor(packed, Int32)
    for i in cutlass.range_constexpr(8):
        packed[i] = (O[8 * eight + i] * scales[(i // 2) % 2]).to(dtype)
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[place.toint(), words[0], words[1], words[2], words[3]],
    )
