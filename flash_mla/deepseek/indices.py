"""Top-k logical positions, as an indexer gives them, to the indices that the sparse functions take."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.contract import check_index
from flash_mla.problem import BLOCK


def pool_indices(positions: Tensor, block_table: Tensor, page: int = BLOCK) -> Tensor:
    """Top-k positions inside each request -> `indices` of flash_mla_with_kvcache.

    Args:
        positions: [b, s_q, topk] int32 or int64, tokens of request b; a negative one, or one past its row of the table,
            names no token.
        block_table: [b, max_blocks] pages of the pool.
        page: tokens a page.

    Returns:
        [b, s_q, topk] int32, block_table[b, position // page] * page + position % page, or -1.
    """
    check_index("positions", positions, (block_table.shape[0], -1, -1), "[b, s_q, topk]")
    blocks = block_table.shape[1]
    live = (positions >= 0) & (positions < blocks * page)
    logical = torch.where(live, positions, 0).long()
    if not blocks:
        return torch.full_like(positions, -1, dtype=torch.int32)
    physical = block_table.gather(1, (logical // page).flatten(1)).view_as(logical)
    return torch.where(live, physical.long() * page + logical % page, -1).to(torch.int32)


def ragged_indices(positions: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor) -> Tensor:
    """Top-k positions inside each sequence -> `indices` of flash_mla_sparse_fwd over sequences laid end to end.

    Args:
        positions: [total_q, topk], tokens of the query's own sequence; a negative one, or one past its end, names none.
        cu_seqlens_q, cu_seqlens_kv: [n + 1] int32, where each sequence starts among the queries and in kv.

    Returns:
        [total_q, 1, topk] int32 rows of kv, or -1.
    """
    check_index("positions", positions, (-1, -1), "[total_q, topk]")
    token = torch.arange(positions.shape[0], device=positions.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
    start, end = cu_seqlens_kv[sequence].unsqueeze(1), cu_seqlens_kv[sequence + 1].unsqueeze(1)
    live = (positions >= 0) & (positions < end - start)
    return torch.where(live, positions + start, -1).to(torch.int32).unsqueeze(1)
