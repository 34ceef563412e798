"""Tensors whose last row lies more than 2^31 elements from their first: 64-bit offsets in the Triton kernels.

In the interpreter, where a product that leaves its type fails. Memory that nobody touches is never there.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_mla import FlashMLAError, decode_over_pages, deepseek, flash_mla_prefill, indexer
from flash_mla.problem import FP8
from flash_mla.testing import DecodeCase, GradientCase, SparseDecodeCase, SparsePrefillCase, VarlenCase, same_bits

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

MLA = {"Hk": 1, "D": 576, "Dv": 512, "alias": True, "softmax_scale": 0.05}
DECODE = {
    "gqa": DecodeCase("", (70,), Hq=4, Hk=2, D=64, S_q=3),
    "split": DecodeCase("", (700, 64), Hq=4, Hk=2, D=64, S_q=3),
    "latent": DecodeCase("", (70,), Hq=16, S_q=3, kv_dtype=FP8, **MLA),
}


def far(x: Tensor, dim: int) -> Tensor:
    """The same values with `dim` outermost, its last index 2^31 elements from its first."""
    step = -(-(2**31) // (x.shape[dim] - 1) // 1024) * 1024
    inner = x.movedim(dim, 0)[0].numel()
    assert inner <= step < 2**31
    memory = torch.empty((x.shape[dim] - 1) * step + inner, dtype=x.dtype)
    rest = x.shape[:dim] + x.shape[dim + 1 :]
    view = memory.as_strided((x.shape[dim], *rest), (step, *torch.empty(rest, device="meta").stride())).movedim(0, dim)
    return view.copy_(x)


def assert_same(call, x: dict, name: str, dim: int) -> None:
    wanted = call(**x)
    got = call(**{**x, name: far(x[name], dim)})
    for a, b in zip(got, wanted, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("name", ["q", "out"])
@pytest.mark.parametrize("case", DECODE)
def test_decode_by_token(case, name):
    case = DECODE[case]
    x = replace(case, layout="serving").call().arguments
    k, v = (x[n][0].permute(1, 2, 0, 3) for n in ("k_cache", "v_cache"))
    call = {n: x[n] for n in ("q", "block_table", "seq_lens", "softmax_scale")}
    call |= {"k_pages": k, "v_pages": None if case.alias else v, "v_head_dim": case.Dv}
    call["out"] = torch.zeros(*x["q"].shape[:3], case.Dv or case.D, dtype=x["q"].dtype)

    def decode(**x):
        return decode_over_pages(**x, return_lse=True, check_values=False, backend="triton")

    assert_same(decode, call, name, 2)


@pytest.mark.parametrize("name", ["q", "k", "v", "d_out"])
def test_sequences_of_one_token(name):
    """torch says of one row that the next is all heads away."""
    case = VarlenCase("", (1, 3), (1, 5), Hq=6, Hk=3, D=32, Dv=32).call()
    x = {name: case.arguments[name] for name in ("q", "k", "v", "cu_seqlens_qo", "cu_seqlens_kv", "causal")}
    x["d_out"] = case.reference["d_out"]

    def attend(q, k, v, d_out, **x):
        q, k, v = (leaf.detach().requires_grad_() for leaf in (q, k, v))
        sizes = {"max_seqlen_qo": 3, "max_seqlen_kv": 5}
        out, _ = deepseek.flash_attn_varlen_func(q, k, v, **x, **sizes, backend="triton")
        return out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)

    assert_same(attend, x, name, 1)


def test_rows_too_far_apart_are_refused():
    """A tile of prefill has up to 128 rows, whose offsets are of 32 bits; a gradient is copied."""
    x = GradientCase("", 3, 1, Hq=1, Hk=1, D=32, d_lse=False).call().arguments

    def attend(d_out, **x):
        leaves = [x[name].detach().requires_grad_() for name in ("q", "k", "v")]
        out = flash_mla_prefill(**{**x, **dict(zip(("q", "k", "v"), leaves, strict=True))}, backend="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    x["d_out"] = torch.randn_like(x["q"])
    assert_same(attend, x, "d_out", 2)
    for name in ("q", "k", "v"):
        with pytest.raises(FlashMLAError, match="elements apart"):
            attend(**{**x, name: far(x[name], 2)})


@pytest.mark.parametrize("dim", [0, 1])
def test_sparse_prefill(dim):
    x = SparsePrefillCase("", S_q=3, Hq=4, topk=20).call().arguments
    assert_same(lambda **x: deepseek.flash_mla_sparse_fwd(**x, backend="triton"), x, "q", dim)


@pytest.mark.parametrize(("name", "dim"), [("q", 1), ("q", 2), ("indices", 1), ("k_cache", 0)])
def test_sparse_decode(name, dim):
    x = SparseDecodeCase("", B=2, S_q=3, Hq=4, topk=20, format=None, softmax_scale=0.05).call().arguments
    assert_same(lambda **x: deepseek.flash_mla_with_kvcache(**x, backend="triton"), x, name, dim)


@pytest.mark.parametrize(("name", "dim"), [("q", 0), ("q", 1), ("weights", 0)])
def test_index(name, dim):
    x = {"q": torch.randn(3, 4, 32).to(FP8), "weights": torch.randn(3, 4)}
    kv = torch.randn(70, 32).to(FP8), torch.rand(70)
    starts, ends = torch.tensor([[0] * 3, [70] * 3])

    def scores(q, weights):
        return (indexer.mqa_logits(q, kv, weights, starts, ends, backend="triton"),)

    assert_same(scores, x, name, dim)


@pytest.mark.parametrize(("name", "dim"), [("q", 1), ("q", 2), ("weights", 1)])
def test_paged_index(name, dim):
    rows = indexer.INDEX_ROWS
    x = {"q": torch.randn(2, 3, 4, rows.head_dim).to(FP8), "weights": torch.randn(2, 3, 4)}
    cache = rows.quantise(torch.randn(4, 64, 1, rows.head_dim).bfloat16())
    lengths, table = torch.tensor([100, 5]), torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)

    def scores(q, weights):
        return (indexer.paged_mqa_logits(q, cache, weights, lengths, table, backend="triton"),)

    assert_same(scores, x, name, dim)
