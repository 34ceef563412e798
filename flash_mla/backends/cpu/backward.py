"""The backward of prefill on the CPU, in FP32, one request at a time.

With S = scale Q K^T + mask, P = exp(S - lse) and f = exp(lse) / (exp(lse) + exp(sink)), 1 without a sink:

    dV = (f P)^T dO      dS = P (f dO V^T - shift)      shift = f rowsum(dO out) - dlse
    dQ = scale dS K      dK = scale dS^T Q              dsink = -sum over rows of (1 - f) rowsum(dO out)

f is a factor of a row of dO, and the rest is as without a sink. Causal and full attention go through torch's own op,
which finds the shift itself where there is no dlse; any else is products of query tiles. Rows of queries at the end
that have no gradient are not read: padding may hold anything.

NOTE: BF16 too goes through FP32: without AVX512-BF16 torch's op takes 1649 ms in BF16 and 236 ms in FP32 (4 heads of
128 columns, 2048 tokens, causal, EPYC, one thread).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla.backends.cpu.attend import BIAS_BYTES, to_bias
from flash_mla.backends.cpu.prefill import alike_heads, hide_future, share, take_blocks
from flash_mla.backends.cpu.surroundings import undisturbed
from flash_mla.problem import BLOCK, BackwardArgs, BackwardProblem, PrefillProblem

flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refuse(problem: BackwardProblem) -> str | None:
    """It runs everything that the contract admits."""
    return None


def config(problem: BackwardProblem) -> None:
    """Nothing is chosen ahead: the lengths decide."""
    return


@undisturbed
def launch(problem: BackwardProblem, config: None, args: BackwardArgs) -> None:
    """The gradients, request by request."""
    forward = problem.forward
    heads = (forward.Hk, forward.ratio)
    d_sink = None if args.attn_sink is None else torch.zeros(heads, dtype=torch.float32)
    for b in range(forward.B):
        start = 0 if args.start_pos is None else int(args.start_pos[b])
        keys = forward.S_kv if args.seq_lens is None else min(forward.S_kv, max(int(args.seq_lens[b]), 0))
        d_out, lse, q, out = (x[b].unflatten(0, heads).float() for x in (args.d_out, args.lse, args.q, args.out))
        d_lse = zeros(lse)
        if args.d_lse is not None:  # where lse is -inf it is so whatever the inputs
            d_lse = args.d_lse[b].unflatten(0, heads).float().masked_fill(lse == -math.inf, 0.0)
        rows = live_rows(d_out, d_lse, lse)
        d_out, d_lse, lse, q, out = (x[:, :, :rows] for x in (d_out, d_lse, lse, q, out))
        k, v = (x[b, :, :keys].float() for x in (args.k, args.v))
        if args.attn_sink is not None and d_sink is not None:
            left, taken = beside_sink(lse, args.attn_sink.view(*heads, 1), lse == -math.inf)
            d_sink -= (taken * (d_out * out).sum(-1)).sum(-1)
            d_out = d_out * left.unsqueeze(-1)
        # NOTE: as many heads at a time as fill the threads: gradients of all at once are memory that is new to every
        # call, which took 10% of its time (4 heads of 128 columns, 2048 tokens, one thread)
        through = args.mask is None and args.block_mask is None and (args.d_lse is None or not d_lse.any())
        step = max(torch.get_num_threads() // forward.ratio, 1) if through else forward.Hk
        for first in range(0, forward.Hk, step):
            own = slice(first, min(first + step, forward.Hk))
            if rows and keys and through:
                sums = through_op(forward, args.softmax_scale, start, *(x[own] for x in (q, k, v, d_out, out, lse)))
            else:
                sums = zeros(q[own]), zeros(k[own]), zeros(v[own])
                if rows and keys:
                    through_tiles(forward, args, b, start, q, k, v, d_out, (d_out * out).sum(-1) - d_lse, lse, sums)
            store(args, b, own, rows, keys, *sums)
    if args.d_sink is not None and d_sink is not None:
        args.d_sink.copy_(d_sink.flatten())


def beside_sink(lse: Tensor, attn_sink: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """What a sink leaves of a row's weight, and what it takes; 0 and 0 of an empty row."""
    # NOTE: not 1 minus the other, of which little is right where the sink takes little
    left, taken = (torch.sigmoid(x).masked_fill(empty, 0.0) for x in (lse - attn_sink, attn_sink - lse))
    return left, taken


def live_rows(d_out: Tensor, d_lse: Tensor, lse: Tensor) -> int:
    """Query rows up to the last that has a gradient, in any head."""
    if (d_out[..., -1:, :] != 0).any() and (lse[..., -1:] != -math.inf).all():
        return d_out.shape[2]
    live = ((d_out != 0).any(-1) | (d_lse != 0)) & (lse != -math.inf)
    found = live.flatten(0, -2).any(0).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float32)


