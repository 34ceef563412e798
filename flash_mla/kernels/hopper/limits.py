"""What the chip and the cache page fix, once for every kernel; and how shared memory is counted. Imports no DSL."""

from __future__ import annotations

BLOCK = 64
"""Tokens of a block: one cache page."""
WARP = 32
WARPGROUP = 128
"""Threads that issue a wgmma together."""
TILE_M = 64
"""Rows of a wgmma, which is what one warpgroup computes."""

STAGED = 16 * 32
"""Elements of out that a warp stages: 32 columns of its 16 rows (`staging.py`)."""

ROW_BYTES = 128
"""Bytes of a row in a chunk of shared memory: one row of the 128-byte swizzle."""
CHUNK = 64
"""Columns of a chunk of 16-bit elements."""
SMEM_BYTES = 227 * 1024
"""Shared memory that one CTA may have."""
ALIGNMENT = 1024
"""Bytes on which a swizzled buffer begins."""
TMA_BYTES = 16
"""TMA takes base addresses and strides that are multiples of this."""

REGISTERS = 64 * 1024
"""Registers of an SM, 32 bits each."""


def barrier_bytes(*stages: int) -> int:
    """Shared memory of the barriers of channels with so many stages: a full and an empty one a stage, 8 bytes each."""
    return 16 * sum(stages)


def smem_bytes(*parts: int) -> int:
    """Shared memory of a CTA whose parts take so many bytes, rounded up to what swizzled buffers are aligned on."""
    return -(-sum(parts) // ALIGNMENT) * ALIGNMENT
