"""The truth in float64, one request at a time; nothing of the library is used."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .draw import BLOCK, FP8


class Budget(NamedTuple):
    """docs/contract.md, section 10: out as a share of the largest |out|, lse absolute."""

    out: float
    lse: float


BUDGETS = {
    torch.float32: Budget(1e-5, 1e-4),
    torch.bfloat16: Budget(1.6e-2, 1e-4),
    torch.float16: Budget(2e-3, 1e-4),
    FP8: Budget(6e-2, 6e-2),
}


class Rows(NamedTuple):
    """One request's truth: out [Hq, M, Dv], lse [Hq, M], the greatest scaled score [Hq, M]; float64 on the CPU."""

    out: Tensor
    lse: Tensor
    top: Tensor


def float64(x: Tensor) -> Tensor:
    return x.detach().cpu().to(torch.float32).double() if x.dtype == FP8 else x.detach().cpu().double()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
) -> Rows:
    """q [Hq, M, D], k [Hk, L, D], v [Hk, L, Dv] float64; keep and bias broadcast to [Hq, M, L]; sink [Hq]."""
    ratio = q.shape[0] // k.shape[0]
    scores = scale * (q @ k.repeat_interleave(ratio, 0).transpose(1, 2))
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    top = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    shift = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(scores - shift[..., None])
    total = weights.sum(-1)
    out = weights @ v.repeat_interleave(ratio, 0) / total.masked_fill(total == 0, 1.0)[..., None]
    lse = torch.where(total == 0, -math.inf, shift + total.log())
    if sink is not None:
        taken = torch.exp(float64(sink)[:, None] - lse)  # inf in an empty row, whose out is 0
        out = out * (1.0 / (1.0 + taken))[..., None]
    return Rows(out, lse, top)


def cached(cache: Tensor, table_row: list[int], b: int, length: int) -> Tensor:
    """[Hk, length, D] float64: the tokens of request b of a page view [B, Hk, Nblk, 64, D]."""
    parts = []
    for t in range(0, length, BLOCK):
        parts.append(float64(cache[b, :, table_row[t // BLOCK], : min(BLOCK, length - t)]))
    return torch.cat(parts, 1) if parts else torch.zeros(cache.shape[1], 0, cache.shape[-1], dtype=torch.float64)


def factor(value: float | Tensor | None, b: int, B: int, Hk: int) -> Tensor:
    """[Hk, 1, 1] of a descale."""
    given = torch.ones(()) if value is None else torch.as_tensor(value, dtype=torch.float64).cpu()
    return given.expand(B, Hk)[b].double()[:, None, None]


def split_mask(mask: Tensor | None, b: int, B: int, L: int) -> tuple[Tensor | None, Tensor | None]:
    """(keep, bias) of request b, each [Hq|1, M|1, L] or None; keys past the mask's end are hidden."""
    if mask is None:
        return None, None
    part = mask.cpu().expand(B, -1, -1, -1)[b][..., :L]
    if part.dtype == torch.bool:
        return torch.nn.functional.pad(part, (0, L - part.shape[-1])), None
    return None, torch.nn.functional.pad(part.double(), (0, L - part.shape[-1]), value=-math.inf)


def judge(
    out: Tensor,
    lse: Tensor | None,
    truth: list[Rows],
    dtype: torch.dtype,
    empty_lse: float = -math.inf,
    stored: torch.dtype | None = None,
) -> list[str]:
    """Failures of out [B, Hq, M, Dv] and lse [B, Hq, M] against one Rows a request; dtype: of q, stored: of the cache
    if not q's, whose budget then holds.

    FP32 holds a score of size s to s * 2^-24, and a weight to as much relative: budgets grow where scores are so large
    that no FP32 softmax could meet them.
    """
    want_out = torch.stack([rows.out for rows in truth]) if truth else torch.zeros(out.shape, dtype=torch.float64)
    want_lse = torch.stack([rows.lse for rows in truth]) if truth else torch.zeros(out.shape[:-1], dtype=torch.float64)
    if out.shape != want_out.shape:
        return [f"out {list(out.shape)}, not {list(want_out.shape)}"]
    expected = torch.bfloat16 if dtype == FP8 else dtype
    failures = [] if out.dtype == expected else [f"out {out.dtype}, not {expected}"]
    if not out.numel():
        return failures
    finite = want_lse.masked_fill(want_lse.abs() > 1e30, 0.0).abs()  # -inf too
    rounding = 8 * finite.max().item() * 2.0**-24
    budget = BUDGETS[stored or dtype]
    got = float64(out)
    error = (got - want_out).abs().nan_to_num(nan=math.inf)
    m = want_out.abs().max().item() or 1.0
    allowed = budget.out + rounding
    if error.max() > allowed * m + torch.finfo(expected).tiny:
        failures.append(f"out: error {error.max() / m:.1e} of m {m:.2g} > {allowed:.1e}, {place(error, got, want_out)}")
    empty = want_lse == -math.inf
    if (got[empty] != 0).any():
        failures.append("out: not 0 in a row without keys")
    if lse is not None:
        if lse.shape != want_lse.shape or lse.dtype != torch.float32:
            return [*failures, f"lse {list(lse.shape)} {lse.dtype}"]
        got = float64(lse)
        if (got[empty] != empty_lse).any():
            failures.append(f"lse: not {empty_lse} in a row without keys")
        error = (got - want_lse).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(empty, 0.0)
        # a row of finfo.min throughout: finite is all that FP32 can say of it
        error = error.masked_fill((want_lse.abs() > 1e30) & got.isfinite(), 0.0)
        if error.max() > budget.lse + rounding:
            failures.append(
                f"lse: error {error.max():.1e} > {budget.lse + rounding:.1e}, {place(error, got, want_lse)}"
            )
    return failures


def place(error: Tensor, got: Tensor, want: Tensor) -> str:
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"at {where}: {got[where].item():.6g}, not {want[where].item():.6g}"
