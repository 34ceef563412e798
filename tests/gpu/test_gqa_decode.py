"""The Hopper GQA decode on the GPU: shapes, layouts and dtypes beyond `flash-mla check`, hostile, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.problem import FP8
from flash_mla.testing import DecodeCase, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

LENGTHS = (0, 1, 63, 64, 65, 128, 200, 1000, 4097)
GQA = DecodeCase("gqa", LENGTHS, Hq=32, Hk=8, D=128, device="cuda", backend="hopper")
SMALL = replace(GQA, Hq=8, Hk=2)
CASES = {
    "slab": GQA,
    "sliced": replace(GQA, layout="sliced"),
    "pool": replace(GQA, layout="pool", sink=True),
    "engine": replace(GQA, layout="serving"),
    "one-block": replace(GQA, lengths=(64,)),
    "long": replace(GQA, lengths=(4097,)),
    # teams: of one to eight CTAs, one or several of an item
    "team-1": replace(GQA, lengths=(128,), spare=0, sink=True),
    "team-4": replace(GQA, lengths=(300, 0, 65), spare=0),
    "team-8": replace(GQA, lengths=(1024,), spare=0, S_q=2, layout="pool"),
    "teams": replace(SMALL, lengths=(4000, 1), sink=True),
    "teams-fp8": replace(GQA, Hq=64, Hk=1, lengths=(2000, 0, 1000), dtype=FP8, descale="tensor"),
    "teams-bf16-over-fp8": replace(SMALL, lengths=(1000, 2000), kv_dtype=FP8),
    "teams-rows-64": replace(GQA, Hq=64, Hk=1, lengths=(3000, 70)),
    "teams-256": replace(SMALL, D=256, lengths=(1024, 500)),
    "teams-masked": replace(SMALL, D=64, lengths=(1000, 2000), mask="bool-heads"),
    "teams-scale-negative": replace(SMALL, D=96, Dv=8, lengths=(700,), softmax_scale=-0.2),
    "requests": replace(SMALL, lengths=tuple((37 * i * i + 11 * i) % 1500 for i in range(300)), layout="pool", S_q=2),
    "queries-2": replace(GQA, S_q=2, sink=True),
    "queries-8": replace(GQA, S_q=8, sink=True),
    "heads-1": replace(GQA, Hq=1, Hk=1),
    "heads-1-queries-2": replace(GQA, Hq=1, Hk=1, S_q=2),
    "mha": replace(GQA, Hq=6, Hk=6, layout="serving"),
    "mqa": replace(GQA, Hq=64, Hk=1, layout="pool"),
    "rows-16": replace(GQA, Hk=2),
    "rows-168": replace(GQA, Hq=48, Hk=2, S_q=7, sink=True),
    "alias": replace(SMALL, Dv=64, alias=True),
    "scale-negative": replace(GQA, softmax_scale=-0.2),
    "scale-zero": replace(GQA, softmax_scale=0.0),
    "descale": replace(GQA, descale="tensor"),
    "fp16-64": replace(SMALL, D=64, dtype=torch.float16),
    "96": replace(SMALL, D=96),
    "192-128": replace(SMALL, D=192, Dv=128),
    "256": replace(SMALL, D=256),
    "256-rows-64": replace(GQA, Hk=1, D=256, S_q=2),
    "fp8": replace(GQA, dtype=FP8),
    "fp8-descale": replace(GQA, dtype=FP8, descale="tensor", layout="serving", sink=True),
    "fp8-64": replace(SMALL, D=64, dtype=FP8, descale="float"),
    "fp8-96": replace(SMALL, D=96, dtype=FP8),
    "fp8-256": replace(SMALL, D=256, dtype=FP8),
    "fp8-mqa": replace(GQA, Hq=64, Hk=1, dtype=FP8),
}


@pytest.mark.parametrize("name", CASES)
def test_gqa_decode(name: str) -> None:
    result = run(CASES[name])
    assert result.passed, str(result)
