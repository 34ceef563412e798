"""The Hopper prefill on the GPU: several tiles a CTA, ragged lengths, pages and lists, hostile, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.backends.hopper import prefill
from flash_mla.problem import FP8
from flash_mla.testing import MhaCase, PrefillCase, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
LONG = PrefillCase("long", 1400, B=4, Hq=8, Hk=2, D=128, device="cuda", backend="hopper")
RAGGED = replace(LONG, lengths=(1400, 1, 0, 70))
PAGED = MhaCase("paged", 700, B=3, H=5, D=128, device="cuda", backend="hopper")
CASES = {f"ragged-{D}-{Dv}": replace(RAGGED, D=D, Dv=Dv) for D, Dv in WIDTHS}
CASES |= {f"full-{D}-{Dv}": replace(LONG, D=D, Dv=Dv, causal=False) for D, Dv in WIDTHS}
CASES |= {f"listed-{D}-{Dv}": replace(LONG, D=D, Dv=Dv, sparse="heads", causal=True) for D, Dv in WIDTHS}
CASES |= {f"fp8-{D}-{Dv}": replace(RAGGED, D=D, Dv=Dv, dtype=FP8, descale="tensor", sink=True) for D, Dv in WIDTHS}
CASES |= {f"fp8-full-{D}-{Dv}": replace(LONG, D=D, Dv=Dv, dtype=FP8, causal=False) for D, Dv in WIDTHS}
CASES |= {
    # more tiles than CTAs, of more heads than a section has
    "many-heads": replace(LONG, B=2, Hq=64, Hk=64, P=700),
    "many-heads-full": replace(LONG, B=2, Hq=64, Hk=64, P=700, causal=False),
    # pairs of tiles that share their keys, of few tiles, too: the last row tile is not full, nor is the last block
    "pairs": replace(LONG, B=3, Hq=40, P=1500, causal=False, sink=True),
    "pairs-causal": replace(LONG, B=3, Hq=40, P=2500, sink=True),
    "pairs-causal-192": replace(LONG, B=2, Hq=40, P=2200, D=192, Dv=128),
    "pairs-ragged": replace(RAGGED, P=2200, Hq=40, lengths=(2200, 1, 0, 130)),
    "pairs-ragged-full": replace(RAGGED, Hq=40, P=500, D=192, Dv=128, lengths=(500, 1, 0, 130), causal=False),
    "pairs-192": replace(LONG, B=2, Hq=40, P=1500, D=192, Dv=128, causal=False),
    "pairs-few": replace(LONG, B=1, Hq=2, P=200, causal=False, dtype=torch.float16),
    "many-groups": replace(LONG, B=3, Hq=128, Hk=16, P=450),
    "many-requests": replace(LONG, B=40, Hq=4, Hk=1, P=200, lengths=tuple(5 * i for i in range(40))),
    "one-tile": replace(LONG, B=1, Hq=1, Hk=1, P=1),
    "fp16": replace(RAGGED, dtype=torch.float16, sink=True),
    "fp8-many-groups": replace(LONG, B=3, Hq=128, Hk=16, P=450, dtype=FP8, descale="float"),
    "fp8-listed": replace(LONG, sparse="heads", causal=True, dtype=FP8, descale="tensor"),
    "descale": replace(RAGGED, descale="tensor", sink=True),
    "sliced": replace(RAGGED, sliced=True),
    "mask": replace(RAGGED, mask="bool-heads", causal=True, sink=True),
    "mask-listed": replace(RAGGED, mask="bool", sparse="heads"),
    "scale": replace(LONG, softmax_scale=2.0),
    "paged": PAGED,
    "paged-pool": replace(PAGED, layout="pool", write=False),
    "paged-chunk": replace(PAGED, P=300, starts=(450, 0, 63)),
    "paged-192": replace(PAGED, D=192, Dv=128, starts=(1, 64, 500)),
    "paged-fp8": replace(PAGED, dtype=FP8, descale="tensor"),
    "paged-fp8-pool": replace(PAGED, dtype=FP8, descale="float", layout="pool", write=False),
    "paged-fp8-192": replace(PAGED, D=192, Dv=128, starts=(1, 64, 500), dtype=FP8, causal=False),
    "paged-mask": replace(PAGED, mask="bool-heads", causal=True),
}


@pytest.mark.parametrize("name", CASES)
def test_prefill(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("pairs"):
        monkeypatch.setattr(prefill, "LEAST_TILES", {128: (2, 2), 192: (2, 2)})
    result = run(CASES[name])
    assert result.passed, str(result)
