"""Hostile problems and the error budget: what `flash-mla check` and the tests run.

A case is a frozen description of one call. `case.call()` makes its tensors from the seed, the same on every device:
random data, shuffled tables, NaN in every slot that holds no token, in rows that no index names and in the mask past a
request's keys, 2^31-1 in every unused table entry. `run(case)` calls the public function, with outputs that hold NaN
beforehand, and judges it against float64 (`reference`), against a second call, and against what it may write. `CASES`
is the list that `flash-mla check` walks.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flash_mla import contract, deepseek
from flash_mla.api import flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata, mha_fwd_kvcache
from flash_mla.errors import DeviceError, FlashMLAError
from flash_mla.layout import BlockSparseLayout
from flash_mla.plan import plan
from flash_mla.problem import BLOCK, FP8, DecodeArgs, DecodeProblem
from flash_mla.quant import FORMATS
from flash_mla.reference import (
    decode_reference,
    format_rows,
    mha_reference,
    prefill_reference,
    sparse_reference,
)

UNUSED_ENTRY = 2**31 - 1
FP8_NAN = 0x7F

CacheLayout = Literal["slab", "sliced", "pool", "serving"]
"""slab: the reference's [B, Hk, Nblk, 64, D]; sliced: a monotonic slice of a larger one; pool: batch stride 0;
serving: the view of an engine's [num_blocks, 64, Hk, D], which the public functions refuse and backends take."""

Order = Literal["shuffled", "ordered"]
MaskShape = Literal["bool", "float", "bool-rows", "float-rows", "bool-heads", "float-heads"]
"""bool|float: [B, 1, 1, L] in decode, [B, 1, P, L] in prefill; rows: [B, 1, S_q, L]; heads: [B, Hq, S_q, L]."""

Descale = Literal["float", "tensor"]
Sparse = Literal["tensor", "heads", "layout", "block-mask"]


# --- Budget -----------------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """What a result may differ from float64 by: docs/contract.md, section 10."""

    out: float
    """Largest |error| over m = max|out|."""
    cosine: float
    """1 - 2 x.y / (x.x + y.y), which is at least the cosine distance and sees a wrong scale too."""
    lse: float
    """Largest |error| of lse, absolute. The contract gives none for FP32 (here BF16's) and for FP8: as for out, since
    a part whose lse is off by e has its weight off by e in a merge."""


BUDGETS = {
    torch.float32: Budget(1e-5, 5e-6, 1e-4),
    torch.float16: Budget(2e-3, 5e-6, 1e-4),
    torch.bfloat16: Budget(1.6e-2, 5e-6, 1e-4),
    FP8: Budget(6e-2, 1e-3, 6e-2),
}


class Verdict(NamedTuple):
    """How far a result is from the truth; `failures` is empty where it is within budget."""

    out_error: float
    cosine: float
    lse_error: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def check(out: Tensor, lse: Tensor | None, true_out: Tensor, true_lse: Tensor, dtype: torch.dtype) -> Verdict:
    """Judge (out, lse) against float64.

    Args:
        out: [B, Hq, rows, Dv]; lse: [B, Hq, rows] FP32, or None where the call did not ask for it.
        true_out, true_lse: of the same shapes, float64.
        dtype: the inputs' dtype, which selects the budget.
    """
    budget = BUDGETS[dtype]
    failures: list[str] = []
    if out.shape != true_out.shape:
        return Verdict(math.inf, math.inf, math.inf, (f"out {list(out.shape)}, not {list(true_out.shape)}",))
    got = out.double()
    m = true_out.abs().max().item() if true_out.numel() else 0.0
    # NOTE: NaN compares false with everything, so it is made infinite before any maximum
    error = (got - true_out).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    out_error = error.max().item() / (m or 1.0) if error.numel() else 0.0
    if out_error > budget.out:
        failures.append(
            f"out: error {out_error:.1e} of m = {m:.2g}, budget {budget.out:.1e}, {worst(error, got, true_out)}"
        )
    scale = (got.square().sum() + true_out.square().sum()).item()
    cosine = 1.0 - 2.0 * (got * true_out).sum().item() / scale if scale else 0.0
    if not cosine <= budget.cosine:
        failures.append(f"out: cosine distance {cosine:.1e}, budget {budget.cosine:.1e}")
    empty = true_lse == -math.inf
    if (got[empty] != 0).any():
        failures.append("out: not exactly 0 in a row that sees no key")
    if lse is None:
        return Verdict(out_error, cosine, 0.0, tuple(failures))

    if lse.shape != true_lse.shape or lse.dtype != torch.float32:
        failures.append(f"lse {list(lse.shape)} {lse.dtype}, not {list(true_lse.shape)} float32")
        return Verdict(out_error, cosine, math.inf, tuple(failures))
    if (lse[empty] != -math.inf).any():
        failures.append("lse: not -inf in a row that sees no key")
    difference = (lse.double() - true_lse).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(empty, 0.0)
    lse_error = difference.max().item() if difference.numel() else 0.0
    if lse_error > budget.lse:
        failures.append(f"lse: error {lse_error:.1e}, budget {budget.lse:.1e}, {worst(difference, lse, true_lse)}")
    return Verdict(out_error, cosine, lse_error, tuple(failures))


def worst(error: Tensor, got: Tensor, want: Tensor) -> str:
    """Where the largest error is, and how many of them are NaN."""
    index = [int(x) for x in torch.unravel_index(error.argmax(), error.shape)]
    text = f"at {index}: {got[tuple(index)].item():.6g}, not {want[tuple(index)].item():.6g}"
    nans = int(got.isnan().sum())
    return text + (f"; {nans} of {got.numel()} are NaN" if nans else "")


