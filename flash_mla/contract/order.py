"""Calls in the argument order of DeepSeek's package, which are told where to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from flash_mla.contract.tensors import INDEX_DTYPES
from flash_mla.errors import ShapeError

DEEPSEEK_NAMES = {
    "cache_seqlens",
    "head_dim_v",
    "indices",
    "is_fp8_kvcache",
    "num_heads_k",
    "num_q_tokens_per_head_k",
    "num_splits",
    "tile_scheduler_metadata",
}
DEEPSEEK = "Call flash_mla.deepseek, which has DeepSeek's names and argument order"


def refuse_deepseek_order(*args: object) -> None:
    """A call in DeepSeek's order has a 4-dim pool as second argument and an integer table as third; its
    get_mla_metadata begins with lengths."""
    first, second, third = (*args, None, None, None)[:3]
    pool = isinstance(second, Tensor) and second.dim() == 4
    table = isinstance(third, Tensor) and third.dtype in INDEX_DTYPES and third.dim() == 2
    lengths = isinstance(first, Tensor) and first.dtype in INDEX_DTYPES and first.dim() == 1
    if (pool and table) or lengths:
        deepseek_order([a for a in args if a is not None])


def deepseek_order(args: Sequence[object]) -> NoReturn:
    shown = ", ".join(str(list(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
    raise ShapeError(
        f"arguments in order: {shown}",
        "the reference's order: q, k_cache, v_cache, block_table, seq_lens, ... (q_shape, kv_shape, block_table, "
        "seq_lens for get_mla_metadata)",
        "This call is in the argument order of DeepSeek's package",
        DEEPSEEK,
    )
