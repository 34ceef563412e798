"""Index scores on the CPU: one FP32 product of all heads of a few queries with a request's keys, then the sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.problem import IndexArgs, IndexProblem
from flash_mla.quant import decode_e4m3

SLICE_BYTES = 32 << 20
"""Of the products [queries, heads, keys] in FP32."""


def refuse(problem: IndexProblem) -> str | None:
    """Nothing is refused."""
    return None


def config(problem: IndexProblem) -> None:
    """Nothing is chosen ahead."""
    return


@torch.no_grad()
def launch(problem: IndexProblem, config: None, args: IndexArgs) -> None:
    """Fill args.out, always clean."""
    args.out.fill_(-math.inf)
    for b in range(problem.B):
        starts, ends = bounds(problem, args, b)
        low, high = int(starts.min()), int(ends.max())
        if low >= high:
            continue
        k, scale = keys(problem, args, b, low, high)
        t = torch.arange(low, high)
        step = max(1, SLICE_BYTES // (4 * problem.H * len(k)))
        for i in range(0, problem.S_q, step):
            rows = slice(i, i + step)
            q = decode_e4m3(args.q[b, rows].view(torch.uint8)).float()
            products = torch.matmul(q.flatten(0, 1), k.T).relu_().view(len(q), problem.H, -1)
            scores = torch.bmm(args.weights[b, rows, None], products)[:, 0] * scale
            hidden = (t < starts[rows, None]) | (t >= ends[rows, None])
            args.out[b, rows, low:high] = scores.masked_fill_(hidden, -math.inf)


def bounds(problem: IndexProblem, args: IndexArgs, b: int) -> tuple[Tensor, Tensor]:
    """(first, past the last) [S_q] of the keys that each query of a request sees, of those that are there."""
    there = problem.width
    if args.block_table is not None:
        there = min(there, args.block_table.shape[1] * problem.page)
    ends = args.ends[b].long().clamp(max=there)
    return torch.zeros_like(ends) if args.starts is None else args.starts[b].long().clamp(min=0), ends


def keys(problem: IndexProblem, args: IndexArgs, b: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Keys low .. high of a request, FP32 [n, D], and their scales [n]."""
    if args.block_table is None:
        return decode_e4m3(args.k[0, low:high].view(torch.uint8)).float(), args.k_scale[0, low:high]
    page = problem.page
    pages = args.block_table[b, low // page : -(-high // page)].long().clamp(0, problem.pages - 1)
    rows = slice(low % page, low % page + high - low)
    codes = args.k.view(torch.uint8)[pages].flatten(0, 1)[rows]
    return decode_e4m3(codes).float(), args.k_scale[pages].flatten()[rows]