# --- Hostile tensors --------------------------------------------------------------------------------------------------


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
        return float(factors.flatten()[0]) if kind == "float" else factors.to(self.device)


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
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- Cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeCase:
    """A call of flash_mla_with_kvcache. lengths: seq_lens in tokens, one a request; the others as in the contract."""

    name: str
    lengths: tuple[int, ...]
    Hq: int = 4
    Hk: int = 2
    D: int = 64
    Dv: int | None = None
    """None: D."""
    S_q: int = 1
    dtype: torch.dtype = torch.bfloat16
    layout: CacheLayout = "slab"
    order: Order = "shuffled"
    alias: bool = False
    mask: MaskShape | None = None
    sink: bool = False
    descale: Descale | None = None
    spare: int = 1
    shared: int = 0
    index_dtype: torch.dtype = torch.int32
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "flash_mla_with_kvcache"

    def call(self) -> Call:
        """The tensors; `reference` is the same dict, as decode_reference takes the same names."""
        source = Source(self.seed, self.device)
        B, Dv = len(self.lengths), self.Dv or self.D
        table, Nblk = block_table(self.lengths, self.layout, self.order, self.spare, self.shared, source)
        k_cache = nan_cache(self.layout, B, self.Hk, Nblk, self.D, self.dtype, self.device)
        v_cache = (
            k_cache[..., :Dv] if self.alias else nan_cache(self.layout, B, self.Hk, Nblk, Dv, self.dtype, self.device)
        )
        for b, length in enumerate(self.lengths):
            fill(k_cache, table, b, source.normal((self.Hk, length, self.D), self.dtype))
            if not self.alias:
                fill(v_cache, table, b, source.normal((self.Hk, length, Dv), self.dtype))
        L = max(self.lengths, default=0) + 3
        mask_rows = 1 if self.mask in ("bool", "float") else self.S_q
        arguments = {
            "q": source.normal((B, self.Hq, self.S_q, self.D), self.dtype),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": table.to(self.index_dtype).to(self.device),
            "seq_lens": torch.tensor(self.lengths, dtype=self.index_dtype, device=self.device),
            "mask": make_mask(self.mask, self.lengths, self.Hq, mask_rows, L, source),
            "softmax_scale": self.softmax_scale,
            "q_descale": source.descale(self.descale, B, self.Hk),
            "k_descale": source.descale(self.descale, B, self.Hk),
            "v_descale": source.descale(self.descale, B, self.Hk),
            "attn_sink": source.normal((self.Hq,), torch.float32) if self.sink else None,
        }
        return Call(arguments, arguments)


@dataclass(frozen=True)
class PrefillCase:
    """A call of flash_mla_prefill. lengths: keys a request, NaN past them; None: P everywhere, no seq_lens given."""

    name: str
    P: int
    B: int = 2
    lengths: tuple[int, ...] | None = None
    Hq: int = 4
    Hk: int = 2
    D: int = 64
    Dv: int | None = None
    """None: D."""
    dtype: torch.dtype = torch.bfloat16
    sliced: bool = False
    """q, k and v are monotonic slices of larger tensors."""
    causal: bool | None = None
    mask: MaskShape | None = None
    sparse: Sparse | None = None
    sink: bool = False
    descale: Descale | None = None
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "flash_mla_prefill"

    def rows(self, source: Source, heads: int, width: int) -> Tensor:
        """[B, heads, P, width], dense or a slice."""
        values = source.normal((self.B, heads, self.P, width), self.dtype)
        if not self.sliced:
            return values
        view = nan_filled((self.B, heads + 1, self.P + 3, width + 8), self.dtype, self.device)
        view = view[:, 1:, 2:-1, :width]
        return view.copy_(values)

    def call(self) -> Call:
        """The tensors; the reference takes the blocks as a bool tensor and causal settled."""
        source = Source(self.seed, self.device)
        Dv = self.Dv or self.D
        q, k, v = (self.rows(source, *x) for x in ((self.Hq, self.D), (self.Hk, self.D), (self.Hk, Dv)))
        keys = (self.P,) * self.B if self.lengths is None else self.lengths
        for b, length in enumerate(keys):
            for rows in (k, v):
                rows[b, :, length:].copy_(nan_filled((1,), self.dtype, self.device))
        sparse, blocks = self.block_mask(source)
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "attn_mask": make_mask(self.mask, keys, self.Hq, self.P, self.P, source),
            "softmax_scale": self.softmax_scale,
            "seq_lens": None
            if self.lengths is None
            else torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            "q_descale": source.descale(self.descale, self.B, self.Hk),
            "k_descale": source.descale(self.descale, self.B, self.Hk),
            "v_descale": source.descale(self.descale, self.B, self.Hk),
            "attn_sink": source.normal((self.Hq,), torch.float32) if self.sink else None,
        }
        causal = self.mask is None if self.causal is None else self.causal
        return Call(
            {**arguments, "sparse_layout": sparse, "causal": self.causal},
            {**arguments, "block_mask": blocks, "causal": causal},
        )

    def block_mask(self, source: Source) -> tuple[Any, Tensor | None]:
        """(sparse_layout, the same as a bool tensor); its first block row is empty where it is random."""
        n = -(-self.P // BLOCK)
        if self.sparse is None:
            return None, None
        if self.sparse == "layout":
            layout = BlockSparseLayout.local_global(self.P, BLOCK + 7, 5, device=self.device)
            return layout, layout.blocks
        if self.sparse == "block-mask":
            # imported here: FlexAttention loads inductor's front, a second that nobody else should pay
            from torch.nn.attention.flex_attention import create_block_mask

            window = create_block_mask(
                lambda b, h, i, j: (i - j).abs() <= 100, None, None, self.P, self.P, self.device, 2 * BLOCK
            )
            coarse = window.to_dense().bool()
            fine = coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)
            return window, fine[..., :n, :n]
        blocks = source.chance((self.B, self.Hq, n, n) if self.sparse == "heads" else (1, 1, n, n), 0.5)
        blocks[:, :, :1] = False
        return blocks, blocks


