"""Top-k on the CPU: torch's own, asked for one more than is wanted.

Its k + 1 greatest, in any order, tell what is cut off: where the least of them is alone, it is dropped and the rest are
the answer. Where others equal it, those that are kept lie furthest left, and are looked for in the row. NaN, which
torch takes for the greatest, is found among them too. The columns are then sorted, not the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.problem import TopkArgs, TopkProblem

SLICE_BYTES = 32 << 20
"""Of the scores of a few rows: a copy of them, where some are hidden, and the places of the least."""

PAST = 2**31 - 1
"""A column that sorts behind every other: none."""


def refuse(problem: TopkProblem) -> str | None:
    """Nothing is refused."""
    return None


def config(problem: TopkProblem) -> None:
    """Nothing is chosen ahead."""
    return


@torch.no_grad()
def launch(problem: TopkProblem, config: None, args: TopkArgs) -> None:
    """Fill args.out."""
    k = min(problem.topk, problem.N)
    if k < problem.topk:
        args.out.fill_(-1)
    step = max(1, SLICE_BYTES // (4 * max(problem.N, 1)))
    for first in range(0, problem.rows if k else 0, step):
        rows = slice(first, min(first + step, problem.rows))
        columns = greatest(visible(problem, args, rows), k)
        args.out[rows, :k] = columns if args.block_table is None else in_pool(problem, args.block_table, rows, columns)


def visible(problem: TopkProblem, args: TopkArgs, rows: slice) -> Tensor:
    """Scores [n, N] of a few rows, -inf outside of starts and ends."""
    scores = args.scores[rows, : problem.N]
    for bound, outside in ((args.starts, torch.lt), (args.ends, torch.ge)):
        if bound is not None:
            t = torch.arange(problem.N, dtype=torch.int32)
            hidden = outside(t, bound[rows, None].clamp(0, problem.N).int())
            scores = scores.masked_fill(hidden, -math.inf)
    return scores


def greatest(scores: Tensor, k: int) -> Tensor:
    """The columns of the k greatest of each row [n, k] int32, ascending; -1 behind them."""
    N = scores.shape[1]
    values, found = scores.topk(min(k + 1, N), dim=1, sorted=False)
    columns = found.int()
    least = values.amin(1, keepdim=True)
    equal = values == least
    alone = equal.sum(1) == 1  # NaN equals nothing
    if k < N and alone.all():
        return columns.masked_fill_(equal, PAST).sort(dim=1).values[:, :k]
    if least.isnan().any():
        return greatest(scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), k)
    columns.masked_fill_(values == -math.inf, PAST)
    if k < N:
        columns = columns.masked_fill_(equal, PAST).sort(dim=1).values
        tied = (~alone & (least[:, 0] > -math.inf)).nonzero()[:, 0]
        columns[tied] = leftmost(scores[tied], least[tied], columns[tied], k)
    columns = columns.sort(dim=1).values[:, :k]
    return columns.masked_fill_(columns == PAST, -1)


def leftmost(scores: Tensor, least: Tensor, columns: Tensor, k: int) -> Tensor:
    """Columns [n, k + 1], ascending, of scores above the least, filled up to k by the first that equal it."""
    above = (columns != PAST).sum(1)
    row, column = (scores == least).nonzero(as_tuple=True)
    place = torch.arange(len(row)) - torch.searchsorted(row, torch.arange(len(columns)))[row] + above[row]
    room = place < k
    columns[row[room], place[room]] = column[room].int()
    return columns


def in_pool(problem: TopkProblem, table: Tensor, rows: slice, columns: Tensor) -> Tensor:
    """Columns as indices of their rows in the pool; -1 stays."""
    logical = columns.clamp(0, table.shape[1] * problem.page - 1)
    request = torch.arange(rows.start, rows.stop)[:, None] // problem.queries
    found = table[request, logical // problem.page] * problem.page + logical % problem.page
    return found.masked_fill(columns < 0, -1)
