"""The backward of sparse prefill on the CPU, in FP32: the equations of backward.py, each query with its own keys.

A row of kv is K and, in its first Dv columns, V: its gradient is the sum of both, over every query that names it. The
sum goes through index_add_, which on a CPU adds row after row: the same bits in every run.
"""

from __future__ import annotations

import torch

from flash_mla.backends.cpu.backward import beside_sink
from flash_mla.backends.cpu.sparse import SLICE_BYTES, gather_keys
from flash_mla.backends.cpu.surroundings import undisturbed
from flash_mla.problem import SparseBackwardArgs, SparseBackwardProblem, SparseProblem


def refuse(problem: SparseBackwardProblem) -> str | None:
    """It runs everything that the contract admits."""
    return None


def config(problem: SparseBackwardProblem) -> None:
    """Nothing is chosen ahead: the indices decide."""
    return


@undisturbed
def launch(problem: SparseBackwardProblem, config: None, args: SparseBackwardArgs) -> None:
    """The whole call, slice after slice of the query tokens."""
    forward = problem.forward
    dkv = torch.zeros(args.dkv.shape, dtype=torch.float32).view(-1, forward.D)
    d_sink = torch.zeros(forward.Hq, dtype=torch.float32)
    # K, its gradient, the scores and theirs
    step = max(1, SLICE_BYTES // (8 * max(forward.sets[0].topk, 1) * (forward.D + forward.Hq)))
    for first in range(0, forward.B, step):
        add_tokens(forward, args, torch.arange(first, min(first + step, forward.B)), dkv, d_sink)
    args.dkv.copy_(dkv.view(args.dkv.shape))
    if args.d_sink is not None:
        args.d_sink.copy_(d_sink)


def add_tokens(
    problem: SparseProblem, args: SparseBackwardArgs, tokens: torch.Tensor, dkv: torch.Tensor, d_sink: torch.Tensor
) -> None:
    """Fill dq of these tokens; add to dkv [rows, D] and d_sink."""
    k, live = gather_keys(args.keys, problem, tokens, torch.zeros_like(tokens))
    k, scale = k.float(), args.softmax_scale  # [n, topk, D]
    q, out, d_out, lse, d_lse = (x[tokens, 0].float() for x in (args.q, args.out, args.d_out, args.lse, args.d_lse))
    empty = lse.isinf()  # [n, Hq]
    weights = torch.bmm(q, k.transpose(1, 2)).mul_(scale).sub_(lse.unsqueeze(-1)).exp_()
    weights.masked_fill_(~live.unsqueeze(1) | empty.unsqueeze(-1), 0.0)
    product = (out * d_out).sum(-1)
    if args.attn_sink is not None:
        left, taken = beside_sink(lse, args.attn_sink, empty)
        d_sink -= (taken * product).sum(0)
        product, d_out = product * left, d_out * left.unsqueeze(-1)
    shift = product - d_lse.masked_fill(empty, 0.0)
    d_scores = torch.bmm(d_out, k[..., : problem.Dv].transpose(1, 2)).sub_(shift.unsqueeze(-1))
    d_scores.mul_(weights).mul_(scale)
    args.dq[tokens, 0] = torch.bmm(d_scores, k).to(problem.dtype)
    dk = torch.bmm(d_scores.transpose(1, 2), q)
    dk[..., : problem.Dv] += torch.bmm(weights.transpose(1, 2), d_out)
    # what names no row has weights 0, and is added to row 0
    slots = args.keys.indices[tokens, 0].long().masked_fill(~live, 0)
    dkv.index_add_(0, slots.flatten(), dk.flatten(0, 1))
