"""Every argument of the public functions in turn, of a kind that they do not take: our error, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flash_mla import (
    BlockSparseLayout,
    FlashMLAError,
    ShapeError,
    decode_over_pages,
    deepseek,
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    indexer,
    mha_fwd_kvcache,
)
from flash_mla.merge import apply_sink, merge
from flash_mla.problem import FP8
from flash_mla.testing import DecodeCase, MhaCase, PrefillCase, same_bits

JUNK = {
    "text": "abc", "list": [1, 2], "number": 10**30, "complex": 1j, "object": object(), "numpy": np.zeros((2, 3)),
    "sparse": torch.zeros(2, 3).to_sparse(), "imaginary": torch.ones(2, 3, dtype=torch.complex64),
}  # fmt: skip


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(FP8)


def drop_in(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "q": torch.randn(2, 1, 4, 64).to(dtype), "k_cache": torch.randn(6, 64, 1, 64).to(dtype),
        "block_table": ints(2, 3), "cache_seqlens": ints(2) + 3, "head_dim_v": 64, "softmax_scale": 0.1,
        "causal": True,
    }  # fmt: skip


def sequences() -> dict[str, Any]:
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    rows = [torch.randn(7, heads, 64) for heads in (4, 2, 2)]
    names = ("q", "k", "v", "cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv", "softmax_scale")
    return dict(zip(names, (*rows, starts, starts, 4, 4, 0.1), strict=True)) | {"causal": True}


CALLS: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "decode": lambda: (flash_mla_with_kvcache, DecodeCase("", (70, 3), sink=True).call().arguments),
    "prefill": lambda: (flash_mla_prefill, PrefillCase("", 70, sink=True).call().arguments),
    "mha": lambda: (mha_fwd_kvcache, MhaCase("", 70, starts=(64, 3)).call().arguments),
    "metadata": lambda: (
        get_mla_metadata,
        {
            "q_shape": (2, 4, 1, 64), "kv_shape": (2, 1, 3, 64, 64), "block_table": ints(2, 3), "seq_lens": ints(2),
            "v_head_dim": 64, "check_values": True,
        },
    ),
    "pages": lambda: (
        decode_over_pages,
        {
            "q": torch.randn(2, 4, 1, 64), "k_pages": torch.randn(6, 16, 1, 64), "v_pages": torch.randn(6, 16, 1, 64),
            "block_table": ints(2, 3), "seq_lens": ints(2) + 3, "layout": "NHD", "causal": True, "check_values": True,
            "return_lse": True,
        },
    ),
    "drop-in": lambda: (deepseek.flash_mla_with_kvcache, drop_in(torch.bfloat16) | {"is_fp8_kvcache": False}),
    "drop-in/fp8": lambda: (
        deepseek.flash_mla_with_kvcache_fp8,
        drop_in(FP8) | {"descale_q": torch.ones(1), "descale_k": torch.ones(1)},
    ),
    "drop-in/sparse-prefill": lambda: (
        deepseek.flash_mla_sparse_fwd,
        {"q": torch.randn(5, 4, 576), "kv": torch.randn(9, 1, 576), "indices": ints(5, 1, 8), "sm_scale": 0.1},
    ),
    "drop-in/varlen": lambda: (deepseek.flash_attn_varlen_func, sequences()),
    "pool-indices": lambda: (
        deepseek.pool_indices, {"positions": ints(2, 1, 8), "block_table": ints(2, 3), "page": 64},
    ),
    "index/ragged": lambda: (
        indexer.mqa_logits,
        {
            "q": e4m3(5, 4, 128), "kv": (e4m3(9, 128), torch.ones(9)), "weights": torch.ones(5, 4), "starts": ints(5),
            "ends": ints(5) + 9, "clean_logits": True,
        },
    ),
    "index/pages": lambda: (
        indexer.decode_indices,
        {
            "q": e4m3(2, 1, 4, 128), "k_cache": indexer.INDEX_ROWS.empty(3).zero_(), "weights": torch.ones(2, 4),
            "context_lens": ints(2) + 5, "block_table": ints(2, 3), "topk": 4, "max_context_len": 192,
        },
    ),
    "index/topk": lambda: (
        indexer.topk_indices,
        {"scores": torch.randn(4, 50), "topk": 5, "starts": ints(4), "block_table": ints(2, 3), "page": 64},
    ),
    "merge": lambda: (merge, {"outs": torch.randn(3, 2, 16), "lses": torch.randn(3, 2)}),
    "apply-sink": lambda: (
        apply_sink, {"out": torch.randn(2, 4, 16), "lse": torch.randn(2, 4), "attn_sink": torch.zeros(4)},
    ),
    "layout": lambda: (BlockSparseLayout, {"blocks": torch.ones(1, 1, 2, 2, dtype=torch.bool)}),
    "layout/window": lambda: (BlockSparseLayout.sliding_window, {"P": 100, "window": 64, "causal": True}),
    "layout/dense": lambda: (BlockSparseLayout.from_dense_mask, {"mask": torch.ones(70, 70, dtype=torch.bool)}),
}  # fmt: skip
UNUSED = {("drop-in/varlen", "max_seqlen_qo"), ("drop-in/varlen", "max_seqlen_kv")}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_kind_is_our_error(name: str, junk: str) -> None:
    function, arguments = CALLS[name]()
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    for key, right in arguments.items():
        if (name, key) in UNUSED or (junk == "number" and (isinstance(right, float) or "scale" in key)):
            continue
        with pytest.raises(FlashMLAError):
            function(**{**arguments, key: JUNK[junk]})
    assert all(same_bits(content, arguments[key]) for key, content in before.items())


def test_a_flag_is_refused_before_the_cache_is_written() -> None:
    arguments = MhaCase("", 70, starts=(64, 3)).call().arguments
    before = arguments["k_cache"].clone()
    with pytest.raises(ShapeError, match="return_lse"):
        mha_fwd_kvcache(**arguments, return_lse="yes")
    assert same_bits(before, arguments["k_cache"])