@dataclass(frozen=True)
class MhaCase:
    """A call of mha_fwd_kvcache. starts: start_pos, one a request; None: 0 everywhere, no start_pos given."""

    name: str
    P: int
    B: int = 2
    starts: tuple[int, ...] | None = None
    H: int = 2
    D: int = 64
    Dv: int | None = None
    """None: D."""
    dtype: torch.dtype = torch.bfloat16
    layout: CacheLayout = "slab"
    order: Order = "shuffled"
    alias: bool = False
    write: bool = True
    """Pass k and v; False: the cache already holds the prompt."""
    causal: bool | None = None
    mask: MaskShape | None = None
    descale: Descale | None = None
    spare: int = 1
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "mha_fwd_kvcache"

    def call(self) -> Call:
        """The tensors; `reference` has caches that hold the whole prompt, and nothing else but NaN."""
        source = Source(self.seed, self.device)
        starts, Dv = self.starts or (0,) * self.B, self.Dv or self.D
        ends = tuple(start + self.P for start in starts)
        table, Nblk = block_table(ends, self.layout, self.order, self.spare, 0, source)
        caches, full_caches, new_rows = [], [], []
        for width in (self.D,) if self.alias else (self.D, Dv):
            cache, full = (
                nan_cache(self.layout, self.B, self.H, Nblk, width, self.dtype, self.device) for _ in range(2)
            )
            rows = source.normal((self.B, self.H, max(ends, default=0), width), self.dtype)
            for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
                fill(full, table, b, rows[b, :, :end])
                fill(cache, table, b, rows[b, :, : start if self.write else end])
            caches.append(cache)
            full_caches.append(full)
            chunks = nan_filled((self.B, self.H, self.P, width), self.dtype, self.device)
            for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
                chunks[b].copy_(rows[b, :, start:end])
            new_rows.append(chunks)
        if self.alias:
            caches.append(caches[0][..., :Dv])
            full_caches.append(full_caches[0][..., :Dv])
        arguments = {
            "q": source.normal((self.B, self.H, self.P, self.D), self.dtype),
            "block_table": table.to(self.device),
            "attn_mask": make_mask(self.mask, ends, self.H, self.P, max(ends, default=0), source),
            "start_pos": None
            if self.starts is None
            else torch.tensor(self.starts, dtype=torch.int32, device=self.device),
            "softmax_scale": self.softmax_scale,
            "q_descale": source.descale(self.descale, self.B, self.H),
            "k_descale": source.descale(self.descale, self.B, self.H),
            "v_descale": source.descale(self.descale, self.B, self.H),
        }
        causal = self.mask is None if self.causal is None else self.causal
        written = {"k": new_rows[0], "v": new_rows[1]} if self.write else {}
        return Call(
            {**arguments, **written, "k_cache": caches[0], "v_cache": caches[1], "causal": self.causal},
            {**arguments, "k_cache": full_caches[0], "v_cache": full_caches[1], "causal": causal},
        )


# --- Cases of the drop-in for DeepSeek's package ----------------------------------------------------------------------

NO_TOKEN = (-(2**31), -123456, -1, 1919810, 2147480000, 2**31 - 1)
"""Indices that name no token, whatever the pool's size here."""


def sparse_pool(
    B: int, S_q: int, topk: int, pages: int, page: int, D: int, format_name: str | None, dtype: torch.dtype,
    lengths: bool, source: Source,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(pool, indices [B, S_q, topk] int32, topk_length [B] or None).

    A fifth of the indices name no token, all of the very first query token's do; rows that no query names hold NaN.
    """
    slots, generator = pages * page, source.generator
    indices = torch.randint(0, slots, (B, S_q, topk), generator=generator)
    stray = torch.rand(B, S_q, topk, generator=generator) < 0.2
    stray[:1, :1] = True
    indices[stray] = torch.tensor(NO_TOKEN)[torch.randint(0, len(NO_TOKEN), (int(stray.sum()),), generator=generator)]
    counts = torch.randint(0, topk + 1, (B,), generator=generator) if lengths else torch.full((B,), topk)
    seen = (indices >= 0) & (indices < slots) & (torch.arange(topk) < counts.view(B, 1, 1))
    rows = torch.full((slots, D), math.nan)
    named = indices[seen].unique()
    rows[named] = torch.randn(len(named), D, generator=generator)
    pool = rows.view(pages, page, 1, D)
    pool = pool.to(dtype) if format_name is None else FORMATS[format_name].quantise(pool.bfloat16())
    topk_length = counts.int().to(source.device) if lengths else None
    return to_device(pool, source.device), indices.int().to(source.device), topk_length


def to_device(pool: Tensor, device: str) -> Tensor:
    """The pool on a device with the strides that it has: a row format's pages may lie further apart than their rows."""
    memory = torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage()).to(device)
    return memory.view(pool.dtype).as_strided(pool.shape, pool.stride(), pool.storage_offset())


def make_sink(Hq: int, source: Source) -> Tensor:
    """[Hq] FP32, of which some are -inf and some +inf."""
    sink = torch.randn(Hq, generator=source.generator)
    sink[::3], sink[1::4] = -math.inf, math.inf
    return sink.to(source.device)


def library_lse(lse: Tensor) -> Tensor:
    """A drop-in's lse, +inf without keys, by the library's convention, -inf; a -inf there becomes NaN."""
    return lse.masked_fill(lse == -math.inf, math.nan).masked_fill(lse == math.inf, -math.inf)


@dataclass(frozen=True)
class SparseDecodeCase:
    """A call of deepseek.flash_mla_with_kvcache with indices, over one pool or, with extra_topk, two."""

    name: str
    B: int = 3
    S_q: int = 2
    Hq: int = 16
    topk: int = 70
    page: int = 64
    format: str | None = "fp8_ds_mla"
    """A row format's name; None: the pool is in `dtype`."""
    D: int = 576
    Dv: int = 512
    dtype: torch.dtype = torch.bfloat16
    extra_topk: int | None = None
    extra_page: int = 53
    lengths: bool = False
    """Pass topk_length, and extra_topk_length."""
    sink: bool = False
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_mla_with_kvcache"
    more = ()

    def call(self) -> Call:
        """The tensors; the reference takes rows in float64."""
        source = Source(self.seed, self.device)
        shape = (self.B, self.S_q)
        pools = [sparse_pool(*shape, self.topk, 7, self.page, self.D, self.format, self.dtype, self.lengths, source)]
        if self.extra_topk is not None:
            pools.append(
                sparse_pool(
                    *shape, self.extra_topk, 5, self.extra_page, self.D, self.format, self.dtype, self.lengths, source
                )
            )
        (k_cache, indices, length), (extra, extra_indices, extra_length) = (*pools, (None, None, None))[:2]
        q = source.normal((*shape, self.Hq, self.D), self.dtype)
        sink = make_sink(self.Hq, source) if self.sink else None
        return Call(
            {
                "q": q,
                "k_cache": k_cache,
                "block_table": None,
                "cache_seqlens": None,
                "head_dim_v": self.Dv,
                "softmax_scale": self.softmax_scale,
                "is_fp8_kvcache": self.format is not None,
                "indices": indices,
                "attn_sink": sink,
                "extra_k_cache": extra,
                "extra_indices_in_kvcache": extra_indices,
                "topk_length": length,
                "extra_topk_length": extra_length,
            },
            {
                "q": q,
                "pools": [(format_rows(pool, self.format), *rest) for pool, *rest in pools],
                "Dv": self.Dv,
                "softmax_scale": self.D**-0.5 if self.softmax_scale is None else self.softmax_scale,
                "attn_sink": sink,
            },
        )

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        out, lse = deepseek.flash_mla_with_kvcache(**call.arguments, backend=self.backend)
        return out.transpose(1, 2), library_lse(lse)

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        return sparse_reference(**call.reference)[:2]


