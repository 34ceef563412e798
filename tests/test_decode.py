"""flash_mla_with_kvcache against float64: the listed cases, then random ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla import HeadGroupingError, decode_over_pages, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.problem import FP8
from flash_mla.reference import decode_reference
from flash_mla.testing import DTYPES, DecodeCase, check, decode_cases, nan_cache, run

pytestmark = pytest.mark.usefixtures("cpu_engine")


@pytest.mark.parametrize("case", decode_cases(), ids=lambda case: case.name)
def test_case(case):
    result = run(case)
    assert result.passed, str(result)


@st.composite
def cases(draw):
    alias = draw(st.booleans())
    D = 8 * draw(st.integers(1, 12))
    lengths = tuple(draw(st.lists(st.integers(0, 200) | st.sampled_from([64, 128, 600]), min_size=1, max_size=4)))
    Hk = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    return DecodeCase(
        "decode/random",
        lengths,
        Hq=Hk * draw(st.integers(1, 5)),
        Hk=Hk,
        D=D,
        Dv=draw(st.integers(1, D // 8)) * 8 if alias else 8 * draw(st.integers(1, 12)),
        S_q=draw(st.integers(1, 8)),
        dtype=dtype,
        layout=draw(st.sampled_from(["slab", "sliced", "pool", "serving"])),
        order=draw(st.sampled_from(["shuffled", "ordered"])),
        alias=alias,
        mask=draw(st.sampled_from([None, "bool", "float", "bool-rows", "float-rows", "bool-heads", "float-heads"])),
        sink=draw(st.booleans()),
        descale=draw(st.sampled_from([None, "float", "tensor"])) if dtype == torch.float8_e4m3fn else None,
        spare=draw(st.integers(0, 3)),
        shared=draw(st.integers(0, 3)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        softmax_scale=draw(st.sampled_from([None, 0.2])),
        seed=draw(st.integers(0, 9)),
    )


@given(cases())
def test_random(case):
    result = run(case)
    assert result.passed, str(result)


def test_metadata_follows_changes_in_place():
    """One metadata serves a request that grows: lengths, table and cache change in place beneath it."""
    case = DecodeCase("decode/grow", (60, 130), spare=3)
    x = case.call().arguments
    metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"])
    free = 1 if int(x["block_table"][0, 0]) != 1 else 0
    x["block_table"][0, 1] = free
    for cache in (x["k_cache"], x["v_cache"]):
        block = int(x["block_table"][0, 0])
        cache[0, :, block, 60:].copy_(torch.randn(2, 4, 64))
        cache[0, :, free, :5].copy_(torch.randn(2, 5, 64))
    for length in (61, 64, 65, 69):
        x["seq_lens"][0] = length
        out, lse = flash_mla_with_kvcache(**x, metadata=metadata, return_lse=True)
        verdict = check(out, lse, *decode_reference(**x), case.dtype)
        assert verdict.passed, verdict.failures


def test_lse_only_on_request():
    x = DecodeCase("decode/lse", (70,)).call().arguments
    alone = flash_mla_with_kvcache(**x)
    out, lse = flash_mla_with_kvcache(**x, return_lse=True)
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, out)
    assert lse.shape == out.shape[:3]
    assert lse.dtype == torch.float32


def test_slab_pool_and_serving_agree():
    """The same rows behind three layouts give the same answer."""
    x = DecodeCase("decode/agree", (130, 64, 5), dtype=torch.float32).call().arguments
    caches = [x.pop(name) for name in ("k_cache", "v_cache")]
    q, table, lengths, (B, _, Nblk) = x["q"], x.pop("block_table"), x["seq_lens"], caches[0].shape[:3]
    pooled = table + Nblk * torch.arange(B, dtype=torch.int32)[:, None]
    # [B, Hk, Nblk, 64, D] -> [B * Nblk, 64, Hk, D], which engines hold, and its view as a pool of blocks 64 x D
    pages = [cache.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous() for cache in caches]
    pool = [cache.transpose(0, 1).flatten(1, 2).contiguous().expand(B, -1, -1, -1, -1) for cache in caches]
    slab = flash_mla_with_kvcache(**x, k_cache=caches[0], v_cache=caches[1], block_table=table)
    assert torch.equal(flash_mla_with_kvcache(**x, k_cache=pool[0], v_cache=pool[1], block_table=pooled), slab)
    # torch's ops add up in another order over other strides
    torch.testing.assert_close(decode_over_pages(q, *pages, pooled, lengths), slab, atol=1e-6, rtol=1e-5)


def test_queries_beyond_the_sequence_see_nothing():
    """With S_q = 4 queries on 2 tokens, the first two queries stand before the sequence."""
    x = DecodeCase("decode/short", (2,), S_q=4).call().arguments
    out, lse = flash_mla_with_kvcache(**x, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert out[:, :, 2:].isfinite().all()
    assert lse[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 3), (2, 1, 3), (1, 4, 3), (2, 4, 3)])
def test_mask_broadcasts_in_each_dim(shape):
    x = DecodeCase("decode/broadcast", (70, 40), S_q=3, dtype=torch.float32).call().arguments
    generator = torch.Generator().manual_seed(0)
    x["mask"] = torch.rand(*shape, 80, generator=generator) < 0.5
    out, lse = flash_mla_with_kvcache(**x, return_lse=True)
    verdict = check(out, lse, *decode_reference(**x), torch.float32)
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_mask_of_any_floating_dtype(dtype):
    x = DecodeCase("decode/mask-dtype", (70, 40)).call().arguments
    x["mask"] = torch.randn(2, 1, 1, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, lse = flash_mla_with_kvcache(**x, return_lse=True)
    verdict = check(out, lse, *decode_reference(**x), torch.bfloat16)
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("alias", [False, True], ids=["kv", "alias"])
@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        ((2**31 - 1, -(2**31), -1, 4), (130, 256)),
        ((3, 2, 1, 0), (2**31 - 1, 257)),
        ((10**6, 0, -7, 4), (2**31 - 1, 2**31 - 64)),
        ((2**31 - 1, 2, 1, 0), (-1, -(2**31))),
    ],
    ids=["ids", "lengths", "both", "negative"],
)
def test_unchecked_values_read_nothing_outside_the_cache(dtype, masked, alias, ids, lengths):
    """The cache holds numbers, the memory around it NaN: with values that nobody checked the output has no NaN."""
    k_cache, v_cache = (nan_cache("sliced", 2, 2, 4, 64, dtype, "cpu") for _ in range(2))
    for cache in (k_cache, v_cache):
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(0)))
    x = {
        "q": torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(dtype),
        "k_cache": k_cache,
        "v_cache": k_cache[..., :32] if alias else v_cache,
        "block_table": torch.tensor([ids, ids], dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
    }
    metadata = get_mla_metadata(x["q"].shape, k_cache.shape, x["block_table"], x["seq_lens"], check_values=False)
    mask = torch.ones(2, 1, 1, 256, dtype=torch.bool) if masked else None
    out, lse = flash_mla_with_kvcache(**x, mask=mask, metadata=metadata, return_lse=True)
    assert out.isfinite().all()
    assert not lse.isnan().any()
    if max(lengths) < 0:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


EMPTY = {
    "no-request": DecodeCase("decode/no-request", ()),
    "no-block": DecodeCase("decode/no-block", (0, 0), spare=0),
    "no-block-pool": DecodeCase("decode/no-block-pool", (0, 0), spare=0, layout="pool"),
    "no-block-mask": DecodeCase("decode/no-block-mask", (0, 0), spare=0, mask="bool"),
    "no-block-mla": DecodeCase("decode/no-block-mla", (0, 0), spare=0, alias=True, Dv=32, S_q=3),
}


@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_empty(case):
    result = run(case)
    assert result.passed, str(result)


def test_no_query_is_an_empty_output_and_no_head_an_error():
    x = DecodeCase("decode/nothing", (70,)).call().arguments
    assert flash_mla_with_kvcache(**{**x, "q": x["q"][:, :, :0]}).shape == (1, 4, 0, 64)
    with pytest.raises(HeadGroupingError):
        flash_mla_with_kvcache(**{**x, "q": x["q"][:, :0]})


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP8], ids=str)
def test_any_finite_scale(scale, dtype):
    x = DecodeCase("decode/scale", (70, 130), S_q=2, dtype=dtype, softmax_scale=scale).call().arguments
    verdict = check(*flash_mla_with_kvcache(**x, return_lse=True), *decode_reference(**x), dtype)
    assert verdict.passed, verdict.failures
