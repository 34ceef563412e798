"""How a decode's work is shared: which KV blocks of which request a program takes, found on the device.

The work is one line of units. A unit is one 64-token block of one (request, KV head); requests follow one another, and
inside a request its KV heads. Every request counts at least one block, so that an empty one is visited and its row
written. Each of `programs` programs takes an equal share of consecutive units. A request's heads are items; an item
that lies across a boundary between shares is merged by the combine kernel, which calls the same `locate`.

A batch-invariant call has no shares: each item is cut into pieces whose size follows from its own length, at most
MOST_PIECES, and each piece is a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
PIECE = 32
"""Units of a piece of a batch-invariant call, at least: 2048 tokens."""
MOST_PIECES = 16
"""Of an item."""
TILE_B = tl.constexpr(128)
"""Requests that one step of a prefix sum takes."""
VARYING = ("B", "Nblk", "capacity", "stride_tb")
"""Arguments that change while a server runs. Triton would compile a kernel anew, 5 to 10 s, for each that becomes a
multiple of 16 or ceases to be one; no access to memory is wider for it."""


@triton.jit
def request_length(seq_lens_ptr, b, capacity):
    """Keys of request b, no more than its table row covers; an int64 is clamped before it is narrowed."""
    return tl.maximum(tl.minimum(tl.load(seq_lens_ptr + b), capacity), 0).to(tl.int32)


@triton.jit
def units(length):
    """Blocks that a request of this length counts for one KV head."""
    return tl.maximum((length + BLOCK - 1) // BLOCK, 1)


@triton.jit
def request_units(seq_lens_ptr, b, B, capacity):
    """Units of one KV head of the requests b [TILE_B]; 0 past the last."""
    length = tl.minimum(tl.load(seq_lens_ptr + b, mask=b < B, other=0), capacity)
    return tl.where(b < B, units(tl.maximum(length, 0).to(tl.int32)), 0)


@triton.jit
def block_id(table_row_ptr, t, Nblk, PAGE: tl.constexpr = BLOCK):
    """The physical page of the tokens t, forced into the cache."""
    entry = tl.load(table_row_ptr + tl.cast(t, tl.int32) // PAGE)
    return tl.minimum(tl.maximum(entry, 0), Nblk - 1).to(tl.int64)


@triton.jit
def slot(t, PAGE: tl.constexpr = BLOCK):
    """The place of the tokens t in their pages."""
    return tl.cast(t, tl.int32) % PAGE


@triton.jit
def locate(seq_lens_ptr, B, capacity, Hk, programs, index):
    """Where share `index` of `programs` begins: (units in all, units a share, request, the request's first unit)."""
    if B == 1:  # known when the kernel is compiled: a single request skips the sums
        total = units(request_length(seq_lens_ptr, 0, capacity)) * Hk
        share = (total + programs - 1) // programs
        return total, share, tl.cast(index * share >= total, tl.int32), 0
    total = 0
    for first in tl.range(0, B, TILE_B, num_stages=1):
        total += tl.sum(request_units(seq_lens_ptr, first + tl.arange(0, TILE_B), B, capacity), 0)
    total = total * Hk
    share = (total + programs - 1) // programs
    request = 0
    request_start = 0
    seen = 0
    for first in tl.range(0, B, TILE_B, num_stages=1):
        b = first + tl.arange(0, TILE_B)
        size = request_units(seq_lens_ptr, b, B, capacity) * Hk
        before = (seen + tl.cumsum(size, 0) <= index * share) & (b < B)
        request += tl.sum(before.to(tl.int32), 0)
        request_start += tl.sum(tl.where(before, size, 0), 0)
        seen += tl.sum(size, 0)
    return total, share, request, request_start


@triton.jit
def first_unit(
    seq_lens_ptr, B, Hk, capacity, program, programs, SPLIT: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """What a program takes: (the request, its first unit, the program's first unit, the one past its last).

    SPLIT: a share, or with PIECE units at least a piece of an item; otherwise an item.
    """
    if PIECE > 0:
        most = programs // (B * Hk)
        b = program // most // Hk
        size = units(request_length(seq_lens_ptr, b, capacity))
        item = program // most % Hk * size
        each = piece_units(size, PIECE, MOST)
        start = item + tl.minimum(program % most * each, size)
        return b, 0, start, tl.minimum(start + each, item + size)
    if SPLIT:
        total, share, b, request_start = locate(seq_lens_ptr, B, capacity, Hk, programs, program)
        start = program * share
        return b, request_start, start, tl.minimum(start + share, total)
    b = program // Hk
    size = units(request_length(seq_lens_ptr, b, capacity))
    start = (program % Hk) * size
    return b, 0, start, start + size


@triton.jit
def piece_units(size, PIECE: tl.constexpr, MOST: tl.constexpr):
    """Units of the pieces of an item of `size` units."""
    return tl.maximum((size + MOST - 1) // MOST, PIECE)


def pieces(capacity: int) -> int:
    """Pieces that an item may have whose request has room for `capacity` tokens in the table."""
    return max(1, min(-(-capacity // (PIECE * BLOCK.value)), MOST_PIECES))
