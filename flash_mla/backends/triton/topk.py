"""Top-k problems to the Triton kernels' arguments."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.triton.device import device_of, target
from flash_mla.kernels.triton import topk
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import TopkArgs, TopkProblem


def refuse(problem: TopkProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if problem.topk > topk.MAX_K:
        return f"topk is {problem.topk}; at most {topk.MAX_K} fit a program"
    return None


def config(problem: TopkProblem, on: Target | None = None) -> topk.Config:
    """The kernels' tiles, on the problem's device or on the target given."""
    on = on or target(problem.device)
    return topk.config(rows=problem.rows, N=problem.N, topk=problem.topk, target=on)


class Workspace(NamedTuple):
    """pivots [rows] FP32, candidates [rows, parts, room] int32, counts [rows, parts] int32."""

    pivots: Tensor
    candidates: Tensor
    counts: Tensor


def workspace(problem: TopkProblem, config: topk.Config) -> Workspace | None:
    """Uninitialised; None where a row has no more scores than a program holds."""
    if not config.parts:
        return None
    empty = partial(torch.empty, device=problem.device)
    return Workspace(
        empty(problem.rows, dtype=torch.float32),
        empty(problem.rows, config.parts, config.room, dtype=torch.int32),
        empty(problem.rows, config.parts, dtype=torch.int32),
    )


def pivot_arguments(problem: TopkProblem, config: topk.Config, args: TopkArgs, space: Workspace) -> dict[str, Any]:
    """pivot_kernel's arguments."""
    return topk.pivot_arguments(
        config, scores=args.scores, starts=args.starts, ends=args.ends, pivots=space.pivots, N=problem.N,
        topk=problem.topk,
    )  # fmt: skip


def narrow_arguments(problem: TopkProblem, config: topk.Config, args: TopkArgs, space: Workspace) -> dict[str, Any]:
    """narrow_kernel's arguments."""
    return topk.narrow_arguments(
        config, scores=args.scores, starts=args.starts, ends=args.ends, pivots=space.pivots,
        candidates=space.candidates, counts=space.counts, N=problem.N,
    )  # fmt: skip


def select_arguments(
    problem: TopkProblem, config: topk.Config, args: TopkArgs, space: Workspace | None
) -> dict[str, Any]:
    """select_kernel's arguments."""
    pivots, candidates, counts = space or (None, None, None)
    return topk.select_arguments(
        config, scores=args.scores, starts=args.starts, ends=args.ends, pivots=pivots, candidates=candidates,
        counts=counts, block_table=args.block_table, out=args.out, N=problem.N, queries=problem.queries,
        page=problem.page,
    )  # fmt: skip


def launch(problem: TopkProblem, config: topk.Config, args: TopkArgs) -> None:
    """One kernel, and two before it where a row has more scores than a program holds."""
    rows = problem.rows
    with device_of(problem.device):
        space = workspace(problem, config)
        if space is not None:
            topk.pivot_kernel[(rows,)](**pivot_arguments(problem, config, args, space), num_warps=topk.PIVOT_WARPS)
            grid = (rows, config.parts)
            topk.narrow_kernel[grid](**narrow_arguments(problem, config, args, space), num_warps=topk.NARROW_WARPS)
        topk.select_kernel[(rows,)](**select_arguments(problem, config, args, space), num_warps=config.warps)
