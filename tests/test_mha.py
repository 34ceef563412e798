"""mha_fwd_kvcache: attention against float64, and which bytes of the caches it writes."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla import mha_fwd_kvcache
from flash_mla.testing import DTYPES, MhaCase, mha_cases, run, same_bits

pytestmark = pytest.mark.usefixtures("cpu_engine")

# NOTE: the interpreter takes half a minute a case of several tiles
MOST_TOKENS = 600 if os.environ.get("TRITON_INTERPRET") == "1" else 1000


@pytest.mark.parametrize("case", [c for c in mha_cases() if c.P <= MOST_TOKENS], ids=lambda case: case.name)
def test_case(case):
    """`run` compares the whole memory of both caches with what they should hold, NaN included."""
    result = run(case)
    assert result.passed, str(result)


@st.composite
def cases(draw):
    B, P = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    starts = st.lists(st.integers(0, 150), min_size=B, max_size=B).map(tuple)
    return MhaCase(
        "mha/random",
        P,
        B=B,
        starts=draw(st.none() | starts),
        H=draw(st.integers(1, 3)),
        D=8 * draw(st.integers(1, 12)),
        Dv=8 * draw(st.integers(1, 12)),
        dtype=dtype,
        layout=draw(st.sampled_from(["slab", "sliced", "pool"])),
        order=draw(st.sampled_from(["shuffled", "ordered"])),
        write=draw(st.booleans()),
        causal=draw(st.sampled_from([None, True, False])),
        mask=draw(st.sampled_from([None, "bool", "float", "bool-heads", "float-heads"])),
        descale=draw(st.sampled_from([None, "float", "tensor"])) if dtype == torch.float8_e4m3fn else None,
        spare=draw(st.integers(0, 2)),
        softmax_scale=draw(st.sampled_from([None, 0.2])),
        seed=draw(st.integers(0, 9)),
    )


@given(cases())
def test_random(case):
    result = run(case)
    assert result.passed, str(result)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["slab", "sliced", "pool"])
def test_tokens_go_where_the_table_says(dtype, layout):
    """Token t lies in block_table[b, t // 64], slot t % 64; every other byte is as it was."""
    case = MhaCase("mha/write", 100, layout=layout, dtype=dtype, spare=2)
    x = case.call().arguments
    want = {name: x[name].contiguous().clone() for name in ("k_cache", "v_cache")}
    mha_fwd_kvcache(**x)
    for name, rows in (("k_cache", x["k"]), ("v_cache", x["v"])):
        for b in range(2):
            for t in range(100):
                request = slice(None) if layout == "pool" else b
                want[name][request, :, int(x["block_table"][b, t // 64]), t % 64] = rows[b, :, t]
        assert same_bits(x[name], want[name])


def test_chunks_equal_the_whole_prompt():
    """A prompt in three chunks gives what it gives in one call."""
    case = MhaCase("mha/chunks", 150, dtype=torch.float32)
    x = case.call().arguments
    whole = mha_fwd_kvcache(**x)
    y = case.call().arguments
    outs = []
    for first, last in ((0, 64), (64, 65), (65, 150)):
        chunk = {name: y[name][:, :, first:last].contiguous() for name in ("q", "k", "v")}
        outs.append(mha_fwd_kvcache(**{**y, **chunk, "start_pos": torch.full((2,), first, dtype=torch.int32)}))
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-5, atol=1e-5)
    assert same_bits(x["k_cache"], y["k_cache"])
    assert same_bits(x["v_cache"], y["v_cache"])


def test_reading_writes_nothing():
    x = MhaCase("mha/read", 100, write=False).call().arguments
    before = {name: x[name].clone() for name in ("k_cache", "v_cache")}
    mha_fwd_kvcache(**x)
    assert same_bits(x["k_cache"], before["k_cache"])
    assert same_bits(x["v_cache"], before["v_cache"])


EMPTY = {
    "no-token": MhaCase("mha/no-token", 0),
    "no-block": MhaCase("mha/no-block", 0, spare=0),
}


@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_empty(case):
    result = run(case)
    assert result.passed, str(result)


def test_no_request():
    out, lse = mha_fwd_kvcache(**MhaCase("mha/no-request", 10, B=0).call().arguments, return_lse=True)
    assert out.shape == (0, 2, 10, 64)
    assert lse.shape == (0, 2, 10)
