"""What `get_mla_metadata` checks, and a call that brings its result along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_mla.contract.caches import (
    check_block_size,
    check_cache_shape,
    check_grouping,
    check_head_dims,
    check_seq_lens_shape,
    check_table,
)
from flash_mla.contract.tensors import check_on, check_rank, check_tensor, named, shape_of
from flash_mla.contract.values import check_values
from flash_mla.errors import ShapeError
from flash_mla.problem import BLOCK, DecodeProblem


@dataclass(frozen=True)
class MLAMetadata:
    """What `get_mla_metadata` has checked: shapes, and (unless `max_seq_len` is None) values.

    Attributes:
        B, Hq, Hk, S_q, D, Nblk: as in the reference's shape table; `Dv` is None when v_head_dim was not given.
        table_blocks: blocks in a row of block_table.
        max_seq_len: the largest sequence length in tokens when it was checked; None with check_values=False.
    """

    B: int
    Hq: int
    Hk: int
    S_q: int
    D: int
    Dv: int | None
    Nblk: int
    table_blocks: int
    max_seq_len: int | None

    @property
    def ratio(self) -> int:
        """Query heads that share one KV head, Hq / Hk."""
        return self.Hq // self.Hk

    def fits(self, problem: DecodeProblem) -> bool:
        """Whether it was made for such a call."""
        if problem is self.__dict__.get("fitted"):  # the layers of a step ask about one
            return True
        fits = (
            self.B == problem.B
            and self.Hq == problem.Hq
            and self.Hk == problem.Hk
            and self.S_q == problem.S_q
            and self.D == problem.D
            and self.Nblk == problem.Nblk
            and self.table_blocks == problem.table_blocks
            and self.Dv in (None, problem.Dv)
        )
        if fits:
            self.__dict__["fitted"] = problem
        return fits

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, S_q, D]."""
        return (self.B, self.Hq, self.S_q, self.D)

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """[B, Hk, Nblk, 64, D]."""
        return (self.B, self.Hk, self.Nblk, BLOCK, self.D)


def check_shape(name: str, shape: Sequence[int], rank: int, layout: str) -> None:
    """A tuple (or torch.Size, or list) of `rank` sizes, none negative."""
    sizes = isinstance(shape, Sequence) and all(isinstance(x, (int, torch.SymInt)) for x in shape)
    if isinstance(shape, str) or not sizes or any(x < 0 for x in shape):
        given = f"is a {type(shape).__name__}" if isinstance(shape, Tensor) else f"= {shape!r}"
        raise ShapeError(
            f"{name} {given}"[:200],
            f"{name} {layout}, a tuple of ints, none negative",
            f"`{name}` is not a shape",
            "Pass q.shape and k_cache.shape",
        )
    check_rank(name, shape, rank, layout)


def metadata(
    q_shape: Sequence[int],
    kv_shape: Sequence[int],
    block_table: Tensor,
    seq_lens: Tensor,
    v_head_dim: int | None,
    read_values: bool,
) -> MLAMetadata:
    """See `flash_mla.get_mla_metadata`."""
    check_shape("q_shape", q_shape, 4, "[B, Hq, S_q, D]")
    check_shape("kv_shape", kv_shape, 5, f"[B, Hk, Nblk, {BLOCK}, D]")
    if v_head_dim is not None and not isinstance(v_head_dim, int):
        raise ShapeError(
            f"v_head_dim = {v_head_dim!r}"[:200], "an int, or None", "`v_head_dim` is no number of columns", "Pass Dv"
        )
    check_tensor("block_table", block_table)
    check_tensor("seq_lens", seq_lens)
    B, Hq, S_q, D = (int(x) for x in q_shape)
    Hk, Nblk = int(kv_shape[1]), int(kv_shape[2])
    check_block_size("kv_shape", kv_shape)
    check_cache_shape("kv_shape", kv_shape, B, D, shape_of("q_shape", q_shape))
    check_grouping(Hq, Hk)
    check_head_dims(D, D if v_head_dim is None else v_head_dim)
    check_table(block_table, B)
    check_seq_lens_shape(seq_lens, B)
    check_on(block_table.device, seq_lens=seq_lens)
    longest = check_values(block_table, seq_lens, Nblk) if read_values else None
    return MLAMetadata(B, Hq, Hk, S_q, D, v_head_dim, Nblk, block_table.shape[1], longest)


def check_metadata(metadata: MLAMetadata, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
    """The metadata was made for these shapes."""
    if not isinstance(metadata, MLAMetadata):
        raise ShapeError(
            f"metadata is a {type(metadata).__name__}",
            "metadata is a flash_mla.MLAMetadata",
            "`metadata` does not come from flash_mla.get_mla_metadata",
            "Pass get_mla_metadata(q.shape, k_cache.shape, block_table, seq_lens), or none",
        )
    table_blocks, Dv = (x.shape[-1] if x.dim() else None for x in (block_table, v_cache))
    if (
        q.shape == metadata.q_shape
        and k_cache.shape == metadata.kv_shape
        and table_blocks == metadata.table_blocks
        and metadata.Dv in (None, Dv)
    ):
        return
    raise ShapeError(
        f"{named(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)}; {metadata}",
        "tensors of the shapes that the metadata was made for",
        "The metadata belongs to other shapes",
        "Call get_mla_metadata again for these shapes",
    )
