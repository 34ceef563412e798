"""The Hopper MLA decode on the GPU: shapes, layouts and lengths beyond `flash-mla check`, hostile, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.testing import DecodeCase, DenseDecodeCase, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 200, 1000, 4097)
MLA = DecodeCase("mla", LENGTHS, Hq=128, Hk=1, D=576, Dv=512, alias=True, device="cuda", backend="hopper")
FEW = replace(MLA, Hq=16)
TOKENS = DenseDecodeCase("tokens", LENGTHS, S_q=3, Hq=128, device="cuda", backend="hopper")
"""q and out as [b, s_q, h_q, d]."""
MANY = tuple((37 * i * i + 11 * i) % 1500 for i in range(300))
SHORT = (0, 1, 63, 64, 65, 127, 128)
CASES = {
    # two row tiles share K (clusters of 2), one does not
    "heads-128": MLA,
    "heads-64": replace(MLA, Hq=64),
    "heads-16": FEW,
    "heads-1": replace(MLA, Hq=1),
    "heads-7": replace(MLA, Hq=7, sink=True),
    "heads-96": replace(MLA, Hq=96),
    "heads-192": replace(MLA, Hq=192, lengths=(700, 0, 4097)),
    # rows of several tokens; the first queries of a short request see no key
    "queries-2": replace(MLA, S_q=2, sink=True),
    "queries-3-heads-40": replace(MLA, Hq=40, S_q=3),
    "queries-8-heads-16": replace(FEW, S_q=8),
    "queries-8-heads-128": replace(MLA, S_q=8, lengths=(7, 600, 0, 3)),
    # widths, dtypes, layouts
    "no-rope": replace(MLA, D=512),
    "no-rope-heads-16": replace(FEW, D=512, S_q=2),
    "fp16": replace(MLA, dtype=torch.float16),
    "fp16-heads-16": replace(FEW, dtype=torch.float16),
    "sliced": replace(MLA, layout="sliced"),
    "pool": replace(MLA, layout="pool", sink=True),
    "engine": replace(MLA, layout="serving"),
    # split among all clusters, in many, and in a few of many requests
    "one-long": replace(MLA, lengths=(20000,)),
    "one-block": replace(MLA, lengths=(64,)),
    "requests": replace(FEW, lengths=MANY, layout="pool", S_q=2),
    "requests-heads-128": replace(MLA, lengths=MANY[:150], layout="pool"),
    # few rows over tables of one pair of blocks: a kernel variant of its own
    "short": replace(MLA, lengths=SHORT, spare=0, sink=True),
    "short-heads-16": replace(FEW, lengths=SHORT, spare=0, S_q=2),
    "short-no-rope-fp16": replace(MLA, lengths=SHORT, spare=0, D=512, dtype=torch.float16),
    "short-masked": replace(FEW, lengths=SHORT[1:], spare=0, mask="bool-heads"),
    "short-heads-192": replace(MLA, Hq=192, lengths=SHORT, spare=0, layout="pool"),
    # teams: of two to eight CTAs, one or several of an item, one pair of blocks a CTA or more
    "team-2": replace(MLA, lengths=(129, 0, 256), spare=0, sink=True),
    "team-4": replace(FEW, lengths=(400, 1, 65, 0), spare=0, S_q=2),
    "team-8": replace(MLA, lengths=(1024, 900), spare=0, layout="pool", sink=True),
    "teams": replace(FEW, lengths=(4096, 3000, 1), S_q=2, sink=True),
    "teams-heads-128": replace(MLA, lengths=(4000,), layout="sliced"),
    "teams-heads-7": replace(FEW, Hq=7, lengths=(0, 1024, 130), spare=48),
    "teams-masked": replace(FEW, lengths=(1000, 2000), mask="bool-heads"),
    "teams-fp16": replace(MLA, lengths=(2000,), D=512, dtype=torch.float16),
    "teams-of-2-pairs": replace(MLA, lengths=(8000,), sink=True),
    "teams-of-4-pairs": replace(FEW, lengths=(16000, 100), index_dtype=torch.int64),
    "int64": replace(FEW, index_dtype=torch.int64),
    "scale": replace(MLA, softmax_scale=0.31),
    "tokens": TOKENS,
    "tokens-heads-16": replace(TOKENS, S_q=8, Hq=16, sink=True),
    "tokens-one-long": replace(TOKENS, lengths=(20000,), S_q=2),
}


@pytest.mark.parametrize("name", CASES)
def test_mla_decode(name: str) -> None:
    result = run(CASES[name])
    assert result.passed, str(result)
