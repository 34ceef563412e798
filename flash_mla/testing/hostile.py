"""Tensors that punish a kernel: NaN where no token is, 2^31-1 where no entry is, shuffled tables, odd strides."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flash_mla.problem import BLOCK, FP8

UNUSED_ENTRY = 2**31 - 1
FP8_NAN = 0x7F

CacheLayout = Literal["slab", "sliced", "pool", "serving"]
"""slab: the reference's [B, Hk, Nblk, 64, D]; sliced: a monotonic slice of a larger one; pool: batch stride 0;
serving: the view of an engine's [num_blocks, 64, Hk, D], which the public functions refuse and backends take."""

Order = Literal["shuffled", "ordered"]
MaskShape = Literal["bool", "float", "bool-rows", "float-rows", "bool-heads", "float-heads"]
"""bool|float: [B, 1, 1, L] in decode, [B, 1, P, L] in prefill; rows: [B, 1, S_q, L]; heads: [B, Hq, S_q, L]."""

Descale = Literal["float", "scalar", "head", "request", "tensor"]
"""A number, or a tensor [], [Hk], [B, 1] or [B, Hk]."""
Sparse = Literal["tensor", "heads", "layout", "block-mask"]


class Call(NamedTuple):
    """The tensors of one call, and of the same call for the oracle, by argument name."""

    arguments: dict[str, Any]
    reference: dict[str, Any]


class Source:
    """Random tensors, drawn on the CPU so that a seed means the same on every device."""

    def __init__(self, seed: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def chance(self, shape: tuple[int, ...], probability: float) -> Tensor:
        """Bool, True with that probability."""
        return (torch.rand(shape, generator=self.generator) < probability).to(self.device)

    def descale(self, kind: Descale | None, B: int, Hk: int) -> float | Tensor | None:
        if kind is None:
            return None
        factors = torch.rand(B, Hk, generator=self.generator) + 0.5
        if kind == "float":
            return float(factors[0, 0])
        shaped = {"scalar": factors[0, 0], "head": factors[0], "request": factors[:, :1], "tensor": factors}[kind]
        return shaped.to(self.device)


def nan_filled(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """NaN throughout."""
    if dtype == FP8:
        return torch.full(shape, FP8_NAN, dtype=torch.uint8, device=device).view(FP8)
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def nan_cache(layout: CacheLayout, B: int, Hk: int, Nblk: int, D: int, dtype: torch.dtype, device: str) -> Tensor:
    """A page view [B, Hk, Nblk, 64, D] in which no slot holds a token."""
    if layout == "slab":
        return nan_filled((B, Hk, Nblk, BLOCK, D), dtype, device)
    if layout == "sliced":
        return nan_filled((B + 1, 2 * Hk, Nblk + 2, BLOCK, D), dtype, device)[1:, ::2, 1:-1]
    if layout == "pool":
        return nan_filled((Hk, Nblk, BLOCK, D), dtype, device).expand(B, -1, -1, -1, -1)
    return nan_filled((Nblk, BLOCK, Hk, D), dtype, device).permute(2, 0, 1, 3).expand(B, -1, -1, -1, -1)


def block_table(
    lengths: tuple[int, ...],
    layout: CacheLayout,
    order: Order,
    spare: int,
    shared: int,
    source: Source,
) -> tuple[Tensor, int]:
    """A table [B, width] int32 on the CPU, and Nblk.

    `spare` blocks are there that nobody uses; in a pool, requests share the physical blocks of their first `shared`
    logical ones.
    """
    counts = [-(-length // BLOCK) for length in lengths]
    width = max(counts, default=0) + spare
    table = torch.full((len(lengths), width), UNUSED_ENTRY, dtype=torch.int32)
    pooled = layout in ("pool", "serving")
    Nblk = sum(counts) + spare if pooled else width

    def ids() -> Tensor:
        return source.permutation(Nblk) if order == "shuffled" else torch.arange(Nblk)

    free, taken = ids(), 0
    for b, count in enumerate(counts):
        if not pooled:
            free, taken = ids(), 0
        common = min(shared, count) if pooled and b else 0
        if common:
            common = min(common, counts[0])
            table[b, :common] = table[0, :common]
        table[b, common:count] = free[taken : taken + count - common].int()
        taken += count - common
    return table, Nblk


def fill(cache: Tensor, table: Tensor, b: int, rows: Tensor) -> None:
    """Put rows [Hk, n, D] at positions 0..n-1 of request b."""
    for position in range(0, rows.shape[1], BLOCK):
        block = rows[:, position : position + BLOCK]
        cache[b, :, int(table[b, position // BLOCK]), : block.shape[1]].copy_(block)


def make_mask(
    kind: MaskShape | None, lengths: tuple[int, ...], Hq: int, rows: int, L: int, source: Source
) -> Tensor | None:
    """A mask [B, 1|Hq, rows, L] that hides about a third of the keys; past a request's keys True, or NaN."""
    if kind is None:
        return None
    B = len(lengths)
    heads = Hq if kind.endswith("heads") else 1
    keep = source.chance((B, heads, rows, L), 0.67)
    if B > 1:
        keep[-1, :, :1] = False  # a row with no key left
    past = torch.arange(L, device=keep.device) >= torch.tensor(lengths, device=keep.device)[:, None, None, None]
    if kind.startswith("bool"):
        return keep | past
    bias = source.normal((B, heads, rows, L), torch.float32).masked_fill(~keep, -math.inf)
    return bias.masked_fill(past, math.nan)


def storage_bytes(tensor: Tensor) -> Tensor:
    """A copy of all bytes of the memory that a tensor views, what lies around it included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    # NOTE: a dim of size 1 keeps whatever stride it has in a contiguous tensor, which a view of bytes refuses
    return a.shape == b.shape and torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
