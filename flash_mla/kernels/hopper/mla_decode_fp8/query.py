"""16-bit queries over an FP8 cache: each row as the sum of two e4m3 rows (`e4m3.split_row`)."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import const_expr

from flash_mla.kernels.hopper.e4m3 import split_row
from flash_mla.kernels.hopper.limits import TILE_M
from flash_mla.kernels.hopper.mla_decode_fp8.config import CHUNK, DV, ROPE, WARPS_A_GROUP
from flash_mla.kernels.hopper.mla_decode_fp8.shared import Shared

QUERY_WARPS = 2 * WARPS_A_GROUP
"""The values warps, who have nothing else to do before the first P."""
TOGETHER = 4
"""Rows whose loads a warp has in flight."""
PIECE = 8
"""Elements of a 16-byte load."""


@cute.jit
def load_query(shared: Shared, q: cute.Tensor, request, row0, warp_id) -> None:
    """The CTA's tile of q [B, rows, D], from row `row0` on, into sQ, and its units into sUnit; by eight warps.

    Rows past the request's are zeros.
    """
    config, lane, sUnit = shared.config, cute.arch.lane_idx(), shared.sUnit
    own, pieces = config.tile_n // QUERY_WARPS, -(-config.D // (32 * PIECE))
    together = min(TOGETHER, own)
    first_query = own * warp_id
    values = cute.make_rmem_tensor(cute.make_layout((PIECE, pieces, together)), q.element_type)
    for first in cutlass.range(first_query, first_query + own, together, unroll=1):
        values.fill(0.0)
        for i in cutlass.range_constexpr(together):
            if row0 + first + i < q.shape[1]:
                for p in cutlass.range_constexpr(pieces):
                    if 32 * p + lane < config.D // PIECE:
                        piece = cute.local_tile(q[request, row0 + first + i, None], (PIECE,), (32 * p + lane,))
                        cute.autovec_copy(piece, values[None, p, i])
        for i in cutlass.range_constexpr(together):
            unit = store_row(shared, values[None, None, i], config.tile_row(first + i), lane)
            if lane == 0:
                sUnit[first + i] = unit
    cute.arch.fence_view_async_shared()


@cute.jit
def store_row(shared: Shared, values: cute.Tensor, row, lane):
    """One row as two of e4m3, the first at row `row` of sQ; returns the power of two by which they are too small."""
    high, low, unit = split_row(values)
    # the second term: eight rows further on, or in a tile of its own
    second = row + (8 if const_expr(shared.config.q_tiles == 1) else TILE_M)
    for p in cutlass.range_constexpr(values.shape[1]):
        store_piece(shared, 32 * p + lane, row, high[2 * p : 2 * p + 2])
        store_piece(shared, 32 * p + lane, second, low[2 * p : 2 * p + 2])
    return unit


@cute.jit
def store_piece(shared: Shared, piece, row, words) -> None:
    """Eight bytes of row `row` of all tiles of sQ, where the swizzle has them."""
    # NOTE: 16 bytes c of row i lie at place c ^ i % 8 of its 128 bytes, or c ^ (i / 2) % 4 of 64
    tile, at = row // TILE_M, row % TILE_M
    address = shared.sQ.iterator.toint() + tile * (TILE_M * DV) + piece // 16 * (TILE_M * CHUNK)
    address = address + at * CHUNK + ((piece % 16 // 2) ^ (at % 8)) * 16
    if const_expr(shared.config.rope > 0):
        rope = shared.sQ_rope.iterator.toint() + tile * (TILE_M * ROPE)
        rope = rope + at * ROPE + ((piece % 8 // 2) ^ (at // 2 % 4)) * 16
        address = rope if piece >= DV // PIECE else address
    if piece < shared.config.D // PIECE:
        cute.arch.inline_ptx(
            "st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address + piece % 2 * 8, *words]
        )
