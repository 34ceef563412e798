"""How a decode's work is shared: which KV blocks of which request a program takes, found on the device.

The work is one line of units. A unit is one 64-token block of one (request, KV head); requests follow one another, and
inside a request its KV heads. Every request counts at least one block, so that an empty one is visited and its row
written. Each of `programs` programs takes `share` consecutive units, at least MIN_SHARE; a request's heads are items,
and an item that lies across a boundary between two shares is merged by the combine kernel.

`units`, `share_size` and `locate` are the only definitions; decode and combine call them, so that they agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
TILE_B = tl.constexpr(128)
"""Requests that one step of a prefix sum takes."""


@triton.jit
def request_length(seq_lens_ptr, b, table_blocks):
    """Keys of request b, no more than its table row covers."""
    return tl.minimum(tl.load(seq_lens_ptr + b), table_blocks * BLOCK).to(tl.int32)


@triton.jit
def units(length):
    """Blocks that a request of this length counts for one KV head."""
    return tl.maximum((length + BLOCK - 1) // BLOCK, 1)


@triton.jit
def block_id(table_row_ptr, t, Nblk):
    """The physical block of token t, forced into the cache."""
    entry = tl.load(table_row_ptr + tl.cast(t, tl.int32) // BLOCK)
    return tl.minimum(tl.maximum(entry, 0), Nblk - 1).to(tl.int64)


@triton.jit
def slot(t):
    """The place of token t in its block."""
    return tl.cast(t, tl.int32) % BLOCK


@triton.jit
def share_size(seq_lens_ptr, B, table_blocks, Hk, programs, MIN_SHARE: tl.constexpr):
    """(units of the whole call, units a program takes)."""
    total = 0
    for first in tl.range(0, B, TILE_B, num_stages=1):
        b = first + tl.arange(0, TILE_B)
        length = tl.minimum(tl.load(seq_lens_ptr + b, mask=b < B, other=0), table_blocks * BLOCK).to(tl.int32)
        total += tl.sum(tl.where(b < B, units(length), 0), 0)
    total = total * Hk
    return total, tl.maximum((total + programs - 1) // programs, MIN_SHARE)


@triton.jit
def locate(seq_lens_ptr, B, table_blocks, Hk, unit):
    """(request that owns this unit, the request's first unit)."""
    request = 0
    request_start = 0
    seen = 0
    for first in tl.range(0, B, TILE_B, num_stages=1):
        b = first + tl.arange(0, TILE_B)
        length = tl.minimum(tl.load(seq_lens_ptr + b, mask=b < B, other=0), table_blocks * BLOCK).to(tl.int32)
        size = tl.where(b < B, units(length), 0) * Hk
        before = (seen + tl.cumsum(size, 0) <= unit) & (b < B)
        request += tl.sum(before.to(tl.int32), 0)
        request_start += tl.sum(tl.where(before, size, 0), 0)
        seen += tl.sum(size, 0)
    return request, request_start
