"""Words of raw rows for 64 heads: codes times their scales as pairs of FP16, BF16 columns as FP16."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from flash_mla.kernels.hopper.gqa_decode.consumer import convert_pairs
from flash_mla.kernels.hopper.sparse_decode.raw_consumer import two_halves


@cute.jit
def scaled_halves(codes, scales):
    """Four e4m3 of a word as FP16 pairs, the first two and the last two, times a pair of FP16."""
    low, high = two_halves(codes)
    return multiply_pairs(low, high, scales)


@cute.jit
def scaled_columns(codes, scales):
    """e4m3 bytes (key 0, d 0), (0, 1), (1, 0), (1, 1) as FP16 pairs of keys, d 0 and d 1, times a pair of FP16."""
    even, odd = convert_pairs(codes)
    return multiply_pairs(even, odd, scales)


@cute.jit
def multiply_pairs(first, second, scales):
    """Two pairs of FP16 times a third."""
    return cute.arch.inline_ptx(
        "mul.rn.f16x2 {$w0}, {$r0}, {$r2}; mul.rn.f16x2 {$w1}, {$r1}, {$r2};",
        write_only_types=[Int32, Int32],
        read_only_args=[first, second, scales],
    )


def read_twice(address, offset: int):
    """16 bits of shared memory, in both halves of a word."""
    return cute.arch.inline_ptx(
        f"{{ .reg .b16 h; ld.shared.b16 h, [{{$r0}} + {offset}]; mov.b32 {{$w0}}, {{h, h}}; }}",
        write_only_types=[Int32],
        read_only_args=[address],
    )


@cute.jit
def larger_bf16(first, second):
    """The larger magnitudes of two pairs of BF16, the first of which are not negative."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 a, b; mov.b32 a, {$r0}; and.b32 b, {$r1}, 0x7fff7fff; max.bf16x2 {$w0}, a, b; }",
        write_only_types=[Int32],
        read_only_args=[first, second],
    )
