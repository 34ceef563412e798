"""The index of DSA against float64, on the CPU and, under TRITON_INTERPRET=1, through the Triton kernels."""

from __future__ import annotations

import math
import os

import pytest
import torch
from test_deepseek import assert_close, generator, randn

from flash_mla import deepseek
from flash_mla.errors import (
    BlockCountError,
    DeviceError,
    DTypeError,
    LayoutError,
    ShapeError,
)
from flash_mla.indexer import (
    INDEX_ROWS,
    decode_indices,
    mqa_logits,
    paged_mqa_logits,
    prefill_indices,
    topk_indices,
)
from flash_mla.quant import FP8_DS_MLA
from flash_mla.reference import attend_head, format_rows, index_reference, topk_reference

FP8 = torch.float8_e4m3fn
BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
FAR = 2**40
UNUSED = 2**31 - 1


def ragged_case(S_q, S_kv, H, D, seed=0, index_dtype=torch.int32):
    """q, (k, scales), weights, starts, ends: rows that see all, some, one and no key, and bounds past both ends."""
    g = generator(seed)
    q = randn(S_q, H, D, g=g, dtype=torch.float32).to(FP8)
    k = (2 * randn(S_kv, D, g=g, dtype=torch.float32)).to(FP8)
    scale = torch.rand(S_kv, generator=g) + 0.1
    weights = randn(S_q, H, g=g, dtype=torch.float32)
    starts = torch.randint(-5, S_kv + 5, (S_q,), generator=g)
    ends = torch.randint(-5, S_kv + 5, (S_q,), generator=g)
    far = FAR if index_dtype == torch.int64 else UNUSED
    edges = [(0, S_kv), (0, 1), (7, 7), (S_kv - 1, far), (-far, far), (far, far), (9, 3)][:S_q]
    starts[: len(edges)], ends[: len(edges)] = torch.tensor(edges).T
    return q, (k, scale), weights, starts.to(index_dtype), ends.to(index_dtype)