def store(args: BackwardArgs, b: int, own: slice, rows: int, keys: int, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write the gradients of a request's KV heads `own`, and 0 for what took no part."""
    ratio = dq.shape[1]
    queries = slice(own.start * ratio, own.stop * ratio)
    wanted = ((args.dq, dq.flatten(0, 1), queries, rows), (args.dk, dk, own, keys), (args.dv, dv, own, keys))
    for target, value, heads, live in wanted:
        if target is not None:
            target[b, heads, :live].copy_(value)
            target[b, heads, live:].zero_()


# --- Causal or full ---------------------------------------------------------------------------------------------------


def through_op(
    problem: PrefillProblem,
    scale: float,
    start: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by torch's op: q, out, d_out [Hk, ratio, P, ..], k, v [Hk, S, ..], lse [Hk, ratio, P].

    Parts of rows and keys add up, since lse is the whole row's.
    """
    D, Dv = problem.D, problem.Dv
    every = list(parts(problem.causal, start, q.shape[2], k.shape[1]))
    alone = len(every) == 1 and every[0][1].stop == k.shape[1] and problem.ratio == 1
    if not alone:
        dq, dk, dv = zeros(q), zeros(k), zeros(v)
    # the op wants one head dim
    # NOTE: a pad by nothing copies
    if Dv > D:
        q, k = (F.pad(x, (0, Dv - D)) for x in (q, k))
    if D > Dv:
        v, d_out, out = (F.pad(x, (0, D - Dv)) for x in (v, d_out, out))
    for rows, keys, causal in every:
        own = [x[:, :, rows] for x in (d_out, q, out, lse)]
        one, two, three = flash_backward(
            own[0], own[1], share(k[:, keys], problem.ratio), share(v[:, keys], problem.ratio), own[2], own[3], 0.0,
            causal, scale=scale,
        )  # fmt: skip
        if alone:
            return one[..., :D], two[:, 0, :, :D], three[:, 0, :, :Dv]
        dq[:, :, rows] += one[..., :D]
        dk[:, keys] += two[..., :D].sum(1)
        dv[:, keys] += three[..., :Dv].sum(1)
    return dq, dk, dv


def parts(causal: bool, start: int, rows: int, keys: int) -> Iterator[tuple[slice, slice, bool]]:
    """(rows, keys, whether row i sees the first i + 1 of them) that make up the attention of rows from `start` on."""
    if not causal:
        yield slice(0, rows), slice(0, keys), False
        return
    inside = max(min(keys - start, rows), 0)  # rows whose own key is there
    if inside:
        yield slice(0, inside), slice(start, start + inside), True
    if inside and start:
        yield slice(0, inside), slice(0, start), False
    if inside < rows:
        yield slice(inside, rows), slice(0, keys), False


# --- Masks, block layouts, gradients of lse ---------------------------------------------------------------------------


def through_tiles(
    problem: PrefillProblem,
    args: BackwardArgs,
    b: int,
    start: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    shift: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """As through_op by products, one tile of query rows after another; blocks that the mask drops are not read."""
    heads = (problem.Hk, problem.ratio)
    mask = None if args.mask is None else args.mask[b].unflatten(0, heads)
    blocks = None if args.block_mask is None else args.block_mask[b].unflatten(0, heads)
    tile = BLOCK if blocks is not None else max(BLOCK, BIAS_BYTES // (4 * k.shape[1] * problem.Hq))
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # a row without keys: weights 0
    for groups, ratios in alike_heads(problem, mask, blocks):
        for first in range(0, q.shape[2], tile):
            rows = slice(first, min(first + tile, q.shape[2]))
            visible = min(k.shape[1], start + rows.stop) if problem.causal else k.shape[1]
            kept = torch.arange(-(-visible // BLOCK))
            if blocks is not None:
                kept = kept[blocks[groups.start, ratios.start, first // BLOCK, : len(kept)]]
            if not len(kept):
                continue
            keys = take_blocks(torch.arange(visible)[None], kept, visible)[0]
            bias = None if mask is None else to_bias(mask[groups.start, ratios.start, rows].index_select(1, keys))
            if problem.causal:
                bias = hide_future(bias, keys[None], start + first + torch.arange(rows.stop - first))
            own = groups, ratios, rows
            add_tile(
                own, keys, q[own], k[groups].index_select(1, keys), v[groups].index_select(1, keys), d_out[own],
                shift[own], lse[own], bias, args.softmax_scale, sums,
            )  # fmt: skip


def add_tile(
    own: tuple[slice, slice, slice],
    keys: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    shift: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """One tile: q, d_out [h, r, M, ..], k, v [h, n, ..], shift, lse [h, r, M], bias [M, n], keys [n] of k and v."""
    dq, dk, dv = sums
    shape = q.shape[:3]
    # the heads of a group are rows over one K and V
    q, d_out = q.flatten(1, 2), d_out.flatten(1, 2)
    weights = torch.bmm(q, k.transpose(1, 2)).mul_(scale).unflatten(1, shape[1:])
    if bias is not None:
        weights += bias
    weights.sub_(lse.unsqueeze(-1)).exp_()
    d_scores = torch.bmm(d_out, v.transpose(1, 2)).unflatten(1, shape[1:])
    d_scores = d_scores.sub_(shift.unsqueeze(-1)).mul_(weights).mul_(scale).flatten(1, 2)
    dq[own] += torch.bmm(d_scores, k).view(*shape, -1)
    dk[own[0]].index_add_(1, keys, torch.bmm(d_scores.transpose(1, 2), q))
    dv[own[0]].index_add_(1, keys, torch.bmm(weights.flatten(1, 2).transpose(1, 2), d_out))
