"""Top-k problems to the Triton kernels' arguments."""

from __future__ import annotations

import torch

from flash_mla.kernels.triton import topk
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import TopkArgs, TopkProblem


def refuse(problem: TopkProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if problem.topk > topk.MAX_K:
        return f"topk is {problem.topk}; at most {topk.MAX_K} fit a program"
    return None


def config(problem: TopkProblem, target: Target) -> topk.Config:
    """The kernels' tiles."""
    return topk.config(rows=problem.rows, N=problem.N, topk=problem.topk, target=target)


def launch(problem: TopkProblem, config: topk.Config, args: TopkArgs) -> None:
    """One kernel, and one before it where a row has more scores than a program holds."""
    candidates = counts = None
    bounds = {"scores": args.scores, "starts": args.starts, "ends": args.ends, "N": problem.N}
    if config.parts:
        candidates = torch.empty(problem.rows, config.parts, config.room, dtype=torch.int32, device=problem.device)
        counts = torch.empty(problem.rows, config.parts, dtype=torch.int32, device=problem.device)
        arguments = topk.narrow_arguments(config, **bounds, candidates=candidates, counts=counts, topk=problem.topk)
        topk.narrow_kernel[(problem.rows, config.parts)](*arguments, num_warps=topk.NARROW_WARPS)
    arguments = topk.select_arguments(
        config, **bounds, candidates=candidates, counts=counts, block_table=args.block_table, out=args.out,
        queries=problem.queries, page=problem.page,
    )  # fmt: skip
    topk.select_kernel[(problem.rows,)](*arguments, num_warps=config.warps)
