"""The Hopper sparse prefill on the GPU: heads, ids and rows of all kinds, hostile, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla import deepseek
from flash_mla.backends import hopper
from flash_mla.backends.hopper import sparse_prefill
from flash_mla.plan import plan
from flash_mla.reference import sparse_reference
from flash_mla.testing import SparsePrefillCase, check, library_lse, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

BASE = SparsePrefillCase("prefill", S_q=9, S_kv=1000, Hq=128, topk=300, device="cuda", backend="hopper")
CASES = {
    "heads-128": BASE,
    "heads-1": replace(BASE, Hq=1),
    "heads-16": replace(BASE, Hq=16, sink=True),
    "heads-7": replace(BASE, Hq=7, lengths=True, sink=True),
    "heads-9": replace(BASE, Hq=9, dtype=torch.float16),
    "heads-16-many": replace(BASE, S_q=300, Hq=16, topk=130, lengths=True),
    "heads-63": replace(BASE, Hq=63),
    "heads-65": replace(BASE, Hq=65, sink=True),
    "heads-192": replace(BASE, Hq=192),
    "one-id": replace(BASE, topk=1),
    "ids-64": replace(BASE, topk=64),
    "ids-129": replace(BASE, topk=129, lengths=True),
    "ids-2048": replace(BASE, topk=2048, lengths=True, sink=True),
    "one-row": replace(BASE, S_kv=1),
    "no-rope": replace(BASE, D=512, lengths=True),
    "fp16": replace(BASE, dtype=torch.float16, sink=True),
    "many-tokens": replace(BASE, S_q=300, Hq=64, topk=70, lengths=True),
    "scale-small": replace(BASE, softmax_scale=1e-4),
}


@pytest.fixture(params=[False, True], ids=["as-given", "in-order"])
def order(request, monkeypatch):
    """Whether ids are ordered first, whatever the size of the call."""
    monkeypatch.setattr(sparse_prefill, "ORDER_BYTES", -1 if request.param else 2**62)
    monkeypatch.setattr(sparse_prefill, "ORDER_TOKENS", 1)
    monkeypatch.setattr(sparse_prefill, "ORDER_TOPK", 1)
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("name", CASES)
def test_sparse_prefill(name: str) -> None:
    result = run(CASES[name])
    assert result.passed, str(result)


@pytest.mark.usefixtures("order")
def test_replays_new_ids() -> None:
    """One call that never waits for the GPU, then a graph whose ids and lengths change in place."""
    call = replace(BASE, lengths=True).call()
    x = call.arguments
    deepseek.flash_mla_sparse_fwd(**x, backend="hopper")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        deepseek.flash_mla_sparse_fwd(**x, backend="hopper")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _, lse = deepseek.flash_mla_sparse_fwd(**x, backend="hopper")
    x["indices"].copy_(x["indices"].flip(0, 2))
    x["topk_length"].copy_(x["topk_length"].flip(0))
    ((rows, indices, lengths),) = call.reference["pools"]
    # rows that the new ids name may hold NaN: give them numbers, in both
    x["kv"].nan_to_num_(0.5)
    graph.replay()
    true_out, true_lse, _ = sparse_reference(**{**call.reference, "pools": [(rows.nan_to_num(0.5), indices, lengths)]})
    verdict = check(
        out.transpose(0, 1).unsqueeze(0), library_lse(lse).T.unsqueeze(0),
        true_out.squeeze(2).transpose(0, 1).unsqueeze(0), true_lse.squeeze(2).T.unsqueeze(0), BASE.dtype,
    )  # fmt: skip
    assert verdict.passed, verdict.failures


def test_out_past_32_bits() -> None:
    """The last token of 33000 with 128 heads begins past element 2^31 of out."""
    tokens = 33000
    q = torch.zeros(tokens, 128, 576, dtype=torch.bfloat16, device="cuda")
    kv = torch.arange(64, device="cuda").to(torch.bfloat16).view(64, 1, 1).expand(64, 1, 576).contiguous()
    indices = (torch.arange(tokens, device="cuda", dtype=torch.int32) % 64).view(tokens, 1, 1)
    out, _, _ = deepseek.flash_mla_sparse_fwd(q, kv, indices, 1.0, backend="hopper")
    assert torch.equal(out[:, ::127, ::73], indices.to(out.dtype).expand(tokens, 2, 8))
