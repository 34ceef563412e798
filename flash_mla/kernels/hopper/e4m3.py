"""P in e4m3, and words of four e4m3: made from FP32, and turned from rows of a cache into columns.

P = 2^(S - reference). e4m3 has four bits from 2^-6 to 448 = 2^8.8, so that the reference decides which weights survive.
In decode it stays whole powers of two below a row's largest score so far, whose P is exact then: the errors are 4 %
smaller. In prefill it moves only where P would leave what e4m3 holds well: O is then rarely rescaled.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_mla.kernels.hopper.lanes import warp_max
from flash_mla.kernels.hopper.softmax import Rows

PEAK = 6.0
"""Where a row's reference puts the largest P of a block when it moves: below 2^7, and the largest of all at 2^6."""
HIGHEST = 8.0
"""A block whose largest P would lie above 2^8 moves the reference up. So no key that is rounded, by up to 5.9 %, weighs
more than four times as much as one that is exact."""
LOWEST = 0.0
"""A block whose largest P would lie below 2^0 moves it down."""
FAR = 30.0
"""But not to a block whose largest score is 2^-30 of the largest so far."""


@cute.jit
def move_reference(rows: Rows, tops: cute.Tensor, r: cutlass.Constexpr, peak, exact: cutlass.Constexpr = True) -> None:
    """Move the reference `rows.max` of a row if a block's P would leave what e4m3 holds well; exact: and to every new
    maximum, whole powers of two below it.

    tops: the largest score of each row so far, LOW before the first; peak: that of the block. All base 2.
    """
    before, old = tops[r], rows.max[r]
    top = cute.arch.fmax(before, peak)
    low = peak < old + LOWEST and peak > top - FAR
    moves = peak > old + HIGHEST or low
    reference = peak - PEAK
    if const_expr(exact):
        moves = peak > before or moves
        reference = top - cute.math.floor(top - peak) - PEAK
    rows.move_max(r, reference if moves else old)
    tops[r] = top


@cute.jit
def pack(a, b, c, d):
    """Four numbers as e4m3 in a word, and, in FP16 pairs, the sums a + c and b + d of what was rounded."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 lo, hi; .reg .b32 x, y; cvt.rn.satfinite.e4m3x2.f32 lo, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, {$r3}, {$r2}; mov.b32 {$w0}, {lo, hi}; "
        "cvt.rn.f16x2.e4m3x2 x, lo; cvt.rn.f16x2.e4m3x2 y, hi; add.rn.f16x2 {$w1}, x, y; }",
        write_only_types=[Int32, Int32],
        read_only_args=[a, b, c, d],
    )


@cute.jit
def pack_twice(a, b, c, d):
    """Four numbers as e4m3 in a word, and what that leaves of them as e4m3 in another."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 lo, hi, h<4>; .reg .b32 x, y; .reg .f32 f<4>; cvt.rn.satfinite.e4m3x2.f32 lo, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, {$r3}, {$r2}; mov.b32 {$w0}, {lo, hi}; "
        "cvt.rn.f16x2.e4m3x2 x, lo; cvt.rn.f16x2.e4m3x2 y, hi; mov.b32 {h0, h1}, x; mov.b32 {h2, h3}, y; "
        "cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1; cvt.f32.f16 f2, h2; cvt.f32.f16 f3, h3; "
        "sub.f32 f0, {$r0}, f0; sub.f32 f1, {$r1}, f1; sub.f32 f2, {$r2}, f2; sub.f32 f3, {$r3}, f3; "
        "cvt.rn.satfinite.e4m3x2.f32 lo, f1, f0; cvt.rn.satfinite.e4m3x2.f32 hi, f3, f2; mov.b32 {$w1}, {lo, hi}; }",
        write_only_types=[Int32, Int32],
        read_only_args=[a, b, c, d],
    )


@cute.jit
def powers(peak):
    """The power of two that takes `peak` to 2^7 .. 2^8, and its inverse."""
    return cute.arch.inline_ptx(
        "{ .reg .s32 e, d; shr.u32 e, {$r0}, 23; max.s32 e, e, 8; min.s32 e, e, 254; sub.s32 d, 261, e; "
        "shl.b32 d, d, 23; sub.s32 e, e, 7; shl.b32 e, e, 23; mov.b32 {$w0}, d; mov.b32 {$w1}, e; }",
        write_only_types=[Float32, Float32],
        read_only_args=[peak],
    )


@cute.jit
def split_row(values: cute.Tensor):
    """A row of 16-bit numbers as the sum of two of e4m3, by one warp: (words of the first, words of the second, unit).

    values: this lane's numbers, four a word; unit: the power of two by which both rows are too small. Four bits of a
    number and four more of the rest are the eight bits of a BF16, so that products with both rows are those of BF16 (of
    FP16 up to 2^-9). The row is first multiplied by a power of two that takes its largest number to 2^7 .. 2^8; what
    then lies below 2^-9 is lost: 2^-17 of the largest.
    """
    peak = Float32(0.0)
    for i in cutlass.range_constexpr(cute.size(values)):
        number = values[i].to(Float32)
        peak = cute.arch.fmax(peak, cute.arch.fmax(number, -number))
    factor, unit = powers(warp_max(peak))
    high, low = [], []
    for i in cutlass.range_constexpr(0, cute.size(values), 4):
        words = pack_twice(*(values[i + at].to(Float32) * factor for at in range(4)))
        high.append(words[0])
        low.append(words[1])
    return high, low, unit


@cute.jit
def sum_pairs(a, b, c, d):
    """Sum of eight FP16, four pairs."""
    low, high = cute.arch.inline_ptx(
        "{ .reg .b32 x, y; .reg .b16 h, i; add.rn.f16x2 x, {$r0}, {$r1}; add.rn.f16x2 y, {$r2}, {$r3}; "
        "add.rn.f16x2 x, x, y; mov.b32 {h, i}, x; cvt.f32.f16 {$w0}, h; cvt.f32.f16 {$w1}, i; }",
        write_only_types=[Float32, Float32],
        read_only_args=[a, b, c, d],
    )
    return low + high


@cute.jit
def word(a, b, c, d):
    """Four numbers as e4m3 in a word."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, {$r3}, {$r2}; mov.b32 {$w0}, {lo, hi}; }",
        write_only_types=[Int32],
        read_only_args=[a, b, c, d],
    )


@cute.jit
def separate(low, high):
    """Bytes (key 0, d 0), (0, 1), (1, 0), (1, 1) of keys 0, 1 and of 8, 9 -> keys 0, 1, 8, 9 of d 0 and of d 1."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, 0x6420; prmt.b32 {$w1}, {$r0}, {$r1}, 0x7531;",
        write_only_types=[Int32, Int32],
        read_only_args=[low, high],
    )


@cute.jit
def separate_either(low, high, odd):
    """The same, d 1 before d 0 where `odd` is 1, not 0."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 a, b; mad.lo.s32 a, {$r2}, 0x1111, 0x6420; xor.b32 b, a, 0x1111; "
        "prmt.b32 {$w0}, {$r0}, {$r1}, a; prmt.b32 {$w1}, {$r0}, {$r1}, b; }",
        write_only_types=[Int32, Int32],
        read_only_args=[low, high, odd],
    )
