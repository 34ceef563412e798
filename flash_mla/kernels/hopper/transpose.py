"""The transposing load of matrices from shared memory."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def transpose_load(address):
    """Four 8 x 8 matrices of 16-bit elements from shared memory, transposed; lane l gives the address of row l."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )
