"""Which tile comes when, and which keys it sees: the order of a persistent prefill, as plain index arithmetic.

A tile is TILE_M query rows of one head of one request; `heads` counts the heads of all requests, a level is one row
tile of each of some heads. Tiles are handed out in the order of their numbers, each CTA taking the next when it is done
(a counter in global memory). The order serves two ends.

L2: heads are taken in sections of eight KV heads or fewer, all tiles of a section before the next, so that the CTAs
that run together read the K and V of few heads, which then come from DRAM once. With 32 heads a section, 128 heads of
4096 keys read 20.9 GB of DRAM where 1.6 will do, and the power for that cost 12 % of the clock.

Balance: the last rows of a causal call see the most keys, so a section begins with its heaviest level. What is uneven
at the end of the call, small tiles must even out; so the lightest levels of the last heads are kept for the end: of as
many heads as keep those keys in the L2, and as many levels as there is to even out.

    heads 0 .. early             section | section | ...         all levels, heaviest first
    heads early .. the last      section | section | ...         all but the lightest levels
                                 the tail: the lightest levels, of all of these heads

Every function takes Python ints (tests) or the DSL's Int32 (the kernel), with `least`, `most` and `pick` for min, max
and `a if condition else b`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

L2_BYTES = 32 * 2**20
"""K and V that stay in the L2 (50 MB) while other data pass through it."""
SECTION_HEADS = 8
"""KV heads of a section, at most."""


class Order(NamedTuple):
    """The order of a call: query heads of a section; heads that have a tail, the last ones; levels of the tail."""

    section: Any
    late: Any
    tail: Any


def order(kv_bytes: int, ratio: int, heads: int, row_tiles: int, causal: bool, ctas: int) -> Order:
    """The order of a call; kv_bytes: K and V of one KV head, which `ratio` query heads read."""
    if kv_bytes * heads <= L2_BYTES * ratio:
        return Order(heads, 0, 0)  # all K and V stay: balance alone counts
    # NOTE: a causal tile reads half of them, on average. Two heads at least: all CTAs would ask for one head's lines at
    # once (614 against 661 TFLOP/s). A power of two, so that sections come out even
    fit = L2_BYTES // (kv_bytes if causal else 2 * kv_bytes)
    section = ratio * next(n for n in (SECTION_HEADS, 4, 2) if n <= max(2, fit))
    if not causal:
        return Order(section, 0, 0)
    late = min(heads, max(1, 4 * L2_BYTES // kv_bytes * ratio // section) * section)
    # heavy tiles leave half of one uneven on each CTA, ctas * row_tiles / 2 blocks; the tail has late * tail^2 / 2
    tail = math.isqrt(ctas * row_tiles // late)
    return Order(section, late, min(tail, row_tiles // 2))


class Tile(NamedTuple):
    """A tile: which row tile of which head (request * Hq + head)."""

    row_tile: Any
    head: Any


def choose(condition: Any, a: Any, b: Any) -> Any:
    """a if the condition holds, else b."""
    return a if condition else b


def tile(
    index: Any,
    row_tiles: Any,
    heads: Any,
    order: Order,
    least: Callable[..., Any] = min,
    pick: Callable[..., Any] = choose,
) -> Tile:
    """The tile with this number."""
    early = heads - order.late
    is_late = index >= early * row_tiles
    index = index - pick(is_late, early * row_tiles, 0 * index)
    count = pick(is_late, order.late, early)
    tail = pick(is_late, order.tail, 0 * index)
    # the tail is one section, below the others
    body = count * (row_tiles - tail)
    in_tail = index >= body
    index = index - pick(in_tail, body, 0 * index)
    levels = pick(in_tail, tail, row_tiles - tail)
    section = pick(in_tail, count, order.section)
    lowest = pick(in_tail, 0 * index, tail)

    number = index // (section * levels)
    inside = index - number * section * levels
    width = least(section, count - number * section)
    level = inside // width
    head = number * section + inside - level * width
    return Tile(lowest + levels - 1 - level, head + pick(is_late, early, 0 * index))


class Blocks(NamedTuple):
    """Key blocks of a tile: `total` of them, of which the first `whole` are seen by every row to their last key."""

    total: Any
    whole: Any


def blocks(
    length: Any,
    first: Any,
    rows: int,
    causal: Any,
    tile_n: int,
    least: Callable[..., Any] = min,
    most: Callable[..., Any] = max,
) -> Blocks:
    """The key blocks of the tile whose first row is at position `first`; at least one, so that zeros are written."""
    reach, seen = length, length
    if causal:
        reach, seen = least(length, first + rows), least(length, first + 1)
    total = most(1, (most(reach, 0) + tile_n - 1) // tile_n)
    return Blocks(total, most(seen, 0) // tile_n)
