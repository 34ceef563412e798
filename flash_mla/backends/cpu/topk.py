"""Top-k on the CPU: torch's own finds the threshold; what lies at it is taken from the left."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.problem import TopkArgs, TopkProblem

SLICE_BYTES = 32 << 20
"""Of the scores of a few rows: their masks and sums take about five times that."""


def refuse(problem: TopkProblem) -> str | None:
    """Nothing is refused."""
    return None


def config(problem: TopkProblem) -> None:
    """Nothing is chosen ahead."""
    return


@torch.no_grad()
def launch(problem: TopkProblem, config: None, args: TopkArgs) -> None:
    """Fill args.out."""
    args.out.fill_(-1)
    if not problem.N:
        return
    step = max(1, SLICE_BYTES // (4 * problem.N))
    for first in range(0, problem.rows, step):
        select(problem, args, torch.arange(first, min(first + step, problem.rows)))


def select(problem: TopkProblem, args: TopkArgs, rows: Tensor) -> None:
    """The columns of a few rows."""
    t = torch.arange(problem.N)
    scores = args.scores[rows, : problem.N].nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if args.starts is not None:
        scores.masked_fill_(t < args.starts[rows, None], -math.inf)
    if args.ends is not None:
        scores.masked_fill_(t >= args.ends[rows, None], -math.inf)
    k = min(problem.topk, problem.N)
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above = scores > threshold
    equal = (scores == threshold) & (threshold > -math.inf)
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    row, column = chosen.nonzero(as_tuple=True)
    place = (chosen.cumsum(1) - 1)[row, column]
    row = rows[row]
    if args.block_table is not None:
        logical = column.clamp(max=args.block_table.shape[1] * problem.page - 1)
        column = (
            args.block_table[row // problem.queries, logical // problem.page] * problem.page + logical % problem.page
        )
    args.out[row, place] = column.int()
