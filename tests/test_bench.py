"""The bench: its FLOP and byte model by hand, its gate, its clocks and its reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flash_mla.bench import measure as measure_module
from flash_mla.bench import plot, report, timing
from flash_mla.bench.cases import CASES, Case
from flash_mla.bench.measure import measure, select
from flash_mla.bench.peers import Peer, peers
from flash_mla.bench.sparse import (
    SPARSE_CASES,
    IndexBench,
    SparseBench,
    SparseDecodeBench,
    SparsePrefillBench,
    TopkBench,
)
from flash_mla.bench.timing import Ceilings, alternate, extra_bytes, median_ratio
from flash_mla.testing import DecodeCase, PrefillCase

CEILINGS = Ceilings(gbps=10.0, tflops=0.2, how="made up")
GQA = Case(DecodeCase("decode/gqa", (128, 128), 4, 2, 64, spare=0), ("cpu",))
MLA = Case(DecodeCase("decode/mla", (128, 128), 4, 1, 96, 64, alias=True, spare=0), ("cpu",))
POOL = Case(DecodeCase("decode/pool", (128, 128), 4, 2, 64, layout="pool", spare=36), ("cpu",))
CAUSAL = Case(PrefillCase("prefill/causal", 192, 1, Hq=2, Hk=2, D=64, causal=True), ("cpu",))
SPARSE = Case(PrefillCase("prefill/sparse", 256, 1, Hq=2, Hk=2, D=64, causal=False), ("cpu",), density=0.25)


def named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@pytest.mark.parametrize(
    ("name", "flops", "nbytes"),
    [
        # 2 GEMMs x 2 FLOPs x 32 heads x 1024 keys x 128; q and out 2 x 32 x 128, K and V 2 x 8 x 1024 x 128, 2 bytes
        ("decode/gqa-32x8-d128-b1-s1024", 16_777_216, 4_210_688),
        # 2 x 16 requests x 128 heads x 4096 keys x (576 + 512); rows of 576 read once, q 576 and out 512 a head
        ("decode/mla-128x576-b16-s4096", 18_253_611_008, 79_953_920),
        # query 0 sees 8191 keys, query 1 sees 8192
        ("decode/mla-128x576-b128-s8192-q2", 2 * 128 * 128 * (8191 + 8192) * 1088, 128 * 2 * (256 * 1088 + 8192 * 576)),
        # 2 x 8 heads x 2048 * 2049 / 2 pairs x 256; q, k, v and out of 8 x 2048 x 128
        ("prefill/causal-d128-h8-b1-2048", 8_594_128_896, 16_777_216),
        # 64 block rows x 16 blocks of 64 x 64
        ("prefill/block-sparse-25-d128-h8-4096", 2 * 8 * 64 * 16 * 4096 * 256, 33_554_432),
    ],
)
def test_flop_and_byte_model(name: str, flops: int, nbytes: int) -> None:
    case = named(name)
    assert case.flops == flops
    assert case.bytes == nbytes


def test_names_are_unique_and_say_the_phase() -> None:
    names = [c.name for c in (*CASES, *SPARSE_CASES)]
    assert len(set(names)) == len(names)
    assert all(c.name.split("/")[0] == c.group.split(",")[0] for c in (*CASES, *SPARSE_CASES))
    assert {c.devices for c in CASES} == {("cpu",), ("cuda",)}


def test_select_by_substring() -> None:
    assert [c.name for c in select("cpu", ["b1-s1024"])] == ["decode/gqa-32x8-d128-b1-s1024"]
    assert select("cpu", ["no such case"]) == []
    assert all("cuda" in c.devices for c in select("cuda"))


def test_pool_case_uses_a_twentieth_of_its_blocks() -> None:
    case = named("decode/gqa-32x8-d128-b4-s4096-pool5-scattered")
    small = replace(case.spec, lengths=(128,) * 4, spare=16 * 2, Hq=2, Hk=1, D=16)
    arguments = replace(case, spec=small).arguments()
    assert arguments["k_cache"].shape[2] == 20 * 2
    assert arguments["k_cache"].stride(0) == 0


def test_sparse_layout_keeps_the_same_number_in_every_block_row() -> None:
    assert SPARSE.arguments()["sparse_layout"].sum(-1).flatten().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("case", [GQA, MLA, POOL, CAUSAL, SPARSE], ids=lambda c: c.name)
def test_measure_times_right_results_and_their_peers(case: Case) -> None:
    record = measure(case, "cpu", CEILINGS, budget_s=0.0)
    assert "error" not in record
    assert record["ms"] > 0
    assert record["gbps"] == pytest.approx(case.bytes / record["ms"] / 1e6)
    assert record["share_of_bandwidth"] == pytest.approx(record["gbps"] / 10.0)
    timed = {name for name, peer in record["peers"].items() if "ratio" in peer}
    want = {
        "decode/gqa": {"gather + SDPA", "gather + SDPA GQA"},
        "decode/mla": {"gather + SDPA", "gather + flash V=K"},
        "decode/pool": {"gather + SDPA", "gather + SDPA GQA", "ours in a slab"},
        "prefill/causal": {"SDPA"},
        "prefill/sparse": {"SDPA + mask", "ours, dense"},
    }[case.name]
    assert timed - {"vLLM CPU"} == want
    json.dumps(record)


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        (SparseDecodeBench(2, 2, 4, 256, 100, "fp8_ds_mla", ("cpu",)), "gather + SDPA"),
        (SparseDecodeBench(2, 1, 4, 256, 100, None, ("cpu",)), "gather + SDPA"),
        (SparsePrefillBench(3, 4, 300, 100, ("cpu",)), "gather + SDPA"),
        (IndexBench(3, 8, 300, ("cpu",)), "torch, a query at a time"),
        (TopkBench(3, 1000, 64, ("cpu",)), "torch.topk"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_measure_times_sparse_attention_and_selection(case: SparseBench, peer: str) -> None:
    record = measure(case, "cpu", CEILINGS, budget_s=0.0)
    assert "error" not in record
    assert record["ms"] > 0
    assert record["peers"][peer]["ratio"] > 0
    assert record["backend"] == "cpu"
    arguments = case.arguments()
    wrong = case.function(arguments)().roll(1, -1) + 1
    assert not case.gate(arguments)(wrong).passed
    json.dumps(record)


def test_sparse_models_by_hand() -> None:
    case = SparseDecodeBench(4, 2, 16, 4096, 1024, "fp8_ds_mla", ("cpu",))
    assert case.flops == 2 * 8 * 16 * 1024 * 1088
    assert case.bytes == 8 * (16 * 1088 * 2 + 1024 * (656 + 4))
    case = SparsePrefillBench(3, 16, 4096, 1024, ("cpu",))
    assert case.flops == 2 * 3 * 16 * 1024 * 1088
    assert case.bytes == 3 * (16 * 1088 * 2 + 1024 * 4) + 4096 * 576 * 2
    case = IndexBench(3, 64, 4096, ("cpu",))
    assert case.flops == 2 * 3 * 64 * 4096 * 128
    assert case.bytes == 3 * 64 * 132 + 4096 * 132 + 3 * 4096 * 4
    assert TopkBench(4, 1000, 10, ("cpu",)).bytes == 4 * 4 * 1010


def test_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Case.function

    def wrong(self: Case, arguments: dict) -> Callable[[], Tensor]:
        call = right(self, arguments)
        return partial(scaled, call.func, *call.args, **call.keywords)

    def scaled(function: Callable[..., Tensor], *args: object, backend: str | None, **kwargs: object) -> Tensor:
        return function(*args, **kwargs, backend=backend) * 1.05

    monkeypatch.setattr(Case, "function", wrong)
    record = measure(GQA, "cpu", CEILINGS, budget_s=0.0)
    assert "wrong result" in record["error"]
    assert "ms" not in record
    assert "not timed: wrong result" in report.notes([record])[0]


def test_wrong_or_failing_peer_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Tensor:
        raise RuntimeError("no kernel\nand a trace")

    def others(case: Case, arguments: dict) -> dict[str, Peer]:
        good = peers(case, arguments)["gather + SDPA"].run
        assert good is not None
        return {"zeros": Peer(lambda: torch.zeros_like(good())), "fails": Peer(fails), "good": Peer(good)}

    monkeypatch.setattr(measure_module, "peers", others)
    record = measure(GQA, "cpu", CEILINGS, budget_s=0.0)
    assert "wrong result" in record["peers"]["zeros"]["error"]
    assert record["peers"]["fails"] == {"error": "RuntimeError: no kernel"}
    assert record["peers"]["good"]["ratio"] > 0


def test_functions_run_in_turn() -> None:
    order: list[str] = []

    def function(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            order.append(name)
            return torch.zeros(())

        return run

    times = alternate({"a": function("a"), "b": function("b")}, "cpu", budget_s=0.0)
    assert order == ["a", "b"] * 4  # once to warm up, then MIN_ROUNDS rounds
    assert [len(t) for t in times.values()] == [3, 3]


def test_ratio_is_taken_within_rounds() -> None:
    assert median_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == 3.0


def test_extra_bytes_sees_what_is_freed_within_the_call() -> None:
    def function() -> Tensor:
        return (torch.ones(1 << 20) + 1).sum()  # two tensors of 4 MiB at once

    assert 8 << 20 <= extra_bytes(function, "cpu") < (8 << 20) + 4096


@pytest.mark.parametrize("case", [named("decode/mla-128x576-b1-s16384"), named("decode/gqa-32x8-d128-b1-s16384")])
def test_decode_needs_less_than_64_mib(case: Case) -> None:
    assert extra_bytes(case.function(case.arguments()), "cpu") < 64 << 20


def test_markdown_is_a_table_a_group() -> None:
    machine = {"name": "box", "torch": "2", "date": "now", "gbps": 10.0, "tflops": 0.2, "how": "made up"}
    records = [measure(case, "cpu", CEILINGS, budget_s=0.0) for case in (GQA, CAUSAL)]
    lines = report.markdown(machine, records, "flash-mla bench").splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# flash_mla on box", "## Decode, GQA", "## Prefill"]
    rows = [line for line in lines if line.startswith("| decode/gqa") or line.startswith("| prefill/causal")]
    heads = [line for line in lines if line.startswith("| case")]
    assert len(rows) == len(heads) == 2
    assert all(row.count("|") == head.count("|") for row, head in zip(rows, heads, strict=True))
    assert "rate GFLOP/s" in heads[0]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.5, "1234"), (12.34, "12.3"), (0.01234, "0.0123"), (999.7, "1000")]
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert report.significant(value) == text


def test_labels_are_spread() -> None:
    heights = plot.spread([0.0, 1.0, 2.0, 50.0], [(0, 10), (0, 10), (20, 30), (0, 10)], 8.0)
    assert heights == [-7.0, 1.0, 2.0, 50.0]


def test_labels_keep_off_other_points() -> None:
    # three labels that start at x = 0 run over two points at x = 50, which stand 10 apart
    starts, ys = [0, 0, 0, 50, 50], [4.0, 5.0, 6.0, 0.0, 10.0]
    heights = plot.spread(ys, [(x, x + 100) for x in starts], 8.0)
    assert all(abs(heights[i] - ys[j]) > 7.9 for i in range(3) for j in (3, 4))
    assert all(abs(a - b) > 7.9 for i, a in enumerate(heights) for b in heights[:i])


def test_a_backend_that_refuses_gets_no_time() -> None:
    record = measure(GQA, "cpu", CEILINGS, backend="hopper", budget_s=0.0)
    assert record["error"].startswith("refused: hopper: ")
    assert "ms" not in record
    assert report.columns({"tflops": 1.0}, [record])[1].cells == ["hopper"]


# --- Ceilings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gflops", "dtype", "edge"),
    [
        # without BF16 instructions: 1.3 GFLOP/s in BF16, so that 4096^3 would take a minute and more
        ({torch.bfloat16: 1.3, torch.float32: 80.0}, torch.float32, 2048),
        ({torch.bfloat16: 400.0, torch.float32: 150.0}, torch.bfloat16, 4096),
        ({torch.bfloat16: 1.3, torch.float32: 1.0}, torch.bfloat16, 512),
    ],
)
def test_gemm_ceiling_is_of_the_fastest_dtype_and_bounded(
    monkeypatch: pytest.MonkeyPatch, gflops: dict[torch.dtype, float], dtype: torch.dtype, edge: int
) -> None:
    spent = 0.0

    def seconds(edge: int, dtype: torch.dtype) -> float:
        nonlocal spent
        one = 2 * edge**3 / gflops[dtype] / 1e9
        spent += 2 * one
        return one

    monkeypatch.setattr(timing, "seconds_of_gemm", seconds)
    assert timing.fastest_gemm(4096) == (dtype, edge)
    assert spent < 4 * timing.GEMM_SECONDS


def test_ceiling_names_its_dtype() -> None:
    ceilings = timing.measure_ceilings("cpu", small=True)
    assert ceilings.dtype in ("BF16", "FP32")
    assert f"{ceilings.dtype} GEMM of" in ceilings.how
    assert ceilings.dtype in report.ceilings_line(
        {"name": "box", "torch": "2", "gbps": 1.0, "tflops": 0.1, "dtype": ceilings.dtype, "how": ceilings.how}
    )


def test_a_round_that_takes_long_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE_S", 0.0)
    times = alternate({"slow": lambda: torch.zeros(())}, "cpu", budget_s=5.0)
    assert len(times["slow"]) == 1


def test_commit_is_this_checkouts() -> None:
    if (Path(__file__).parents[1] / ".git").exists():
        commit = timing.commit()
        assert commit is not None
        assert len(commit.rstrip("+")) >= 7


# --- Plots ------------------------------------------------------------------------------------------------------------


def drawn(records: list[dict], tmp_path: Path, **machine: object) -> tuple[list[Path], str]:
    """The files of a plot as SVG, and their text in one string."""
    given = {"name": "box", "torch": "2.99", "commit": "abc1234", "date": "2026-11-27", "gbps": 10.0, "tflops": 0.2}
    files = plot.draw(given | machine, records, tmp_path / "a.svg")
    # NOTE: matplotlib draws letters as paths, and names each text in a comment before it
    return files, "\n".join(file.read_text() for file in files)


def test_plots_say_what_ran(tmp_path: Path) -> None:
    record = {
        "case": "decode/one", "group": "decode, MLA", "dtype": "FP8", "ms": 2.0, "flops": 1e8, "bytes": 1e7,
        "peers": {"them": {"ratio": 1.5, "ms": 3.0}, "absent": {"error": "not installed"}},
    }  # fmt: skip
    files, text = drawn([record], tmp_path, tflops_fp8=0.4)
    assert [file.name for file in files] == ["a.svg", "a-peers.svg"]
    said = (
        "flash_mla on box",
        "FP8; torch 2.99; commit abc1234; 2026-11-27",
        "FP8 GEMM",
        "fastest peer",
        "them",
        "1.50x",
    )
    for words in said:
        assert f"<!-- {words}" in text
    assert "absent" not in text
    assert "<!-- 100 -->" in text, "ticks are plain numbers"
    assert "10^" not in text


def test_a_plot_of_many_runs_counts_their_commits(tmp_path: Path) -> None:
    records = [
        {
            "case": f"decode/{i}",
            "group": "odd",
            "dtype": "BF16",
            "ms": 2.0,
            "flops": 1e8,
            "bytes": 1e7,
            "commit": str(i),
        }
        for i in range(9)
    ]
    assert "<!-- BF16; torch 2.99; 9 commits; 2026-11-27" in drawn(records, tmp_path)[1]


def test_plots_of_what_was_not_compared(tmp_path: Path) -> None:
    record = {"case": "decode/one", "group": "odd", "ms": 2.0, "flops": 1e8, "bytes": 1e7}
    assert [file.name for file in drawn([record], tmp_path)[0]] == ["a.svg"]
    with pytest.raises(ValueError, match="no case of this file has a time"):
        drawn([{"case": "decode/one", "group": "odd", "error": "wrong"}], tmp_path)


COMMITTED = sorted((Path(__file__).parents[1] / "docs" / "bench").glob("*.jsonl"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_records_are_drawn_and_tabled(path: Path, tmp_path: Path) -> None:
    machine, records = report.read_jsonl(path)
    assert len({record["case"] for record in records}) == len(records)
    assert len(plot.draw(machine, records, tmp_path / "a.png")) == 2
    for record in records:
        if record.get("flops") and "tflops" in record:
            assert record["tflops"] == pytest.approx(record["flops"] / record["ms"] / 1e9, rel=1e-3)
    for group, members in report.groups(records).items():
        assert all(len(column.cells) == len(members) for column in report.columns(machine, members)), group


def test_every_figure_of_the_gpu_says_where_it_comes_from() -> None:
    machine, records = report.read_jsonl(next(path for path in COMMITTED if path.name == "h200.jsonl"))
    assert {"gbps", "tflops", "tflops_fp8", "how"} <= machine.keys()
    for record in records:
        assert {"dtype", "ms", "gpu", "commit", "date", "command", "torch"} <= record.keys()
        assert all(peer["ratio"] > 0 for peer in record["peers"].values())
        assert record["peers"]
