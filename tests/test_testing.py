"""The judge must be able to say no: a result that is off by more than the budget fails, in words."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flash_mla import backends, deepseek, indexer
from flash_mla.plan import plan
from flash_mla.quant import FORMATS
from flash_mla.reference import format_rows
from flash_mla.testing import (
    BUDGETS,
    CASES,
    DTYPES,
    UNUSED_ENTRY,
    DecodeCase,
    MhaCase,
    RaggedIndexCase,
    SparseDecodeCase,
    SparsePrefillCase,
    VarlenCase,
    check,
    run,
)

CALLS = itertools.count(1)


def truth():
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2, 4, 3, 64, generator=generator, dtype=torch.float64)
    lse = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    out[0, 0, 0], lse[0, 0, 0] = 0.0, -math.inf
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_budget_has_an_edge(dtype):
    out, lse = truth()
    m, budget = out.abs().max(), BUDGETS[dtype]
    assert check(out, lse.float(), out, lse, dtype).passed
    for factor, passes in ((0.9, True), (1.1, False)):
        off = out.clone()
        off[1, 2, 1, 5] += factor * budget.out * m
        assert check(off, None, out, lse, dtype).passed is passes
        off_lse = lse.clone()
        off_lse[1, 2, 1] += factor * budget.lse
        assert check(out, off_lse.float(), out, lse, dtype).passed is passes


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out, lse: out.__setitem__((1, 1, 1, 1), math.nan), "1 of 1536 are NaN"),
        (lambda out, lse: out.mul_(1.01), "cosine distance"),
        (lambda out, lse: out.__setitem__((0, 0, 0, 0), 1e-9), "not exactly 0"),
        (lambda out, lse: lse.__setitem__((0, 0, 0), -1e30), "not -inf"),
        (lambda out, lse: lse.__setitem__((1, 0, 0), math.nan), "lse: error inf"),
        (lambda out, lse: lse.__setitem__((1, 0, 0), -math.inf), "lse: error inf"),
    ],
    ids=["nan", "scale", "empty-row", "empty-lse", "nan-lse", "inf-lse"],
)
def test_the_judge_sees(spoil, words):
    out, lse = truth()
    bad_out, bad_lse = out.clone(), lse.clone()
    spoil(bad_out, bad_lse)
    verdict = check(bad_out, bad_lse.float(), out, lse, torch.bfloat16)
    assert not verdict.passed
    assert any(words in failure for failure in verdict.failures), verdict.failures


def test_cases_are_hostile():
    x = DecodeCase("", (70, 0), spare=2).call().arguments
    assert (x["block_table"][0, 2:] == UNUSED_ENTRY).all()
    assert (x["block_table"][1] == UNUSED_ENTRY).all()
    used = x["k_cache"].isfinite().all(-1).sum()
    assert used == 70 * 2, "70 tokens of 2 heads hold numbers, every other slot NaN"
    fp8 = DecodeCase("", (70, 0), dtype=torch.float8_e4m3fn).call().arguments["k_cache"]
    assert (~fp8.float().isnan()).all(-1).sum() == 70 * 2


def test_a_seed_is_a_problem():
    one, same, other = (DecodeCase("", (70, 3), seed=seed).call().arguments["q"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.fixture
def wrong_launch(monkeypatch):
    """Let `spoil(args)` follow the CPU backend's launch."""

    def install(spoil):
        engine = backends.module("cpu", "engine")

        def spoiled(problem, config, bind=engine.bind):
            launch = bind(problem, config)
            return lambda args: (launch(args), spoil(args))

        monkeypatch.setattr(engine, "bind", spoiled)
        plan.cache_clear()

    yield install
    plan.cache_clear()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda args: args.out.mul_(1.05), "out: error"),
        (lambda args: args.q.add_(1), "the call wrote to q"),
        (lambda args: args.k[0, 0, 0].fill_(0), "k_cache does not hold"),
        (lambda args: args.lse.add_(next(CALLS) * 1e-5), "differs in bits"),
    ],
    ids=["scale", "writes-q", "writes-cache", "not-reproducible"],
)
def test_run_sees(wrong_launch, spoil, words):
    wrong_launch(spoil)
    result = run(DecodeCase("spoiled", (70, 30)))
    assert not result.passed
    assert any(words in failure for failure in result.failures), result.failures
    assert "spoiled: FAILED" in str(result)


