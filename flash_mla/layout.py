"""BlockSparseLayout: which 64x64 blocks of a prefill's score matrix are computed.

A layout is the blocks alone. A block that it keeps is computed whole, under whatever mask and causality the call asks
for beside it; a block that it drops is never loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla.errors import MaskShapeError, ShapeError
from flash_mla.kinds import explained_class, is_dense
from flash_mla.problem import BLOCK

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PICTURE = 32
"""Most rows and columns that `repr` draws; a larger layout is drawn coarser."""


@explained_class
@dataclass(frozen=True, eq=False, repr=False)
class BlockSparseLayout:
    """An immutable 64x64-block mask for `flash_mla_prefill`.

    Args:
        blocks: bool [B|1, Hq|1, ceil(P/64), ceil(S/64)], True = compute; copied, so that writing to it later changes
            nothing here. S is the number of keys; in `flash_mla_prefill` S = P.

    The constructors below take lengths in tokens and keep every block that holds at least one element of their
    pattern. The edges of a pattern that cross a block (a window that is no multiple of 64, the diagonal) are the
    element mask's task: `attn_mask`, or `causal`.
    """

    blocks: Tensor

    def __post_init__(self) -> None:
        if not is_dense(self.blocks):
            raise MaskShapeError(
                given=f"blocks = {self.blocks!r}"[:200],
                required="a dense bool tensor",
                cause="A layout is made of a tensor",
                fix="Pass a dense bool tensor, or build it with from_dense_mask(mask)",
            )
        if self.blocks.dim() != 4 or self.blocks.dtype != torch.bool:
            raise MaskShapeError(
                given=f"blocks {list(self.blocks.shape)} {self.blocks.dtype}",
                required="bool [B|1, Hq|1, ceil(P/64), ceil(S/64)]",
                cause="A block mask has four dims and says yes or no",
                fix="Add leading dims of 1, or build it with from_dense_mask(mask)",
            )
        object.__setattr__(self, "blocks", self.blocks.clone())

    @classmethod
    def causal(cls, P: int, *, device: torch.device | str | None = None) -> BlockSparseLayout:
        """The blocks on and below the diagonal of P tokens: [1, 1, ceil(P/64), ceil(P/64)], on `device`."""
        return cls(_distance(P, device).ge(0)[None, None])

    @classmethod
    def sliding_window(
        cls, P: int, window: int, *, causal: bool = True, device: torch.device | str | None = None
    ) -> BlockSparseLayout:
        """Each query sees the `window` keys that end with its own (not causal: those less than `window` away).

        Args:
            P: tokens.
            window: tokens, at least 1; 1 keeps the diagonal alone.
            causal: drop the blocks above the diagonal (default).
            device: of the blocks. Default: torch's.
        """
        _positive(window=window)
        distance = _distance(P, device)
        nearest = (distance.abs() * BLOCK - (BLOCK - 1)).clamp_min(0)  # tokens between the nearest query and key
        keep = nearest < window
        return cls((keep & (distance >= 0) if causal else keep)[None, None])

    @classmethod
    def local_global(
        cls, P: int, window: int, global_tokens: int, *, causal: bool = True, device: torch.device | str | None = None
    ) -> BlockSparseLayout:
        """A sliding window plus global tokens: Longformer's pattern, and with `causal` that of attention sinks.

        Args:
            P: tokens.
            window: as in `sliding_window`.
            global_tokens: the first so many tokens see all others and are seen by all, within causality.
            causal, device: as in `sliding_window`.
        """
        _positive(global_tokens=global_tokens)
        local = cls.sliding_window(P, window, causal=causal, device=device).blocks.clone()
        blocks = -(-global_tokens // BLOCK)
        local[..., :blocks] = True
        local[..., :blocks, :] = True
        layout = cls(local)
        return layout & cls.causal(P, device=device) if causal else layout

    @classmethod
    def from_dense_mask(cls, mask: Tensor) -> BlockSparseLayout:
        """The blocks in which a bool element mask [.., P, S] keeps anything; up to two leading dims."""
        if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
            raise MaskShapeError(
                given=f"mask {list(mask.shape)} {mask.dtype}",
                required="bool [P, S], [Hq|1, P, S] or [B|1, Hq|1, P, S], True = attend",
                cause="A layout is made from an element mask that says yes or no",
                fix="Pass `mask > -inf` for an additive mask",
            )
        mask = mask[(None,) * (4 - mask.dim())]
        P, S = mask.shape[-2:]
        tiles = F.pad(mask, (0, -S % BLOCK, 0, -P % BLOCK)).unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        return cls(tiles.any(dim=5).any(dim=3))

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockSparseLayout:
        """The block structure of a FlexAttention BlockMask, in blocks of 64.

        Only the structure is taken: its partial blocks and its full blocks alike are kept whole. `mask_mod`, which
        masks the elements of partial blocks, is a function that no kernel here can run: what it masks inside a block
        goes to the call as `attn_mask` (or `causal`).

        Raises:
            ShapeError: BLOCK_SIZE is not a multiple of 64 in both dims.
        """
        if not hasattr(block_mask, "BLOCK_SIZE"):
            raise ShapeError(
                given=f"block_mask is a {type(block_mask).__name__}",
                required="a BlockMask of torch.nn.attention.flex_attention",
                cause="It has no blocks",
                fix="create_block_mask(..., BLOCK_SIZE=64), or from_dense_mask(mask) for a tensor",
            )
        q_block, kv_block = block_mask.BLOCK_SIZE
        if q_block % BLOCK or kv_block % BLOCK:
            raise ShapeError(
                given=f"a BlockMask with BLOCK_SIZE ({q_block}, {kv_block})",
                required="BLOCK_SIZE a multiple of 64 in both dims",
                cause="Its blocks cut through the 64-token blocks of the cache",
                fix="create_block_mask(..., BLOCK_SIZE=64)",
            )
        P, S = block_mask.seq_lengths
        columns = -(-S // kv_block)
        coarse = _scatter_columns(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            coarse |= _scatter_columns(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
        fine = coarse.repeat_interleave(q_block // BLOCK, dim=-2).repeat_interleave(kv_block // BLOCK, dim=-1)
        fine = fine[..., : -(-P // BLOCK), : -(-S // BLOCK)]
        return cls(fine[(None,) * (4 - fine.dim())])

    @property
    def shape(self) -> torch.Size:
        """[B|1, Hq|1, ceil(P/64), ceil(S/64)], in blocks."""
        return self.blocks.shape

    @property
    def density(self) -> float:
        """The share of blocks that is kept, of the whole rectangle; waits for the GPU."""
        return self.blocks.float().mean().item()

    def __and__(self, other: BlockSparseLayout) -> BlockSparseLayout:
        """The blocks that both keep; the batch and head dims broadcast."""
        if not isinstance(other, BlockSparseLayout):
            return NotImplemented
        leading = zip(self.shape[:2], other.shape[:2], strict=True)
        if self.shape[2:] != other.shape[2:] or any(a != b and 1 not in (a, b) for a, b in leading):
            raise MaskShapeError(
                given=f"layouts of {list(self.shape)} and {list(other.shape)} blocks",
                required="equal block rows and columns; batch and heads equal or 1",
                cause="The two layouts describe different score matrices",
                fix="Build both for the same P, B and Hq",
            )
        return BlockSparseLayout(self.blocks & other.blocks)

    def to(self, device: torch.device | str) -> BlockSparseLayout:
        """The layout with its blocks on `device`."""
        return BlockSparseLayout(self.blocks.to(device))

    def __repr__(self) -> str:
        """The shape, the density, and a picture of the first request's first head; waits for the GPU."""
        if self.blocks.is_meta or not self.blocks.numel():
            return f"BlockSparseLayout({list(self.shape)} blocks of 64x64)"
        picture = self.blocks[0, 0].float()
        rows, columns = (min(n, PICTURE) for n in picture.shape)
        picture = F.adaptive_max_pool2d(picture[None], (rows, columns))[0]
        lines = ["".join("■" if kept else "·" for kept in row) for row in picture.bool().tolist()]
        head = f"BlockSparseLayout({list(self.shape)} blocks of 64x64, density {self.density:.1%})"
        return "\n  ".join([head, *lines])


def _positive(**lengths: int) -> None:
    for name, value in lengths.items():
        if type(value) is not int or value < 1:
            raise ShapeError(
                given=f"{name}={value!r}",
                required=f"{name}, an integer of at least 1, in tokens",
                cause="A pattern of no tokens keeps nothing",
                fix="Pass the length in tokens",
            )


def _distance(P: int, device: torch.device | str | None) -> Tensor:
    """[n, n] for n = ceil(P/64): how many blocks the key block lies before the query block."""
    _positive(P=P)
    block = torch.arange(-(-P // BLOCK), device=device)
    return block[:, None] - block[None, :]


def _scatter_columns(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Bool [.., rows, columns] from the first counts [.., rows] of indices [.., rows, n]; the rest are undefined."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    target = torch.where(used, indices, columns).long()  # column `columns` takes what is undefined
    dense = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, target, True)[..., :columns]
