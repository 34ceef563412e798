"""The Hopper MLA decode over FP8 caches on the GPU: shapes and layouts beyond `flash-mla check`, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import flash_mla
from flash_mla.backends import hopper
from flash_mla.problem import FP8
from flash_mla.testing import CASES as CHECKED
from flash_mla.testing import DecodeCase, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 200, 1000, 4097)
MLA = DecodeCase(
    "mla-fp8",
    LENGTHS,
    Hq=128,
    Hk=1,
    D=576,
    Dv=512,
    dtype=FP8,
    kv_dtype=FP8,
    descale="tensor",
    alias=True,
    device="cuda",
    backend="hopper",
)
FEW = replace(MLA, Hq=16)
MANY = tuple((37 * i * i + 11 * i) % 1500 for i in range(300))
CASES = {
    # two row tiles share K (clusters of 2), one does not
    "heads-128": MLA,
    "heads-64": replace(MLA, Hq=64),
    "heads-32": replace(MLA, Hq=32),
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
    # widths, factors, layouts
    "no-rope": replace(MLA, D=512),
    "no-rope-heads-16": replace(FEW, D=512, S_q=2),
    "no-descale": replace(MLA, descale=None),
    "descale-float": replace(FEW, descale="float"),
    "sliced": replace(MLA, layout="sliced"),
    "pool": replace(MLA, layout="pool", sink=True),
    "engine": replace(MLA, layout="serving"),
    # split among all clusters, in many, and in a few of many requests
    "one-long": replace(MLA, lengths=(20000,)),
    "one-block": replace(MLA, lengths=(64,)),
    "requests": replace(FEW, lengths=MANY, layout="pool", S_q=2),
    "requests-heads-128": replace(MLA, lengths=MANY[:150], layout="pool"),
    # teams: of one to eight CTAs, one or several of an item, one pair of blocks a CTA or more
    "team-1": replace(MLA, lengths=(128, 0, 65), sink=True),
    "team-2": replace(MLA, lengths=(129, 0, 256), spare=0, sink=True),
    "team-8": replace(MLA, lengths=(1024, 900), spare=0, layout="pool"),
    "teams": replace(FEW, lengths=(4096, 3000, 1), S_q=2, sink=True),
    "teams-heads-128": replace(MLA, lengths=(4000,), D=512),
    "teams-heads-7": replace(FEW, Hq=7, lengths=(0, 1024, 130), spare=48),
    "teams-of-2-pairs": replace(MLA, lengths=(8000,), sink=True),
    "teams-of-4-pairs": replace(FEW, lengths=(16000, 100), index_dtype=torch.int64),
    "int64": replace(FEW, index_dtype=torch.int64),
}


@pytest.mark.parametrize("q_dtype", [FP8, torch.bfloat16, torch.float16], ids=["fp8", "bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_mla_decode_fp8(name: str, q_dtype: torch.dtype) -> None:
    result = run(replace(CASES[name], dtype=q_dtype))
    assert result.passed, str(result)


@pytest.mark.parametrize("heads", [16, 128])
def test_the_drop_in_gives_inf_to_a_query_without_keys(heads: int) -> None:
    """The case's reference and DeepSeek's convention: lse +inf; our own calls above have -inf there."""
    case = next(case for case in CHECKED if case.name == "deepseek/dense-fp8-full")
    result = run(replace(case, Hq=heads, lengths=LENGTHS, device="cuda", backend="hopper"))
    assert result.passed, str(result)


@pytest.mark.parametrize("heads", [16, 128])
def test_small_weights_survive(heads: int) -> None:
    """One key far above 20000 others that together outweigh it: each of them is 2^-13 of it."""
    length, D, Dv = 20001, 576, 512
    blocks = -(-length // 64)
    k = torch.randn((1, 1, blocks, 64, D), device="cuda").to(FP8)
    k[..., Dv:] = 0
    k[0, 0, 0, 0, Dv] = 13.0
    q = torch.zeros((1, heads, 1, D), device="cuda").to(FP8)
    q[..., Dv] = 1.0
    table = torch.arange(blocks, device="cuda", dtype=torch.int32)[None]
    lengths = torch.tensor([length], device="cuda", dtype=torch.int32)
    scale = math.log(2.0)
    out = flash_mla.flash_mla_with_kvcache(
        q, k, k[..., :Dv], table, lengths, softmax_scale=scale, backend="hopper"
    ).double()
    v = k[0, 0].reshape(-1, D)[:length, :Dv].double()
    weights = torch.ones(length, dtype=torch.float64, device="cuda")
    weights[0] = 2.0**13
    want = weights @ v / weights.sum()
    error = (out[0, :, 0] - want).abs().max() / want.abs().max()
    assert error <= 6e-2


@pytest.mark.parametrize("heads", [1, 16, 32])
@pytest.mark.parametrize("length", [1024, 32768])
def test_queries_of_16_bits_keep_their_accuracy(heads: int, length: int) -> None:
    """Few heads: two terms of q and of P, sums in FP32: as BF16 products."""
    case = replace(MLA, Hq=heads, lengths=(length,), dtype=torch.bfloat16)
    result = run(case)
    assert result.passed, str(result)
    assert result.verdict is not None
    # NOTE: the cosine distance is half the square of the relative error
    assert math.sqrt(2 * max(result.verdict.cosine, 0.0)) <= 3e-3
