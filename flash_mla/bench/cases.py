"""The shapes that are measured, how their tensors are built, and what a call must compute and move.

A case is named `<phase>/<shape>`. Its FLOP model counts the two GEMMs over the keys that a query may see; a causal
triangle or a dropped block counts nothing. Its byte model counts every byte of q, of the cache rows that the lengths
name, and of out, once: what an ideal kernel moves, not what a kernel or a peer does move. A gathered copy, spare
blocks and scores in memory are therefore never counted as work done.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.api import flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.layout import BlockSparseLayout
from flash_mla.problem import BLOCK, DecodeProblem, PrefillProblem

__all__ = ["CASES", "DecodeCase", "DecodeInputs", "PrefillCase", "PrefillInputs"]

Pool = Literal["slab", "scattered", "consecutive"]

POOL_SHARE = 20
"""A pool case's cache holds this many times the blocks of one request: a request uses 5 % of it."""


class DecodeInputs(NamedTuple):
    """q [B, Hq, S_q, D], caches [B, Hk, Nblk, 64, D|Dv], block_table [B, S/64] int32, seq_lens [B] int32."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor


class PrefillInputs(NamedTuple):
    """q [B, Hq, P, D], k [B, Hk, P, D], v [B, Hk, P, Dv], blocks bool [1, 1, P/64, P/64] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor | None


@dataclass(frozen=True)
class DecodeCase:
    """S_q new tokens of B requests over S cached tokens each (S a multiple of 64), BF16.

    MLA is `Dv < D`: V is the view `k_cache[..., :Dv]`. `pool` says where the blocks lie: in a slab a request that is
    used to the full, in shuffled order; or in a pool of 20 times a request's blocks that all requests share (batch
    stride 0), scattered or one consecutive run a request.
    """

    name: str
    devices: tuple[str, ...]
    B: int
    Hq: int
    Hk: int
    S: int
    D: int
    Dv: int
    S_q: int = 1
    pool: Pool = "slab"
    dtype: torch.dtype = torch.bfloat16

    @property
    def alias(self) -> bool:
        """V is a view of K's first Dv columns."""
        return self.Dv < self.D

    @property
    def group(self) -> str:
        """The table that reports it."""
        return f"decode, {'MLA' if self.alias else 'GQA'}"

    @property
    def flops(self) -> int:
        """Two GEMMs over the keys that each query sees: query i of S_q sees S - S_q + 1 + i."""
        keys = self.S_q * self.S - self.S_q * (self.S_q - 1) // 2
        return 2 * self.B * self.Hq * keys * (self.D + self.Dv)

    @property
    def bytes(self) -> int:
        """q, the used cache rows (K and V; one row where V lies in K) and out, once."""
        rows = self.B * self.Hq * self.S_q * (self.D + self.Dv)
        cache = self.B * self.Hk * self.S * (self.D + (0 if self.alias else self.Dv))
        return (rows + cache) * self.dtype.itemsize

    def build(self, device: str) -> DecodeInputs:
        """Random tensors of this case, the same for the same name and device."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        normal = partial(_normal, generator=generator, dtype=self.dtype)
        used = self.S // BLOCK
        blocks = used if self.pool == "slab" else POOL_SHARE * used
        owners = self.B if self.pool == "slab" else 1
        k = normal(owners, self.Hk, blocks, BLOCK, self.D).expand(self.B, -1, -1, -1, -1)
        v = (
            k[..., : self.Dv]
            if self.alias
            else normal(owners, self.Hk, blocks, BLOCK, self.Dv).expand(self.B, -1, -1, -1, -1)
        )
        if self.pool == "consecutive":
            table = _runs(self.B, used, blocks, device)
        elif self.pool == "scattered":
            # each request's own blocks, dealt from one shuffled pool
            table = torch.randperm(blocks, generator=generator, device=device)[: self.B * used].view(self.B, used)
        else:
            table = torch.stack([torch.randperm(used, generator=generator, device=device) for _ in range(self.B)])
        lengths = torch.full((self.B,), self.S, dtype=torch.int32, device=device)
        return DecodeInputs(normal(self.B, self.Hq, self.S_q, self.D), k, v, table.int(), lengths)

    def call(self, inputs: DecodeInputs, backend: str | None = None) -> Callable[[], Tensor]:
        """The public function with metadata made beforehand, as a decode layer calls it."""
        metadata = get_mla_metadata(
            inputs.q.shape, inputs.k_cache.shape, inputs.block_table, inputs.seq_lens, v_head_dim=self.Dv
        )

        def run() -> Tensor:
            return flash_mla_with_kvcache(*inputs, None, metadata, backend=backend)  # type: ignore[return-value]

        return run

    def problem(self, inputs: DecodeInputs) -> DecodeProblem:
        """The problem that the call poses."""
        return contract.decode(*inputs, None, (None, None, None), None)


@dataclass(frozen=True)
class PrefillCase:
    """P prompt tokens of B requests (P a multiple of 64), BF16; causal, or full with a random block layout.

    `density` is the share of the 64x64 blocks that the layout keeps, the same number in every block row.
    """

    name: str
    devices: tuple[str, ...]
    B: int
    Hq: int
    Hk: int
    P: int
    D: int
    Dv: int
    density: float | None = None
    dtype: torch.dtype = torch.bfloat16

    group = "prefill"

    @property
    def causal(self) -> bool:
        """Causal where no layout is given."""
        return self.density is None

    @property
    def kept(self) -> int:
        """Blocks that the layout keeps in a block row."""
        return max(1, round(self.P // BLOCK * (self.density or 1.0)))

    @property
    def flops(self) -> int:
        """Two GEMMs over the (query, key) pairs that are attended: the causal triangle, or the kept blocks."""
        pairs = self.P * (self.P + 1) // 2 if self.causal else self.P * self.kept * BLOCK
        return 2 * self.B * self.Hq * pairs * (self.D + self.Dv)

    @property
    def bytes(self) -> int:
        """q, k, v and out, once."""
        return self.B * (self.Hq + self.Hk) * self.P * (self.D + self.Dv) * self.dtype.itemsize

    def build(self, device: str) -> PrefillInputs:
        """Random tensors of this case, the same for the same name and device."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        q, k, v = (
            _normal(self.B, heads, self.P, width, generator=generator, dtype=self.dtype)
            for heads, width in ((self.Hq, self.D), (self.Hk, self.D), (self.Hk, self.Dv))
        )
        blocks = None
        if not self.causal:
            n = self.P // BLOCK
            order = torch.rand(n, n, generator=generator, device=device).argsort(1)
            blocks = torch.zeros(n, n, dtype=torch.bool, device=device).scatter_(1, order[:, : self.kept], True)
            blocks = blocks[None, None]
        return PrefillInputs(q, k, v, blocks)

    def call(self, inputs: PrefillInputs, backend: str | None = None) -> Callable[[], Tensor]:
        """The public function."""
        q, k, v, blocks = inputs
        layout = None if blocks is None else BlockSparseLayout(blocks)

        def run() -> Tensor:
            return flash_mla_prefill(q, k, v, layout, causal=self.causal, backend=backend)  # type: ignore[return-value]

        return run

    def problem(self, inputs: PrefillInputs) -> PrefillProblem:
        """The problem that the call poses."""
        q, k, v, blocks = inputs
        return contract.prefill(
            q, k, v, None, None, (None, None, None), None, causal=self.causal, block_mask=blocks is not None
        )


