"""Masks, causality and layouts of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.contract.tensors import check_on, check_rank, check_tensor, named
from flash_mla.errors import MaskShapeError, ShapeError
from flash_mla.layout import BlockSparseLayout
from flash_mla.problem import BLOCK, MaskKind


def check_mask(name: str, mask: Tensor | None, B: int, Hq: int, rows: int, layout: str) -> MaskKind:
    """The kind of a mask [B|1, Hq|1, rows|1, L]; L is checked by `check_mask_length`."""
    if mask is None:
        return "none"
    check_tensor(name, mask)
    if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.element_size() > 1):
        raise MaskShapeError(
            f"{name} {mask.dtype}",
            "bool (True = attend) or a floating dtype of 16 bits or more (added to the scaled scores)",
            f"`{name}` is neither bool nor what scores can be added to",
            f"Call {name}.bool()",
        )
    if mask.dim() != 4:
        raise MaskShapeError(
            named(**{name: mask}),
            f"{name} {layout}",
            f"`{name}` does not have 4 dims",
            "Add dims of size 1 with mask[:, None, None]",
        )
    for size, want, dim in zip(mask.shape[:3], (B, Hq, rows), ("B", "Hq", "query"), strict=True):
        if size not in (1, want):
            raise MaskShapeError(
                f"{named(**{name: mask})}: {dim} dim {size}",
                f"{name} {layout}: {dim} dim 1 or {want}",
                f"`{name}` does not broadcast to the queries",
                "Give each leading dim its full size, or 1",
            )
    return "bool" if mask.dtype == torch.bool else "float"


def one_mask(mask: Tensor | None, tail_mask: Tensor | None) -> Tensor | None:
    """The mask of a decode call, of which there is one at most."""
    if mask is not None and tail_mask is not None:
        raise MaskShapeError(
            "mask and tail_mask",
            "one of them, or none",
            "`tail_mask` is the mask over the new tokens alone, whose earlier keys are all seen",
            "Leave one out; a mask over all keys is `mask`",
        )
    return mask if tail_mask is None else tail_mask


def check_decode_mask(mask: Tensor | None, tail: bool, B: int, Hq: int, S_q: int) -> MaskKind:
    """The kind of a decode's mask, over all keys or, a `tail` mask, over the S_q newest tokens."""
    if not tail or mask is None:
        return check_mask("mask", mask, B, Hq, S_q, "[B, 1, 1, P+T]")
    kind = check_mask("tail_mask", mask, B, Hq, S_q, "[B|1, Hq|1, S_q, S_q]")
    if mask.shape[2:] != (S_q, S_q):
        raise MaskShapeError(
            named(tail_mask=mask),
            f"tail_mask [B|1, Hq|1, {S_q}, {S_q}]",
            "`tail_mask` is over the S_q new tokens alone",
            "Pass a square over them; a mask over all keys is `mask`",
        )
    return kind


def check_mask_length(name: str, mask: Tensor | None, keys: int) -> None:
    if mask is not None and mask.shape[-1] < keys:
        raise MaskShapeError(
            f"{named(**{name: mask})}, which covers {mask.shape[-1]} keys",
            f"a last dim of at least {keys}",
            f"`{name}` last dim < `P+T`",
        )


def settle_causal(causal: bool | None, mask: Tensor | None) -> bool:
    """Whether a prefill is causal: as said, or else where no mask is given."""
    if causal is None:
        return mask is None
    if not isinstance(causal, bool):
        raise ShapeError(
            f"causal = {causal!r}"[:200], "True, False or None", "`causal` says neither yes nor no", "Pass a bool"
        )
    return causal


def sparse_blocks(sparse_layout: object, q: Tensor) -> Tensor | None:
    """A bool tensor, a BlockSparseLayout or a BlockMask -> bool [B, Hq, ceil(P/64), ceil(P/64)], expanded."""
    if sparse_layout is None:
        return None
    check_tensor("q", q)
    check_rank("q", q.shape, 4, "[B, Hq, P, D]")
    if not isinstance(sparse_layout, (Tensor, BlockSparseLayout)):
        if not hasattr(sparse_layout, "BLOCK_SIZE"):
            raise ShapeError(
                f"sparse_layout is a {type(sparse_layout).__name__}",
                "a bool tensor, a BlockSparseLayout or FlexAttention's BlockMask",
                "`sparse_layout` does not describe blocks",
                "Build it with BlockSparseLayout",
            )
        sparse_layout = BlockSparseLayout.from_block_mask(sparse_layout)  # type: ignore[arg-type]
    blocks = sparse_layout.blocks if isinstance(sparse_layout, BlockSparseLayout) else sparse_layout
    B, Hq, P = q.shape[:3]
    n = -(-P // BLOCK)
    fits = (
        blocks.dim() == 4
        and blocks.shape[0] in (1, B)
        and blocks.shape[1] in (1, Hq)
        and tuple(blocks.shape[2:]) == (n, n)
        and blocks.dtype == torch.bool
    )
    if not fits:
        raise MaskShapeError(
            f"sparse_layout {list(blocks.shape)} {blocks.dtype}, P = {P}",
            f"bool [B|1, Hq|1, ceil(P/64), ceil(P/64)] = [{B}|1, {Hq}|1, {n}, {n}]",
            "`sparse_layout` does not describe the 64x64 blocks of this problem",
            "Build it with BlockSparseLayout for this P",
        )
    check_on(q.device, sparse_layout=blocks)
    return blocks.expand(B, Hq, n, n)
