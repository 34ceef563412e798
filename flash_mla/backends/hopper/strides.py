"""What TMA can read, for every Hopper kernel, and the packing of query rows in decode."""

from __future__ import annotations

from collections.abc import Sequence

from flash_mla.kernels.hopper import packing
from flash_mla.kernels.hopper.limits import TMA_BYTES
from flash_mla.problem import DecodeProblem


def refuse_rows(name: str, strides: Sequence[int], width: int, itemsize: int) -> str | None:
    """Why TMA cannot read rows of `width` elements with these strides, or None."""
    if strides[-1] != 1 or strides[-2] < width:
        return f"{name} strides {tuple(strides)}: rows must be contiguous and must not overlap"
    return refuse_steps(name, strides[:-1], itemsize)


def refuse_steps(name: str, strides: Sequence[int], itemsize: int) -> str | None:
    """Why TMA cannot step by these strides, or None."""
    unit = TMA_BYTES // itemsize
    for stride in strides:
        if stride % unit:
            return f"a {name} stride of {stride} elements: TMA takes multiples of {unit}"
    return None


def query_row_stride(problem: DecodeProblem) -> int | None:
    """Elements between the packed query rows of a KV head; None where they are not evenly spaced."""
    _, head, token, _ = problem.q_strides
    return packing.row_stride(head, token, problem.ratio, problem.S_q, problem.D)


def refuse_query(problem: DecodeProblem, itemsize: int | None = None) -> str | None:
    """Why TMA cannot read the packed query rows (of elements of q's size, unless told otherwise), or None."""
    request, head, _, column = problem.q_strides
    row = query_row_stride(problem)
    if column != 1 or row is None:
        return f"q strides {problem.q_strides}: (head, token) must pack into evenly spaced rows"
    steps = (request, row) if problem.Hk == 1 else (request, row, head * problem.ratio)
    return refuse_steps("q", steps, itemsize or problem.dtype.itemsize)
