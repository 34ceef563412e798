"""flash_mla_prefill against float64: the listed cases, then random ones."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla import BlockSparseLayout, flash_mla_prefill
from flash_mla.reference import prefill_reference
from flash_mla.testing import DTYPES, PrefillCase, check, prefill_cases, run

pytestmark = pytest.mark.usefixtures("cpu_engine")

# NOTE: the interpreter takes half a minute a case of several tiles
MOST_TOKENS = 200 if os.environ.get("TRITON_INTERPRET") == "1" else 1000


@pytest.mark.parametrize("case", [c for c in prefill_cases() if c.P <= MOST_TOKENS], ids=lambda case: case.name)
def test_case(case):
    result = run(case)
    assert result.passed, str(result)


@st.composite
def cases(draw):
    B, P, Hk = draw(st.integers(1, 3)), draw(st.integers(1, 200)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    lengths = st.lists(st.integers(0, P), min_size=B, max_size=B).map(tuple)
    return PrefillCase(
        "prefill/random",
        P,
        B=B,
        lengths=draw(st.none() | lengths),
        Hq=Hk * draw(st.integers(1, 4)),
        Hk=Hk,
        D=8 * draw(st.integers(1, 12)),
        Dv=8 * draw(st.integers(1, 12)),
        dtype=dtype,
        sliced=draw(st.booleans()),
        causal=draw(st.sampled_from([None, True, False])),
        mask=draw(st.sampled_from([None, "bool", "float", "bool-heads", "float-heads"])),
        sparse=draw(st.sampled_from([None, "tensor", "heads", "layout"])),
        sink=draw(st.booleans()),
        descale=draw(st.sampled_from([None, "float", "tensor"])) if dtype == torch.float8_e4m3fn else None,
        softmax_scale=draw(st.sampled_from([None, 0.2])),
        seed=draw(st.integers(0, 9)),
    )


@given(cases())
def test_random(case):
    result = run(case)
    assert result.passed, str(result)


def test_causal_is_the_default_without_a_mask_only():
    x = PrefillCase("prefill/default", 70, dtype=torch.float32).call().arguments
    assert torch.equal(flash_mla_prefill(**x), flash_mla_prefill(**{**x, "causal": True}))
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    full = flash_mla_prefill(**{**x, "causal": False})
    torch.testing.assert_close(flash_mla_prefill(**{**x, "attn_mask": mask}), full, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(full, flash_mla_prefill(**x))


def test_a_dropped_block_is_never_read():
    """NaN in K and V of blocks that no row keeps does not reach the output."""
    x = PrefillCase("prefill/dropped", 256, dtype=torch.float32).call().arguments
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    blocks[..., 2, 2] = False
    x["sparse_layout"] = blocks
    for name in ("k", "v"):
        x[name][:, :, 128:192] = torch.nan
    out, lse = flash_mla_prefill(**x, return_lse=True)
    assert (out[:, :, 128:192] == 0).all()
    assert (lse[:, :, 128:192] == -torch.inf).all()
    clean = {**x, **{name: x[name].nan_to_num(0.0) for name in ("k", "v")}}
    want = prefill_reference(
        **{k: v for k, v in clean.items() if k not in ("sparse_layout", "causal")}, block_mask=blocks, causal=True
    )
    verdict = check(out, lse, *want, torch.float32)
    assert verdict.passed, verdict.failures


def test_three_forms_of_one_layout_agree():
    from torch.nn.attention.flex_attention import create_block_mask

    P = 300
    x = PrefillCase("prefill/forms", P, dtype=torch.float32).call().arguments
    layout = BlockSparseLayout.causal(P)
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, P, P, "cpu", 64)
    outs = [flash_mla_prefill(**{**x, "sparse_layout": form}) for form in (layout, layout.blocks, block_mask)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    # the blocks of the causal layout and causality keep what causality keeps
    torch.testing.assert_close(outs[0], flash_mla_prefill(**x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_mask_broadcasts_over_requests_and_heads(shape):
    x = PrefillCase("prefill/broadcast", 70, dtype=torch.float32).call().arguments
    x["attn_mask"] = torch.rand(*shape, 70, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    out, lse = flash_mla_prefill(**x, return_lse=True)
    want = prefill_reference(**{k: v for k, v in x.items() if k not in ("sparse_layout", "causal")}, causal=False)
    verdict = check(out, lse, *want, torch.float32)
    assert verdict.passed, verdict.failures


EMPTY = {
    "no-token": PrefillCase("prefill/no-token", 0),
    "no-token-mask": PrefillCase("prefill/no-token-mask", 0, mask="bool"),
    "no-token-sparse": PrefillCase("prefill/no-token-sparse", 0, sparse="tensor"),
    "no-request": PrefillCase("prefill/no-request", 10, B=0),
}


@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_empty(case):
    result = run(case)
    assert result.passed, str(result)


def test_a_mask_of_finfo_min_is_causality():
    """A layer of transformers' masks: finfo.min where a key is hidden, 0 elsewhere."""
    q, k, v = (torch.randn(1, 2, 130, 64) for _ in range(3))
    seen = torch.ones(130, 130, dtype=torch.bool).tril()
    mask = torch.zeros(130, 130).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    out = flash_mla_prefill(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, flash_mla_prefill(q, k, v), atol=1e-6, rtol=1e-5)
