"""Compaction: a bit for every score that is kept, and the list of the columns whose bits are set, in order.

A score costs a comparison and its share of three steps of a warp that gather 32 bits in a word; only what is kept costs
a place and a store. Giving every score a place by a running sum took 63 instructions a score, a bit takes 9.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def running(x):
    """(sum of what came before each, the sum of all) of a tile of a multiple of 16.

    NOTE: 16 in a row are four threads, so that two steps of a warp scan them; 128 in a row take five.
    """
    rows = tl.reshape(x, [x.shape[0] // 16, 16])
    totals = tl.sum(rows, 1)
    before = tl.cumsum(rows, 1) - rows + (tl.cumsum(totals, 0) - totals)[:, None]
    return tl.reshape(before, [x.shape[0]]), tl.sum(totals, 0)


SCATTER = tl.constexpr("""{
    .reg .pred chosen;
    setp.ne.s32 chosen, $3, 0;
    @chosen st.global.b32 [$1], $2;
    mov.b32 $0, 0;
}""")


@triton.jit
def scatter(pointers, values, mask, PTX: tl.constexpr):
    """tl.store of int32.

    NOTE: Triton gives a store to scattered places one element a thread at a time, and pointers, values and mask another
    layout, by way of shared memory; the store in PTX takes them where they are.
    """
    if PTX:
        tl.inline_asm_elementwise(
            SCATTER, "=r,l,r,r", [pointers, values, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit
def ones(x):
    """How many bits of an int32 are set, in the form that LLVM knows as one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (tl.mul(x, 0x01010101, sanitize_overflow=False) >> 24).to(tl.int32)


@triton.jit
def mark(score_row, mark_row, pivot, begin, end, first, last, width, SPAN: tl.constexpr):
    """Write a bit a column of the spans from first up to last: whether its score reaches the pivot."""
    bit = 1 << (tl.arange(0, SPAN) % 32)
    # NOTE: into registers: through shared memory, in stages, top-k takes 1.14 times as long (H200, 4096 rows of 32768)
    for t in tl.range(first, last, SPAN, num_stages=1):
        offs = t + tl.arange(0, SPAN)
        # NOTE: the mask names width alone, so that four scores are one access where it is a multiple of 16
        scores = tl.load(score_row + offs, mask=offs < width, other=float("-inf"))
        marks = tl.where(scores >= pivot, bit, 0)
        if (t < begin) | (t + SPAN > end):
            marks = tl.where((offs >= begin) & (offs < end), marks, 0)
        tl.store(mark_row + t // 32 + tl.arange(0, SPAN // 32), tl.sum(tl.reshape(marks, [SPAN // 32, 32]), 1))


@triton.jit
def list_marked(
    mark_row, candidate_row, begin, end, ROOM: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Write the marked columns in order, WORDS words a step, unless they would be more than ROOM; return how many."""
    total = 0
    for w in tl.range(begin // SPAN * SPAN // 32, (end + 31) // 32, WORDS):
        word = w + tl.arange(0, WORDS)
        left = tl.load(mark_row + word, mask=word * 32 < end, other=0)
        count = ones(left)
        place, more = running(count)
        place += total
        total += more
        most = tl.where(total <= ROOM, tl.max(count, 0), 0)
        for _ in tl.range(0, most, num_stages=1):
            less = tl.sub(left, 1, sanitize_overflow=False)
            scatter(candidate_row + place, word * 32 + ones(less & ~left), left != 0, PTX)
            left = left & less
            place += 1
    return total
