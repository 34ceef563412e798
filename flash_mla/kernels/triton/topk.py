"""Top-k: the columns of the k greatest scores of a row, in ascending order, the leftmost first where scores are equal.

Find a pivot: a strided sample of the row gives a score that a little more than k are expected to reach. Mark: each
score is read once, and a bit says whether it does (compact.py). Select: the columns whose bits are set are the
candidates, whose scores are held in registers as integers that order as the scores do; the range of the threshold is
narrowed, a guess and its middle a step, until k of them lie at or above it. Rows of at most `room` scores are all
candidates.

select_kernel, grid (rows), does all three; of few long rows, pivot_kernel, grid (rows), and mark_kernel, grid (rows,
parts), do the first two.

The answer never depends on the sample: where too few or too many scores reach the pivot (many equal ones can), the
selection takes the whole row instead, with a pass over it for every bit.

Bound: bytes, one read of the scores. Few rows are bound by the selection, a chain of reductions over the program: 19 us
in a launch of its own (H200, 64 rows of 32768).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.compact import list_marked, mark, running, scatter
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import power_of_2

# --- Config ---


@dataclass(frozen=True)
class Config:
    """room candidates a row, 16 a thread of warps warps; parts programs mark them, span scores a step, with a pivot
    from sample scores. parts is 0 where every score is a candidate. Where there are too many, tile scores a step are
    looked at again. ptx: of NVIDIA.
    """

    room: int
    parts: int
    span: int
    tile: int
    sample: int
    ptx: bool

    @property
    def warps(self) -> int:
        """Of select_kernel."""
        return min(16, max(1, self.room // 512))

    def aim(self, topk: int) -> int:
        """Scores that are wanted to reach the pivot: the mean of topk and room, as their ratio goes."""
        return int((topk * self.room) ** 0.5)


MAX_K = 4096
MAX_PARTS = 16
PIVOT_WARPS = 8
MARK_WARPS = 4


def config(*, rows: int, N: int, topk: int, target: Target) -> Config:
    """Room for twice topk: the pivot aims between the two. A program marks a row and selects from it, which leaves its
    scores in L2 for the selection; long rows that are too few for the SMs have more programs."""
    interpreted, ptx = target.backend == "interpreter", target.backend == "cuda"
    room = max(512 if interpreted else 4096, power_of_2(2 * topk))
    if room >= N:
        return Config(max(128, power_of_2(max(N, 1))), 0, 0, 0, 0, ptx)
    span, tile = (512, 512) if interpreted else (8192, 2048)
    # a sixteenth of the row: of 128k scores, 128 +- 9 of the sample are among the greatest 2048
    sample = min(16384, max(64 if interpreted else 2048, power_of_2(N) // 16))
    parts = 1
    if rows <= target.multiprocessors and N > (1024 if interpreted else 32768):
        # four programs an SM while a part has a span or more
        parts = min(-(-N // span), -(-4 * target.multiprocessors // rows), MAX_PARTS)
    return Config(room, parts, span, tile, sample, ptx)


# --- Steps ---

NEVER = tl.constexpr(-(2**31))
"""The integer of a score that is never selected."""
LEAST = tl.constexpr(-0x7F800000)
"""The integer of the least finite score."""
GREATEST = tl.constexpr(0x7F800000)
"""The integer of +inf."""


@triton.jit
def ordered(scores, live):
    """Integers in the order of the scores: -0 is 0, what is not live, -inf and NaN are NEVER."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(live & (scores > float("-inf")), keys, NEVER)


