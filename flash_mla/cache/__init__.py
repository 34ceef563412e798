"""PagedKVCache: keys and values of a batch of requests in blocks of 64 tokens."""

from __future__ import annotations

from flash_mla.cache.paged import PagedKVCache

__all__ = ["PagedKVCache"]
