"""The Hopper sparse prefill without a GPU: what it takes, where its gather puts rows, what the assembler made of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from sass import NEEDS, Sass, compiled, gates

from flash_mla.backends import hopper
from flash_mla.backends.hopper import sparse_prefill
from flash_mla.kernels.hopper.limits import BLOCK, SMEM_BYTES
from flash_mla.kernels.hopper.sparse_prefill.config import BINS, CHUNK_BYTES, Config, bin_shift
from flash_mla.problem import SparseProblem, SparseSet

CONFIGS = [Config("bf16", 576), Config("bf16", 512), Config("fp16", 576)]
FEW = [Config("bf16", 576, 8), Config("bf16", 576, 16), Config("fp16", 512, 16)]
needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)


def problem(**changes: object) -> SparseProblem:
    """4096 tokens of 128 heads, 2048 of 65536 rows each."""
    keys = SparseSet(
        topk=2048, pages=1, page=65536, cache_strides=(65536 * 576, 576), index_strides=(2048, 2048), lengths=False
    )
    base = SparseProblem(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        B=4096,
        S_q=1,
        Hq=128,
        D=576,
        Dv=512,
        format=None,
        sets=(keys,),
        q_strides=(128 * 576, 128 * 576, 576, 1),
        sink=False,
        max_logits=True,
    )
    return base._replace(**changes)  # type: ignore[arg-type]


def rows(**changes: int) -> dict[str, object]:
    return {"sets": (problem().sets[0]._replace(**changes),)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16},
        {"Hq": 1},
        {"Hq": 200, "sink": True},
        {"D": 512, "q_strides": (128 * 512, 128 * 512, 512, 1)},
        rows(topk=1, lengths=True),
        rows(cache_strides=(0, 1024)),
    ],
)
def test_takes(changes: dict[str, object]) -> None:
    assert hopper.phase(problem(**changes)) is sparse_prefill
    assert sparse_prefill.refuse(problem(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"format": "fp8_ds_mla"}, "fp8_ds_mla"),
        ({"D": 128, "Dv": 128}, "D = 128"),
        ({"Dv": 256}, "Dv = 256"),
        ({"S_q": 2}, "query tokens"),
        (rows(pages=2), "pages"),
        ({"sets": problem().sets * 2}, "several caches"),
        (rows(page=2**31), "at most"),
        (rows(cache_strides=(0, 580)), "kv stride"),
        ({"q_strides": (128 * 580, 128 * 580, 580, 1)}, "q stride"),
        ({"q_strides": (576, 576, 0, 1)}, "overlap"),
    ],
)
def test_refuses(changes: dict[str, object], reason: str) -> None:
    assert reason in str(sparse_prefill.refuse(problem(**changes)))


@pytest.mark.parametrize(
    ("changes", "order"),
    [({}, True), (rows(page=8192), False), ({"B": 100}, False), (rows(topk=64), False), (rows(topk=8193), False)],
)
def test_orders_ids_where_the_l2_does_not_hold_the_rows(changes: dict[str, object], order: bool) -> None:
    assert sparse_prefill.config(problem(**changes)) == (Config("bf16", 576), order)


@pytest.mark.parametrize(("Hq", "tile"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 64), (64, 64), (65, 64), (200, 64)])
def test_few_heads_are_the_n_of_the_products(Hq: int, tile: int) -> None:
    assert sparse_prefill.config(problem(Hq=Hq)).kernel == Config("bf16", 576, tile)


@pytest.mark.parametrize("num_rows", [1, 2, 31, 32, 33, 1000, 65536, 65537, 2**31 - 1])
def test_bins_hold_every_row(num_rows: int) -> None:
    last = (num_rows - 1) >> bin_shift(num_rows)
    assert last < BINS
    assert last >= BINS // 2 or num_rows <= BINS // 2


@pytest.mark.parametrize("config", CONFIGS + FEW, ids=str)
def test_stages_cover_each_chunk_once(config: Config) -> None:
    for block in range(2):
        halves = [config.stage_chunks(stage) for stage in range(2 * block, 2 * block + 2)]
        assert sorted(chunk for half in halves for chunk in half) == list(range(config.chunks))
        # V's left and right columns: what each consumer frees
        assert [set(half) & set(range(8)) for half in halves] == [set(range(4)), set(range(4, 8))]
    assert config.smem_bytes() <= SMEM_BYTES


@needs_dsl
def test_gather_places_each_piece_once_and_swizzled() -> None:
    from flash_mla.kernels.hopper.gather import PASSES, ROWS, WARPS, place

    found = {
        place(warp, lane, i): (ROWS * warp + 4 * i + lane // 8, lane % 8)
        for warp in range(WARPS)
        for lane in range(32)
        for i in range(PASSES)
    }
    assert sorted(found) == list(range(0, CHUNK_BYTES, 16))
    for byte, (row, piece) in found.items():
        assert byte // 128 == row < BLOCK
        # the 128-byte swizzle: address bits 4 to 6 are xored with bits 7 to 9
        plain = 128 * row + 16 * piece
        assert byte == plain ^ (plain >> 3 & 0x70)
    for warp in range(WARPS):
        for lane in range(32):
            # passes two apart lie 1024 bytes apart, so that two registers address all of them
            assert [place(warp, lane, i + 2) - place(warp, lane, i) for i in range(2)] == [1024, 1024]


def marked(test):
    """The test with the marks of all that compile."""
    for mark in NEEDS:
        test = mark(test)
    return test


@marked
def test_order_compiles(tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.sparse_prefill.order import build

    assert compiled(build, None, tmp_path).spills == (0, 0, 0)


@marked
@pytest.mark.parametrize("config", gates(CONFIGS[:2], CONFIGS[2:]), ids=str)
def test_compiles(config: Config, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.sparse_prefill.kernel import build

    sass = compiled(build, config, tmp_path)
    check(sass, config)
    # rows of out, 16 bytes a thread: a stride of unknown divisor would make it 2
    assert sass.count(r"STG\.E\.128") >= 32
    # Q K^T in three places; P V: 4 steps, two blocks, in three places
    assert sass.count("HGMMA") == 3 * config.D // 16 + 3 * 2 * 4
    # NOTE: serialised wgmma shows as one wait an instruction
    assert sass.count(r"WARPGROUP\.DEPBAR") < 16


@marked
@pytest.mark.parametrize("config", gates(FEW[:1], FEW[1:]), ids=str)
def test_few_heads_compile(config: Config, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.sparse_prefill.kernel import build

    sass = compiled(build, config, tmp_path)
    check(sass, config)
    # K Q^T; V^T P^T: 4 steps of 16 keys for each 64 columns
    assert sass.count("HGMMA") == config.D // 16 + 4 * 8
    assert sass.count(r"WARPGROUP\.DEPBAR") == 2


def check(sass: Sass, config: Config) -> None:
    """Entry registers, no spills, and the copies of a pair: 16 bytes a thread of four rows of a chunk, two blocks."""
    assert sass.resources == [(168, 0)]
    assert sass.spills == (0, 0, 0)
    assert sass.count(r"LDGSTS\.E\.BYPASS\.LTC128B\.128") == 2 * 4 * config.chunks
