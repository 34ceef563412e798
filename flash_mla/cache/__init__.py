"""PagedKVCache: keys and values of a batch of requests in blocks of 64 tokens; and a serving engine's pool as one."""

from __future__ import annotations

from flash_mla.cache.paged import PagedKVCache
from flash_mla.cache.rows import page_view

__all__ = ["PagedKVCache", "page_view"]
