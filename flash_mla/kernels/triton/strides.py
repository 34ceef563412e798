"""Strides as a kernel names them: `stride_kb` is K's over requests, `stride_kh` over heads.

A launch gives every argument by its name, so that none depends on its place among sixty.
"""

from __future__ import annotations

import functools
from itertools import repeat

from torch import Tensor


@functools.cache
def names(name: str, dims: str) -> tuple[str, ...]:
    """The arguments for the leading dims of a tensor, a letter each."""
    return tuple(f"stride_{name}{dim}" for dim in dims)


def strides(name: str, dims: str, tensor: Tensor | None) -> dict[str, int]:
    """The strides of a tensor's leading dims, a letter each, in elements; 0 where there is no tensor."""
    return dict(zip(names(name, dims), repeat(0) if tensor is None else tensor.stride(), strict=False))


def row_stride(tensor: Tensor) -> int:
    """From a row to the next; 0 of one row, whose stride may be anything, past 32 bits too."""
    return tensor.stride(-2) if tensor.shape[-2] > 1 else 0
