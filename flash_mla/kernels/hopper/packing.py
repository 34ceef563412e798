"""How query rows are packed in decode, for every Hopper kernel: head-major. Imports no DSL.

The `heads` query heads of one KV head and the S_q tokens of a request make one matrix of heads * S_q rows,
`row = head * S_q + token`: the order of q [B, Hq, S_q, D] and of out, so that a contiguous q is one strided matrix for
TMA, and a tile of rows of out is written as it lies. (Triton's kernels pack query-major, `row = token * heads + head`:
see `kernels/triton/decode.py`.)

Functions take Python ints (backends, tests) or the DSL's Int32 (kernels).
"""

from __future__ import annotations

from typing import Any


def head_of(row: Any, S_q: Any) -> Any:
    """The query head of a row, within its KV head."""
    return row // S_q


def token_of(row: Any, S_q: Any) -> Any:
    """The query token of a row."""
    return row % S_q


def last_key(row: Any, length: Any, S_q: Any) -> Any:
    """The last key that a row sees: causal among the S_q newest of the request's `length` tokens."""
    return length - S_q + token_of(row, S_q)


def row_stride(head_stride: int, token_stride: int, heads: int, S_q: int, D: int) -> int | None:
    """Elements between packed rows; None where they are not evenly spaced. One row has none: D."""
    if S_q == 1:
        return head_stride if heads > 1 else D
    return token_stride if heads == 1 or head_stride == S_q * token_stride else None
