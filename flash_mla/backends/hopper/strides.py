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


def is_token_major(problem: DecodeProblem) -> bool:
    """Whether the rows of the one KV head are packed token by token, since q lies as [B, S_q, Hq, D] alone."""
    _, head, token, _ = problem.q_strides
    Hq, S_q, D = problem.Hq, problem.S_q, problem.D
    return (
        problem.Hk == 1
        and packing.row_stride(head, token, Hq, S_q, D) is None
        and packing.row_stride(token, head, S_q, Hq, D) is not None
    )


def query_row_stride(problem: DecodeProblem) -> int | None:
    """Elements between the packed query rows of a KV head; None where they are not evenly spaced."""
    _, head, token, _ = problem.q_strides
    return head if is_token_major(problem) else packing.row_stride(head, token, problem.ratio, problem.S_q, problem.D)


def refuse_query(problem: DecodeProblem, itemsize: int | None = None) -> str | None:
    """Why TMA cannot read the packed query rows (of elements of q's size, unless told otherwise), or why out's rows do
    not lie as they are packed, or None."""
    request, head, _, column = problem.q_strides
    row = query_row_stride(problem)
    if column != 1 or row is None:
        return f"q strides {problem.q_strides}: (head, token) must pack into evenly spaced rows"
    Hq, S_q, Dv = problem.Hq, problem.S_q, problem.Dv
    if problem.out_strides != ((S_q * Hq * Dv, Dv, Hq * Dv, 1) if is_token_major(problem) else None):
        return (
            f"out strides {problem.out_strides or 'of a contiguous tensor'}, q strides {problem.q_strides}: one order"
        )
    steps = (request, row) if problem.Hk == 1 else (request, row, head * problem.ratio)
    return refuse_steps("q", steps, itemsize or problem.dtype.itemsize)
