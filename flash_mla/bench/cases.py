"""The shapes that are measured, and what a call must compute and move.

A case is named `<phase>/<shape>`; `testing` builds its tensors. Its FLOP model counts the two GEMMs over the keys that
a query may see; the upper triangle under causality and dropped blocks count nothing. Its byte model counts every byte
of q, of the cache rows that the lengths name, and of out, once: what an ideal kernel moves, not what a kernel or a peer
does move. A gathered copy, spare blocks and scores in memory are therefore never counted as work done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_mla.api import flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.problem import BLOCK, FP8
from flash_mla.testing import CacheLayout, DecodeCase, Order, PrefillCase

__all__ = ["CASES", "Case"]

Arguments = dict[str, Any]
"""The arguments of the public function by name, as testing's `call()` makes them."""


@dataclass(frozen=True)
class Case:
    """One call to measure, BF16, and where it is measured.

    density: for a prefill that is block-sparse instead of causal, the share of the 64x64 blocks that is kept, the same
    number in every block row, so that the FLOPs are known.
    """

    spec: DecodeCase | PrefillCase
    devices: tuple[str, ...]
    density: float | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def Dv(self) -> int:
        """The value head dimension."""
        return self.spec.Dv or self.spec.D

    @property
    def group(self) -> str:
        """The table that reports it."""
        if isinstance(self.spec, PrefillCase):
            return "prefill"
        return "decode, MLA" if self.spec.alias else "decode, GQA"

    @property
    def dtype(self) -> str:
        """The dtype's short name."""
        return {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32", FP8: "FP8"}[self.spec.dtype]

    @property
    def kept(self) -> int:
        """Blocks in a block row that a block-sparse prefill computes."""
        assert isinstance(self.spec, PrefillCase)
        assert self.density is not None
        return round(self.spec.P / BLOCK * self.density)

    @property
    def flops(self) -> int:
        """Two GEMMs over the (query, key) pairs that are attended.

        Decode: query i of S_q sees S - S_q + 1 + i keys. Prefill: the causal triangle, or the kept blocks.
        """
        spec = self.spec
        if isinstance(spec, DecodeCase):
            pairs = sum(spec.S_q * S - spec.S_q * (spec.S_q - 1) // 2 for S in spec.lengths)
        else:
            pairs = spec.B * (spec.P * (spec.P + 1) // 2 if self.density is None else spec.P * self.kept * BLOCK)
        return 2 * spec.Hq * pairs * (spec.D + self.Dv)

    @property
    def bytes(self) -> int:
        """q, K and V (the used cache rows; one row where V lies in K) and out, once."""
        spec = self.spec
        row = spec.D + self.Dv
        if isinstance(spec, DecodeCase):
            queries, keys, cache_row = len(spec.lengths) * spec.S_q, sum(spec.lengths), spec.D if spec.alias else row
        else:
            queries, keys, cache_row = spec.B * spec.P, spec.B * spec.P, row
        return (spec.Hq * queries * row + spec.Hk * keys * cache_row) * spec.dtype.itemsize

    def on(self, device: str, backend: str | None) -> Case:
        """The same case on that device and backend."""
        return replace(self, spec=replace(self.spec, device=device, backend=backend))

    def arguments(self) -> Arguments:
        """The tensors of the call, the same for every run."""
        arguments = self.spec.call().arguments
        if isinstance(self.spec, DecodeCase) and self.spec.alias:
            arguments["softmax_scale"] = self.spec.D**-0.5  # meant: the reference and the peers take it too
        if isinstance(self.spec, PrefillCase) and self.density is not None:
            n = self.spec.P // BLOCK
            order = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).argsort(1)
            blocks = torch.zeros(n, n, dtype=torch.bool).scatter_(1, order[:, : self.kept], True)
            arguments["sparse_layout"] = blocks[None, None].to(self.spec.device)
        return arguments

    def function(self, arguments: Arguments) -> partial[Tensor]:
        """The call: the public function, for decode with metadata made beforehand, as a layer calls it."""
        if isinstance(self.spec, PrefillCase):
            return partial(flash_mla_prefill, **arguments, backend=self.spec.backend)
        x = arguments
        metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"])
        return partial(flash_mla_with_kvcache, **x, metadata=metadata, backend=self.spec.backend)


# --- The cases --------------------------------------------------------------------------------------------------------

CPU, CUDA = ("cpu",), ("cuda",)


def _gqa(
    devices: tuple[str, ...], Hq: int, Hk: int, B: int, S: int, layout: CacheLayout = "slab", order: Order = "shuffled"
) -> Case:
    """A slab a request, used to the full; or a pool of 20 times a request's blocks, scattered or consecutive."""
    name, spare = f"decode/gqa-{Hq}x{Hk}-d128-b{B}-s{S}", 0
    if layout == "pool":
        name += f"-pool5-{'consecutive' if order == 'ordered' else 'scattered'}"
        spare = (20 - B) * (S // BLOCK)
    return Case(DecodeCase(name, (S,) * B, Hq, Hk, 128, layout=layout, order=order, spare=spare), devices)


def _mla(devices: tuple[str, ...], Hq: int, B: int, S: int, S_q: int = 1) -> Case:
    name = f"decode/mla-{Hq}x576-b{B}-s{S}" + ("" if S_q == 1 else f"-q{S_q}")
    return Case(DecodeCase(name, (S,) * B, Hq, 1, 576, 512, S_q, alias=True, spare=0), devices)


def _causal(devices: tuple[str, ...], H: int, P: int, D: int = 128, Dv: int = 128, B: int = 1) -> Case:
    width = f"d{D}" if Dv == D else f"d{D}x{Dv}"
    return Case(
        PrefillCase(f"prefill/causal-{width}-h{H}-b{B}-{P}", P, B, Hq=H, Hk=H, D=D, Dv=Dv, causal=True), devices
    )


def _sparse(devices: tuple[str, ...], H: int, P: int) -> Case:
    spec = PrefillCase(f"prefill/block-sparse-25-d128-h{H}-{P}", P, 1, Hq=H, Hk=H, D=128, causal=False)
    return Case(spec, devices, density=0.25)


CASES: tuple[Case, ...] = (
    *(_gqa(CPU, 32, 8, B, S) for B in (1, 16) for S in (1024, 4096, 16384)),
    _gqa(CPU, 32, 8, 4, 4096, "pool", "ordered"),
    _gqa(CPU, 32, 8, 4, 4096, "pool", "shuffled"),
    *(_mla(CPU, Hq, B, S) for Hq in (16, 128) for B, S in ((1, 4096), (1, 16384), (16, 4096))),
    *(_causal(CPU, 8, P) for P in (2048, 8192)),
    _sparse(CPU, 8, 4096),
    *(_gqa(CUDA, 32, 8, B, S) for B, S in ((1, 32768), (32, 4096), (64, 8192))),
    _gqa(CUDA, 64, 8, 128, 4096),
    *(_mla(CUDA, 128, B, S) for B, S in ((1, 32768), (64, 8192), (128, 4096), (128, 8192))),
    _mla(CUDA, 128, 128, 8192, 2),
    *(_mla(CUDA, 16, B, S) for B, S in ((1, 32768), (64, 8192), (128, 8192))),
    *(_causal(CUDA, 32, P, B=max(1, 16384 // P)) for P in (2048, 8192, 16384)),
    _causal(CUDA, 32, 8192, 192, 128),
    _sparse(CUDA, 32, 8192),
)