def _normal(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal values."""
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(generator=generator)


def _runs(B: int, used: int, blocks: int, device: str) -> Tensor:
    """[B, used]: one run of blocks a request, the runs spread evenly over the pool."""
    first = torch.arange(B, device=device) * (blocks // B)
    return first[:, None] + torch.arange(used, device=device)


# --- The cases --------------------------------------------------------------------------------------------------------

CPU, CUDA = ("cpu",), ("cuda",)


def _gqa(devices: tuple[str, ...], Hq: int, Hk: int, B: int, S: int, pool: Pool = "slab") -> DecodeCase:
    where = "" if pool == "slab" else f"-pool5-{pool}"
    return DecodeCase(f"decode/gqa-{Hq}x{Hk}-d128-b{B}-s{S}{where}", devices, B, Hq, Hk, S, 128, 128, pool=pool)


def _mla(devices: tuple[str, ...], Hq: int, B: int, S: int, S_q: int = 1) -> DecodeCase:
    rows = "" if S_q == 1 else f"-q{S_q}"
    return DecodeCase(f"decode/mla-{Hq}x576-b{B}-s{S}{rows}", devices, B, Hq, 1, S, 576, 512, S_q)


def _causal(devices: tuple[str, ...], H: int, P: int, D: int = 128, Dv: int = 128, B: int = 1) -> PrefillCase:
    width = f"d{D}" if Dv == D else f"d{D}x{Dv}"
    return PrefillCase(f"prefill/causal-{width}-h{H}-b{B}-{P}", devices, B, H, H, P, D, Dv)


def _sparse(devices: tuple[str, ...], H: int, P: int) -> PrefillCase:
    return PrefillCase(f"prefill/block-sparse-25-d128-h{H}-{P}", devices, 1, H, H, P, 128, 128, density=0.25)


CASES: tuple[DecodeCase | PrefillCase, ...] = (
    *(_gqa(CPU, 32, 8, B, S) for B in (1, 16) for S in (1024, 4096, 16384)),
    _gqa(CPU, 32, 8, 4, 4096),
    _gqa(CPU, 32, 8, 4, 4096, "consecutive"),
    _gqa(CPU, 32, 8, 4, 4096, "scattered"),
    *(_mla(CPU, 16, B, S) for B, S in ((1, 4096), (1, 16384), (16, 4096))),
    *(_mla(CPU, 128, B, S) for B, S in ((1, 4096), (1, 16384), (16, 4096))),
    *(_causal(CPU, 8, P) for P in (2048, 8192)),
    _sparse(CPU, 8, 4096),
    *(_gqa(CUDA, 32, 8, B, S) for B, S in ((1, 32768), (16, 4096), (64, 8192))),
    _gqa(CUDA, 64, 8, 128, 4096),
    *(_mla(CUDA, 128, B, S) for B, S in ((1, 32768), (64, 8192), (128, 4096), (128, 8192))),
    _mla(CUDA, 128, 128, 8192, 2),
    *(_mla(CUDA, 16, B, S) for B, S in ((1, 32768), (64, 8192), (128, 8192))),
    *(_causal(CUDA, 32, P, B=max(1, 16384 // P)) for P in (2048, 8192, 16384)),
    _causal(CUDA, 32, 8192, 192, 128),
    _sparse(CUDA, 32, 8192),
)