@dataclass(frozen=True)
class SparsePrefillCase:
    """A call of deepseek.flash_mla_sparse_fwd."""

    name: str
    S_q: int = 5
    S_kv: int = 150
    Hq: int = 16
    topk: int = 70
    D: int = 576
    Dv: int = 512
    dtype: torch.dtype = torch.bfloat16
    lengths: bool = False
    """Pass topk_length."""
    sink: bool = False
    softmax_scale: float = 0.05
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_mla_sparse_fwd"
    more = ("max_logits",)

    def call(self) -> Call:
        source = Source(self.seed, self.device)
        kv, indices, length = sparse_pool(
            self.S_q, 1, self.topk, 1, self.S_kv, self.D, None, self.dtype, self.lengths, source
        )
        q = source.normal((self.S_q, self.Hq, self.D), self.dtype)
        sink = make_sink(self.Hq, source) if self.sink else None
        return Call(
            {
                "q": q,
                "kv": kv[0],
                "indices": indices,
                "sm_scale": self.softmax_scale,
                "d_v": self.Dv,
                "attn_sink": sink,
                "topk_length": length,
            },
            {
                "q": q.unsqueeze(1),
                "pools": [(format_rows(kv, None), indices, length)],
                "Dv": self.Dv,
                "softmax_scale": self.softmax_scale,
                "attn_sink": sink,
            },
        )

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        out, max_logits, lse = deepseek.flash_mla_sparse_fwd(**call.arguments, backend=self.backend)
        return tuple(x.transpose(0, 1).unsqueeze(0) for x in (out, library_lse(lse), max_logits))

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        out, lse, top = sparse_reference(**call.reference)
        return tuple(x.squeeze(2).transpose(0, 1).unsqueeze(0) for x in (out, lse, top))


