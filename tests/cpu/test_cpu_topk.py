"""The CPU's selection kernel: the same columns as torch's sort says, for any numbers, lanes and threads."""

from __future__ import annotations

import math

import pytest
import torch

from flash_mla.backends.cpu import engine, topk
from flash_mla.kernels.cpu.config import Target
from flash_mla.problem import TopkArgs, TopkProblem

ROWS, N = 12, 333


def numbers(kind: str) -> torch.Tensor:
    """[ROWS, N] scores."""
    x = torch.randn(ROWS, N, generator=torch.Generator().manual_seed(1))
    if kind == "ties":
        return x.mul(2).round()
    if kind == "zeros":  # of both signs, which are equal
        return torch.where(x.abs() < 1, 0.0 * x, x)
    if kind == "special":
        special = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 3.4e38, -3.4e38, 1e-45, -1e-45])
        return torch.where(x > 0.3, special[torch.arange(N) % 8], x)
    return x * {"normal": 1.0, "tiny": 1e-40, "near": 1e-7}[kind] + (1.0 if kind == "near" else 0.0)


def expected(scores: torch.Tensor, k: int, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """By a stable sort of each row."""
    out = torch.full((ROWS, k), -1, dtype=torch.int32)
    t = torch.arange(N)
    for r in range(ROWS):
        seen = (t >= starts[r]) & (t < ends[r]) & (scores[r] > -math.inf)
        columns = t[seen][scores[r, seen].argsort(descending=True, stable=True)[:k]].sort().values
        out[r, : len(columns)] = columns.int()
    return out


@pytest.mark.parametrize("k", [1, 40, 300, 333, 400])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "special", "tiny", "near"])
@pytest.mark.parametrize("way", ["kernel", "torch"])
def test_the_greatest_are_taken(way, kind, k):
    if way == "kernel" and engine.missing():
        pytest.skip(engine.missing())
    wide = torch.full((ROWS, N + 7), math.nan)
    scores = wide[:, :N]
    scores.copy_(numbers(kind))
    starts = torch.tensor([0, 5, 300, -(2**62), 332, 2**62] * 2)
    ends = torch.tensor([N, 2**62, 310, 45, 333, N, 0, -(2**62), N, 7, 333, 5])
    out = torch.full((ROWS, k), 77, dtype=torch.int32)
    problem = TopkProblem(scores.device, ROWS, N, N, k, 0, 1)
    args = TopkArgs(scores, starts, ends, None, out)
    if way == "kernel":
        topk.launch(problem, topk.config(problem), args)
    else:
        topk.launch(problem, None, args)
    assert torch.equal(out, expected(scores, k, starts, ends))


@pytest.mark.skipif(engine.missing() is not None, reason="the kernels cannot run here")
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_any_lanes_and_threads_take_the_same(lanes, monkeypatch):
    monkeypatch.setattr(Target, "lanes", lanes)
    monkeypatch.setattr(topk, "TEAM_SCORES", 0)
    scores = numbers("ties")
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(torch.full((ROWS, 50), 77, dtype=torch.int32))
            problem = TopkProblem(scores.device, ROWS, N, N, 50, 0, 1)
            topk.launch(problem, topk.config(problem), TopkArgs(scores, None, None, None, outs[-1]))
    finally:
        torch.set_num_threads(before)
    want = expected(scores, 50, torch.zeros(ROWS), torch.full((ROWS,), N))
    assert torch.equal(outs[0], want)
    assert torch.equal(outs[1], want)
