"""The command line, through typer's runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from flash_mla import testing
from flash_mla.backends import ORDER
from flash_mla.cli import PROBLEMS, app
from flash_mla.testing import judge


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_info_names_versions_devices_and_backends() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    assert f"{torch.get_num_threads()} threads" in result.output
    for name in (*PROBLEMS, *ORDER):
        assert name in result.output
    assert result.output.count("serves") >= len(PROBLEMS)


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
    assert "RuntimeError: illegal access" in result.output


def test_bench_then_plot(tmp_path: Path) -> None:
    jsonl, page = tmp_path / "new" / "bench.jsonl", tmp_path / "bench.md"
    name = "decode/gqa-32x8-d128-b1-s1024"
    result = run("bench", "--quick", "--filter", name, "--jsonl", str(jsonl), "--markdown", str(page))
    assert result.exit_code == 0, result.output
    assert name in result.output
    machine, case = (json.loads(line) for line in jsonl.read_text().splitlines())
    assert machine["kind"] == "machine"
    assert machine["gbps"] > 0
    assert case["case"] == name
    assert case["peers"]["gather + SDPA"]["ratio"] > 0
    assert f"| {name} | cpu |" in page.read_text()

    result = run("plot", str(jsonl))
    assert result.exit_code == 0, result.output
    png = jsonl.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--filter", "no-such-case"], "no cpu case matches"),
        (["check", "--filter", "no-such-case"], "no case matches"),
        (["check", "--device", "tpu"], "cpu or cuda"),
        (["plot", __file__], "Invalid value"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
