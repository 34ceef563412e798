"""The cases of sparse attention and of its index: what `cases.Case` is for the reference's functions.

A case builds its own tensors, since a benchmark's pools are larger than any that `testing` fills with hostile rows.
Each query names distinct rows; they count once each, as they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla import deepseek, indexer
from flash_mla.bench.peers import Peer
from flash_mla.problem import BLOCK
from flash_mla.quant import FORMATS
from flash_mla.reference import format_rows, sparse_reference, topk_reference
from flash_mla.testing import Verdict, check

__all__ = ["SPARSE_CASES", "SparseCase", "TopkCase"]

D, DV = 576, 512
GATE_HEADS = 4
"""Heads of the last query token that are compared with float64."""


def sparse_out(*, backend: str | None = None, **arguments: Any) -> Tensor:
    """out of deepseek.flash_mla_with_kvcache."""
    return deepseek.flash_mla_with_kvcache(**arguments, backend=backend)[0]


@dataclass(frozen=True)
class SparseCase:
    """Decode over indices: B requests of S tokens, S_q queries each, that name topk rows of a pool.

    format: of the rows, or None for BF16.
    """

    B: int
    S_q: int
    Hq: int
    S: int
    topk: int
    format: str | None
    devices: tuple[str, ...]
    device: str = "cpu"
    backend: str | None = None

    group = "decode, sparse"

    @property
    def name(self) -> str:
        return f"decode/sparse-{self.format or 'bf16'}-h{self.Hq}-b{self.B}-q{self.S_q}-s{self.S}-topk{self.topk}"

    @property
    def dtype(self) -> str:
        return "BF16" if self.format is None else "FP8 rows"

    @property
    def flops(self) -> int:
        return 2 * self.B * self.S_q * self.Hq * self.topk * (D + DV)

    @property
    def bytes(self) -> int:
        """q and out, and for each query its rows and their indices."""
        row = 2 * D if self.format is None else FORMATS[self.format].row_bytes
        return self.B * self.S_q * (2 * self.Hq * (D + DV) + self.topk * (row + 4))

    def on(self, device: str, backend: str | None) -> SparseCase:
        return replace(self, device=device, backend=backend)

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        blocks = self.S // BLOCK
        rows = torch.randn(self.B * blocks, BLOCK, 1, D, generator=generator).bfloat16().to(self.device)
        named = [torch.randperm(self.S, generator=generator)[: self.topk] for _ in range(self.B * self.S_q)]
        indices = torch.stack(named).view(self.B, self.S_q, -1) + self.S * torch.arange(self.B)[:, None, None]
        return {
            "q": torch.randn(self.B, self.S_q, self.Hq, D, generator=generator).bfloat16().to(self.device),
            "k_cache": rows if self.format is None else FORMATS[self.format].quantise(rows),
            "block_table": None,
            "cache_seqlens": None,
            "head_dim_v": DV,
            "is_fp8_kvcache": self.format is not None,
            "indices": indices.int().to(self.device),
        }

    def function(self, arguments: dict[str, Any]) -> partial[Tensor]:
        return partial(sparse_out, **arguments, backend=self.backend)

    def rows(self, arguments: dict[str, Any]) -> Tensor:
        """The rows that the queries name, [B * S_q, topk, D] BF16: gathered, and then converted."""
        pool, indices = arguments["k_cache"].flatten(0, 1), arguments["indices"].flatten(0, 1).long()
        named = pool.view(torch.uint8)[indices.flatten()].view(pool.dtype)
        if self.format is not None:
            named = FORMATS[self.format].dequantise(named.unsqueeze(1)).squeeze(1)
        return named.view(*indices.shape, D)

    def gate(self, arguments: dict[str, Any]) -> Callable[[Tensor], Verdict]:
        """Judges the first heads of the last query token."""
        q = arguments["q"][-1:, -1:, :GATE_HEADS]
        pool = arguments["k_cache"].flatten(0, 1).unsqueeze(1)
        named = pool.view(torch.uint8)[arguments["indices"][-1, -1].long()].view(pool.dtype)
        order = torch.arange(self.topk, device=q.device).view(1, 1, -1)
        truth = sparse_reference(q, [(format_rows(named, self.format), order, None)], DV, D**-0.5)
        return lambda out: check(out[-1:, -1:, :GATE_HEADS].transpose(1, 2), None, truth[0], truth[1], torch.bfloat16)

    def peers(self, arguments: dict[str, Any]) -> dict[str, Peer]:
        def gathered() -> Tensor:
            k = self.rows(arguments).unsqueeze(1)
            q = arguments["q"].flatten(0, 1).unsqueeze(1)  # the heads are rows of the one KV head
            return F.scaled_dot_product_attention(q, k, k[..., :DV]).view(self.B, self.S_q, self.Hq, DV)

        return {"gather + SDPA": Peer(gathered)}


@dataclass(frozen=True)
class TopkCase:
    """The greatest topk of N scores in each row. A comparison is no FLOP: only bytes are counted."""

    rows: int
    N: int
    topk: int
    devices: tuple[str, ...]
    device: str = "cpu"
    backend: str | None = None

    group = "index"
    dtype = "FP32"
    flops = 0

    @property
    def name(self) -> str:
        return f"index/topk-r{self.rows}-n{self.N}-k{self.topk}"

    @property
    def bytes(self) -> int:
        return 4 * self.rows * (self.N + self.topk)

    def on(self, device: str, backend: str | None) -> TopkCase:
        return replace(self, device=device, backend=backend)

    def arguments(self) -> dict[str, Any]:
        scores = torch.randn(self.rows, self.N, generator=torch.Generator().manual_seed(0))
        return {"scores": scores.to(self.device), "topk": self.topk}

    def function(self, arguments: dict[str, Any]) -> partial[Tensor]:
        return partial(indexer.topk_indices, **arguments, backend=self.backend)

    def gate(self, arguments: dict[str, Any]) -> Callable[[Tensor], Verdict]:
        """The last row's columns are those of a sort; the order in which they come does not count."""
        truth = topk_reference(arguments["scores"][-1:], self.topk)[0]

        def judge(out: Tensor) -> Verdict:
            wrong = int((out[-1].sort().values != truth).sum())
            return Verdict(float(wrong), 0.0, 0.0, (f"{wrong} of {self.topk} columns differ",) if wrong else ())

        return judge

    def peers(self, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {"torch.topk": Peer(lambda: torch.topk(**select(arguments)).indices)}


def select(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for torch.topk, which need not sort."""
    return {"input": arguments["scores"], "k": arguments["topk"], "sorted": False}


CPU, CUDA = ("cpu",), ("cuda",)

SPARSE_CASES: tuple[SparseCase | TopkCase, ...] = (
    *(SparseCase(4, 1, Hq, 4096, 1024, format_name, CPU) for Hq in (16, 128) for format_name in ("fp8_ds_mla", None)),
    *(TopkCase(4, N, 2048, CPU) for N in (32768, 131072)),
    *(SparseCase(B, 2, 128, 32768, 2048, "fp8_ds_mla", CUDA) for B in (2, 64, 128)),
    *(SparseCase(B, 1, 16, 32768, 2048, "fp8_ds_mla", CUDA) for B in (1, 8, 128)),
    *(TopkCase(64, N, 2048, CUDA) for N in (32768, 131072)),
)
