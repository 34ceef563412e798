"""Loads of matrices from shared memory: lane l gives the address of row l of four 8 x 8 matrices of 16-bit elements."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def transpose_load(address):
    """The matrices transposed: a thread's two elements of each are neighbours in a column."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )


@cute.jit
def matrix_load(address):
    """The matrices as they are: a thread's two elements of each are neighbours in a row."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )
