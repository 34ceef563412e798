"""Caches of 64-token blocks, their table and lengths: shapes, heads, widths and layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla.contract.tensors import check_dtypes, check_index, check_monotonic, check_rank, named, shape_of
from flash_mla.errors import BlockCountError, HeadGroupingError, LayoutError, ShapeError
from flash_mla.problem import BLOCK, FP8

UNABSORBED = (
    "Give q the D of the cache's rows; over an MLA latent (512 + 64 columns) absorb W_UK into q's nope columns first"
)


def check_grouping(Hq: int, Hk: int) -> None:
    if Hq < 1 or Hk < 1 or Hq % Hk:
        raise HeadGroupingError(f"Hq = {Hq} query heads and Hk = {Hk} KV heads", "Hq % Hk == 0")


def check_head_dims(D: int, Dv: int) -> None:
    for name, size in (("D", D), ("Dv", Dv)):
        if not isinstance(size, (int, torch.SymInt)) or size % 8 or not 8 <= size <= 576:
            raise ShapeError(
                f"head dim {name} = {size!r}"[:200],
                "a multiple of 8 from 8 to 576",
                f"`{name}` is not a head dimension that the kernels support",
                f"Pad {name} with zeros to the next multiple of 8",
            )


def check_block_size(name: str, shape: Sequence[int]) -> None:
    if shape[3] != BLOCK:
        raise BlockCountError(
            f"{shape_of(name, shape)}: blocks of {shape[3]} tokens",
            f"blocks of {BLOCK} tokens: {name} [B, Hk, Nblk, {BLOCK}, D]",
            f"Block size is fixed at {BLOCK}",
            f"Re-pack the cache into blocks of {BLOCK} tokens",
        )


def check_table(block_table: Tensor, B: int) -> None:
    check_index("block_table", block_table, (B, -1), "[B, Nblk]")
    if not block_table.is_contiguous():
        raise LayoutError(
            f"block_table {list(block_table.shape)} with strides {block_table.stride()}",
            "block_table contiguous",
            "block_table is not contiguous",
        )


def check_seq_lens_shape(seq_lens: Tensor, B: int, name: str = "seq_lens") -> None:
    check_index(name, seq_lens, (B,), "[B]")


def check_ranks(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    check_rank("q", q.shape, 4, "[B, Hq, S_q, D]")
    check_rank("k_cache", k_cache.shape, 5, f"[B, Hk, Nblk, {BLOCK}, D]")
    check_rank("v_cache", v_cache.shape, 5, f"[B, Hk, Nblk, {BLOCK}, Dv]")


def check_decode_dtypes(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """One dtype for all, or 16-bit queries over FP8 caches."""
    if q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == v_cache.dtype == FP8:
        return
    check_dtypes(q=q, k_cache=k_cache, v_cache=v_cache)


def check_cache_shape(name: str, shape: Sequence[int], B: int, D: int, q: str) -> None:
    if shape[0] != B or shape[4] != D:
        raise ShapeError(
            f"{shape_of(name, shape)}, {q}",
            f"{name} [B, Hk, Nblk, 64, D] with B = {B} and D = {D}",
            f"`{name}` and q differ in " + ("B" if shape[0] != B else "D"),
            None if shape[0] != B else UNABSORBED,
        )


def check_page_view(name: str, cache: Tensor) -> None:
    """Blocks of 64 rows of D, each block one slab in memory; the leading dims strided but monotonic."""
    if cache.stride()[-2:] != (cache.shape[-1], 1):
        raise LayoutError(
            f"{named(**{name: cache})} with strides {cache.stride()}",
            f"each block a contiguous slab of 64 rows x D: strides (..., {cache.shape[-1]}, 1)",
            f"`{name}` is not contiguous on D/Blk",
        )
    check_monotonic(name, cache.shape[:3], cache.stride()[:3], "B Hk Nblk")


def is_alias(k_cache: Tensor, v_cache: Tensor) -> bool:
    """V is the first Dv columns of K's memory: same start, same strides, no wider than K (MLA)."""
    return (
        v_cache.stride() == k_cache.stride()
        and v_cache.shape[-1] <= k_cache.shape[-1]
        and v_cache.data_ptr() == k_cache.data_ptr()
        # without memory (meta tensors, tensors without an element) every address is 0
        and (v_cache.data_ptr() != 0 or v_cache.untyped_storage()._cdata == k_cache.untyped_storage()._cdata)
    )


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Shapes and layout of both caches against q; returns whether V aliases K."""
    check_block_size("k_cache", k_cache.shape)
    check_cache_shape("k_cache", k_cache.shape, q.shape[0], q.shape[3], named(q=q))
    if v_cache.shape[:4] != k_cache.shape[:4]:
        raise ShapeError(
            named(k_cache=k_cache, v_cache=v_cache), "the same B, Hk, Nblk, 64", "`k_cache` and `v_cache` differ"
        )
    check_grouping(q.shape[1], k_cache.shape[1])
    check_head_dims(q.shape[3], v_cache.shape[4])
    check_page_view("k_cache", k_cache)
    alias = is_alias(k_cache, v_cache)
    if not alias:
        check_page_view("v_cache", v_cache)
    return alias
