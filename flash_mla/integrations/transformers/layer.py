"""One layer's part of a paged cache: views of its rows, and its decode calls, whose checks are made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_mla.autograd import learning, refusing
from flash_mla.cache import PagedKVCache
from flash_mla.contract import is_alias
from flash_mla.pages import Bound, PoolCall, bind
from flash_mla.passed import Passed

if TYPE_CHECKING:
    from flash_mla.integrations.transformers.token import LatentDecode, TokenDecode


class Layer:
    """Layer `index` of `layers`, which share the heads of a cache evenly: views, none of them a copy.

    Attributes:
        pool: the cache's k_cache; where that is another tensor, this layer is of the past.
        k_cache, v_cache: [B, Hk, Nblk, 64, D] and [.., Dv].
        is_latent: V is the first Dv columns of K (MLA).
        k_rows, v_rows: where new rows are written: [Hk, Nblk * 64, D] and [.., Dv]. FP8 as bytes, since torch copies
            e4m3 by index as bytes only.
        index_rows: [1, Nblk * 64, index_dim], the columns of a row behind the latent, or None.
        k_descale, v_descale: [1, Hk] of an FP8 cache, or None.
        tokens: the layer's bound calls of one token a sequence.
    """

    def __init__(self, pages: PagedKVCache, index: int, layers: int, index_dim: int = 0) -> None:
        self.pool = pages.k_cache
        heads = self.pool.shape[1] // layers
        own = slice(index * heads, (index + 1) * heads)
        k_cache, v_cache = self.pool[:, own], pages.v_cache[:, own]
        self.index_rows = rows_of(k_cache[..., -index_dim:]) if index_dim else None
        self.k_cache, self.v_cache = k_cache[..., : self.pool.shape[-1] - index_dim], v_cache
        self.is_latent = is_alias(self.k_cache, v_cache)
        self.k_rows, self.v_rows = rows_of(self.k_cache), rows_of(v_cache)
        self.k_descale = None if pages.k_descale is None else pages.k_descale[:, own]
        self.v_descale = None if pages.v_descale is None else pages.v_descale[:, own]
        self.tokens: Passed[TokenDecode | LatentDecode] = Passed()
        self._bound = Passed[Bound]()

    def decode(self, q: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """Attention of the newest tokens, q [B, Hq, S_q, D], over the pages: [B, Hq, S_q, Dv]."""
        out = q.new_empty((*q.shape[:3], self.v_cache.shape[-1]))
        self.bound(q, table, lengths, out, scale).attend(q, table, lengths, out, False)
        inputs = learning(q)
        return refusing("decode over a paged cache", out, inputs) if inputs else out

    def bound(self, q: Tensor, table: Tensor, lengths: Tensor, out: Tensor, scale: float) -> Bound:
        """The decode call with these tensors; one that repeats what the checks look at is not checked again."""
        tensors, rest = (q, table, lengths), (scale,)
        if (found := self._bound.get(tensors, rest)) is not None:
            return found
        k_pages, v_pages = (x[0].transpose(0, 1) for x in (self.k_cache, self.v_cache))
        call = PoolCall(
            q, k_pages, v_pages, None, table, lengths, layout="HND", softmax_scale=scale,
            descales=(None, self.k_descale, self.v_descale),
        )  # fmt: skip
        return self._bound.keep(tensors, rest, bind(call, out))


def rows_of(cache: Tensor) -> Tensor:
    """A pool's view [B, Hk, Nblk, 64, D] as rows [Hk, Nblk * 64, D]."""
    rows = cache[0].flatten(1, 2)
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
