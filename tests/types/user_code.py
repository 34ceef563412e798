"""Code as a user writes it, for `mypy --strict`'s flags (pyproject.toml): never run, only checked.

An `assert_type` that is wrong is an error; so is a `type: ignore` under which there is none, which holds the calls that
must not pass.
"""

from __future__ import annotations

from typing import Any, assert_type

from torch import Tensor

import flash_mla
from flash_mla import (
    BlockSparseLayout,
    FlashMLAError,
    MLAMetadata,
    PagedKVCache,
    decode_over_pages,
    deepseek,
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    indexer,
    mha_fwd_kvcache,
)

Both = tuple[Tensor, Tensor]


def decode(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, wanted: bool) -> Tensor:
    metadata = get_mla_metadata(q.shape, k.shape, table, lengths, v_head_dim=512)
    assert_type(metadata, MLAMetadata)
    assert_type(metadata.max_seq_len, int | None)
    assert_type(flash_mla_with_kvcache(q, k, v, table, lengths, return_lse=True), Both)
    assert_type(flash_mla_with_kvcache(q, k, v, table, lengths, return_lse=wanted), Tensor | Both)
    assert_type(flash_mla_with_kvcache(q, k, v, table, lengths, return_lse=False), Tensor)
    flash_mla_with_kvcache(q, k, v, table, lengths, return_lse=1)  # type: ignore[call-overload]
    flash_mla_with_kvcache(q, k, v, table, lengths, causal=True)  # type: ignore[call-overload]
    out = flash_mla_with_kvcache(q, k, v, table, lengths, None, metadata, softmax_scale=0.1, backend="cpu")
    assert_type(out, Tensor)
    return out


def prefill(q: Tensor, k: Tensor, v: Tensor, wanted: bool) -> Tensor:
    layout = BlockSparseLayout.causal(1024)
    assert_type(layout, BlockSparseLayout)
    assert_type(flash_mla_prefill(q, k, v, layout), Tensor)
    assert_type(flash_mla_prefill(q, k, v, return_lse=wanted), Tensor | Both)
    flash_mla_prefill(q, k, return_lse=True)  # type: ignore[call-overload]
    out, lse = flash_mla_prefill(q, k, v, causal=True, return_lse=True)
    assert_type(lse, Tensor)
    return out


def paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, wanted: bool) -> Tensor:
    assert_type(mha_fwd_kvcache(q, k, v, table, k=q, v=q), Tensor)
    assert_type(mha_fwd_kvcache(q, k, v, table, return_lse=True), Both)
    assert_type(mha_fwd_kvcache(q, k, v, table, return_lse=wanted), Tensor | Both)
    assert_type(decode_over_pages(q, k, None, table, lengths, v_head_dim=512), Tensor)
    assert_type(decode_over_pages(q, k, v, table, lengths, layout="HND", return_lse=True), Both)
    assert_type(decode_over_pages(q, k, v, table, lengths, return_lse=wanted), Tensor | Both)
    return decode_over_pages(q, k, v, table, lengths)


def drop_in(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor, indices: Tensor) -> Tensor:
    """DeepSeek's functions always return all that they have."""
    scheduler, splits = deepseek.get_mla_metadata(lengths, 128, 1)
    out = deepseek.flash_mla_with_kvcache(q, pool, table, lengths, 512, scheduler, splits, causal=True)
    assert_type(out, Both)
    assert_type(deepseek.flash_mla_sparse_fwd(q, pool, indices, 0.1), tuple[Tensor, Tensor, Tensor])
    assert_type(deepseek.flash_attn_varlen_func(q, q, q, lengths, lengths, 64, 64), Both)
    assert_type(indexer.topk_indices(q, 512), Tensor)
    return out[0]


def own_cache(model: Any) -> int:
    cache = PagedKVCache.mla(8, max_seq_len=4096)
    try:
        cache.append(model.k)
    except FlashMLAError as error:
        assert_type(error.args, tuple[Any, ...])
    assert_type(cache.block_table, Tensor)
    assert_type(cache.decode(model.q, softmax_scale=0.1), Tensor)
    assert_type(cache.decode(model.q, return_lse=True), Both)
    assert_type(flash_mla.__version__, str)
    return sum(cache.lengths)
