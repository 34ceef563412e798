"""Top-k logical positions, as an indexer gives them, to the indices that the sparse functions take."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.contract import check_index, check_on, check_tensor
from flash_mla.deepseek.checks import check_start_values, check_starts
from flash_mla.errors import ShapeError
from flash_mla.kinds import explained
from flash_mla.problem import BLOCK


@explained
def pool_indices(positions: Tensor, block_table: Tensor, page: int = BLOCK) -> Tensor:
    """Top-k positions inside each request -> `indices` of flash_mla_with_kvcache.

    Args:
        positions: [b, s_q, topk] int32 or int64, tokens of request b; a negative one, or one past its row of the table,
            names no token.
        block_table: [b, max_blocks] pages of the pool.
        page: tokens a page.

    Returns:
        [b, s_q, topk] int32, block_table[b, position // page] * page + position % page, or -1; -1 too where that row
        is no int32 (an entry that holds anything, for no pool is as large).
    """
    check_tensor("positions", positions)
    check_tensor("block_table", block_table)
    check_on(positions.device, block_table=block_table)
    check_index("block_table", block_table, (-1, -1), "[b, max_blocks]")
    check_index("positions", positions, (len(block_table), -1, -1), "[b, s_q, topk]")
    if type(page) is not int or page < 1:
        raise ShapeError(f"page = {page!r}", "page >= 1, an integer", "A page holds at least one token", "Pass 64")
    blocks = block_table.shape[1]
    live = (positions >= 0) & (positions < blocks * page)
    logical = torch.where(live, positions, 0).long()
    if not blocks:
        return torch.full_like(positions, -1, dtype=torch.int32)
    physical = block_table.gather(1, (logical // page).flatten(1)).view_as(logical)
    return int32_or_none(torch.where(live, physical.long() * page + logical % page, -1))


@explained
def ragged_indices(positions: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor) -> Tensor:
    """Top-k positions inside each sequence -> `indices` of flash_mla_sparse_fwd over sequences laid end to end.

    Args:
        positions: [total_q, topk], tokens of the query's own sequence; a negative one, or one past its end, names none.
        cu_seqlens_q, cu_seqlens_kv: [n + 1] int32, where each sequence starts among the queries and in kv.

    Returns:
        [total_q, 1, topk] int32 rows of kv, or -1. The values of cu_seqlens are checked on a CPU; a GPU is not waited
        for, and a query past the last sequence gets -1 there.
    """
    check_tensor("positions", positions)
    check_index("positions", positions, (-1, -1), "[total_q, topk]")
    check_starts(positions, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
    if positions.device.type == "cpu":
        check_start_values("cu_seqlens_q", cu_seqlens_q.tolist(), len(positions))
        starts = cu_seqlens_kv.tolist()
        check_start_values("cu_seqlens_kv", starts, starts[-1])
    if len(cu_seqlens_q) < 2:
        return torch.full_like(positions, -1, dtype=torch.int32).unsqueeze(1)
    token = torch.arange(len(positions), device=positions.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].long(), token, right=True)
    last = len(cu_seqlens_q) - 2
    starts_kv = cu_seqlens_kv.long()
    start, end = (starts_kv[sequence.clamp_max(last) + i].unsqueeze(1) for i in (0, 1))
    live = (positions >= 0) & (positions < end - start) & (sequence <= last).unsqueeze(1)
    return int32_or_none(torch.where(live, positions + start, -1)).unsqueeze(1)


def int32_or_none(index: Tensor) -> Tensor:
    """int64 to int32; -1 where it does not fit."""
    return index.masked_fill(index > torch.iinfo(torch.int32).max, -1).to(torch.int32)
