"""Merge attention over disjoint sets of keys: the specification of every combine kernel.

Softmax over a union of key sets is the average of the parts' outputs, weighted by exp(lse) (FlashDecoding, Dao et al.
2023; the same algebra as online softmax, Milakov and Gimelshein 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_sink", "merge"]


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge n partial results.

    Args:
        outs: [n, ..., Dv], each the attention output over its own keys.
        lses: [n, ...], natural-log sums of exponentials; -inf where a part has no key (its output is then ignored,
            but must not be NaN).

    Returns:
        (out [..., Dv], lse [...]) in the input's dtypes; a row without any key gives 0 and -inf.
    """
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))
    return (outs * weights.unsqueeze(-1).to(outs.dtype)).sum(0), lse


def apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor) -> Tensor:
    """Scale out by exp(lse) / (exp(lse) + exp(sink)): the sink takes weight and gives no value.

    Args:
        out: [..., Dv]; lse: [...]; attn_sink: broadcasts to lse. A sink of -inf changes nothing.
    """
    return out * torch.sigmoid(lse - attn_sink).nan_to_num(0.0).unsqueeze(-1)
