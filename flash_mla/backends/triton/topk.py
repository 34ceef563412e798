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
    """pivots [rows] FP32, marks [rows, ceil(N / 32)] int32 (whole spans), candidates [rows, room] int32."""

    pivots: Tensor
    marks: Tensor
    candidates: Tensor


def workspace(problem: TopkProblem, config: topk.Config) -> Workspace | None:
    """Uninitialised; None where a row has no more scores than a program holds."""
    if not config.parts:
        return None
    empty = partial(torch.empty, device=problem.device)
    return Workspace(
        empty(problem.rows, dtype=torch.float32),
        empty(problem.rows, -(-problem.N // config.span) * config.span // 32, dtype=torch.int32),
        empty(problem.rows, config.room, dtype=torch.int32),
    )


def pivot_arguments(problem: TopkProblem, config: topk.Config, args: TopkArgs, space: Workspace) -> dict[str, Any]:
    """pivot_kernel's arguments."""
    return topk.pivot_arguments(
        config, scores=args.scores, starts=args.starts, ends=args.ends, pivots=space.pivots, N=problem.N,
        topk=problem.topk,
    )  # fmt: skip


def mark_arguments(problem: TopkProblem, config: topk.Config, args: TopkArgs, space: Workspace) -> dict[str, Any]:
    """mark_kernel's arguments."""
    return topk.mark_arguments(
        config, scores=args.scores, starts=args.starts, ends=args.ends, pivots=space.pivots, marks=space.marks,
        N=problem.N,
    )  # fmt: skip


def select_arguments(
    problem: TopkProblem, config: topk.Config, args: TopkArgs, space: Workspace | None
) -> dict[str, Any]:
    """select_kernel's arguments."""
    pivots, marks, candidates = space or (None, None, None)
    return topk.select_arguments(
        config, scores=args.scores, starts=args.starts, ends=args.ends, pivots=pivots, marks=marks,
        candidates=candidates, block_table=args.block_table, out=args.out, N=problem.N, queries=problem.queries,
        page=problem.page,
    )  # fmt: skip


def launch(problem: TopkProblem, config: topk.Config, args: TopkArgs) -> None:
    """One kernel; two before it where several programs mark a row."""
    rows = problem.rows
    with device_of(problem.device):
        space = workspace(problem, config)
        if space is not None and config.parts > 1:
            topk.pivot_kernel[(rows,)](**pivot_arguments(problem, config, args, space), num_warps=topk.PIVOT_WARPS)
            marks = mark_arguments(problem, config, args, space)
            topk.mark_kernel[(rows, config.parts)](**marks, num_warps=topk.MARK_WARPS)
        topk.select_kernel[(rows,)](**select_arguments(problem, config, args, space), num_warps=config.warps)
