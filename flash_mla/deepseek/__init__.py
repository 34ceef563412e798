"""A drop-in for DeepSeek's FlashMLA package, on every device: its names, argument order and conventions.

    import flash_mla.deepseek as flash_mla

The interface is that of DeepSeek's repository before its release of 2026.09.30, and takes the calls of the copies that
vLLM and SGLang carry. Caches are pools that all requests share, `[num_blocks, page, h_kv, d]`; q is `[b, s_q, h_q, d]`;
lse is natural-log and, where a query sees no key, +inf from the decode and sparse functions and -inf from the varlen
ones, as theirs. These conventions hold in this module only. Nothing here waits for the GPU but the varlen functions,
which read cu_seqlens. docs/deepseek.md lists what is the same, wider and different.
"""

from __future__ import annotations

from flash_mla.deepseek.decode import (
    FlashMLASchedMeta,
    flash_mla_with_kvcache,
    flash_mla_with_kvcache_fp8,
    get_mla_metadata,
)
from flash_mla.deepseek.indices import pool_indices, ragged_indices
from flash_mla.deepseek.sparse import flash_mla_sparse_fwd
from flash_mla.deepseek.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "flash_mla_with_kvcache_fp8",
    "get_mla_metadata",
    "pool_indices",
    "ragged_indices",
]
