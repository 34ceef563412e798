"""The Hopper sparse backward on the GPU: heads, slots and chunks of all kinds, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.backends.hopper import sparse_backward
from flash_mla.backends.triton import sparse_backward as chunks
from flash_mla.testing import run
from flash_mla.testing.gradient_cases import SparseGradientCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

BASE = SparseGradientCase("", S_q=50, S_kv=300, topk=200, Hq=128, D=576, Dv=512, dtype=torch.bfloat16, device="cuda")
CASES = {
    "base": BASE,
    "sink-lengths": replace(BASE, sink=True, lengths=True),
    "fp16": replace(BASE, dtype=torch.float16, sink=True, lengths=True),
    "d512": replace(BASE, D=512, sink=True),
    "heads-64": replace(BASE, Hq=64, lengths=True),
    "heads-65": replace(BASE, Hq=65, sink=True),
    "heads-3": replace(BASE, Hq=3, sink=True),
    "slots-1": replace(BASE, topk=1, S_kv=20),
    "slots-33": replace(BASE, topk=33),
    "slots-64": replace(BASE, topk=64, expanded=True),
    "slots-97": replace(BASE, topk=97, lengths=True),
    "slots-2048": replace(BASE, topk=2048, S_q=9, S_kv=9000),
    "two-tokens": replace(BASE, S_q=2),
    "fp16-slots-3": replace(BASE, dtype=torch.float16, topk=3),
    "scale": replace(BASE, softmax_scale=-0.04),
}


@pytest.mark.parametrize("workspace", [chunks.WORKSPACE, 1])
@pytest.mark.parametrize("name", CASES)
def test_backward(name: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged against float64; with all tokens in the workspace, and with 16 at a time."""
    launches: list[object] = []
    launch = sparse_backward.launch
    monkeypatch.setattr(chunks, "WORKSPACE", workspace)
    monkeypatch.setattr(sparse_backward, "launch", lambda *args: (launches.append(args), launch(*args)))
    result = run(CASES[name])
    assert result.passed, str(result)
    assert launches, "another backend computed it"