@dataclass(frozen=True)
class DenseDecodeCase:
    """A call of deepseek.flash_mla_with_kvcache with a block table, or, in FP8, of flash_mla_with_kvcache_fp8."""

    name: str
    lengths: tuple[int, ...] = (140, 0, 1, 64, 3)
    S_q: int = 2
    Hq: int = 16
    Hk: int = 1
    D: int = 576
    Dv: int = 512
    page: int = 64
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    sink: bool = False
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_mla_with_kvcache"
    more = ()

    def call(self) -> Call:
        """The tensors; the reference names the keys of each query one by one."""
        source = Source(self.seed, self.device)
        B, width = len(self.lengths), -(-max(*self.lengths, 1) // self.page) + 1
        table = torch.full((B, width), UNUSED_ENTRY, dtype=torch.int32)
        pool = nan_filled((B * width, self.page, self.Hk, self.D), self.dtype, self.device)
        free = source.permutation(B * width).int()
        indices = torch.full((B, self.S_q, max(*self.lengths, 1)), -1)
        for b, length in enumerate(self.lengths):
            pages = -(-length // self.page)
            table[b, :pages] = free[b * width : b * width + pages]
            t = torch.arange(length)
            slots = table[b, t // self.page].long() * self.page + t % self.page
            pool.flatten(0, 1)[slots.to(self.device)] = source.normal((length, self.Hk, self.D), self.dtype)
            for i in range(self.S_q):
                limit = max(length - self.S_q + i + 1, 0) if self.causal else length
                indices[b, i, :limit] = slots[:limit]
        q = source.normal((B, self.S_q, self.Hq, self.D), self.dtype)
        sink = make_sink(self.Hq, source) if self.sink else None
        factors = {}
        if self.dtype == FP8:
            factors = {
                name: torch.tensor([x], device=self.device) for name, x in (("descale_q", 0.5), ("descale_k", 0.25))
            }
        arguments = {
            "q": q,
            "k_cache": pool,
            "block_table": table.to(self.device),
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            "head_dim_v": self.Dv,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            **(factors if self.dtype == FP8 else {"attn_sink": sink}),
        }
        reference = {
            "q": q.double() * (0.5 if factors else 1.0),
            "rows": pool.double().flatten(0, 1) * (0.25 if factors else 1.0),  # [slots, Hk, D]
            "indices": indices.to(self.device),
            "softmax_scale": self.D**-0.5 if self.softmax_scale is None else self.softmax_scale,
            "sink": sink,
        }
        return Call(arguments, reference)

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        function = deepseek.flash_mla_with_kvcache_fp8 if self.dtype == FP8 else deepseek.flash_mla_with_kvcache
        out, lse = function(**call.arguments, backend=self.backend)
        return out.transpose(1, 2), library_lse(lse)

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        x = call.reference
        parts = []
        for hk, q in enumerate(x["q"].chunk(self.Hk, 2)):
            sink = None if x["sink"] is None else x["sink"].chunk(self.Hk)[hk]
            pools = [(x["rows"][:, hk], x["indices"], None)]
            parts.append(sparse_reference(q, pools, self.Dv, x["softmax_scale"], sink))
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


@dataclass(frozen=True)
class VarlenCase:
    """A call of deepseek.flash_attn_varlen_func and its backward, through out and lse."""

    name: str
    lengths_q: tuple[int, ...] = (3, 65, 1, 20)
    lengths_kv: tuple[int, ...] = (9, 130, 1, 20)
    Hq: int = 4
    Hk: int = 2
    D: int = 192
    Dv: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_attn_varlen_func"
    more = ("dq", "dk", "dv")

    def call(self) -> Call:
        source = Source(self.seed, self.device)
        starts = [[0, *torch.tensor(x).cumsum(0).tolist()] for x in (self.lengths_q, self.lengths_kv)]
        rows = ((starts[0][-1], self.Hq, self.D), (starts[1][-1], self.Hk, self.D), (starts[1][-1], self.Hk, self.Dv))
        q, k, v = (source.normal(shape, self.dtype) for shape in rows)
        cu_seqlens = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in starts]
        return Call(
            {
                "q": q,
                "k": k,
                "v": v,
                "cu_seqlens_qo": cu_seqlens[0],
                "cu_seqlens_kv": cu_seqlens[1],
                "max_seqlen_qo": max(self.lengths_q),
                "max_seqlen_kv": max(self.lengths_kv),
                "causal": self.causal,
            },
            {
                "d_out": source.normal((starts[0][-1], self.Hq, self.Dv), self.dtype),
                "d_lse": source.normal((starts[0][-1], self.Hq), torch.float32),
                "starts": starts,
            },
        )

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        leaves = {name: call.arguments[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
        out, lse = deepseek.flash_attn_varlen_func(**{**call.arguments, **leaves}, backend=self.backend)
        return as_batch(out.detach(), lse.detach(), *self.gradients(call, out, lse, leaves))

    def gradients(self, call: Call, out: Tensor, lse: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Of (out d_out).sum() + (lse d_lse).sum() over the rows that see a key."""
        d_lse = call.reference["d_lse"].masked_fill(lse.detach() == -math.inf, 0.0)
        return torch.autograd.grad(
            (out, lse), tuple(leaves.values()), (call.reference["d_out"].to(out.dtype), d_lse.to(lse.dtype))
        )

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        """By autograd in float64."""
        leaves = {name: call.arguments[name].double().requires_grad_() for name in ("q", "k", "v")}
        outs, lses = [], []
        starts_q, starts_kv = call.reference["starts"]
        for n in range(len(self.lengths_q)):
            own_q, own_kv = slice(*starts_q[n : n + 2]), slice(*starts_kv[n : n + 2])
            q, k, v = (
                leaves[name][own].transpose(0, 1)[None] for name, own in (("q", own_q), ("k", own_kv), ("v", own_kv))
            )
            out, lse = differentiable_attention(q, k, v, self.causal)
            outs.append(out)
            lses.append(lse)
        out, lse = torch.cat(outs), torch.cat(lses)
        return as_batch(out.detach(), lse.detach(), *self.gradients(call, out, lse, leaves))


def differentiable_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q [1, Hq, S_q, D], k and v [1, Hk, S_kv, ..] float64 -> out [S_q, Hq, Dv], lse [S_q, Hq], of plain operators.

    The last query sees all keys. A row without keys: 0 and -inf, and no gradient.
    """
    S_q, S_kv = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    hidden = torch.ones(S_q, S_kv, dtype=torch.bool, device=q.device).triu(S_kv - S_q + 1)
    if not causal:
        hidden = torch.zeros_like(hidden)
    empty = hidden.all(-1)[:, None]
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(hidden & ~empty, -math.inf)
    out = (scores.softmax(-1) @ v).masked_fill(empty, 0.0) if S_kv else q.new_zeros(*q.shape[:3], v.shape[3])
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    return out[0].transpose(0, 1), lse[0, ..., 0].transpose(0, 1)


def as_batch(out: Tensor, lse: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """out [S, Hq, Dv] and lse [S, Hq] as [1, Hq, S, ..]."""
    return out.transpose(0, 1)[None], lse.transpose(0, 1)[None], *gradients


DropInCase = SparseDecodeCase | SparsePrefillCase | DenseDecodeCase | VarlenCase
Case = DecodeCase | PrefillCase | MhaCase | DropInCase


# --- Run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of a case. `refused` is the reason of the backend that does not run it (nothing was checked)."""

    case: Case
    verdict: Verdict | None
    failures: tuple[str, ...] = ()
    refused: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.verdict is not None and not self.failures

    def __str__(self) -> str:
        if self.refused is not None:
            return f"{self.case.name}: refused: {self.refused}"
        if self.passed and self.verdict is not None:
            return (
                f"{self.case.name}: passed, error {self.verdict.out_error:.1e} of m, lse {self.verdict.lse_error:.1e}"
            )
        return "\n  ".join([f"{self.case.name}: FAILED ({self.case})", *self.failures])


def run(case: Case) -> Result:
    """Call the case's function twice (once into memory that holds NaN, in decode once with metadata) and judge both.

    An error that the call raises is a failure, except a DeviceError, which is a refusal.
    """
    begin = time.perf_counter()
    call = case.call()
    want_caches = {name: storage_bytes(call.reference[name]) for name in CACHES if name in call.reference}
    before = {name: storage_bytes(x) for name, x in call.arguments.items() if isinstance(x, Tensor)}
    try:
        first = invoke(case, call, True)
        second = invoke(case, call, False)
    except DeviceError as error:
        return Result(case, None, refused=error.given, seconds=time.perf_counter() - begin)
    except FlashMLAError as error:
        return Result(case, None, (f"{type(error).__name__}: {error}",), seconds=time.perf_counter() - begin)
    true = truth(case, call)
    (out, lse), (true_out, true_lse) = first[:2], true[:2]
    verdict = check(out, lse, true_out, true_lse, case.dtype)
    failures = list(verdict.failures)
    if isinstance(case, DropInCase):
        for name, got, want in zip(case.more, first[2:], true[2:], strict=True):
            failures += check_more(name, got, want, case.dtype)
    if out.dtype != contract.out_dtype(case.dtype):
        failures.append(f"out: {out.dtype}, not {contract.out_dtype(case.dtype)}")
    if not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
        failures.append("a second call differs in bits")
    for name, content in before.items():
        if name not in want_caches and not torch.equal(content, storage_bytes(call.arguments[name])):
            failures.append(f"the call wrote to {name}")
    for name, content in want_caches.items():
        if not torch.equal(content, storage_bytes(call.arguments[name])):
            failures.append(f"{name} does not hold, bit for bit, what it should after the call")
    return Result(case, verdict, tuple(failures), seconds=time.perf_counter() - begin)


def check_more(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> list[str]:
    """Judge what a drop-in returns beside out and lse: max_logits as lse is, a gradient as out is."""
    if got.shape != want.shape:
        return [f"{name} {list(got.shape)}, not {list(want.shape)}"]
    finite = want.isfinite()
    if not torch.equal(got[~finite].double(), want[~finite]):
        return [f"{name}: not {want[~finite][0]} in a row that sees no key"]
    m = 1.0 if name == "max_logits" else want.abs().max().item() if want.numel() else 1.0
    budget = BUDGETS[dtype].lse if name == "max_logits" else BUDGETS[dtype].out * m
    error = (got.double() - want).masked_fill(~finite, 0.0).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    if error.numel() and error.max() > budget:
        return [f"{name}: error {error.max():.1e}, budget {budget:.1e}, {worst(error, got, want)}"]
    return []


CACHES = ("k_cache", "v_cache")


def truth(case: Case, call: Call) -> tuple[Tensor, ...]:
    """(out, lse) of the case in float64, and what else the function returns."""
    if isinstance(case, DropInCase):
        return case.truth(call)
    if isinstance(case, DecodeCase):
        return decode_reference(**call.reference)
    if isinstance(case, PrefillCase):
        return prefill_reference(**call.reference)
    return mha_reference(**call.reference)


def poisoned_out(case: DecodeCase | PrefillCase | MhaCase, call: Call) -> Tensor:
    """A NaN-filled output."""
    v = call.arguments["v"] if isinstance(case, PrefillCase) else call.arguments["v_cache"]
    shape = (*call.arguments["q"].shape[:3], v.shape[-1])
    return nan_filled(shape, contract.out_dtype(case.dtype), case.device)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, workspaces too: torch's deterministic mode fills what it leaves uninitialised."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def invoke(case: Case, call: Call, poison: bool) -> tuple[Tensor, ...]:
    """(out, lse, ..) of the case's function, where `poison` says so into memory that holds NaN; else decode goes
    through metadata."""
    if isinstance(case, DropInCase):
        with poisoned_memory() if poison else contextlib.nullcontext():
            return case.invoke(call)
    out = poisoned_out(case, call) if poison else None
    if isinstance(case, DecodeCase):
        if case.layout == "serving":
            return launch_serving(case, call, out)
        x = call.arguments
        metadata = None
        if out is None:
            metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"])
        result = flash_mla_with_kvcache(**x, metadata=metadata, return_lse=True, out=out, backend=case.backend)
    elif isinstance(case, PrefillCase):
        result = flash_mla_prefill(**call.arguments, return_lse=True, out=out, backend=case.backend)
    else:
        result = mha_fwd_kvcache(**call.arguments, return_lse=True, out=out, backend=case.backend)
    assert isinstance(result, tuple)
    return result


def launch_serving(case: DecodeCase, call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a page view that the public functions refuse (an engine's [num_blocks, 64, Hk, D] pool), as vLLM's seam
    does: a problem made by hand, through the plan."""
    x = call.arguments
    q, k, v, mask = x["q"], x["k_cache"], x["v_cache"], x["mask"]
    B, Hq, S_q, D = q.shape
    descales = {name: broadcast(x[name], B, case.Hk, q.device) for name in ("q_descale", "k_descale", "v_descale")}
    problem = DecodeProblem(
        device=q.device,
        dtype=q.dtype,
        out_dtype=contract.out_dtype(q.dtype),
        B=B,
        Hq=Hq,
        Hk=case.Hk,
        S_q=S_q,
        D=D,
        Dv=v.shape[-1],
        Nblk=k.shape[2],
        table_blocks=x["block_table"].shape[1],
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        alias=case.alias,
        mask="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        descale=case.descale is not None,
        sink=case.sink,
    )
    out = q.new_empty((B, Hq, S_q, v.shape[-1]), dtype=problem.out_dtype) if out is None else out
    lse = q.new_empty((B, Hq, S_q), dtype=torch.float32)
    args = DecodeArgs(
        q=q,
        k=k,
        v=v,
        block_table=x["block_table"],
        seq_lens=x["seq_lens"],
        mask=None if mask is None else mask.expand(B, Hq, S_q, -1),
        **descales,
        attn_sink=x["attn_sink"],
        softmax_scale=D**-0.5 if case.softmax_scale is None else case.softmax_scale,
        out=out,
        lse=lse,
    )
    plan(problem, case.backend).launch(args)
    return out, lse


def broadcast(value: float | Tensor | None, B: int, Hk: int, device: torch.device) -> Tensor | None:
    return None if value is None else torch.as_tensor(value, dtype=torch.float32, device=device).expand(B, Hk)


# --- The list ---------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}
RAGGED = (1, 0, 64, 65, 300)
LONG = (700, 513, 1)
"""Long enough for runs of eight consecutive blocks, which the CPU backend reads in place."""


def decode_cases() -> list[DecodeCase]:
    mla = DecodeCase("decode/mla", LONG, Hq=16, Hk=1, D=576, Dv=512, alias=True)
    gqa = DecodeCase("decode/gqa", RAGGED, Hq=8, Hk=2, D=128)
    cases = []
    for name, dtype in DTYPES.items():
        descale: Descale | None = "tensor" if dtype == FP8 else None
        cases += [
            replace(mla, name=f"decode/mla-{name}", dtype=dtype, descale=descale),
            replace(gqa, name=f"decode/gqa-{name}", dtype=dtype, descale=descale),
            replace(
                gqa, name=f"decode/speculative-{name}", dtype=dtype, descale=descale, S_q=4, lengths=(7, 600, 0, 3)
            ),
        ]
    for ratio in (1, 2, 8, 64, 128):
        cases.append(DecodeCase(f"decode/ratio-{ratio}", (65, 3, 0), Hq=ratio * 2, Hk=2, D=64))
    for D in (16, 40, 80, 96, 192, 256, 512, 576):
        cases.append(DecodeCase(f"decode/head-dim-{D}", (130, 64), D=D))
    for D, Dv in ((192, 128), (64, 128), (72, 8), (576, 512)):
        cases.append(DecodeCase(f"decode/head-dim-{D}-{Dv}", (130, 64), D=D, Dv=Dv))
    for S_q in range(2, 9):
        # the second request is shorter than S_q: its first queries see no key
        cases.append(replace(gqa, name=f"decode/queries-{S_q}", lengths=(600, S_q - 1, 64, 129, 0), S_q=S_q))
    masks: tuple[MaskShape, ...] = ("bool", "float", "bool-rows", "float-rows", "bool-heads", "float-heads")
    for mask in masks:
        S_q = 1 if mask in ("bool", "float") else 3
        cases.append(replace(gqa, name=f"decode/mask-{mask}", mask=mask, S_q=S_q))
    cases += [
        replace(
            gqa, name="decode/mask-mla", lengths=LONG, mask="bool-rows", S_q=2, Hq=16, Hk=1, D=576, Dv=512, alias=True
        ),
        replace(gqa, name="decode/mask-fp8", mask="float", dtype=FP8, descale="float"),
    ]
    layouts: tuple[CacheLayout, ...] = ("sliced", "pool", "serving")
    for layout in layouts:
        cases += [
            replace(gqa, name=f"decode/{layout}", layout=layout, lengths=LONG),
            replace(gqa, name=f"decode/{layout}-ordered", layout=layout, lengths=LONG, order="ordered"),
            replace(mla, name=f"decode/{layout}-mla", layout=layout),
            replace(gqa, name=f"decode/{layout}-fp8", layout=layout, dtype=FP8, descale="tensor"),
        ]
    cases += [
        replace(gqa, name="decode/shared-prefix", layout="pool", order="ordered", lengths=(640, 700, 650), shared=9),
        replace(mla, name="decode/shared-prefix-mla", layout="pool", lengths=(640, 700, 650), shared=9, S_q=2),
        replace(gqa, name="decode/pool-barely-used", layout="pool", lengths=(200, 65), spare=100),
        replace(gqa, name="decode/ordered", order="ordered", lengths=LONG),
        replace(gqa, name="decode/sink", sink=True),
        replace(mla, name="decode/sink-mla", sink=True, S_q=2),
        replace(gqa, name="decode/sink-mask", sink=True, mask="bool"),
        replace(gqa, name="decode/scale", softmax_scale=0.31),
        replace(gqa, name="decode/int64", index_dtype=torch.int64),
        replace(gqa, name="decode/exact-blocks", lengths=(64, 128, 192), spare=0),
        replace(gqa, name="decode/all-empty", lengths=(0, 0)),
        replace(gqa, name="decode/one-token", lengths=(1,)),
        replace(gqa, name="decode/descale", descale="tensor"),
        replace(mla, name="decode/descale-mla", descale="float"),
        replace(gqa, name="decode/fp8-no-descale", dtype=FP8),
        replace(gqa, name="decode/fp8-float", dtype=FP8, descale="float"),
        replace(mla, name="decode/fp8-mla-sink", dtype=FP8, descale="tensor", sink=True, S_q=2),
    ]
    return cases


def prefill_cases() -> list[PrefillCase]:
    cases = []
    for name, dtype in DTYPES.items():
        descale: Descale | None = "tensor" if dtype == FP8 else None
        base = PrefillCase("", 150, dtype=dtype, descale=descale)
        cases += [
            replace(base, name=f"prefill/causal-{name}"),
            replace(base, name=f"prefill/full-{name}", causal=False),
            replace(base, name=f"prefill/mask-{name}", mask="float"),
            replace(base, name=f"prefill/sparse-{name}", sparse="tensor", causal=False),
            replace(base, name=f"prefill/mla-{name}", D=192, Dv=128),
        ]
    base = PrefillCase("", 200)
    for ratio in (1, 8, 128):
        cases.append(PrefillCase(f"prefill/ratio-{ratio}", 70, B=1, Hq=ratio, Hk=1))
    for D, Dv in ((16, 16), (40, 40), (256, 256), (576, 512), (64, 128), (72, 8)):
        cases.append(PrefillCase(f"prefill/head-dim-{D}-{Dv}", 100, D=D, Dv=Dv))
    for P in (1, 63, 64, 65, 129):
        cases.append(replace(base, name=f"prefill/tokens-{P}", P=P))
    masks: tuple[MaskShape, ...] = ("bool", "float", "bool-heads", "float-heads")
    for mask in masks:
        cases += [
            replace(base, name=f"prefill/mask-{mask}", mask=mask),
            replace(base, name=f"prefill/mask-{mask}-causal", mask=mask, causal=True),
        ]
    patterns: tuple[Sparse, ...] = ("tensor", "heads", "layout", "block-mask")
    for sparse in patterns:
        cases += [
            replace(base, name=f"prefill/sparse-{sparse}", sparse=sparse),
            replace(base, name=f"prefill/sparse-{sparse}-mask", sparse=sparse, mask="bool", causal=True),
        ]
    for D, Dv in ((64, 64), (128, 128), (192, 128), (256, 256)):
        # several tiles of every kernel
        long = PrefillCase("", 700, Hq=4, Hk=2, D=D, Dv=Dv)
        cases += [
            replace(long, name=f"prefill/long-{D}-{Dv}"),
            replace(long, name=f"prefill/long-{D}-{Dv}-ragged", lengths=(700, 333), causal=False),
            replace(long, name=f"prefill/long-{D}-{Dv}-sparse", sparse="heads", causal=False),
            replace(long, name=f"prefill/long-{D}-{Dv}-sparse-causal", sparse="heads", causal=True),
            replace(long, name=f"prefill/long-{D}-{Dv}-mask", mask="bool"),
        ]
    cases += [
        replace(base, name="prefill/mask-float-128", mask="float", D=128),
        replace(base, name="prefill/mask-bool-192-128", mask="bool", causal=True, D=192, Dv=128),
        replace(base, name="prefill/ragged", lengths=(200, 77)),
        replace(base, name="prefill/ragged-empty", lengths=(0, 64)),
        replace(base, name="prefill/ragged-full", lengths=(130, 1), causal=False),
        replace(base, name="prefill/ragged-mask", lengths=(130, 65), mask="float"),
        replace(base, name="prefill/ragged-sparse", lengths=(130, 65), sparse="heads", mask="bool-heads", causal=True),
        replace(base, name="prefill/sliced", sliced=True),
        replace(base, name="prefill/sliced-sparse", sliced=True, sparse="heads"),
        replace(base, name="prefill/sliced-ragged", sliced=True, lengths=(130, 65), D=192, Dv=128),
        replace(base, name="prefill/sink", sink=True),
        replace(base, name="prefill/sink-sparse", sink=True, sparse="tensor", mask="bool"),
        replace(base, name="prefill/scale", softmax_scale=0.31),
        replace(base, name="prefill/descale", descale="tensor"),
        replace(base, name="prefill/fp8-ragged", dtype=FP8, descale="float", lengths=(130, 65)),
        replace(base, name="prefill/fp8-sparse-heads", dtype=FP8, sparse="heads", mask="float-heads"),
    ]
    return cases


def mha_cases() -> list[MhaCase]:
    cases = []
    for name, dtype in DTYPES.items():
        descale: Descale | None = "tensor" if dtype == FP8 else None
        base = MhaCase("", 130, dtype=dtype, descale=descale)
        cases += [
            replace(base, name=f"mha/write-{name}"),
            replace(base, name=f"mha/chunk-{name}", P=70, starts=(65, 0)),
            replace(base, name=f"mha/read-{name}", write=False),
        ]
    base = MhaCase("", 130)
    chunk = replace(base, P=70, starts=(100, 64))
    masks: tuple[MaskShape, ...] = ("bool", "float", "bool-heads", "float-heads")
    for mask in masks:
        cases += [
            replace(base, name=f"mha/mask-{mask}", mask=mask),
            replace(chunk, name=f"mha/chunk-mask-{mask}", mask=mask, causal=True),
        ]
    layouts: tuple[CacheLayout, ...] = ("sliced", "pool")
    for layout in layouts:
        cases += [
            replace(base, name=f"mha/{layout}", layout=layout),
            replace(chunk, name=f"mha/{layout}-chunk", layout=layout),
        ]
    cases += [
        replace(base, name="mha/one-token", P=1),
        replace(base, name="mha/exact-blocks", P=128, spare=0),
        replace(base, name="mha/full", causal=False),
        replace(chunk, name="mha/chunk-full", causal=False),
        replace(chunk, name="mha/chunk-one-token", P=1, starts=(63, 64)),
        replace(base, name="mha/ordered", order="ordered", P=600, B=1),
        replace(base, name="mha/head-dims", D=192, Dv=128),
        replace(base, name="mha/long", P=700, D=128),
        replace(base, name="mha/long-chunk", P=300, starts=(450, 64), D=128, layout="pool"),
        replace(base, name="mha/scale", softmax_scale=0.31),
        replace(base, name="mha/latent", D=576, Dv=512, alias=True, write=False),
        replace(chunk, name="mha/latent-chunk", D=576, Dv=512, alias=True, write=False, layout="pool"),
        replace(chunk, name="mha/fp8-pool", dtype=FP8, descale="float", layout="pool"),
    ]
    return cases


def drop_in_cases() -> list[DropInCase]:
    cases: list[DropInCase] = []
    widths = {"fp8_ds_mla": 576, "model1": 512, "v4.1": 512, "flat": 576}
    for format_name, D in widths.items():
        base = SparseDecodeCase(f"deepseek/sparse-{format_name}", format=format_name, D=D)
        cases += [
            base,
            replace(base, name=f"{base.name}-all", sink=True, lengths=True, extra_topk=33, page=61),
            replace(base, name=f"{base.name}-many", Hq=128, S_q=1, B=5, topk=300, page=2),
        ]
    for name, dtype in DTYPES.items():
        if dtype != FP8:
            base = SparseDecodeCase(f"deepseek/sparse-{name}", format=None, dtype=dtype)
            cases += [
                base,
                replace(base, name=f"{base.name}-all", D=512, sink=True, lengths=True, extra_topk=33, page=7),
            ]
            prefill = SparsePrefillCase(f"deepseek/sparse-prefill-{name}", dtype=dtype)
            cases += [prefill, replace(prefill, name=f"{prefill.name}-all", sink=True, lengths=True)]
    decode, prefill, dense, varlen = (
        SparseDecodeCase(""), SparsePrefillCase(""), DenseDecodeCase(""), VarlenCase(""),
    )  # fmt: skip
    cases += [
        replace(decode, name="deepseek/sparse-one-index", topk=1, S_q=1),
        replace(decode, name="deepseek/sparse-long", topk=2048, B=1, page=576),
        replace(decode, name="deepseek/sparse-sink", sink=True),
        replace(decode, name="deepseek/sparse-lengths", lengths=True),
        replace(decode, name="deepseek/sparse-extra", extra_topk=33),
        replace(decode, name="deepseek/sparse-heads-3", Hq=3, softmax_scale=0.03),
        replace(decode, name="deepseek/sparse-narrow", format=None, D=128, Dv=64),
        replace(prefill, name="deepseek/sparse-prefill-512", D=512, Hq=64, topk=300),
        replace(prefill, name="deepseek/sparse-prefill-heads-128", Hq=128, topk=128, S_kv=95),
        replace(prefill, name="deepseek/sparse-prefill-heads-3", Hq=3),
        replace(prefill, name="deepseek/sparse-prefill-128", D=128, Dv=128),
    ]
    for name, dtype in DTYPES.items():
        cases.append(replace(dense, name=f"deepseek/dense-{name}", dtype=dtype))
        if dtype != FP8:
            cases.append(replace(varlen, name=f"deepseek/varlen-{name}", dtype=dtype))
    cases += [
        replace(dense, name="deepseek/dense-full", causal=False),
        replace(dense, name="deepseek/dense-fp8-full", causal=False, dtype=FP8),
        replace(dense, name="deepseek/dense-128-heads", Hq=128, S_q=1),
        replace(dense, name="deepseek/dense-gqa", Hq=63, Hk=3, S_q=3),
        replace(dense, name="deepseek/dense-gqa-full", Hq=16, Hk=8, S_q=4, causal=False),
        replace(dense, name="deepseek/dense-512", D=512),
        replace(dense, name="deepseek/dense-pages-256", lengths=(300, 1000), page=256),
        replace(dense, name="deepseek/dense-sink", sink=True),
        replace(dense, name="deepseek/dense-sink-full", sink=True, causal=False, Hk=2),
        replace(varlen, name="deepseek/varlen-full", causal=False),
        replace(varlen, name="deepseek/varlen-alike", lengths_q=(70, 70), lengths_kv=(70, 70), Hk=4),
        replace(varlen, name="deepseek/varlen-empty", lengths_q=(5, 0, 7), lengths_kv=(2, 4, 0), D=64, Dv=32),
        replace(
            varlen, name="deepseek/varlen-empty-full", lengths_q=(5, 0, 7), lengths_kv=(2, 4, 0), causal=False, D=128
        ),
    ]
    return cases


CASES: tuple[Case, ...] = (*decode_cases(), *prefill_cases(), *mha_cases(), *drop_in_cases())
"""Every function, dtype and edge of docs/contract.md, small enough for a CPU: `replace(case, device=..., backend=...)`
moves one elsewhere."""
