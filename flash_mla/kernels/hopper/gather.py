"""Rows that indices name, copied into the swizzled chunks that wgmma reads: `cp.async`, 16 bytes a thread.

A block is 64 rows in shared memory, cut into chunks of 64 columns: 64 rows of 128 bytes, the 16-byte pieces of row r at
places p ^ (r % 8) (the 128-byte swizzle). Four warps copy it, 16 rows each. A warp copies four rows with one
instruction, eight threads a row: 128 bytes of each, one L2 line.

A lane holds one index of its warp's rows; a row that no key names (a negative index, or one past the last row) arrives
as zeros and memory is not read there, so that V of a key with P = 0 is finite whatever the row holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

WARPS = 4
ROWS = 16
"""Rows of a block that a warp copies."""
PASS = 4
"""Rows that a warp copies with one instruction."""
PASSES = ROWS // PASS
PIECE = 16
"""Bytes a thread copies with one instruction."""
CHUNK_BYTES = 64 * 128
NO_ROW = -1
"""An index that names no row."""


@cute.jit
def count_keys(indices: cute.Tensor, lengths: cute.Tensor, has_lengths, token):
    """How many of a token's indices [tokens, topk] count: `lengths` [tokens] says, or all do."""
    keys = Int32(indices.shape[1])
    if has_lengths != 0:
        keys = cutlass.max(0, cutlass.min(lengths[token], keys))
    return keys


@cute.jit
def row_named(indices: cute.Tensor, token, key, keys, num_rows):
    """The row that index number `key` of a token's first `keys` names; negative, as NO_ROW is, for none."""
    row = Int32(NO_ROW)
    if key < keys:
        row = indices[token, key]
    return row if row < num_rows else Int32(NO_ROW)


def place(warp, lane, i):
    """Byte of a chunk at which the piece of a lane lies in pass i: swizzled."""
    row, piece = ROWS * warp + PASS * i + lane // 8, lane % 8
    return 128 * row + PIECE * (piece ^ (row % 8))


class Sources(NamedTuple):
    """For each pass, the address of this thread's first piece in global memory, and the bytes to read: 16 or 0."""

    addresses: list[Int64]
    sizes: list[Int32]


@dataclass(frozen=True)
class Gather:
    """One thread of the four warps. first: address of its piece of row 0; even, odd: its places in passes 0 and 1."""

    first: Int64
    row_bytes: Int64
    even: Int32
    odd: Int32

    @staticmethod
    def over(rows: cute.Pointer, row_bytes, warp, lane) -> Gather:
        first = Int64(rows.toint()) + Int64(PIECE * (lane % 8))
        return Gather(first, Int64(row_bytes), place(warp, lane, 0), place(warp, lane, 1) - 128 * PASS)

    @cute.jit
    def sources(self, index, first_lane: cutlass.Constexpr) -> Sources:
        """Where this thread reads; `index` of lane first_lane + r is that of the warp's row r, NO_ROW for none."""
        addresses, sizes = [], []
        for i in cutlass.range_constexpr(PASSES):
            row = cute.arch.shuffle_sync(index, first_lane + PASS * i + cute.arch.lane_idx() // 8)
            addresses.append(self.first + Int64(cutlass.max(row, 0)) * self.row_bytes)
            sizes.append(Int32(0) if row < 0 else Int32(PIECE))
        return Sources(addresses, sizes)

    @cute.jit
    def copy(self, block: Int32, sources: Sources, chunks: cutlass.Constexpr[Iterable[int]]) -> None:
        """Start copying these chunks of the warp's rows; block: the shared-memory address of chunk 0."""
        for i in cutlass.range_constexpr(PASSES):
            target = block + (self.even if i % 2 == 0 else self.odd)
            for chunk in chunks:
                cute.arch.inline_ptx(
                    "cp.async.cg.shared.global.L2::128B "
                    f"[{{$r0}} + {CHUNK_BYTES * chunk + 128 * PASS * i}], [{{$r1}} + {128 * chunk}], 16, {{$r2}};",
                    read_only_args=[target, sources.addresses[i], sources.sizes[i]],
                )