def test_run_sees_a_stray_write_beside_the_table(wrong_launch):
    case = MhaCase("spoiled", 70, layout="sliced")
    wrong_launch(lambda args: args.k[..., 63, 0].fill_(1.0))
    assert any("k_cache does not hold" in failure for failure in run(case).failures)


@pytest.mark.parametrize("name", FORMATS)
def test_format_rows_are_the_rows(name):
    """The reference's own decoder against the library's."""
    fmt = FORMATS[name]
    pool = fmt.quantise(torch.randn(3, 7, 1, fmt.head_dim, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert torch.equal(format_rows(pool, name), fmt.dequantise(pool).view(21, -1).double())


@pytest.mark.parametrize(
    ("case", "spoil", "words"),
    [
        (SparseDecodeCase("spoiled"), lambda args: args.out.mul_(1.05), "out: error"),
        (SparseDecodeCase("spoiled"), lambda args: args.out[0, 0].fill_(1e-9), "not exactly 0"),
        (SparseDecodeCase("spoiled"), lambda args: args.lse.nan_to_num_(neginf=-100.0), "lse: not -inf"),
        (SparsePrefillCase("spoiled"), lambda args: args.max_logits.add_(0.01), "max_logits: error"),
        (SparsePrefillCase("spoiled"), lambda args: args.max_logits[0].fill_(0.0), "max_logits: not -inf"),
        (SparsePrefillCase("spoiled"), lambda args: args.keys[0].cache[0, 0].fill_(0.0), "the call wrote to kv"),
    ],
    ids=["scale", "empty-row", "empty-lse", "max-logits", "empty-max-logits", "writes-kv"],
)
def test_run_sees_a_wrong_sparse_launch(wrong_launch, case, spoil, words):
    wrong_launch(spoil)
    result = run(case)
    assert not result.passed
    assert any(words in failure for failure in result.failures), result.failures


def test_run_sees_outputs_left_unwritten(monkeypatch):
    """The first call finds NaN where the launch does not write."""
    monkeypatch.setattr(backends.module("cpu", "engine"), "bind", lambda problem, config: lambda args: None)
    plan.cache_clear()
    result = run(SparsePrefillCase("spoiled"))
    plan.cache_clear()
    assert any("are NaN" in failure for failure in result.failures), result.failures


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("mqa_logits", lambda scores: scores * 1.002, "scores: error"),
        ("mqa_logits", lambda scores: scores.nan_to_num(neginf=0.0), "not -inf"),
        ("prefill_indices", lambda indices: indices.roll(1), "indices:"),
    ],
)
def test_run_sees_a_wrong_index(monkeypatch, name, spoil, says):
    right = getattr(indexer, name)
    monkeypatch.setattr(indexer, name, lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    assert any(says in failure for failure in run(RaggedIndexCase("spoiled")).failures)


def test_run_sees_a_wrong_gradient(monkeypatch):
    right = deepseek.varlen.backward

    def wrong(*args, dk, **kwargs):
        right(*args, dk=dk, **kwargs)
        dk *= 1.05

    monkeypatch.setattr(deepseek.varlen, "backward", wrong)
    failures = run(VarlenCase("spoiled")).failures
    assert len(failures) == 1
    assert "dk: error" in failures[0]


def test_names_are_unique_and_cover_every_dtype_and_function():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    kinds = {(case.function, case.dtype) for case in CASES}
    functions = {"flash_mla_with_kvcache", "flash_mla_prefill", "mha_fwd_kvcache", "deepseek.flash_mla_with_kvcache"}
    in_three_dtypes = {
        "flash_mla_prefill (backward)",
        "deepseek.flash_mla_sparse_fwd",
        "deepseek.flash_mla_sparse_fwd (backward)",
        "deepseek.flash_attn_varlen_func",
    }
    assert kinds == {
        (function, dtype)
        for function in functions | in_three_dtypes
        for dtype in DTYPES.values()
        if function in functions or dtype != torch.float8_e4m3fn
    } | {
        ("indexer.prefill_indices", torch.float8_e4m3fn),
        ("indexer.decode_indices", torch.float8_e4m3fn),
        ("indexer.topk_indices", torch.float32),
    }
    assert {case.format for case in CASES if isinstance(case, SparseDecodeCase)} == {None, *FORMATS}
