"""What a result may differ from float64 by, and who says so."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla.problem import FP8


class Budget(NamedTuple):
    """What a result may differ from float64 by: docs/contract.md, section 10."""

    out: float
    """Largest |error| over m = max|out|."""
    cosine: float
    """1 - 2 x.y / (x.x + y.y), which is at least the cosine distance and sees a wrong scale too."""
    lse: float
    """Largest |error| of lse, absolute. The contract gives none for FP32 (here BF16's) and for FP8: as for out, since
    a part whose lse is off by e has its weight off by e in a merge."""


BUDGETS = {
    torch.float32: Budget(1e-5, 5e-6, 1e-4),
    torch.float16: Budget(2e-3, 5e-6, 1e-4),
    torch.bfloat16: Budget(1.6e-2, 5e-6, 1e-4),
    FP8: Budget(6e-2, 1e-3, 6e-2),
}


class Verdict(NamedTuple):
    """How far a result is from the truth; `failures` is empty where it is within budget."""

    out_error: float
    cosine: float
    lse_error: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def check(out: Tensor, lse: Tensor | None, true_out: Tensor, true_lse: Tensor, dtype: torch.dtype) -> Verdict:
    """Judge (out, lse) against float64.

    Args:
        out: [B, Hq, rows, Dv]; lse: [B, Hq, rows] FP32, or None where the call did not ask for it.
        true_out, true_lse: of the same shapes, float64.
        dtype: the inputs' dtype, which selects the budget.
    """
    budget = BUDGETS[dtype]
    failures: list[str] = []
    if out.shape != true_out.shape:
        return Verdict(math.inf, math.inf, math.inf, (f"out {list(out.shape)}, not {list(true_out.shape)}",))
    got = out.double()
    m = true_out.abs().max().item() if true_out.numel() else 0.0
    # NOTE: NaN compares false with everything, so it is made infinite before any maximum
    error = (got - true_out).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    out_error = error.max().item() / (m or 1.0) if error.numel() else 0.0
    if out_error > budget.out:
        failures.append(
            f"out: error {out_error:.1e} of m = {m:.2g}, budget {budget.out:.1e}, {worst(error, got, true_out)}"
        )
    scale = (got.square().sum() + true_out.square().sum()).item()
    cosine = 1.0 - 2.0 * (got * true_out).sum().item() / scale if scale else 0.0
    if not cosine <= budget.cosine:
        failures.append(f"out: cosine distance {cosine:.1e}, budget {budget.cosine:.1e}")
    empty = true_lse == -math.inf
    if (got[empty] != 0).any():
        failures.append("out: not exactly 0 in a row that sees no key")
    if lse is None:
        return Verdict(out_error, cosine, 0.0, tuple(failures))

    if lse.shape != true_lse.shape or lse.dtype != torch.float32:
        failures.append(f"lse {list(lse.shape)} {lse.dtype}, not {list(true_lse.shape)} float32")
        return Verdict(out_error, cosine, math.inf, tuple(failures))
    if (lse[empty] != -math.inf).any():
        failures.append("lse: not -inf in a row that sees no key")
    difference = (lse.double() - true_lse).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(empty, 0.0)
    lse_error = difference.max().item() if difference.numel() else 0.0
    if lse_error > budget.lse:
        failures.append(f"lse: error {lse_error:.1e}, budget {budget.lse:.1e}, {worst(difference, lse, true_lse)}")
    return Verdict(out_error, cosine, lse_error, tuple(failures))


def worst(error: Tensor, got: Tensor, want: Tensor) -> str:
    """Where the largest error is, and how many of them are NaN."""
    index = [int(x) for x in torch.unravel_index(error.argmax(), error.shape)]
    text = f"at {index}: {got[tuple(index)].item():.6g}, not {want[tuple(index)].item():.6g}"
    nans = int(got.isnan().sum())
    return text + (f"; {nans} of {got.numel()} are NaN" if nans else "")
