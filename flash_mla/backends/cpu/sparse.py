"""Sparse attention on the CPU: gather the rows that each query names, dequantise them, and multiply.

Query tokens are taken in slices whose gathered rows fit SLICE_BYTES. Both products are FP32: max_logits and lse
are wanted to FP32 precision, and with BF16 weights the output's cosine distance is 4e-6 of the 5e-6 allowed. Reading
costs topk rows a token, whatever the cache holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.backends.cpu.surroundings import undisturbed
from flash_mla.merge import apply_sink
from flash_mla.problem import SparseArgs, SparseKeys, SparseProblem
from flash_mla.quant import FORMATS, gather_rows

SLICE_BYTES = 32 << 20
"""Of K in FP32 and of the scores together: a dozen tokens at topk 2048, so that few large products are made."""


def refuse(problem: SparseProblem) -> str | None:
    """It runs everything that the contract admits."""
    return None


def config(problem: SparseProblem) -> None:
    """Nothing is chosen ahead: the indices decide."""
    return


@undisturbed
def launch(problem: SparseProblem, config: None, args: SparseArgs) -> None:
    """The whole call, slice after slice of the query tokens."""
    args = args.normalised()
    tokens = problem.B * problem.S_q
    topk = sum(keys.topk for keys in problem.sets)
    step = max(1, SLICE_BYTES // (4 * max(topk, 1) * (problem.D + problem.Hq)))
    for first in range(0, tokens, step):
        attend_tokens(problem, args, torch.arange(first, min(first + step, tokens)))
    args.mark_empty()


def attend_tokens(problem: SparseProblem, args: SparseArgs, tokens: Tensor) -> None:
    """Fill the rows of these tokens, numbered through [B, S_q]."""
    b, i = tokens // problem.S_q, tokens % problem.S_q
    gathered = [gather_keys(keys, problem, b, i) for keys in args.keys]
    k = torch.cat([rows for rows, _ in gathered], dim=1).float()  # [n, topk, D]
    unseen = torch.cat([live for _, live in gathered], dim=1).logical_not_().unsqueeze(1)  # [n, 1, topk]
    scores = torch.bmm(args.q[b, i].float(), k.transpose(1, 2)).mul_(args.softmax_scale)  # [n, Hq, topk]
    scores.masked_fill_(unseen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # [n, Hq]
    if args.max_logits is not None:
        args.max_logits[b, i] = scores.amax(-1) if scores.shape[-1] else lse
    weights = torch.softmax(scores, dim=-1).masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    out = torch.bmm(weights, k[..., : problem.Dv])
    args.out[b, i] = (out if args.attn_sink is None else apply_sink(out, lse, args.attn_sink)).to(problem.dtype)
    args.lse[b, i] = lse


def gather_keys(keys: SparseKeys, problem: SparseProblem, b: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, topk, D] in q's dtype, 0 where no key is named (NaN may lie there); and where one is, [n, topk]."""
    pages, page = keys.cache.shape[:2]
    indices = keys.indices[b, i].long()
    live = (indices >= 0) & (indices < pages * page)
    if keys.lengths is not None:
        live &= torch.arange(indices.shape[1]) < keys.lengths[b].unsqueeze(1)
    if not keys.cache.numel():
        return torch.zeros(*indices.shape, problem.D, dtype=problem.dtype), live
    slots = indices.masked_fill_(~live, 0).flatten()
    if problem.format is None:
        rows = gather_rows(keys.cache.view(torch.uint8), slots).view(problem.dtype)
    else:
        rows = FORMATS[problem.format].read(keys.cache.unsqueeze(2), slots)
    rows = rows.view(*indices.shape, problem.D)
    return rows if live.all() else rows.masked_fill_(~live.unsqueeze(-1), 0.0), live
