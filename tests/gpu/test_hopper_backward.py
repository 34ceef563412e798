"""The Hopper backward on the GPU: several tiles and heads, ragged lengths, sinks, one token, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.backends.hopper import backward
from flash_mla.plan import plan
from flash_mla.testing import run
from flash_mla.testing.gradient_cases import GradientCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

LONG = GradientCase("long", 700, B=2, Hq=4, Hk=2, D=128, device="cuda", backend="hopper")
MLA = replace(LONG, D=192, Dv=128, Hk=4)
CASES = {
    "causal": LONG,
    "full": replace(LONG, causal=False),
    "ragged": replace(LONG, B=4, lengths=(700, 1, 0, 70), sink=True),
    "ragged-full": replace(LONG, B=4, lengths=(700, 1, 0, 130), causal=False),
    "fp16": replace(LONG, dtype=torch.float16, sink=True),
    "one-token": replace(LONG, P=1),
    "tokens-65": replace(LONG, P=65, d_out="expanded"),
    "tokens-129": replace(LONG, P=129, d_lse=False),
    "sliced": replace(LONG, sliced=True, d_out="strided"),
    "group-of-8": replace(LONG, Hq=16, Hk=2, P=300),
    "scale": replace(LONG, softmax_scale=0.31),
    "mla": MLA,
    "mla-ragged": replace(MLA, B=4, lengths=(700, 1, 0, 70), sink=True),
    "mla-full": replace(MLA, causal=False, P=257),
}


@pytest.mark.parametrize("workspace", [backward.WORKSPACE, 1])
@pytest.mark.parametrize("name", CASES)
def test_backward(name: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged against float64; with all heads in the workspace, and with one KV head at a time."""
    bound: list[object] = []
    bind = backward.bind
    monkeypatch.setattr(backward, "WORKSPACE", workspace)
    monkeypatch.setattr(backward, "bind", lambda *args: (bound.append(args), bind(*args))[1])
    # NOTE: a plan keeps the launch that it bound
    plan.cache_clear()
    result = run(CASES[name])
    plan.cache_clear()
    assert result.passed, str(result)
    assert bound, "another backend computed it"
