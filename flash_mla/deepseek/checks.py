"""What the functions of this package check alike, and how they report a query without keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.contract import check_last_dim, check_rank, check_tensor
from flash_mla.errors import DTypeError
from flash_mla.problem import DTYPES


def check_query(q: Tensor, layout: str, rank: int) -> None:
    check_tensor("q", q)
    check_rank("q", q.shape, rank, layout)
    check_last_dim("q", q)
    if q.dtype not in DTYPES:
        raise DTypeError(f"q {q.dtype}", f"one of {DTYPES}", f"{q.dtype} is not a dtype that attention runs in")


def check_same_dtype(q: Tensor, name: str, cache: Tensor) -> None:
    if cache.dtype != q.dtype:
        raise DTypeError(
            f"q {q.dtype}, {name} {cache.dtype}",
            "the same dtype, or with is_fp8_kvcache a 1-byte cache of a row format",
            f"`{name}` is not in q's dtype",
            "Cast one of them, or say what the cache holds with is_fp8_kvcache",
        )


def empty_is_inf(lse: Tensor) -> Tensor:
    """-inf to +inf in place, in one kernel."""
    return torch.nan_to_num_(lse, nan=math.nan, posinf=math.inf, neginf=math.inf)
