"""What the functions of this package check alike."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from flash_mla.contract import (
    OTHER_OUT,
    check_apart,
    check_index,
    check_last_dim,
    check_on,
    check_rank,
    check_tensor,
    is_aligned,
    named,
    out_dtype,
    refuse_learning_out,
)
from flash_mla.errors import DTypeError, SequenceLengthError, ShapeError
from flash_mla.passed import traced
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


def check_starts(q: Tensor, **starts: Tensor) -> None:
    """cu_seqlens [n + 1] of as many sequences each, on q's device; reads no value."""
    sizes: list[int] = []
    for name, x in starts.items():
        check_tensor(name, x)
        check_on(q.device, **{name: x})
        check_index(name, x, (sizes[0] if sizes else -1,), "[n + 1]")
        if not len(x):
            raise ShapeError(f"{name} [0]", f"{name} [n + 1] for n sequences", "The first entry, 0, is missing")
        sizes.append(len(x))


def check_start_values(name: str, starts: list[int], rows: int) -> None:
    """cu_seqlens begin at 0, do not decrease and end at the rows that are there."""
    for i, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            raise SequenceLengthError(
                f"{name}[{i}] = {start}, {name}[{i + 1}] = {end}",
                f"{name} does not decrease",
                f"Sequence {i} has {end - start} rows",
                "Pass the running sum of the lengths, from 0",
            )
    if starts[0] != 0 or starts[-1] != rows:
        raise SequenceLengthError(
            f"{name} from {starts[0]} to {starts[-1]}, {rows} rows",
            f"{name} from 0 to the rows that are there, {rows}",
            "The sequences do not cover the rows",
            "Pass the running sum of the lengths, from 0, and no rows behind the last sequence",
        )


def check_out(out: Tensor | None, q: Tensor, Dv: int, **inputs: Tensor | None) -> None:
    """`out` is q's but for Dv columns, of the output's dtype, and apart from q and the call's other tensors."""
    if out is None:
        return
    check_tensor("out", out)
    size = (*q.shape[:-1], Dv)
    if out.shape != size:
        raise ShapeError(named(out=out), f"out {list(size)}", "`out` does not have the output's shape", OTHER_OUT)
    if out.dtype != out_dtype(q.dtype):
        required = out_dtype(q.dtype)
        raise DTypeError(f"out {out.dtype}", f"out {required}", "`out` does not have the output's dtype", OTHER_OUT)
    check_on(q.device, out=out)
    check_last_dim("out", out)
    refuse_learning_out(out)
    if not traced(q):  # a traced tensor has no address
        check_apart("out", out, q=q, **inputs)


def writable(out: Tensor | None) -> Tensor | None:
    """A checked `out` that kernels write to as it lies: contiguous, on 16 bytes."""
    return out if out is not None and out.is_contiguous() and is_aligned(out) else None


def given(out: Tensor | None, result: Tensor) -> Tensor:
    """The result, in `out` if there is one."""
    return result if out is None or out is result else out.copy_(result)
