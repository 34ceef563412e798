"""The Triton sparse kernels through the drop-in, in Triton's interpreter, against the oracle of test_deepseek."""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch
from test_deepseek import (
    assert_close,
    assert_lse,
    dense_case,
    dense_oracle,
    generator,
    padded,
    randn,
    sparse_oracle,
    sparse_scope,
    varlen_oracle,
)

from flash_mla import deepseek

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

decode = functools.partial(deepseek.flash_mla_with_kvcache, backend="triton")


@pytest.mark.parametrize(
    ("format_name", "d", "h_q", "page", "extra", "lengths"),
    [
        ("fp8_ds_mla", 576, 64, 64, None, False),
        ("fp8_ds_mla", 576, 3, 61, None, True),
        ("model1", 512, 20, 64, 53, True),
        ("model1", 512, 16, 2, None, False),
        ("v4.1", 512, 16, 64, 7, False),
        ("flat", 576, 16, 64, None, True),
        ("fp8_token", 576, 16, 64, 53, True),
        (None, 576, 16, 7, 64, True),
    ],
)
def test_sparse_decode(format_name, d, h_q, page, extra, lengths):
    b, s_q, topk = 3, 2, 70
    q = randn(b, s_q, h_q, d, g=generator(1))
    scopes = [sparse_scope(b, s_q, topk, page, d, format_name, lengths, 2)]
    if extra is not None:
        scopes.append(sparse_scope(b, s_q, 33, extra, d, format_name, lengths, 3))
    sink = torch.randn(h_q, generator=generator(4))
    sink[::3], sink[1::4] = -math.inf, math.inf
    (cache, _, indices, topk_length), second = scopes[0], scopes[1] if extra is not None else (None,) * 4
    out, lse = decode(
        padded(q), cache, None, None, 512, None, None, d**-0.55, False, format_name is not None, padded(indices), sink,
        second[0], second[2], topk_length, second[3],
    )  # fmt: skip
    expected, _, expected_lse = sparse_oracle(q, scopes, 512, d**-0.55, sink)
    assert_close(out, expected)
    assert_lse(lse, expected_lse.transpose(1, 2), relative=1.2e-4)


@pytest.mark.parametrize("start", [0, 12])
def test_pages_at_any_pitch(start):
    """Pages need not lie a multiple of 16 bytes apart, nor begin on one."""
    page = 3
    cache, _, indices, _ = sparse_scope(2, 1, 20, page, 576, "fp8_ds_mla", False, 0)
    size = page * 656
    memory = torch.full((start + len(cache) * (size + 4),), 0xFF, dtype=torch.uint8)
    apart = memory[start:].view(len(cache), size + 4)[:, :size]
    apart.copy_(cache.view(torch.uint8).view(len(cache), size))
    q = randn(2, 1, 8, 576, g=generator(1))
    want, got = (
        decode(q, x, None, None, 512, None, softmax_scale=0.05, is_fp8_kvcache=True, indices=indices)
        for x in (cache, apart.view(cache.shape))
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_sparse_decode_without_a_key():
    cache, _, indices, _ = sparse_scope(2, 1, 16, 64, 576, "fp8_ds_mla", False, 0)
    q = randn(2, 1, 8, 576, g=generator(1))
    sink = torch.tensor([0.0, -math.inf] * 4)
    indices.fill_(-1)
    out, lse = decode(q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices, attn_sink=sink)
    assert not out.any()
    assert (lse == math.inf).all()


@pytest.mark.parametrize(
    ("s_q", "s_kv", "topk", "h_q", "d", "dtype"),
    [
        (3, 95, 128, 64, 512, torch.bfloat16),
        (2, 32, 200, 3, 576, torch.bfloat16),
        (2, 90, 40, 16, 576, torch.float16),
        (2, 90, 40, 2, 128, torch.float32),
    ],
)
def test_sparse_prefill(s_q, s_kv, topk, h_q, d, dtype):
    dv = min(d, 512)
    _, rows, indices, topk_length = sparse_scope(s_q, 1, topk, s_kv, d, None, True, 0, pages=1)
    rows = rows.to(dtype)
    q = randn(s_q, h_q, d, g=generator(1), dtype=dtype)
    sink = torch.randn(h_q, generator=generator(2))
    out, max_logits, lse = deepseek.flash_mla_sparse_fwd(
        padded(q), padded(rows.unsqueeze(1)), padded(indices), 0.1, dv, sink, topk_length, backend="triton"
    )
    expected, top, expected_lse = sparse_oracle(q.unsqueeze(1), [(None, rows, indices, topk_length)], dv, 0.1, sink)
    assert_close(out, expected[:, 0], dtype)
    assert_lse(lse, expected_lse[:, 0])
    assert_lse(max_logits, top[:, 0], empty=-math.inf)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_decode(causal):
    q, pool, table, lengths = dense_case([100, 0, 3], 2, 6, 2, page=128)
    out, lse = decode(q, pool, table, lengths, 512, None, causal=causal)
    expected, expected_lse = dense_oracle(q, pool, table, lengths, 512, causal)
    assert_close(out, expected)
    assert_lse(lse, expected_lse, relative=1.2e-4)


def test_varlen():
    starts = [0, 70, 75], [0, 70, 90]
    g = generator()
    q, k, v = randn(75, 4, 192, g=g), randn(90, 2, 192, g=g), randn(90, 2, 128, g=g)
    cu = [torch.tensor(x, dtype=torch.int32) for x in starts]
    out, lse = deepseek.flash_attn_varlen_func(q, k, v, *cu, 70, 70, causal=True, backend="triton")
    expected, expected_lse = varlen_oracle(q, k, v, *starts, 192**-0.5, True)
    assert_close(out, expected)
    assert_lse(lse, expected_lse, empty=-math.inf)


@pytest.mark.parametrize("size", [1e5, -1e7, 1e8])
def test_splits_weigh_one_in_all_however_large_scores_are(size):
    """Equal keys whose values are 1: the rounding of lse, as large as 8 here, must not reach out."""
    kv, q = torch.ones(4, 64, 1, 576, dtype=torch.bfloat16), torch.ones(1, 1, 16, 576, dtype=torch.bfloat16)
    indices = torch.arange(256, dtype=torch.int32).view(1, 1, 256)
    out, _ = decode(q, kv, None, None, 512, softmax_scale=size / 576, indices=indices)
    assert torch.equal(out, torch.ones_like(out))
