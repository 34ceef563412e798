"""Merge attention over disjoint sets of keys: the specification of every combine kernel.

Softmax over a union of key sets is the average of the parts' outputs, weighted by exp(lse) (FlashDecoding, Dao et al.
2023; the same algebra as online softmax, Milakov and Gimelshein 2018).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from flash_mla.errors import DTypeError, ShapeError
from flash_mla.kinds import explained

__all__ = ["apply_sink", "merge"]


@explained
def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge n partial results.

    Args:
        outs: [n, ..., Dv], each the attention output over its own keys.
        lses: [n, ...], natural-log sums of exponentials; -inf where a part has no key (its output is then ignored,
            but must not be NaN).

    Returns:
        (out [..., Dv], lse [...]) in the input's dtypes; a row without any key gives 0 and -inf.
    """
    check_parts(outs, lses)
    if len(outs) == 0:  # as of one part without a key
        outs, lses = outs.new_zeros((1, *outs.shape[1:])), lses.new_full((1, *lses.shape[1:]), -torch.inf)
    dtypes = outs.dtype, lses.dtype
    outs, lses = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (outs, lses))
    # NOTE: part by part: torch's sums and softmax over the parts give a row other bits beside other rows
    peak = lses.detach().amax(0)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    weights = [torch.exp(lse - peak) for lse in lses]
    total = reduce(torch.add, weights)
    lse = peak + total.log()
    # NOTE: not exp(lses - lse): lse is rounded, and at 1e7 such weights summed to 1.17
    divisor = torch.where(total == 0.0, 1.0, total)
    out = reduce(torch.add, (out * (weight / divisor).unsqueeze(-1) for out, weight in zip(outs, weights, strict=True)))
    return out.to(dtypes[0]), lse.to(dtypes[1])


@explained
def apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor) -> Tensor:
    """Scale out by exp(lse) / (exp(lse) + exp(sink)): the sink takes weight and gives no value.

    Args:
        out: [..., Dv]; lse: [...]; attn_sink: broadcasts to lse. A sink of -inf changes nothing.
    """
    check_parts(out, lse)
    if not computes(attn_sink):
        raise DTypeError(
            f"attn_sink {attn_sink.dtype}",
            "a floating attn_sink of 16 bits or more",
            "A sink is a logit",
            "Call attn_sink.float()",
        )
    if any(size not in (1, of) for size, of in zip(attn_sink.shape[::-1], lse.shape[::-1], strict=False)):
        raise ShapeError(
            f"attn_sink {list(attn_sink.shape)}, lse {list(lse.shape)}",
            "attn_sink that broadcasts to lse",
            "There is not one sink for each row",
            "Pass [Hq, 1] beside lse [B, Hq, S_q]",
        )
    return out * torch.sigmoid(lse - attn_sink).nan_to_num(0.0).unsqueeze(-1)


def check_parts(out: Tensor, lse: Tensor) -> None:
    """One lse for each row of out."""
    if not (computes(out) and computes(lse)) or out.shape[:-1] != lse.shape:
        raise ShapeError(
            f"out {list(out.shape)} {out.dtype}, lse {list(lse.shape)} {lse.dtype}",
            "out [..., Dv] and lse [...], floating, of 16 bits or more",
            "Each row of an output has one lse",
            "Pass what a call with return_lse=True returned",
        )


def computes(x: Tensor) -> bool:
    """Whether torch adds and multiplies in x's dtype: FP8 it only stores."""
    return x.is_floating_point() and x.element_size() > 1