@triton.jit
def score_of(key):
    """The score that an integer stands for."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def finite(score):
    """The score, or the least finite one."""
    return tl.maximum(score, score_of(tl.cast(LEAST, tl.int32)))


@triton.jit
def reaching(keys, key):
    """How many of them are not less than key."""
    return tl.sum((keys >= key).to(tl.int32), 0)


@triton.jit
def halve(low, high):
    """The middle, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def guess(low, at_low, high, at_high, wanted):
    """The key that `wanted` would reach if they lay evenly from low to high, neither of both."""
    width = tl.sub(high, low, sanitize_overflow=False).to(tl.uint32, bitcast=True).to(tl.float32)
    step = width * ((at_low - wanted) / (at_low - at_high).to(tl.float32))
    key = tl.add(low, step.to(tl.uint32).to(tl.int32, bitcast=True), sanitize_overflow=False)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def least(keys):
    """(the least key, how many are there)."""
    return tl.min(tl.where(keys == NEVER, GREATEST, keys), 0), reaching(keys, LEAST)


@triton.jit
def threshold(keys, low, at_low, wanted, enough):
    """(low, at_low, high, at_high): at_low keys reach low, at_high < wanted reach high, and either high is low + 1 or
    at_low is at most `enough` (>= wanted), as it may be from the start.

    A step is a chain of reductions over the program, so it tries two keys: a guess, which takes half as many steps as
    halving does, and the middle, so that no scores make it take more.
    """
    high = tl.max(keys, 0) + 1
    at_high = 0
    while (at_low > enough) & (high > low + 1):
        guessed, middle = guess(low, at_low, high, at_high, wanted), halve(low, high)
        first, second = tl.minimum(guessed, middle), tl.maximum(guessed, middle)
        # both counts in one sum: neither exceeds 16384, the longest sample
        both = tl.sum((keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16), 0)
        at_first, at_second = both & 0xFFFF, both >> 16
        if at_first < wanted:
            high = first
            at_high = at_first
        else:
            low = tl.where(at_second < wanted, first, second)
            at_low = tl.where(at_second < wanted, at_first, at_second)
            high = tl.where(at_second < wanted, second, high)
            at_high = tl.where(at_second < wanted, at_second, at_high)
    return low, at_low, high, at_high


@triton.jit
def emit(
    out_row, keys, columns, low, high, room, aboves, equals, table_row, table_blocks,
    PAGE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Write the columns of the keys that reach high, and the leftmost `room` of those that are low, in order.

    aboves and equals: how many of either came before; returns them with these.
    """
    above = keys >= high
    equal = keys == low
    # both counts in one running sum; neither exceeds a tile
    before, total = running(above.to(tl.int32) | (equal.to(tl.int32) << 16))
    equals_before = equals + (before >> 16)
    place = aboves + (before & 0xFFFF) + tl.minimum(equals_before, room)
    chosen = above | (equal & (equals_before < room))
    rows = columns
    if PAGE > 0:
        block = tl.minimum(columns // PAGE, table_blocks - 1)
        rows = (tl.load(table_row + block, mask=chosen, other=0) * PAGE + columns % PAGE).to(tl.int32)
    scatter(out_row + place, rows, chosen, PTX)
    return aboves + (total & 0xFFFF), equals + (total >> 16)


@triton.jit
def bounds(start_ptr, end_ptr, row, N):
    """The row's columns begin <= t < end."""
    begin, end = 0, N
    if start_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), N).to(tl.int32)
    if end_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(end_ptr + row), 0), N).to(tl.int32)
    return begin, end


