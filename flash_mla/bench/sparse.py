"""The cases of sparse attention and of its index: what `cases.Case` is for the reference's functions.

A case builds its own tensors, since a benchmark's pools are larger than any that `testing` fills with hostile rows.
Each query names distinct rows; they count once each, as they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla import deepseek, indexer
from flash_mla.bench.peers import Peer
from flash_mla.problem import BLOCK, FP8
from flash_mla.quant import FORMATS
from flash_mla.reference import format_rows, index_reference, sparse_reference, topk_reference
from flash_mla.testing import Verdict, check
from flash_mla.testing.index_cases import SCORE_BUDGET

__all__ = ["SPARSE_CASES", "IndexBench", "SparseDecodeBench", "SparsePrefillBench", "TopkBench"]

D, DV = 576, 512
GATE_HEADS = 4
"""Heads of the last query token that are compared with float64."""
PEER_TOKENS = 64
"""Tokens of a sparse prefill whose rows the peer gathers at a time: 150 MB with topk 2048."""
INDEX_D = indexer.INDEX_ROWS.head_dim
MATMUL = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""The dtype in which torch multiplies index queries and keys: it has no product of e4m3 that gives FP32 here."""


def sparse_out(*, backend: str | None = None, **arguments: Any) -> Tensor:
    """out of deepseek.flash_mla_with_kvcache."""
    return deepseek.flash_mla_with_kvcache(**arguments, backend=backend)[0]


