"""Rows of keys and values on their way into a cache, and what a cache's tensors are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla.errors import BlockCountError, ShapeError
from flash_mla.problem import BLOCK, FP8
from flash_mla.quant import quantise


def page_view(pool: Tensor, batch: int) -> Tensor:
    """A serving engine's pool [num_blocks, 64, Hk, D] as the page view [batch, Hk, num_blocks, 64, D], batch stride 0.

    Raises:
        ShapeError: the pool has not four dims.
        BlockCountError: its pages are not 64 tokens long.
    """
    if not isinstance(pool, Tensor) or pool.dim() != 4:
        shape = list(pool.shape) if isinstance(pool, Tensor) else f"is a {type(pool).__name__}"
        raise ShapeError(given=f"pool {shape}", required="[num_blocks, 64, Hk, D]")
    if pool.shape[1] != BLOCK:
        raise BlockCountError(
            given=f"pool {list(pool.shape)}: pages of {pool.shape[1]} tokens",
            required="pages of 64 tokens: [num_blocks, 64, Hk, D]",
            cause="The block size is fixed at 64",
            fix="Configure the engine's page size as 64",
        )
    return pool.permute(2, 0, 1, 3).expand(batch, -1, -1, -1, -1)


def write_rows(target: Tensor, index: Tensor, rows: Tensor, kept: Tensor | None, descale: Tensor | None) -> None:
    """Write rows [R, Hk, T, D] to the target's rows index [R, Hk, T], or those of n kept tokens of R*T to [n, Hk]."""
    if rows.requires_grad:
        rows = rows.detach()
    if descale is not None and rows.dtype != FP8:
        rows, _ = quantise(rows, descale)
    if kept is not None:
        rows = rows.transpose(1, 2).flatten(0, 1)[kept]
    target.index_put_((index,), rows)


def more_blocks(storage: Tensor, blocks: int) -> Tensor:
    """A copy of storage [.., Hk, Nblk, 64, D] with uninitialised blocks behind the others."""
    first, Hk, Nblk, _, D = storage.shape
    grown = storage.new_empty(first, Hk, Nblk + blocks, BLOCK, D)
    grown[:, :, :Nblk] = storage
    return grown


def upload(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on a device; the host does not wait for a GPU."""
    return staged(values, dtype, device).to(device, non_blocking=True)


def staged(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the host, pinned where they go to a GPU, so that a copy there does not wait."""
    # NOTE: device="cpu", or torch's default device would take the list
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type != "cpu")
