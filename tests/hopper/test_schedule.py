"""The order and key ranges of the Hopper prefill against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla.kernels.hopper.prefill import schedule


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, int, schedule.Order]:
    """(row tiles, heads, an order)."""
    row_tiles, heads, section = draw(st.integers(1, 30)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
    late = min(heads, section * draw(st.integers(0, 4)))
    return row_tiles, heads, schedule.Order(section, late, row_tiles // draw(st.integers(2, 5)) if late else 0)


@settings(max_examples=300, deadline=None)
@given(orders())
def test_every_tile_once_section_by_section(case: tuple[int, int, schedule.Order]) -> None:
    row_tiles, heads, order = case
    tiles = [schedule.tile(i, row_tiles, heads, order) for i in range(row_tiles * heads)]
    assert sorted(tiles) == [(row, head) for row in range(row_tiles) for head in range(heads)]

    # the tail: the lightest tiles of the last heads, heaviest first
    early = heads - order.late
    body, tail = tiles[: len(tiles) - order.late * order.tail], tiles[len(tiles) - order.late * order.tail :]
    assert {tile.head for tile in tail} <= set(range(early, heads))
    rows = [tile.row_tile for tile in tail]
    assert rows == sorted(rows, reverse=True)
    assert set(rows) == set(range(order.tail))
    # the rest: section after section, heaviest first
    first = [early if tile.head >= early else 0 for tile in body]
    sections = [(head0, (tile.head - head0) // order.section) for tile, head0 in zip(body, first, strict=True)]
    assert sections == sorted(sections)
    for number in set(sections):
        rows = [tile.row_tile for tile, own in zip(body, sections, strict=True) if own == number]
        assert rows == sorted(rows, reverse=True)


MIB = 2**20


@pytest.mark.parametrize(
    ("kv_bytes", "ratio", "heads", "row_tiles", "causal", "expected"),
    [
        (2 * MIB, 1, 512, 32, False, (8, 0, 0)),  # 4096 keys of 128 + 128 BF16
        (2 * MIB, 1, 512, 32, True, (8, 64, 8)),
        (2 * MIB, 1, 32, 32, True, (8, 32, 11)),
        (2 * MIB, 1, 16, 32, True, (16, 0, 0)),  # all of it stays in the L2
        (2 * MIB, 4, 64, 32, True, (64, 0, 0)),
        (2 * MIB, 1, 512, 1, True, (8, 64, 0)),
        (8 * MIB, 1, 128, 128, True, (4, 16, 32)),  # 16384
        (8 * MIB, 1, 128, 128, False, (2, 0, 0)),
        (10 * MIB, 1, 128, 128, True, (2, 12, 37)),  # 16384 of 192 + 128
        (8 * MIB, 4, 64, 128, True, (16, 64, 16)),  # GQA: query heads
        (2**30, 4, 32, 128, True, (8, 8, 45)),
        (0, 1, 3, 3, True, (3, 0, 0)),
    ],
)
def test_order(
    kv_bytes: int, ratio: int, heads: int, row_tiles: int, causal: bool, expected: tuple[int, int, int]
) -> None:
    assert schedule.order(kv_bytes, ratio, heads, row_tiles, causal, 132) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 500),
    st.integers(0, 400),
    st.sampled_from([64, 128, 192]),
    st.booleans(),
    st.sampled_from([64, 80, 128]),
)
def test_blocks(length: int, first: int, rows: int, causal: bool, tile_n: int) -> None:
    row, key = torch.arange(rows)[:, None], torch.arange(20 * tile_n)
    sees = (key < length) & ((key <= first + row) | (not causal))
    tiles = sees.view(rows, 20, tile_n)
    total, whole = schedule.blocks(length, first, rows, causal, tile_n)
    needed, full = (x.nonzero().flatten().tolist() for x in (tiles.any(0).any(-1), tiles.all(0).all(-1)))
    assert needed == list(range(len(needed)))
    assert total == max(1, len(needed))
    assert full == list(range(whole))
