"""How query rows are packed in decode, for every Hopper kernel. Imports no DSL.

The `heads` query heads of one KV head and the S_q tokens of a request make one matrix of heads * S_q rows. Head-major,
`row = head * S_q + token`, is the order of q [B, Hq, S_q, D] and of out, so that a contiguous q is one strided matrix
for TMA, and a tile of rows of out is written as it lies. Token-major, `row = token * heads + head`, is the order of q
and out that lie as [B, S_q, Hq, D], as DeepSeek's do, over one KV head; each kernel has a variant for it. (Triton's
kernels pack so always: see `kernels/triton/decode.py`.)

Everything takes Python ints (backends, tests) or the DSL's Int32 (kernels).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Packing(NamedTuple):
    """The order of rows: S_q tokens of every head or, where `heads` is not None, so many heads of every token."""

    S_q: Any
    heads: Any = None

    def head_of(self, row: Any) -> Any:
        """The query head of a row, within its KV head."""
        return row // self.S_q if self.heads is None else row % self.heads

    def token_of(self, row: Any) -> Any:
        """The query token of a row."""
        return row % self.S_q if self.heads is None else row // self.heads

    def last_key(self, row: Any, length: Any) -> Any:
        """The last key that a row sees: causal among the S_q newest of the request's `length` tokens."""
        return length - self.S_q + self.token_of(row)

    def lse_of(self, row: Any) -> Any:
        """Where the row's lse lies in [heads, S_q]."""
        return row if self.heads is None else self.head_of(row) * self.S_q + self.token_of(row)


def row_stride(head_stride: int, token_stride: int, heads: int, S_q: int, D: int) -> int | None:
    """Elements between head-major rows; None where they are not evenly spaced. One row has none: D.

    With the strides, and the numbers, of heads and tokens exchanged: between token-major rows.
    """
    if S_q == 1:
        return head_stride if heads > 1 else D
    return token_stride if heads == 1 or head_stride == S_q * token_stride else None
