"""Top-k on the CPU: a compiled kernel (`kernels/cpu/topk.py`), or torch's own where llvmlite is missing.

torch's is asked for one more than is wanted: its k + 1 greatest, in any order, tell what is cut off. Where the least of
them is alone, it is dropped and the rest are the answer. Where others equal it, those that are kept lie furthest left,
and are looked for in the row. NaN, which torch takes for the greatest, is found among them too. The columns are then
sorted, not the scores.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from flash_mla.backends.cpu import engine
from flash_mla.problem import TopkArgs, TopkProblem

SLICE_BYTES = 32 << 20
"""Of the scores of a few rows: a copy of them, where some are hidden, and the places of the least."""

PAST = 2**31 - 1
"""A column that sorts behind every other: none."""

TEAM_SCORES = 50_000
"""Scores from which on a team is woken: about 50 us of one core."""


def refuse(problem: TopkProblem) -> str | None:
    """Nothing is refused."""
    return None


def config(problem: TopkProblem) -> Select | None:
    """The problem bound to the kernel, which the first call compiles; None where torch must serve."""
    return Select(problem) if engine.missing() is None else None


@torch.no_grad()
def launch(problem: TopkProblem, config: Select | None, args: TopkArgs) -> None:
    """Fill args.out."""
    if config is None:
        through_torch(problem, args)
    else:
        config.launch(args)
    if args.block_table is not None and problem.N:
        args.out.copy_(in_pool(problem, args.block_table, slice(0, problem.rows), args.out))


class Select:
    """A problem bound to its kernel."""

    def __init__(self, problem: TopkProblem) -> None:
        from flash_mla.kernels.cpu.topk import ARGUMENTS

        self.at = {name: i for i, name in enumerate(ARGUMENTS)}
        rows, N, k = problem.rows, problem.N, problem.topk
        values = {"rows": rows, "N": N, "k": k, "out_row": 4 * k}
        self.template = engine.arguments(ARGUMENTS, **values)
        self.most = 1 if rows * N < TEAM_SCORES else rows
        self.k = k

    @cached_property
    def entries(self) -> engine.Entries:
        """The compiled kernel."""
        from flash_mla.kernels.cpu.config import host
        from flash_mla.kernels.cpu.topk import Selection

        spec = Selection(host().lanes)
        return engine.Entries(spec, spec.memory(self.k))

    def launch(self, args: TopkArgs) -> None:
        """Fill args.out with columns."""
        at, entries = self.at, self.entries
        packed = type(self.template).from_buffer_copy(self.template)
        packed[at["scores"]], packed[at["out"]] = args.scores.data_ptr(), args.out.data_ptr()
        packed[at["scores_row"]] = 4 * args.scores.stride(0)
        kept = []
        for name, bound in (("starts", args.starts), ("ends", args.ends)):
            if bound is not None:
                kept.append(bound.contiguous())
                packed[at[name]], packed[at[f"{name}_wide"]] = engine.integers(kept[-1])
        threads = min(self.most, torch.get_num_threads())
        packed[at["memory_bytes"]] = entries.memory
        packed[at["memory"]] = engine.MEMORY.reserve(threads * entries.memory)[0]
        entries.run(packed, threads)
        del kept


# --- Through torch ----------------------------------------------------------------------------------------------------


def through_torch(problem: TopkProblem, args: TopkArgs) -> None:
    """Fill args.out with columns, a slice of rows at a time."""
    k = min(problem.topk, problem.N)
    if k < problem.topk:
        args.out.fill_(-1)
    step = max(1, SLICE_BYTES // (4 * max(problem.N, 1)))
    for first in range(0, problem.rows if k else 0, step):
        rows = slice(first, min(first + step, problem.rows))
        args.out[rows, :k] = greatest(visible(problem, args, rows), k)


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


# --- Both -------------------------------------------------------------------------------------------------------------


def in_pool(problem: TopkProblem, table: Tensor, rows: slice, columns: Tensor) -> Tensor:
    """Columns as indices of their rows in the pool; -1 stays."""
    logical = columns.clamp(0, table.shape[1] * problem.page - 1)
    request = torch.arange(rows.start, rows.stop)[:, None] // problem.queries
    found = table[request, logical // problem.page] * problem.page + logical % problem.page
    return found.masked_fill(columns < 0, -1)
