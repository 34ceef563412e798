"""merge: attention over parts of the keys, put together, is attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla.merge import apply_sink, merge


def attention(scores, values):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 9))
def test_parts_make_the_whole(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 10 * torch.randn(3, 4, sum(sizes), generator=generator, dtype=torch.float64)
    values = torch.randn(3, sum(sizes), 8, generator=generator, dtype=torch.float64)
    parts = [attention(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes, 1), strict=True)]
    out, lse = merge(*(torch.stack(x) for x in zip(*parts, strict=True)))
    want_out, want_lse = attention(scores, values)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_an_empty_part_changes_no_bit():
    out, lse = torch.randn(1, 5, 8), torch.randn(1, 5)
    merged, merged_lse = merge(
        torch.cat([out, torch.full_like(out, 3.0)]), torch.cat([lse, torch.full_like(lse, -math.inf)])
    )
    assert torch.equal(merged, out[0])
    assert torch.equal(merged_lse, lse[0])


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_beside_any_others(parts, dtype):
    outs, lses = torch.randn(parts, 3, 24, 2, 40, dtype=dtype), 3 * torch.randn(parts, 3, 24, 2)
    whole, whole_lse = merge(outs, lses)
    for heads in (slice(0, 1), slice(5, 12), slice(18, 24)):
        out, lse = merge(outs[:, :, heads].contiguous(), lses[:, :, heads].contiguous())
        assert torch.equal(out, whole[:, heads])
        assert torch.equal(lse, whole_lse[:, heads])


def test_no_parts():
    out, lse = merge(torch.ones(0, 2, 4), torch.ones(0, 2))
    assert torch.equal(out, torch.zeros(2, 4))
    assert torch.equal(lse, torch.full((2,), -math.inf))


def test_nothing_but_empty_parts():
    out, lse = merge(torch.ones(3, 2, 4), torch.full((3, 2), -math.inf))
    assert torch.equal(out, torch.zeros(2, 4))
    assert torch.equal(lse, torch.full((2,), -math.inf))


def test_large_lse_does_not_overflow():
    lses = torch.tensor([[800.0], [801.0]], dtype=torch.float64)
    out, lse = merge(torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64), lses)
    torch.testing.assert_close(out, torch.sigmoid(torch.tensor([[1.0]], dtype=torch.float64)))
    torch.testing.assert_close(lse, torch.logsumexp(lses, 0))


def test_sink_is_a_key_without_a_value():
    scores, values = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    sink = torch.tensor([0.3, -2.0, 30.0, -math.inf], dtype=torch.float64)
    padded, _ = attention(torch.cat([scores, sink[:, None]], 1), torch.cat([values, torch.zeros(1, 8)]).double())
    out, lse = attention(scores, values)
    torch.testing.assert_close(apply_sink(out, lse, sink), padded)
    empty = torch.full_like(lse, -math.inf)
    assert torch.equal(apply_sink(torch.zeros_like(out), empty, sink), torch.zeros_like(out))


@pytest.mark.parametrize("size", [0.0, 1e3, -1e7, 1e8])
def test_weights_sum_to_one_however_large_lse_is(size: float) -> None:
    """Its own rounding is as large as the logarithm of the parts."""
    out, _ = merge(torch.ones(5, 3, 8), torch.full((5, 3), size))
    assert torch.allclose(out, torch.ones(3, 8))