def sparse_prefill_out(*, backend: str | None = None, **arguments: Any) -> Tensor:
    """out of deepseek.flash_mla_sparse_fwd."""
    return deepseek.flash_mla_sparse_fwd(**arguments, backend=backend)[0]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a case runs: on this device, by this backend."""

    device: str = "cpu"
    backend: str | None = None

    def on(self, device: str, backend: str | None) -> Self:
        """The same case on that device and backend."""
        return replace(self, device=device, backend=backend)


@dataclass(frozen=True)
class SparseDecodeBench(Placed):
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
class SparsePrefillBench(Placed):
    """Prefill over indices: s_q tokens that name topk of s_kv BF16 rows each."""

    s_q: int
    Hq: int
    s_kv: int
    topk: int
    devices: tuple[str, ...]

    group = "prefill, sparse"
    dtype = "BF16"

    @property
    def name(self) -> str:
        return f"prefill/sparse-h{self.Hq}-q{self.s_q}-s{self.s_kv}-topk{self.topk}"

    @property
    def flops(self) -> int:
        return 2 * self.s_q * self.Hq * self.topk * (D + DV)

    @property
    def bytes(self) -> int:
        """q, out and, for each token, its rows and their indices; rows that tokens share may be read once."""
        return 2 * self.s_q * self.Hq * (D + DV) + 2 * self.s_kv * D + 4 * self.s_q * self.topk

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        named = [torch.randperm(self.s_kv, generator=generator)[: self.topk] for _ in range(self.s_q)]
        return {
            "q": torch.randn(self.s_q, self.Hq, D, generator=generator).bfloat16().to(self.device),
            "kv": torch.randn(self.s_kv, 1, D, generator=generator).bfloat16().to(self.device),
            "indices": torch.stack(named).unsqueeze(1).int().to(self.device),
            "sm_scale": D**-0.5,
        }

    def function(self, arguments: dict[str, Any]) -> partial[Tensor]:
        return partial(sparse_prefill_out, **arguments, backend=self.backend)

    def gate(self, arguments: dict[str, Any]) -> Callable[[Tensor], Verdict]:
        """Judges the first heads of the last token."""
        q = arguments["q"][-1:, :GATE_HEADS].unsqueeze(1)
        pool = (arguments["kv"][:, 0].double(), arguments["indices"][-1:], None)
        truth = sparse_reference(q, [pool], DV, arguments["sm_scale"])
        return lambda out: check(out[-1:, :GATE_HEADS].unsqueeze(2), None, truth[0], truth[1], torch.bfloat16)

    def peers(self, arguments: dict[str, Any]) -> dict[str, Peer]:
        def gathered() -> Tensor:
            tiles = zip(arguments["q"].split(PEER_TOKENS), arguments["indices"].split(PEER_TOKENS), strict=True)
            return torch.cat([self.tile(q, arguments["kv"], indices) for q, indices in tiles])

        return {"gather + SDPA": Peer(gathered)}

    @staticmethod
    def tile(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        """The out of a few tokens: their rows gathered, whose memory is what bounds the tile."""
        k = kv[indices[:, 0].long(), 0].unsqueeze(1)
        return F.scaled_dot_product_attention(q.unsqueeze(1), k, k[..., :DV]).squeeze(1)


@dataclass(frozen=True)
class IndexBench(Placed):
    """Index scores of s_q queries of H heads against s_kv e4m3 keys, all seen; D 128, as DeepSeek-V3.2 has them."""

    s_q: int
    H: int
    s_kv: int
    devices: tuple[str, ...]

    group = "index"
    dtype = "FP8"

    @property
    def name(self) -> str:
        return f"index/scores-h{self.H}-q{self.s_q}-s{self.s_kv}"

    @property
    def flops(self) -> int:
        return 2 * self.s_q * self.H * self.s_kv * INDEX_D

    @property
    def bytes(self) -> int:
        """Queries and weights, keys and scales, scores."""
        return self.s_q * self.H * (INDEX_D + 4) + self.s_kv * (INDEX_D + 4) + 4 * self.s_q * self.s_kv

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        q, k, scale, weights = (
            torch.randn(shape, generator=generator).to(self.device)
            for shape in ((self.s_q, self.H, INDEX_D), (self.s_kv, INDEX_D), (self.s_kv,), (self.s_q, self.H))
        )
        starts = torch.zeros(self.s_q, dtype=torch.int32, device=self.device)
        ends = torch.full_like(starts, self.s_kv)
        return {"q": q.to(FP8), "kv": (k.to(FP8), scale.abs()), "weights": weights, "starts": starts, "ends": ends}

    def function(self, arguments: dict[str, Any]) -> partial[Tensor]:
        return partial(indexer.mqa_logits, **arguments, backend=self.backend)

    def gate(self, arguments: dict[str, Any]) -> Callable[[Tensor], Verdict]:
        """Judges the scores of the last query, by the budget of `flash-mla check`."""
        x = arguments
        last = [x[name][-1:] for name in ("q", "weights", "starts", "ends")]
        truth = index_reference(last[0], *x["kv"], *last[1:])

        def judge(out: Tensor) -> Verdict:
            error = float((out[-1:].double() - truth).abs().max() / truth.abs().max())
            return Verdict(error, 0.0, 0.0, () if error <= SCORE_BUDGET else (f"scores: error {error:.1e}",))

        return judge

    def peers(self, arguments: dict[str, Any]) -> dict[str, Peer]:
        x = arguments
        k = (x["kv"][0].float() * x["kv"][1][:, None]).to(MATMUL[self.device.split(":")[0]])

        def matmul() -> Tensor:
            rows = zip(x["q"].to(k.dtype), x["weights"], strict=True)
            return torch.stack([w @ (q @ k.T).relu().float() for q, w in rows])

        return {"torch, a query at a time": Peer(matmul, gated=False)}


@dataclass(frozen=True)
class TopkBench(Placed):
    """The greatest topk of N scores in each row. A comparison is no FLOP: only bytes are counted."""

    rows: int
    N: int
    topk: int
    devices: tuple[str, ...]

    group = "index"
    dtype = "FP32"
    flops = 0

    @property
    def name(self) -> str:
        return f"index/topk-r{self.rows}-n{self.N}-k{self.topk}"

    @property
    def bytes(self) -> int:
        return 4 * self.rows * (self.N + self.topk)

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

SparseBench = SparseDecodeBench | SparsePrefillBench | IndexBench | TopkBench

SPARSE_CASES: tuple[SparseBench, ...] = (
    *(
        SparseDecodeBench(4, 1, Hq, 4096, 1024, format_name, CPU)
        for Hq in (16, 128)
        for format_name in ("fp8_ds_mla", None)
    ),
    SparsePrefillBench(16, 16, 4096, 1024, CPU),
    IndexBench(64, 64, 4096, CPU),
    *(TopkBench(4, N, 2048, CPU) for N in (32768, 131072)),
    *(SparseDecodeBench(B, 2, 128, 32768, 2048, "fp8_ds_mla", CUDA) for B in (2, 64, 128)),
    *(SparseDecodeBench(B, 1, 16, 32768, 2048, "fp8_ds_mla", CUDA) for B in (1, 8, 128)),
    *(SparsePrefillBench(4096, Hq, 32768, 2048, CUDA) for Hq in (16, 64, 128)),
    IndexBench(4096, 64, 32768, CUDA),
    *(TopkBench(64, N, 2048, CUDA) for N in (32768, 131072)),
)