@triton.jit
def find_pivot(score_row, begin, end, AIM: tl.constexpr, ROOM: tl.constexpr, SAMPLE: tl.constexpr):
    """A score that about AIM of the row's are expected to reach; -inf where all that are finite are candidates."""
    length = tl.maximum(end - begin, 1)
    offs = begin + (tl.arange(0, SAMPLE).to(tl.int64) * length // SAMPLE).to(tl.int32)
    live = (offs < end) & (length > ROOM)
    keys = ordered(tl.load(score_row + offs, mask=live, other=float("-inf")), live)
    wanted = tl.maximum(tl.cast(SAMPLE, tl.int64) * AIM // length, 1).to(tl.int32)
    low, at_low = least(keys)
    low, at_low, _, _ = threshold(keys, low, at_low, wanted, wanted + wanted // 16)
    return tl.where(at_low < wanted, float("-inf"), score_of(low))


# --- Kernels ---


@triton.jit
def pivot_kernel(
    score_ptr,  # [rows, width]
    start_ptr,  # [rows]
    end_ptr,  # [rows]
    pivot_ptr,  # [rows]
    N,
    stride_row,
    AIM: tl.constexpr,
    ROOM: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds(start_ptr, end_ptr, row, N)
    tl.store(pivot_ptr + row, find_pivot(score_ptr + row * stride_row, begin, end, AIM, ROOM, SAMPLE))


@triton.jit
def mark_kernel(
    score_ptr,  # [rows, width]
    start_ptr,  # [rows]
    end_ptr,  # [rows]
    pivot_ptr,  # [rows]
    mark_ptr,  # [rows, words]
    N,
    width,
    words,
    stride_row,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds(start_ptr, end_ptr, row, N)
    # this part's spans, on multiples of SPAN so that loads are wide
    base = begin // SPAN * SPAN
    each = ((end - base + SPAN - 1) // SPAN + PARTS - 1) // PARTS * SPAN
    first = base + tl.program_id(1) * each
    last = tl.minimum(first + each, end)
    pivot = finite(tl.load(pivot_ptr + row))
    mark(score_ptr + row * stride_row, mark_ptr + row * words, pivot, begin, end, first, last, width, SPAN)


@triton.jit
def select_kernel(
    score_ptr,  # [rows, width]
    start_ptr,  # [rows]
    end_ptr,  # [rows]
    pivot_ptr,  # [rows]
    mark_ptr,  # [rows, words]
    candidate_ptr,  # [rows, ROOM]
    table_ptr,  # [rows / queries, table_blocks]
    out_ptr,  # [rows, K]
    N,
    width,
    words,
    stride_row,
    queries,
    table_blocks,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    PAGE: tl.constexpr,  # 0: columns are not mapped
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,  # 0: all scores are candidates; 1: this kernel marks them
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    AIM: tl.constexpr,
    SAMPLE: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds(start_ptr, end_ptr, row, N)
    score_row = score_ptr + row * stride_row
    out_row = out_ptr + row * K
    table_row = table_ptr
    if PAGE > 0:
        table_row += row // queries * table_blocks

    offs = tl.arange(0, ROOM)
    if PARTS == 0:
        columns = offs
        live = (offs >= begin) & (offs < end)
        scores = tl.load(score_row + offs, mask=offs < width, other=float("-inf"))
        fits = True
    else:
        mark_row = mark_ptr + row * words
        candidate_row = candidate_ptr + row * ROOM
        if PARTS == 1:
            pivot = find_pivot(score_row, begin, end, AIM, ROOM, SAMPLE)
            mark(score_row, mark_row, finite(pivot), begin, end, begin // SPAN * SPAN, end, width, SPAN)
            tl.debug_barrier()  # other threads have written what this one reads, here and below
        else:
            pivot = tl.load(pivot_ptr + row)
        total = list_marked(mark_row, candidate_row, begin, end, ROOM, SPAN, WORDS, PTX)
        fits = (total <= ROOM) & ((pivot == float("-inf")) | (total >= K))
        live = (offs < total) & fits
        tl.debug_barrier()
        columns = tl.load(candidate_row + offs, mask=live, other=0)
        scores = tl.load(score_row + columns, mask=live, other=float("-inf"))

    keys = ordered(scores, live)
    if PARTS == 0:
        low, at_low = least(keys)
    else:
        low, at_low = ordered(finite(pivot), True), tl.where(fits, total, 0)
    low, at_low, high, at_high = threshold(keys, low, at_low, K, K)
    if PARTS > 0:  # noqa: SIM102 (known when the kernel is compiled)
        if fits == 0:
            # NOTE: up to 32 passes over the row (H200, 64 rows of 128k scores of 50 values: 0.9 ms)
            low, high, at_high = tl.cast(LEAST, tl.int32), tl.cast(GREATEST, tl.int32) + 1, 0
            at_low = reaching_row(score_row, low, begin, end, width, TILE)
            while (at_low > K) & (high > low + 1):
                middle = halve(low, high)
                count = reaching_row(score_row, middle, begin, end, width, TILE)
                if count >= K:
                    low = middle
                    at_low = count
                else:
                    high = middle
                    at_high = count

    # all that reach the threshold, or all above it and of those at it the leftmost
    room = tl.where(at_low <= K, 0, K - at_high)
    high = tl.where(at_low <= K, low, high)
    aboves, equals = emit(out_row, keys, columns, low, high, room, 0, 0, table_row, table_blocks, PAGE, PTX)
    if PARTS > 0:  # noqa: SIM102
        if fits == 0:
            for t in tl.range(begin // TILE * TILE, end, TILE):
                offs_t = t + tl.arange(0, TILE)
                tile = tl.load(score_row + offs_t, mask=offs_t < width, other=float("-inf"))
                keys_t = ordered(tile, (offs_t >= begin) & (offs_t < end))
                aboves, equals = emit(
                    out_row, keys_t, offs_t, low, high, room, aboves, equals, table_row, table_blocks, PAGE, PTX
                )
    rest = tl.arange(0, K_TILE)
    tl.store(out_row + rest, tl.full([K_TILE], -1, tl.int32), mask=(rest >= tl.minimum(at_low, K)) & (rest < K))


@triton.jit
def reaching_row(score_row, key, begin, end, width, TILE: tl.constexpr):
    """How many of the row's scores are not less than key."""
    count = 0
    for t in tl.range(begin // TILE * TILE, end, TILE):
        offs = t + tl.arange(0, TILE)
        scores = tl.load(score_row + offs, mask=offs < width, other=float("-inf"))
        count += reaching(ordered(scores, (offs >= begin) & (offs < end)), key)
    return count


# --- Launch ---


def pivot_arguments(
    config: Config, *, scores: Tensor, starts: Tensor | None, ends: Tensor | None, pivots: Tensor, N: int, topk: int
) -> dict[str, Tensor | int | None]:
    """pivot_kernel's arguments."""
    return dict(
        score_ptr=scores, start_ptr=starts, end_ptr=ends, pivot_ptr=pivots, N=N, stride_row=scores.stride(0),
        AIM=config.aim(topk), ROOM=config.room, SAMPLE=config.sample,
    )  # fmt: skip


def mark_arguments(
    config: Config, *, scores: Tensor, starts: Tensor | None, ends: Tensor | None, pivots: Tensor, marks: Tensor, N: int
) -> dict[str, Tensor | int | None]:
    """mark_kernel's arguments."""
    return dict(
        score_ptr=scores, start_ptr=starts, end_ptr=ends, pivot_ptr=pivots, mark_ptr=marks, N=N,
        width=scores.shape[1], words=marks.shape[1], stride_row=scores.stride(0), PARTS=config.parts, SPAN=config.span,
    )  # fmt: skip


def select_arguments(
    config: Config,
    *,
    scores: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    pivots: Tensor | None,
    marks: Tensor | None,
    candidates: Tensor | None,
    block_table: Tensor | None,
    out: Tensor,
    N: int,
    queries: int,
    page: int,
) -> dict[str, Tensor | int | None]:
    """select_kernel's arguments."""
    return dict(
        score_ptr=scores, start_ptr=starts, end_ptr=ends, pivot_ptr=pivots, mark_ptr=marks, candidate_ptr=candidates,
        table_ptr=block_table, out_ptr=out, N=N, width=scores.shape[1], words=0 if marks is None else marks.shape[1],
        stride_row=scores.stride(0), queries=queries,
        table_blocks=0 if block_table is None else block_table.shape[1], K=out.shape[1],
        K_TILE=power_of_2(out.shape[1]), PAGE=page, ROOM=config.room, PARTS=config.parts, SPAN=config.span,
        TILE=config.tile, AIM=config.aim(out.shape[1]), SAMPLE=config.sample,
        WORDS=max(128, min(config.room // 2, power_of_2(-(-N // 32)))), PTX=config.ptx,
    )  # fmt: skip
