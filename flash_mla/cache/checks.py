"""Arguments of a PagedKVCache's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_mla.errors import DeviceError, DTypeError, ShapeError
from flash_mla.problem import DTYPES, FP8
from flash_mla.quant import check_divisor


def integers(
    name: str, values: Sequence[int] | Tensor, requests: int, *, length: int | None = None, most: int | None = None
) -> list[int]:
    """A list of `length` (None: any number of) integers in [0, most]; requests: those of the cache."""
    numbers: Any = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(numbers, (Sequence, range)) and not isinstance(numbers, str):
        numbers = [*numbers]
    fits = isinstance(numbers, list) and length in (None, len(numbers)) and all(type(n) is int for n in numbers)
    if not fits or (numbers and (min(numbers) < 0 or (most is not None and max(numbers) > most))):
        raise ShapeError(
            given=f"{name} {numbers!r}",
            required=f"{'' if length is None else f'{length} '}integers from 0"
            + ("" if most is None else f" to {most}"),
            cause=f"{name} does not fit this cache of {requests} requests or this call",
            fix="Name requests by batch index; take no more tokens than k holds",
        )
    return numbers


def batch_indices(requests: Sequence[int] | None, batch: int) -> list[int]:
    """The different batch indices that are named, all where None are."""
    if requests is None:
        return list(range(batch))
    rows = integers("requests", requests, batch, most=batch - 1)
    if len(set(rows)) < len(rows):
        raise ShapeError(
            given=f"requests {rows}",
            required="different batch indices",
            cause="A request is named twice",
            fix="Name each request once, with all of its tokens",
        )
    return rows


def check_rows(name: str, rows: Tensor, storage: Tensor, R: int, T: int) -> None:
    """New rows [R, Hk, T, D] fit the cache's array of K or V."""
    expected = (R, storage.shape[1], T, storage.shape[-1])
    dense = isinstance(rows, Tensor) and rows.layout == torch.strided
    shape = list(rows.shape) if dense else f"is a {getattr(rows, 'layout', type(rows).__name__)}"
    if shape != [*expected]:
        raise ShapeError(
            given=f"{name} {shape}",
            required=f"{name} [{expected[0]}, {expected[1]}, T, {expected[3]}], the same T in k and v",
            cause="The new rows do not fit the cache",
            fix="Pass [R, Hk, T, D], one row of the batch for each request named",
        )
    if rows.dtype != storage.dtype and (storage.dtype != FP8 or rows.dtype not in DTYPES):
        raise DTypeError(given=f"{name} {rows.dtype}, cache {storage.dtype}", required="the cache's dtype")
    if rows.device != storage.device:
        raise DeviceError(given=f"{name} on {rows.device}, cache on {storage.device}", required="one device")


def head_factors(name: str, descale: float | Tensor, heads: int, device: torch.device) -> Tensor:
    """descale as FP32 [1, Hk]."""
    check_divisor(descale, name)
    factors = torch.as_tensor(descale, dtype=torch.float32, device=device)
    if factors.shape not in ((), (heads,), (1, heads)):
        raise ShapeError(
            given=f"{name} {list(factors.shape)}",
            required=f"a float, [{heads}] or [1, {heads}]",
            cause=f"`{name}` does not have one factor for each KV head",
            fix="Pass a float, or a tensor [Hk]",
        )
    return factors.expand(1, heads).contiguous()
