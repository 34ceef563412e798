"""The oracle against torch's own attention in float64, on contiguous copies of the keys."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from flash_mla.reference import decode_reference, mha_reference, prefill_reference
from flash_mla.testing import DecodeCase, MhaCase, PrefillCase


def sdpa(q, k, v, keep=None, bias=None):
    """[H, M, D] against [Hk, S, D], all of it in float64."""
    if keep is not None:
        bias = (torch.zeros(keep.shape) if bias is None else bias).double().masked_fill(~keep, -math.inf)
    return F.scaled_dot_product_attention(
        q.double()[None], k.double()[None], v.double()[None], attn_mask=bias, enable_gqa=True
    )[0]


def gathered(cache, table, b, length):
    """Rows [Hk, length, D], one index_select over whole blocks."""
    blocks = -(-length // 64)
    return cache[b].index_select(1, table[b, :blocks].long()).flatten(1, 2)[:, :length]


@pytest.mark.parametrize("S_q", [1, 3])
@pytest.mark.parametrize("layout", ["slab", "pool", "serving"])
def test_decode(S_q, layout):
    x = DecodeCase("", (130, 64, 5), S_q=S_q, layout=layout, dtype=torch.float32, Dv=32).call().arguments
    out, lse = decode_reference(**x)
    for b, length in enumerate((130, 64, 5)):
        k, v = (gathered(x[name], x["block_table"], b, length) for name in ("k_cache", "v_cache"))
        keep = torch.arange(length) <= length - S_q + torch.arange(S_q)[:, None]
        torch.testing.assert_close(out[b], sdpa(x["q"][b], k, v, keep), rtol=1e-9, atol=1e-9)
        scores = x["q"][b].double().unflatten(0, (2, 2)) @ k.double().transpose(-1, -2)[:, None] / 8
        want = scores.masked_fill(~keep, -math.inf).logsumexp(-1).flatten(0, 1)
        torch.testing.assert_close(lse[b], want, rtol=1e-9, atol=1e-9)


def test_decode_with_masks_sink_and_descales():
    case = DecodeCase("", (130, 64), mask="float-heads", dtype=torch.float32, descale="tensor", sink=True)
    x = case.call().arguments
    out, _ = decode_reference(**x)
    for b, length in enumerate((130, 64)):
        k, v = (gathered(x[name], x["block_table"], b, length) for name in ("k_cache", "v_cache"))
        k = torch.cat([k.double() * x["k_descale"][b, :, None, None], torch.zeros(2, 1, 64)], 1)
        v = torch.cat([v.double() * x["v_descale"][b, :, None, None], torch.zeros(2, 1, 64)], 1)
        q = x["q"][b].double() * x["q_descale"][b].repeat_interleave(2)[:, None, None]
        # the sink is a key of score `sink` whose value is 0
        bias = torch.cat([x["mask"][b, ..., :length], x["attn_sink"][:, None, None]], -1)
        torch.testing.assert_close(out[b], sdpa(q, k, v, bias=bias.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill(causal):
    x = PrefillCase("", 100, dtype=torch.float32, mask="bool-heads").call().arguments
    mask = x["attn_mask"].clone()
    mask[..., 0] = True  # torch gives NaN where no key is left
    out, _ = prefill_reference(x["q"], x["k"], x["v"], None, mask, causal=causal)
    keep = mask & torch.ones(100, 100, dtype=torch.bool).tril() if causal else mask
    for b in range(2):
        torch.testing.assert_close(out[b], sdpa(x["q"][b], x["k"][b], x["v"][b], keep[b]), rtol=1e-9, atol=1e-9)


def test_prefill_blocks_and_lengths():
    x = PrefillCase("", 150, dtype=torch.float32).call().arguments
    blocks = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)[None, None]
    lengths = torch.tensor([150, 70])
    out, lse = prefill_reference(x["q"], x["k"], x["v"], blocks, causal=False, seq_lens=lengths)
    elements = torch.zeros(150, 150, dtype=torch.bool)
    for i, j in blocks[0, 0].nonzero().tolist():
        elements[64 * i : 64 * i + 64, 64 * j : 64 * j + 64] = True
    for b, length in enumerate((150, 70)):
        keep = elements & (torch.arange(150) < length)
        torch.testing.assert_close(out[b], sdpa(x["q"][b], x["k"][b], x["v"][b], keep), rtol=1e-9, atol=1e-9)
    assert lse.isfinite().all()


def test_rows_without_a_key():
    x = PrefillCase("", 80, dtype=torch.float32).call().arguments
    out, lse = prefill_reference(x["q"], x["k"], x["v"], causal=False, seq_lens=torch.tensor([0, 80]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -math.inf).all()
    assert lse[1].isfinite().all()


def test_mha_continues_a_prompt():
    x = MhaCase("", 70, starts=(65, 0), dtype=torch.float32, write=False).call().reference
    out, _ = mha_reference(**x)
    for b, start in enumerate((65, 0)):
        k, v = (gathered(x[name], x["block_table"], b, start + 70) for name in ("k_cache", "v_cache"))
        keep = torch.arange(start + 70) <= start + torch.arange(70)[:, None]
        torch.testing.assert_close(out[b], sdpa(x["q"][b], k, v, keep), rtol=1e-9, atol=1e-9)
