"""S_q queries that see the same keys are as good as the heads of one query: a kernel then reads those keys once."""

from __future__ import annotations

from torch import Tensor


def by_token(x: Tensor, Hk: int) -> Tensor:
    """[B, Hq, S_q, columns] as the view [B, Hk, S_q, ratio, columns]."""
    return x.unflatten(1, (Hk, x.shape[1] // Hk)).transpose(2, 3)


def as_heads(q: Tensor, Hk: int) -> Tensor:
    """q [B, Hq, S_q, D] as [B, Hk * S_q * ratio, 1, D]: a view where Hk is 1 and q lies as [B, S_q, Hq, D]."""
    B, Hq, S_q, D = q.shape
    return by_token(q, Hk).reshape(B, Hq * S_q, 1, D)


def from_heads(x: Tensor, Hk: int, S_q: int) -> Tensor:
    """What came of `as_heads`, [B, Hk * S_q * ratio, 1, ..], as [B, Hq, S_q, ..]."""
    ratio = x.shape[1] // (Hk * S_q)
    return x.view(x.shape[0], Hk, S_q, ratio, *x.shape[3:]).transpose(2, 3).flatten(1, 2)
