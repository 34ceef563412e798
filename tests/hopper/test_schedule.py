"""The order and key ranges of the Hopper prefill against brute force."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla.kernels.hopper.prefill import schedule


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40))
def test_every_tile_once_heaviest_first(row_tiles: int, heads: int, section: int) -> None:
    tiles = [schedule.tile(i, row_tiles, heads, section) for i in range(row_tiles * heads)]
    assert sorted(tiles) == [(row, head) for row in range(row_tiles) for head in range(heads)]
    sections = [tile.head // section for tile in tiles]
    assert sections == sorted(sections)
    for number in set(sections):
        rows = [tile.row_tile for tile, own in zip(tiles, sections, strict=True) if own == number]
        assert rows == sorted(rows, reverse=True)


def test_section() -> None:
    # 8192 keys of 128 + 128 BF16: 4 MiB a head
    assert schedule.section(4 * 2**20, 1, 256) == 32
    assert schedule.section(4 * 2**20, 4, 256) == 128
    assert schedule.section(2**19, 1, 256) == 64
    assert schedule.section(2**30, 4, 32) == 32
    assert schedule.section(1, 1, 3) == 3
    assert schedule.section(0, 1, 3) == 3


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 500),
    st.integers(0, 400),
    st.sampled_from([64, 128, 192]),
    st.booleans(),
    st.sampled_from([64, 80, 128]),
)
def test_blocks(length: int, first: int, rows: int, causal: bool, tile_n: int) -> None:
    def sees(row: int, key: int) -> bool:
        return key < length and (not causal or key <= first + row)

    total, whole = schedule.blocks(length, first, rows, causal, tile_n)
    needed = [n for n in range(20) if any(sees(row, n * tile_n + i) for row in range(rows) for i in range(tile_n))]
    full = [n for n in range(20) if all(sees(row, n * tile_n + i) for row in range(rows) for i in range(tile_n))]
    assert needed == list(range(len(needed)))
    assert total == max(1, len(needed))
    assert full == list(range(whole))
