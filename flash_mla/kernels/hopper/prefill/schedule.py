"""Which tile comes when, and which keys it sees: the order of a persistent prefill, as plain index arithmetic.

A tile is TILE_M query rows of one head of one request; `heads` counts the heads of all requests. Tiles are handed out
in the order of their numbers, each CTA taking the next when it is done (a counter in global memory). The order serves
two ends. Balance: the last rows of a causal call see the most keys, so tiles come heaviest first, and the light ones
even out what is left. L2: heads are taken in sections, all tiles of a section before the next, so that several CTAs
read the same K and V at about the same time and DRAM gives them once for all. Few heads a section are worse again: all
CTAs then ask for the same lines at once, and the last section balances badly (docs/kernels.md, "Hopper prefill").

Every function takes Python ints (tests) or the DSL's Int32 (the kernel), with `least` and `most` for min and max.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SECTION_HEADS = 32
"""KV heads of a section: four of 132 CTAs read each."""
SECTION_BYTES = 32 * 2**20
"""K and V that a section may have beyond that: they stay in the L2 (50 MB) in any case."""


def section(kv_bytes: int, ratio: int, heads: int) -> int:
    """Query heads of a section; kv_bytes: K and V of one KV head, which `ratio` query heads read."""
    return min(heads, max(SECTION_HEADS, SECTION_BYTES // max(1, kv_bytes)) * ratio)


class Tile(NamedTuple):
    """A tile: which row tile of which head (request * Hq + head)."""

    row_tile: Any
    head: Any


def tile(index: Any, row_tiles: Any, heads: Any, section: Any, least: Callable[..., Any] = min) -> Tile:
    """The tile with this number: section by section, in each the last rows of all its heads first."""
    number = index // (section * row_tiles)
    inside = index - number * section * row_tiles
    width = least(section, heads - number * section)
    level = inside // width
    return Tile(row_tiles - 1 - level, number * section + inside - level * width)


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
