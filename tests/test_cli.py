"""The command line, through typer's runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import flash_mla
from flash_mla import cli, testing
from flash_mla.backends import ORDER
from flash_mla.bench.cases import Case
from flash_mla.cli import app, checks, machine, timings
from flash_mla.cli.machine import PROBLEMS, sample_decode
from flash_mla.testing import judge


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_info_names_versions_devices_and_backends() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    assert version("torch") in result.output
    assert f"{torch.get_num_threads()} thread" in result.output
    for name in (*PROBLEMS, *ORDER):
        assert name in result.output
    assert result.output.count("serves") >= len(PROBLEMS)


@pytest.mark.parametrize("columns", [40, 80])
def test_info_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run("info")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= columns
    for name in ORDER:
        assert name in result.output


def test_info_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "llvmlite")
    there = machine.installed
    monkeypatch.setattr(machine, "installed", lambda name: None if name in missing else there(name))
    result = run("info")
    assert result.exit_code == 0, result.output
    assert "missing nvidia-cutlass-dsl, apache-tvm-ffi:" in result.output
    assert result.output.count("pip install 'flash-mla[hopper]'") == 1
    assert "pip install 'flash-mla[cpu]'" in result.output


def test_problems_of_info_tell_an_alias_from_two_caches() -> None:
    """Tensors without memory all begin at address 0."""
    assert not sample_decode(32, 8, 128, 128, torch.bfloat16).alias
    assert not sample_decode(32, 8, 576, 576, torch.bfloat16).alias
    assert sample_decode(128, 1, 576, 512, torch.bfloat16).alias


def test_start_up_takes_no_more_than_torch() -> None:
    """What only some commands need is not imported by the others."""
    code = "import sys, flash_mla.cli; print([n for n in ('triton', 'transformers', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"flash-mla {flash_mla.__version__}\n")


def test_explain() -> None:
    result = run("explain", "decode", "--heads", "32/8", "--dims", "128", "--dtype", "fp8", "--mask", "bool", "--sink")
    assert result.exit_code == 0, result.output
    assert "decode: cpu serves it" in result.output
    assert "hopper: refuses" in result.output
    result = run("explain", "prefill", "--heads", "16", "--dims", "192/128", "--backend", "hopper")
    assert result.exit_code == 1
    assert "no backend serves it" in result.output


def test_check_passes_a_few_cases() -> None:
    result = run("check", "--filter", "decode/head-dim-16", "--filter", "prefill/tokens-1", "--backend", "cpu")
    assert result.exit_code == 0, result.output
    chosen = [c for c in testing.CASES if "decode/head-dim-16" in c.name or "prefill/tokens-1" in c.name]
    assert f"{len(chosen)} passed, 0 failed, 0 refused" in result.output
    for case in chosen:
        assert case.name in result.output


def test_check_fails_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    invoke = judge.invoke
    monkeypatch.setattr(judge, "invoke", lambda *x: tuple(t * 1.1 for t in invoke(*x)))
    result = run("check", "--filter", "decode/head-dim-16")
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_check_survives_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("illegal access")

    monkeypatch.setattr(judge, "invoke", crash)
    result = run("check", "--filter", "decode/head-dim-16")
    assert result.exit_code == 1
    assert "RuntimeError: illegal access" in result.stderr
    assert "FAILED" in result.stdout


@pytest.mark.parametrize("processes", ["1", "2"])
def test_check_ends_with_a_cuda_error(monkeypatch: pytest.MonkeyPatch, processes: str) -> None:
    """Nothing runs in that process any more: hundreds of failures would hide the one that counts."""
    monkeypatch.setattr(checks, "run_case", lose_the_gpu)
    result = run("check", "--filter", "decode/head-dim", "--backend", "cpu", "--processes", processes)
    assert result.exit_code == 1
    assert "a CUDA error: 1 of" in result.stdout
    assert "an illegal memory access" in result.stderr


def lose_the_gpu(case: testing.Case) -> testing.Result:
    return testing.Result(case, None, ("AcceleratorError: CUDA error: an illegal memory access was encountered",))


def test_check_in_processes_gives_the_same_rows() -> None:
    options = ("check", "--filter", "decode/head-dim", "--filter", "decode/q-tokens", "--backend", "cpu")
    alone, beside = run(*options), run(*options, "--processes", "2")
    assert alone.exit_code == beside.exit_code == 0, beside.output
    *rows, last = alone.stdout.splitlines()
    assert beside.stdout.splitlines()[:-1] == rows
    assert beside.stdout.splitlines()[-1].split(" in ")[0] == last.split(" in ")[0]


def die(case: testing.Case) -> None:
    os._exit(7)


def test_check_tells_that_a_process_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "run_case", die)
    result = run("check", "--filter", "decode/head-dim-16", "--backend", "cpu", "--processes", "2")
    assert result.exit_code == 1
    assert "a process died: 0 of" in result.stdout


def test_check_keeps_what_ran_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def interrupted(case: testing.Case) -> testing.Result:
        if ran:
            raise KeyboardInterrupt
        ran.append(case.name)
        return testing.run(case)

    monkeypatch.setattr(checks, "run_case", interrupted)
    result = run("check", "--filter", "decode/head-dim", "--backend", "cpu")
    assert result.exit_code == 130
    assert ran[0] in result.stdout
    assert result.stdout.splitlines()[-1].startswith("interrupted: 1 of")


def test_bench_then_plot(tmp_path: Path) -> None:
    jsonl, page = tmp_path / "new" / "bench.jsonl", tmp_path / "bench.md"
    name = "decode/gqa-32x8-d128-b1-s1024"
    result = run("bench", "--quick", "--filter", name, "--jsonl", str(jsonl), "--markdown", str(page))
    assert result.exit_code == 0, result.output
    assert name in result.output
    head, case = (json.loads(line) for line in jsonl.read_text().splitlines())
    assert head["kind"] == "machine"
    assert head["gbps"] > 0
    assert head["dtype"] in ("BF16", "FP32")
    assert case["dtype"] == "BF16"
    assert case["case"] == name
    assert case["peers"]["gather + SDPA"]["ratio"] > 0
    assert f"| {name} | cpu |" in page.read_text()

    result = run("plot", str(jsonl))
    assert result.exit_code == 0, result.output
    png = jsonl.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000
    assert jsonl.with_stem("bench-peers").with_suffix(".png").exists()


def test_bench_keeps_what_it_measured_when_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jsonl, page = tmp_path / "bench.jsonl", tmp_path / "bench.md"
    names = []

    def interrupted(case: Case, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if names:
            assert len(jsonl.read_text().splitlines()) == 2, "the record before is written"
            raise KeyboardInterrupt
        names.append(case.name)
        return measure(case, *args, **kwargs)

    measure = timings.measure
    monkeypatch.setattr(timings, "measure", interrupted)
    options = ("--quick", "--no-peers", "--filter", "b1-s1024", "--filter", "b1-s4096", "--jsonl", str(jsonl))
    result = run("bench", *options, "--markdown", str(page))
    assert result.exit_code == 130
    assert names[0] in result.output
    assert "interrupted: 1 of" in result.output
    assert names[0] in page.read_text()
    assert [json.loads(line)["kind"] for line in jsonl.read_text().splitlines()] == ["machine", "case"]


def test_bench_of_a_backend_that_refuses() -> None:
    result = run("bench", "--quick", "--backend", "hopper", "--filter", "b1-s1024")
    assert result.exit_code == 1
    assert "not timed: refused: hopper" in result.output


def test_numbered_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert cli.need_device("cuda:1") == cli.need_device("cuda") == "cuda"
    assert cli.need_device("cpu:0") == cli.need_device("cpu") == "cpu"
    assert chosen == [1]
    result = run("check", "--device", "cuda:2")
    assert result.exit_code == 2
    assert "sees 2 CUDA device(s)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--filter", "no-such-case"], "no cpu case matches"),
        (["check", "--filter", "no-such-case"], "no case matches"),
        (["check", "--device", "tpu"], "cuda or cuda:N"),
        (["check", "--device", "cuda:x"], "cuda or cuda:N"),
        (["bench", "--device", "cpu:1"], "cuda or cuda:N"),
        (["explain", "--device", "mps"], "cuda or cuda:N"),
        (["bench", "--backend", "foo"], "not one of"),
        (["check", "--backend", "foo"], "not one of"),
        (["explain", "--heads", "a/b"], "a number, or two"),
        (["explain", "--heads", "5/2"], "multiple of"),
        (["explain", "--dims", "577"], "multiple of 8"),
        (["plot", __file__], "Invalid value"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
