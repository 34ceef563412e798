"""Calls of flash_mla.indexer, and the list of them: scores against float64, indices against a sort of the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_mla import indexer
from flash_mla.problem import FP8
from flash_mla.reference import index_reference, topk_reference
from flash_mla.testing.budget import Verdict, worst
from flash_mla.testing.hostile import FP8_NAN, UNUSED_ENTRY, Source, same_bits

SCORE_BUDGET = 1e-3
"""Of the greatest |score|: Hopper's FP8 products accumulate in about 14 bits (2e-4 measured); elsewhere 1e-6 is met."""


@dataclass(frozen=True)
class RaggedIndexCase:
    """mqa_logits and prefill_indices. Queries see all, one, none or some of S_kv keys; bounds may lie outside."""

    name: str
    S_q: int = 40
    S_kv: int = 300
    H: int = 64
    D: int = 128
    topk: int = 64
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "indexer.prefill_indices"
    dtype = FP8

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scores, the truth, indices, those of an exact sort of the scores), rows of queries."""
        source = Source(self.seed, self.device)
        q, k = source.normal((self.S_q, self.H, self.D), FP8), source.normal((self.S_kv, self.D), FP8)
        scales, weights = (
            source.normal((self.S_kv,), torch.float32).abs(),
            source.normal((self.S_q, self.H), torch.float32),
        )
        bounds = torch.randint(-9, self.S_kv + 9, (2, self.S_q), generator=source.generator)
        edges = torch.tensor([(0, self.S_kv), (0, 1), (7, 7), (self.S_kv, UNUSED_ENTRY), (9, 3)]).T[:, : self.S_q]
        bounds[:, : edges.shape[1]] = edges
        starts, ends = bounds.int().to(self.device)
        call = (q, (k, scales), weights, starts, ends)
        scores = indexer.mqa_logits(*call, backend=self.backend)
        chosen = indexer.prefill_indices(*call, self.topk, backend=self.backend)[:, 0]
        return scores, index_reference(q, k, scales, weights, starts, ends), chosen, topk_reference(scores, self.topk)


@dataclass(frozen=True)
class PagedIndexCase:
    """paged_mqa_logits and decode_indices; NaN in rows that hold no key, 2^31-1 in unused entries of the table."""

    name: str
    lengths: tuple[int, ...] = (300, 0, 1, 64, 65)
    S_q: int = 1
    H: int = 64
    page: int = 64
    topk: int = 64
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "indexer.decode_indices"
    dtype = FP8

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As RaggedIndexCase's, rows of requests and their queries."""
        source = Source(self.seed, self.device)
        B, D = len(self.lengths), indexer.INDEX_ROWS.head_dim
        counts = [-(-n // self.page) for n in self.lengths]
        cache = indexer.INDEX_ROWS.empty(sum(counts) + 1, self.page, self.device)
        cache.view(torch.uint8).fill_(FP8_NAN)
        parts = indexer.INDEX_ROWS.parts(cache)
        codes, scales = parts.codes.view(FP8), parts.scales.view(torch.float32)
        scales.fill_(math.nan)
        table = torch.full((B, max(counts) + 1), UNUSED_ENTRY, dtype=torch.int32)
        free = source.permutation(sum(counts) + 1).int()
        q = source.normal((B, self.S_q, self.H, D), FP8)
        weights = source.normal((B, self.S_q, self.H), torch.float32)
        truth = torch.full(
            (B, self.S_q, table.shape[1] * self.page), -math.inf, dtype=torch.float64, device=self.device
        )
        for b, n in enumerate(self.lengths):
            table[b, : counts[b]], free = free[: counts[b]], free[counts[b] :]
            k, scale = source.normal((n, D), FP8), source.normal((n,), torch.float32).abs()
            t = torch.arange(n)
            place = tuple(x.to(self.device) for x in (table[b, t // self.page].long(), t % self.page))
            codes.view(torch.uint8)[place], scales[place] = k.view(torch.uint8), scale[:, None]
            ends = n - self.S_q + 1 + torch.arange(self.S_q, device=self.device)
            truth[b, :, :n] = index_reference(q[b], k, scale, weights[b], torch.zeros_like(ends), ends)
        call = (q, cache, weights, torch.tensor(self.lengths, device=self.device), table.to(self.device))
        scores = indexer.paged_mqa_logits(*call, backend=self.backend)
        chosen = indexer.decode_indices(*call, self.topk, backend=self.backend)
        expected = topk_reference(scores.flatten(0, 1), self.topk).view_as(chosen)
        block = table.to(self.device).gather(1, expected.clamp_min(0).flatten(1).long() // self.page).view_as(expected)
        rows = torch.where(expected < 0, expected, block * self.page + expected % self.page)
        return scores, truth, chosen, rows


@dataclass(frozen=True)
class TopkCase:
    """topk_indices of rows of few values, of one value, with infinities and NaN, and of normal numbers."""

    name: str
    N: int
    topk: int
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "indexer.topk_indices"
    dtype = torch.float32

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As RaggedIndexCase's; the scores are given."""
        source = Source(self.seed, self.device)
        x = source.normal((8, self.N), torch.float32)
        x[1] = (x[1] * 2).round()
        x[2] = 1.5
        x[3] = torch.where(x[3] > 0, 0.0, -0.0)
        x[4] = torch.where(x[4] > 0.5, math.inf, x[4])
        x[5] = torch.where(x[5] > -1.0, -math.inf, x[5])
        x[6] = torch.where(x[6] > 0.0, math.nan, x[6])
        chosen = indexer.topk_indices(x, self.topk, backend=self.backend)
        return x, x, chosen, topk_reference(x, self.topk)


IndexCase = RaggedIndexCase | PagedIndexCase | TopkCase


def judge(case: IndexCase) -> tuple[Verdict, list[str]]:
    """(the verdict, failures): scores within budget and -inf where unseen, indices exact, a second call the same."""
    scores, truth, chosen, expected = case.run()
    failures = []
    if not all(same_bits(a, b) for a, b in zip((scores, chosen), case.run()[::2], strict=True)):
        failures.append("a second call differs in bits")
    if not torch.equal(chosen, expected):
        failures.append(f"indices: {int((chosen != expected).sum())} of {chosen.numel()} differ from an exact sort's")
    if isinstance(case, TopkCase):
        return Verdict(0.0, 0.0, 0.0, tuple(failures)), failures
    seen = truth > -math.inf
    if (scores[~seen] != -math.inf).any():
        failures.append("scores: not -inf where a query does not see a key")
    m = (truth[seen].abs().max().item() if seen.any() else 0.0) or 1.0
    difference = (scores.double() - truth).masked_fill(~seen, 0.0).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    error = difference.max().item() / m if difference.numel() else 0.0
    if error > SCORE_BUDGET:
        failures.append(f"scores: error {error:.1e} of m = {m:.2g}, {worst(difference, scores, truth)}")
    return Verdict(error, 0.0, 0.0, tuple(failures)), failures


# --- The list ---------------------------------------------------------------------------------------------------------


def index_cases() -> list[IndexCase]:
    return [
        RaggedIndexCase("index/ragged"),
        RaggedIndexCase("index/ragged-long", S_q=9, S_kv=5000, topk=512),
        RaggedIndexCase("index/ragged-one", S_q=1, S_kv=4500, topk=2048),
        RaggedIndexCase("index/ragged-heads-3", H=3, D=32),
        RaggedIndexCase("index/ragged-heads-128", S_q=7, H=128, D=144),
        RaggedIndexCase("index/ragged-narrow", H=20, D=16, topk=400),
        PagedIndexCase("index/paged"),
        PagedIndexCase("index/paged-queries-2", S_q=2, H=32),
        PagedIndexCase("index/paged-queries-5", (700, 3), S_q=5, H=5),
        PagedIndexCase("index/paged-long", (5000, 4095, 1), topk=2048),
        PagedIndexCase("index/paged-pages-192", (650, 193), page=192),
        TopkCase("index/topk-short", 300, 512),
        TopkCase("index/topk", 5000, 512),
        TopkCase("index/topk-long", 40001, 2048),
    ]