def paged_case(lengths, S_q, H, page=64, seed=0, spare=2):
    """q, k_cache, weights, context_lens, block_table; NaN in unused rows, 2^31-1 in unused entries."""
    g = generator(seed)
    B = len(lengths)
    counts = [-(-n // page) for n in lengths]
    blocks = sum(counts) + spare
    cache = INDEX_ROWS.empty(blocks, page)
    cache.view(torch.uint8).fill_(0x7F)
    INDEX_ROWS.parts(cache).scales.view(torch.float32).fill_(math.nan)
    table = torch.full((B, max(counts, default=0) + 1), UNUSED, dtype=torch.int32)
    free = torch.randperm(blocks, generator=g).int()
    for b, n in enumerate(lengths):
        table[b, : counts[b]], free = free[: counts[b]], free[counts[b] :]
        t = torch.arange(n)
        slots = table[b, t // page].long() * page + t % page
        INDEX_ROWS.append(cache, slots, randn(n, 128, g=g), torch.empty(n, 0, dtype=torch.bfloat16))
    q = randn(B, S_q, H, 128, g=g, dtype=torch.float32).to(FP8)
    weights = randn(B, S_q, H, g=g, dtype=torch.float32)
    return q, cache, weights, torch.tensor(lengths, dtype=torch.int32), table


def unpaged(cache, table_row, n):
    """(k [n, 128], scales [n]) of a request."""
    page = cache.shape[1]
    parts = INDEX_ROWS.parts(cache)
    t = torch.arange(n)
    block, slot = table_row[t // page].long(), t % page
    return parts.codes.view(FP8)[block, slot], parts.scales.view(torch.float32)[block, slot, 0]


def paged_reference(q, cache, weights, limits, table):
    """Scores [S_q, limit] of each request and query."""
    for b in range(q.shape[0]):
        n = max(0, int(limits[b].max()))
        k, scale = unpaged(cache, table[b], n)
        yield index_reference(q[b], k, scale, weights[b], torch.zeros(q.shape[1]), limits[b])


def assert_scores(scores, expected):
    """What a query does not see is -inf; the rest is right to 1e-5 of the greatest (the sums are FP32)."""
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape
    seen = expected > -math.inf
    assert (scores[~seen] == -math.inf).all()
    if seen.any():
        error = (scores.double() - expected)[seen].abs().max()
        assert error <= 1e-5 * expected[seen].abs().max()


# --- Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("S_q", "S_kv", "H", "D"),
    [(9, 300, 64, 128), (7, 70, 32, 64), (8, 129, 3, 32), (1, 64, 1, 16), (7, 33, 20, 144), (3, 500, 128, 128)],
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_ragged_scores(S_q, S_kv, H, D, index_dtype):
    case = ragged_case(S_q, S_kv, H, D, index_dtype=index_dtype)
    q, kv, weights, starts, ends = case
    scores = mqa_logits(*case, backend=BACKEND)
    assert scores.stride(0) % 64 == 0
    expected = index_reference(q, *kv, weights, starts, ends)
    assert_scores(scores, expected)
    unclean = mqa_logits(*case, clean_logits=False, backend=BACKEND)
    seen = expected > -math.inf
    assert torch.equal(unclean[seen], scores[seen])


def test_ragged_strides():
    """q and weights sliced out of wider tensors, bounds that are views."""
    q, (k, scale), weights, starts, ends = ragged_case(8, 100, 8, 64)
    wide = torch.zeros(8, 10, 80, dtype=torch.uint8).view(FP8)
    wide[:, 1:9, 16:] = q
    bounds = torch.stack([starts, ends], 1)
    keys = torch.zeros(100, 2, 64, dtype=torch.uint8).view(FP8)
    keys[:, 0] = k
    pair = torch.stack([scale, scale], 1)
    scores = mqa_logits(
        wide[:, 1:9, 16:],
        (keys[:, 0], pair[:, 1]),
        weights.T.contiguous().T,
        bounds[:, 0],
        bounds[:, 1],
        backend=BACKEND,
    )
    assert torch.equal(scores, mqa_logits(q, (k, scale), weights, starts, ends, backend=BACKEND))


@pytest.mark.parametrize(
    ("lengths", "S_q", "H", "page"),
    [((300, 0, 1, 64, 65), 1, 64, 64), ((130, 3, 0), 4, 8, 64), ((400, 129), 2, 32, 128), ((257,), 3, 5, 64)],
)
def test_paged_scores(lengths, S_q, H, page):
    q, cache, weights, context_lens, table = paged_case(lengths, S_q, H, page)
    scores = paged_mqa_logits(q, cache, weights, context_lens, table, backend=BACKEND)
    assert scores.shape == (len(lengths), S_q, table.shape[1] * page)
    limits = context_lens[:, None] - S_q + 1 + torch.arange(S_q)
    for b, expected in enumerate(paged_reference(q, cache, weights, limits, table)):
        n = expected.shape[1]
        assert_scores(scores[b, :, :n], expected)
        assert (scores[b, :, n:] == -math.inf).all()
    # a limit for each query, weights as DeepGEMM has them, fewer columns
    n = max(lengths) // 2
    short = paged_mqa_logits(q, cache, weights.flatten(0, 1), limits, table, n, backend=BACKEND)
    torch.testing.assert_close(short, scores[..., :n], rtol=1e-5, atol=1e-4)


def test_paged_scores_of_padded_pages():
    """Pages at a pitch of their own, as a hybrid allocator lays them."""
    q, cache, weights, context_lens, table = paged_case((300, 70), 1, 16)
    memory = torch.full((cache.shape[0], 9216), 0x7F, dtype=torch.uint8)
    memory[:, : 64 * 132] = cache.view(torch.uint8).flatten(1)
    padded = memory[:, : 64 * 132].unflatten(1, (64, 1, 132))
    scores = paged_mqa_logits(q, padded, weights, context_lens, table, backend=BACKEND)
    assert torch.equal(scores, paged_mqa_logits(q, cache, weights, context_lens, table, backend=BACKEND))


def test_hostile_block_ids():
    """A used entry of any value reads inside the cache."""
    q, cache, weights, context_lens, table = paged_case((300, 70), 1, 16)
    cache.view(torch.uint8).fill_(0x38)
    INDEX_ROWS.parts(cache).scales.view(torch.float32).fill_(1.0)
    hostile = table.long()
    hostile[0, :4] = torch.tensor([-1, FAR, -FAR, cache.shape[0]])
    scores = paged_mqa_logits(q, cache, weights, context_lens, hostile, backend=BACKEND)
    assert scores[0, 0, :300].isfinite().all()


# --- Top-k ------------------------------------------------------------------------------------------------------------


def hostile_scores(rows, N, seed=0):
    """Normal numbers, few values with many ties, all equal, signed zeros, infinities, NaN, tiny and huge numbers."""
    g = generator(seed)
    scores = torch.randn(rows, N, generator=g)
    kinds = [
        lambda row: row,
        lambda row: (row * 2).round(),
        lambda row: torch.full_like(row, 1.5),
        lambda row: torch.where(row > 0, 0.0, -0.0),
        lambda row: torch.where(row > 0.5, math.inf, row),
        lambda row: torch.where(row > -1.0, -math.inf, row),
        lambda row: torch.where(row > 0.0, math.nan, row),
        lambda row: row * 1e-40,
        lambda row: torch.where(row > 1.0, 3e38, -3e38),
        lambda row: torch.full_like(row, -math.inf),
        lambda row: torch.full_like(row, math.nan),
        lambda row: -row.abs(),
        lambda row: torch.arange(len(row), dtype=torch.float32),
        lambda row: -torch.arange(len(row), dtype=torch.float32),
    ]
    return torch.stack([kinds[i % len(kinds)](row) for i, row in enumerate(scores)])


@pytest.mark.parametrize(
    ("N", "topk"), [(64, 16), (300, 64), (1000, 100), (1024, 1), (700, 700), (50, 512), (2048, 100)]
)
def test_topk(N, topk):
    scores = hostile_scores(14, N)
    assert torch.equal(topk_indices(scores, topk, backend=BACKEND), topk_reference(scores, topk))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_topk_of_short_rows(index_dtype):
    N, topk = 700, 50
    scores = hostile_scores(28, N, seed=1)
    g = generator(2)
    starts = torch.randint(-9, N + 9, (28,), generator=g)
    ends = starts + torch.randint(-9, N, (28,), generator=g)
    far = FAR if index_dtype == torch.int64 else UNUSED
    starts[:3], ends[:3] = torch.tensor([-far, 0, far]), torch.tensor([far, -far, far])
    starts, ends = torch.stack([starts, ends], 1).to(index_dtype).T  # strided views
    t = torch.arange(N)
    seen = scores.masked_fill((t < starts[:, None]) | (t >= ends[:, None]), -math.inf)
    chosen = topk_indices(scores, topk, starts, ends, backend=BACKEND)
    assert torch.equal(chosen, topk_reference(seen, topk))


def test_topk_of_few_rows():
    """So few that several programs mark the scores of one row."""
    N, topk = 1500, 100
    scores = hostile_scores(14, N, seed=3)
    starts = torch.tensor([0, 5, 600, 511, 512, 40, 0, 0, 1499, 1000, 1024, 0, 31, 33])
    ends = torch.tensor([N, N, N, 1499, 1029, 1500, 513, 0, 1500, 900, 1024, 1200, 1400, 1057])
    t = torch.arange(N)
    seen = scores.masked_fill((t < starts[:, None]) | (t >= ends[:, None]), -math.inf)
    for rows in torch.arange(14).split(3):
        chosen = topk_indices(scores[rows], topk, starts[rows], ends[rows], backend=BACKEND)
        assert torch.equal(chosen, topk_reference(seen[rows], topk))


@pytest.mark.parametrize("page", [64, 16])
def test_topk_as_rows_of_a_pool(page):
    """Through a block table, as pool_indices maps positions."""
    B, S_q, N, topk = 3, 2, 320, 40
    scores = torch.randn(B * S_q, N, generator=generator(3))
    ends = torch.tensor([320, 319, 0, 1, 30, 64])
    table = torch.randperm(B * N // page, generator=generator(4)).int().view(B, -1)
    positions = topk_indices(scores, topk, None, ends, backend=BACKEND)
    expected = deepseek.pool_indices(positions.view(B, S_q, topk), table, page)
    rows = topk_indices(scores, topk, None, ends, block_table=table, page=page, backend=BACKEND)
    assert torch.equal(rows.view(B, S_q, topk), expected)


def test_topk_of_a_slice():
    """Rows of a wider tensor, at an odd distance."""
    scores = torch.randn(5, 333, generator=generator(5))
    part = scores[1:, 7:300]
    assert torch.equal(topk_indices(part, 20, backend=BACKEND), topk_reference(part, 20))


# --- From queries to indices ------------------------------------------------------------------------------------------


def test_indices_are_those_of_the_two_steps(monkeypatch):
    case = ragged_case(9, 300, 16, 64)
    expected = topk_indices(mqa_logits(*case, backend=BACKEND), 40, *case[3:], backend=BACKEND)
    assert torch.equal(prefill_indices(*case, 40, backend=BACKEND).squeeze(1), expected)
    monkeypatch.setattr("flash_mla.indexer.SCORE_BYTES", 4 * 300 * 2)  # in slices of two queries
    assert torch.equal(prefill_indices(*case, 40, backend=BACKEND).squeeze(1), expected)


@pytest.mark.parametrize("lengths", [(300, 0, 1, 64, 65), (130, 70)])
def test_decode_indices(lengths):
    """The rows named are those that the reference picks, but where two scores differ by less than rounding."""
    S_q, topk = 2, 40
    q, cache, weights, context_lens, table = paged_case(lengths, S_q, 16)
    chosen = decode_indices(q, cache, weights, context_lens, table, topk, backend=BACKEND)
    scores = paged_mqa_logits(q, cache, weights, context_lens, table, backend=BACKEND)
    positions = topk_reference(scores.flatten(0, 1), topk).view(len(lengths), S_q, topk)
    assert torch.equal(chosen, deepseek.pool_indices(positions, table))
    short = decode_indices(q, cache, weights, context_lens, table, topk, max_context_len=100, backend=BACKEND)
    positions = topk_reference(scores[..., :100].flatten(0, 1), topk).view_as(positions)
    assert torch.equal(short, deepseek.pool_indices(positions, table))


# --- A DSA layer ------------------------------------------------------------------------------------------------------


def test_dsa_decode_layer():
    """Index, select, attend over FP8 caches, beside dense attention masked to the same tokens in float64."""
    lengths, S_q, topk, H = (300, 20, 129), 2, 64, 16
    index_q, index_cache, weights, context_lens, table = paged_case(lengths, S_q, 64, seed=1)
    g = generator(2)
    latents = FP8_DS_MLA.quantise(randn(index_cache.shape[0], 64, 1, 576, g=g))
    q = randn(len(lengths), S_q, H, 576, g=g)
    chosen = decode_indices(index_q, index_cache, weights, context_lens, table, topk, backend=BACKEND)
    out, lse = deepseek.flash_mla_with_kvcache(
        q, latents, None, None, 512, None, None, 0.1, is_fp8_kvcache=True, indices=chosen, backend=BACKEND
    )
    pool = format_rows(latents, "fp8_ds_mla")
    limits = context_lens[:, None] - S_q + 1 + torch.arange(S_q)
    for b, scores in enumerate(paged_reference(index_q, index_cache, weights, limits, table)):
        t = torch.arange(lengths[b])
        rows = pool[table[b, t // 64].long() * 64 + t % 64]
        for i in range(S_q):
            best = topk_reference(scores[i : i + 1], topk)[0]
            keep = torch.zeros(1, lengths[b], dtype=torch.bool)
            keep[:, best[best >= 0].long()] = True
            expected, expected_lse = attend_head(q[b, i].double(), rows, rows[:, :512], keep, None, 0.1, None)
            assert_close(out[b, i], expected)
            assert (lse[b, :, i] - expected_lse).abs().max() < 1e-4


def test_dsa_prefill_layer():
    """Two sequences end to end, causal, with topk beyond the length of most rows."""
    lengths, topk, H = (90, 40), 32, 8
    total = sum(lengths)
    starts = torch.cat([torch.full((n,), start) for n, start in zip(lengths, (0, 90), strict=True)]).int()
    ends = torch.arange(1, total + 1, dtype=torch.int32)
    index_q, kv, weights, *_ = ragged_case(total, total, 32, 128)
    g = generator(3)
    q, latents = randn(total, H, 576, g=g), randn(total, 1, 576, g=g)
    chosen = prefill_indices(index_q, kv, weights, starts, ends, topk, backend=BACKEND)
    out, _, lse = deepseek.flash_mla_sparse_fwd(q, latents, chosen, 0.1, backend=BACKEND)
    scores = index_reference(index_q, *kv, weights, starts, ends)
    best = topk_reference(scores, topk)
    assert (best >= 0).sum(1).tolist() == [
        min(i - s, topk) for s, i in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    keep = torch.zeros(total, total, dtype=torch.bool)
    keep[(best >= 0).nonzero(as_tuple=True)[0], best[best >= 0].long()] = True
    rows = latents[:, 0].double()
    for h in range(H):
        expected, expected_lse = attend_head(q[:, h].double(), rows, rows[:, :512], keep, None, 0.1, None)
        assert_close(out[:, h], expected)
        assert (lse[:, h] - expected_lse).abs().max() < 1e-4


# --- Edges ------------------------------------------------------------------------------------------------------------


def test_nothing_to_do():
    q, kv, weights, starts, ends = ragged_case(7, 50, 4, 32)
    none = (kv[0][:0], kv[1][:0])
    assert mqa_logits(q, none, weights, starts, ends).shape == (7, 0)
    assert (prefill_indices(q, none, weights, starts, ends, 3) == -1).all()
    no_query = (q[:0], kv, weights[:0], starts[:0], ends[:0])
    assert mqa_logits(*no_query).shape == (0, 50)
    assert prefill_indices(*no_query, 3).shape == (0, 1, 3)
    q, cache, weights, context_lens, table = paged_case((70, 3), 2, 4)
    assert (decode_indices(q, cache[:0], weights, context_lens, table, 3) == -1).all()
    assert (decode_indices(q, cache, weights, context_lens, table[:, :0].contiguous(), 3) == -1).all()
    assert decode_indices(q[:0], cache, weights[:0], context_lens[:0], table[:0], 3).shape == (0, 2, 3)
    assert decode_indices(q[:, :0], cache, weights[:, :0], context_lens, table, 3).shape == (2, 0, 3)
    assert topk_indices(torch.empty(0, 5), 2).shape == (0, 2)
    assert (topk_indices(torch.empty(3, 0), 2) == -1).all()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"q": torch.zeros(7, 4, 32)}, DTypeError, "Quantise q"),
        ({"q": torch.zeros(7, 4, 32, 1).to(FP8)}, ShapeError, "3 dims"),
        ({"q": torch.zeros(7, 4, 64).to(FP8)}, ShapeError, "with q's D"),
        ({"q": torch.zeros(7, 4, 24).to(FP8)}, ShapeError, "multiple of 16"),
        ({"weights": torch.zeros(7, 3)}, ShapeError, "one weight for each"),
        ({"weights": torch.zeros(7, 4).bfloat16()}, DTypeError, "FP32"),
        ({"kv": torch.zeros(50, 32)}, ShapeError, "need their scales"),
        ({"kv": (torch.zeros(50, 32), torch.zeros(50))}, DTypeError, "Quantise k"),
        ({"kv": (torch.zeros(50, 32).to(FP8), torch.zeros(49))}, ShapeError, "do not fit"),
        ({"kv": (torch.zeros(32, 50).to(FP8).T, torch.zeros(50))}, LayoutError, "not contiguous"),
        ({"starts": torch.zeros(6, dtype=torch.int32)}, ShapeError, "starts"),
        ({"ends": torch.zeros(7)}, DTypeError, "ends"),
        ({"ends": torch.zeros(7, dtype=torch.int32, device="meta")}, DeviceError, "meta"),
    ],
)
def test_ragged_errors(changes, error, says):
    names = ("q", "kv", "weights", "starts", "ends")
    arguments = dict(zip(names, ragged_case(7, 50, 4, 32), strict=True)) | changes
    for call in (lambda: mqa_logits(**arguments), lambda: prefill_indices(**arguments, topk=3)):
        with pytest.raises(error, match=says) as caught:
            call()
        assert all((caught.value.given, caught.value.required, caught.value.cause, caught.value.fix))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"q": torch.zeros(2, 2, 4, 64).to(FP8)}, ShapeError, "D = 128"),
        ({"k_cache": torch.zeros(5, 64, 1, 128, dtype=torch.uint8)}, ShapeError, "132"),
        ({"k_cache": torch.zeros(5, 64, 1, 132)}, DTypeError, "1-byte"),
        ({"k_cache": INDEX_ROWS.empty(5, 32)}, BlockCountError, "multiple of 64"),
        ({"k_cache": torch.zeros(5, 8449, dtype=torch.uint8)[:, :8448].view(5, 64, 1, 132)}, LayoutError, "apart"),
        ({"context_lens": torch.zeros(3, dtype=torch.int32)}, ShapeError, "context_lens"),
        ({"context_lens": torch.zeros(2, 3, dtype=torch.int32)}, ShapeError, "context_lens"),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, ShapeError, "block_table"),
        ({"block_table": torch.zeros(4, 2, dtype=torch.int32).T}, LayoutError, "contiguous"),
        ({"max_context_len": -1}, ShapeError, "max_context_len"),
    ],
)
def test_paged_errors(changes, error, says):
    names = ("q", "k_cache", "weights", "context_lens", "block_table")
    arguments = dict(zip(names, paged_case((70, 3), 2, 4), strict=True)) | changes
    for call in (lambda: paged_mqa_logits(**arguments), lambda: decode_indices(**arguments, topk=3)):
        with pytest.raises(error, match=says):
            call()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"topk": 0}, ShapeError, "topk >= 1"),
        ({"topk": 2.0}, ShapeError, "topk >= 1"),
        ({"scores": torch.zeros(6, 9).double()}, DTypeError, "FP32"),
        ({"scores": torch.zeros(6)}, ShapeError, "2 dims"),
        ({"scores": torch.zeros(9, 6).T}, LayoutError, "contiguous"),
        ({"ends": torch.zeros(5, dtype=torch.int32)}, ShapeError, "ends"),
        ({"block_table": torch.zeros(4, 3, dtype=torch.int32)}, ShapeError, "same number of query rows"),
        ({"block_table": torch.zeros(3, 3, dtype=torch.int32), "page": 0}, ShapeError, "page from 1"),
        ({"block_table": torch.zeros(3, 3, dtype=torch.int32), "page": 2**40}, ShapeError, "page from 1"),
        ({"topk": True}, ShapeError, "topk >= 1"),
    ],
)
def test_topk_errors(changes, error, says):
    with pytest.raises(error, match=says):
        topk_indices(**({"scores": torch.zeros(6, 9), "topk": 3} | changes))


@pytest.mark.skipif(BACKEND != "triton", reason="needs TRITON_INTERPRET=1")
def test_what_triton_refuses():
    with pytest.raises(DeviceError, match="at most 4096"):
        topk_indices(torch.zeros(1, 9), 4097, backend="triton")
    assert topk_indices(torch.zeros(1, 9), 4097)[0, :10].tolist() == [*range(9), -1]


def test_index_rows_are_deepgemms():
    """132 bytes: the codes of all rows of a page, then the scales; with a power of two for a scale."""
    rows = randn(3, 64, 1, 128, g=generator())
    pages = INDEX_ROWS.quantise(rows)
    assert pages.shape == (3, 64, 1, 132)
    assert pages.is_contiguous()
    memory = pages.view(torch.uint8).view(3, 64 * 132)
    codes = memory[:, : 64 * 128].view(FP8).view(3, 64, 128)
    scales = memory[:, 64 * 128 :].view(torch.float32)
    assert torch.equal(scales, (rows[:, :, 0].float().abs().amax(-1) / 448).log2().ceil().exp2())
    assert torch.equal(codes.float(), (rows[:, :, 0].float() / scales[..., None]).to(FP8).float())
