"""One rank's blocks of every request, as requests grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla.cache import PagedKVCache
from flash_mla.cache.checks import batch_indices
from flash_mla.contract import check_rank, check_tensor, named
from flash_mla.distributed.attention import ShardedAttention
from flash_mla.distributed.split import local_lengths
from flash_mla.errors import SequenceLengthError, ShapeError
from flash_mla.kinds import explained_class
from flash_mla.problem import BLOCK


@explained_class
class ContextCache:
    """This rank's blocks of every request in a PagedKVCache, and the lengths of whole requests.

        cache = ContextCache(PagedKVCache.mla(B, max_seq_len=most // ranks + 64), attention)
        cache.append(latents)                        # the same rows on all ranks: each keeps its own
        step = attention.step(q.shape, pages.k_cache.shape, pages.block_table, cache.seq_lens)

    Args:
        pages: an empty cache; a request of S tokens takes `local_lengths(S, rank, ranks)` of it.
        attention: whose `context` ranks share the requests.

    Attributes:
        pages: the rank's tensors and tables.
        seq_lens: [B] int32, tokens of whole requests; updated in place.

    All ranks make the same calls. None talks to another: where one rank's pool is full, CacheFullError is raised there
    alone, and this cache is as it was; ranks whose caches are of one size and go through the same calls hold at most a
    block a request more than another, so leave each that much spare.
    """

    def __init__(self, pages: PagedKVCache, attention: ShardedAttention) -> None:
        if any(pages.lengths):
            raise ShapeError(
                given=f"pages {pages}",
                required="an empty cache",
                cause="Its tokens are of no whole request",
                fix="Pass a new PagedKVCache, or call pages.clear()",
            )
        self.pages = pages
        # NOTE: a tensor made in inference mode could never be written outside of it
        with torch.inference_mode(False):
            self.seq_lens = torch.zeros_like(pages.seq_lens)
        self._lengths = [0] * len(pages.lengths)
        self._rank, self._size = attention.context.rank, attention.context.size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each whole request, known to the host."""
        return tuple(self._lengths)

    def append(
        self,
        k: Tensor,
        v: Tensor | None = None,
        num_tokens: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
    ) -> None:
        """Write this rank's rows among new tokens; arguments and errors as in `PagedKVCache.append`.

        Args:
            k: [R, Hk, T, D], the rows of all new tokens; v likewise, or None for a latent cache.
            num_tokens: [R], how many of the T tokens each request takes; omitted, all T.
            requests: the R different batch indices; omitted, all B.
        """
        for name, x in (("k", k), ("v", v)):
            if x is not None or name == "k":
                check_tensor(name, x)
                check_rank(name, x.shape, 4, "[R, Hk, T, D]")  # type: ignore[union-attr]
        if v is not None and v.shape[:3] != k.shape[:3]:
            raise ShapeError(
                given=named(k=k, v=v),
                required="k [R, Hk, T, D], v [R, Hk, T, Dv]",
                cause="`k` and `v` are not of the same tokens",
            )
        rows = batch_indices(requests, len(self._lengths))
        counts = [k.shape[2]] * len(rows) if num_tokens is None else [*num_tokens]
        if len(counts) != len(rows) or any(not 0 <= count <= k.shape[2] for count in counts):
            raise ShapeError(
                given=f"num_tokens {counts}, k {list(k.shape)}, {len(rows)} requests",
                required=f"{len(rows)} integers from 0 to {k.shape[2]}",
                cause="`num_tokens` does not say how many of k's tokens each request takes",
                fix="Pass one number a request, or none for all of them",
            )
        own = [self._own(self._lengths[b], count) for b, count in zip(rows, counts, strict=True)]
        most = max(map(len, own), default=0)
        # [R, most]: a request's own tokens side by side
        index = torch.tensor(
            [[*tokens, *[0] * (most - len(tokens))] for tokens in own], dtype=torch.int64, device="cpu"
        )
        index = index.view(len(rows), most).to(k.device)
        request = torch.arange(len(rows), device=k.device)[:, None]
        own_k = k[request, :, index].transpose(1, 2)  # [R, Hk, most, D]
        own_v = None if v is None else v[request, :, index].transpose(1, 2)
        self.pages.append(own_k, own_v, [len(tokens) for tokens in own], rows)
        self._set({b: self._lengths[b] + count for b, count in zip(rows, counts, strict=True)})

    def truncate(self, lengths: Sequence[int], requests: Sequence[int] | None = None) -> None:
        """Shorten whole requests to so many tokens; arguments and errors as in `PagedKVCache.truncate`."""
        rows = batch_indices(requests, len(self._lengths))
        if len(lengths) != len(rows):
            raise ShapeError(
                given=f"{len(lengths)} lengths for {len(rows)} requests",
                required="one a request",
                cause="`lengths` does not say what each request keeps",
                fix="Pass one length for each request named",
            )
        for b, length in zip(rows, lengths, strict=True):
            if not 0 <= length <= self._lengths[b]:
                raise SequenceLengthError(
                    given=f"request {b}: {length} tokens to keep, {self._lengths[b]} held",
                    required=f"lengths from 0 to {self._lengths[b]}",
                    cause="truncate only drops tokens",
                    fix="Pass the tokens to keep",
                )
        self.pages.truncate([local_lengths(length, self._rank, self._size) for length in lengths], rows)
        self._set(dict(zip(rows, lengths, strict=True)))

    def fork(self, source: int, target: int) -> None:
        """Make the empty request `target` a copy of `source`, as `PagedKVCache.fork`."""
        source, target = batch_indices([source, target], len(self._lengths))
        if self._lengths[target]:  # this rank may hold none of its tokens
            raise SequenceLengthError(
                given=f"fork({source}, {target}); request {target} holds {self._lengths[target]} tokens",
                required="an empty target",
                cause="The fork would drop the target's tokens",
                fix=f"free([{target}]) first",
            )
        self.pages.fork(source, target)
        self._set({target: self._lengths[source]})

    def free(self, requests: Sequence[int]) -> None:
        """Empty the requests, as `PagedKVCache.free`."""
        rows = batch_indices(requests, len(self._lengths))
        self.pages.free(rows)
        self._set(dict.fromkeys(rows, 0))

    def _own(self, start: int, count: int) -> list[int]:
        """Which of `count` tokens from position `start` on are this rank's."""
        return [i for i in range(count) if (start + i) // BLOCK % self._size == self._rank]

    def _set(self, lengths: dict[int, int]) -> None:
        for b, length in lengths.items():
            self._lengths[b] = length
        self.seq_lens.copy_(torch.tensor(self._lengths, dtype=torch.int32, device="cpu"))
