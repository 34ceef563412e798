"""The rows that the Hopper sparse decode reads are those of the row formats; no GPU, no DSL."""

from __future__ import annotations

import pytest
import torch

from flash_mla.kernels.hopper.limits import SMEM_BYTES
from flash_mla.kernels.hopper.sparse_decode.config import CHUNK, ROWS, STAGES, TILES, Config
from flash_mla.quant import FORMATS, RowFormat

CONFIGS = [
    Config(rows, caches, tile, cluster)
    for rows in ROWS
    for caches in (1, 2)
    for tile in TILES
    for cluster in (1, 2)
    if cluster == 1 or tile == 64
] + [Config("fp8_ds_mla", caches, 64, halves=True) for caches in (1, 2)]


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=str)
def test_rows_are_the_formats(fmt: RowFormat) -> None:
    row = ROWS[fmt.name]
    pages = fmt.empty(2, page=5).view(torch.uint8)
    codes, scales, rope = fmt.parts(pages)

    def start(part: torch.Tensor) -> int:
        return part[1, 3].storage_offset() - codes[1, 3].storage_offset()

    assert (CHUNK * row.codes, CHUNK * row.wide) == (fmt.quantised, fmt.rope)
    assert (row.group or None, row.apart) == (fmt.tile, fmt.scale_bytes if fmt.page_split else 0)
    assert {"fp32": torch.float32, "e8m0": torch.float8_e8m0fnu}.get(row.scale or "") == (
        fmt.scale_dtype if fmt.tile else None
    )
    if fmt.rope:
        assert row.wide_at == start(rope)
    if fmt.page_split:
        # what `place_in` adds to a row's address
        assert start(scales) == 5 * row.row_bytes + 3 * row.apart - 3 * row.row_bytes
        assert row.row_bytes == codes.stride(1)
    else:
        assert row.row_bytes == fmt.row_bytes
        assert row.scale is None or row.scale_at == start(scales)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_batches_hold_every_chunk_once(config: Config) -> None:
    batches = config.batches()
    for stage in range(STAGES):
        chunks = [chunk for batch in batches if batch.stage == stage for chunk in batch.chunks]
        assert chunks == config.stage_chunks(stage)
    for block in range(2):
        assert sorted(config.stage_chunks(2 * block) + config.stage_chunks(2 * block + 1)) == list(range(config.chunks))
    assert [batch.stage for batch in batches] == sorted(batch.stage for batch in batches)
    # two buffers of registers take turns, from one pair to the next too
    assert len(batches) % 2 == 0


def test_shared_memory_fits() -> None:
    assert max(config.smem_bytes() for config in CONFIGS) <= SMEM_BYTES
