"""The Hopper sparse decode on the GPU: rows, caches, heads and lengths, hostile, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flash_mla import deepseek
from flash_mla.backends import hopper
from flash_mla.backends.hopper import sparse_decode
from flash_mla.plan import plan
from flash_mla.reference import format_rows
from flash_mla.testing import run
from flash_mla.testing.budget import check
from flash_mla.testing.deepseek_cases import SparseDecodeCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

V32 = SparseDecodeCase("v3.2", Hq=128, topk=700, device="cuda", backend="hopper")
FEW = replace(V32, Hq=16)
MODEL1 = replace(V32, format="model1", D=512, Hq=64, extra_topk=129, page=256, extra_page=53)
V41 = replace(V32, format="v4.1", D=512)
FLAT = replace(V32, format="flat", page=7)
BF16 = replace(V32, format=None)
CASES = {
    # two CTAs share a token's keys; one does not; heads as the N of the products
    **{f"heads-{heads}": replace(V32, Hq=heads, sink=True) for heads in (128, 65, 130, 64, 33, 32, 17, 16, 8, 1)},
    # how many keys: none, one, around a block and a pair; more than a wave of tokens; split among all clusters
    **{f"topk-{topk}": replace(V32, topk=topk) for topk in (1, 63, 64, 65, 128, 129)},
    **{f"topk-{topk}-many": replace(V32, B=20, topk=topk) for topk in (1, 64, 129)},
    **{f"topk-{topk}-heads-16": replace(FEW, topk=topk) for topk in (1, 63, 64, 65, 128, 129)},
    "tokens": replace(V32, B=70, S_q=3, topk=200, lengths=True),
    "tokens-heads-8": replace(FEW, Hq=8, B=100, S_q=3, topk=300, lengths=True),
    "queries-9": replace(FEW, S_q=9),
    # teams: of one to eight CTAs, one or several of an item, one pair of blocks a CTA or more
    "team-1": replace(FEW, B=30, topk=100, lengths=True, sink=True),
    "team-2": replace(V32, B=4, topk=512, lengths=True, sink=True),
    "team-5": replace(MODEL1, S_q=1, lengths=True, topk=128, extra_topk=512),
    "team-8": replace(FEW, S_q=1, B=7, topk=2000, lengths=True, sink=True),
    "teams": replace(FEW, S_q=1, topk=2048, sink=True),
    "teams-heads-64": replace(V32, Hq=64, B=8, S_q=1, topk=2048, lengths=True),
    "teams-8": replace(FEW, Hq=8, B=2, S_q=1, topk=16000, lengths=True),
    "teams-bf16": replace(BF16, Hq=64, B=2, S_q=1, topk=1500, sink=True),
    # long enough for raw rows beside 64 heads
    "heads-64-long": replace(V32, Hq=64, B=43, lengths=True, sink=True),
    "heads-33-long-extra": replace(V32, Hq=33, B=32, topk=500, extra_topk=500, page=53),
    "one-long": replace(V32, B=1, S_q=1, topk=16384),
    "one-long-heads-16": replace(FEW, B=1, S_q=1, topk=16384),
    # rows
    "model1": MODEL1,
    "model1-heads-128": replace(MODEL1, Hq=128, lengths=True),
    "model1-heads-8": replace(MODEL1, Hq=8, lengths=True, sink=True),
    "v4.1": V41,
    "v4.1-heads-64": replace(V41, Hq=64, extra_topk=64, extra_page=2),
    "v4.1-heads-16": replace(V41, Hq=16, lengths=True),
    "flat": FLAT,
    "flat-heads-64": replace(FLAT, Hq=64),
    "flat-heads-16": replace(FLAT, Hq=16),
    "bf16": BF16,
    "bf16-heads-64": replace(BF16, Hq=64, extra_topk=200),
    "bf16-heads-16": replace(BF16, Hq=16, lengths=True),
    "bf16-512": replace(BF16, D=512, sink=True),
    "bf16-512-heads-8": replace(BF16, D=512, Hq=8),
    # caches: two, pages at a pitch of their own, of one row
    "extra": replace(V32, extra_topk=500, lengths=True),
    "extra-heads-16": replace(FEW, extra_topk=500, lengths=True),
    "apart": replace(V32, apart=8192 + 16, extra_topk=65),
    "apart-heads-16": replace(FEW, apart=16),
    "apart-model1": replace(MODEL1, apart=576 * 3),
    "page-1": replace(V32, page=1),
    "scale": replace(V32, softmax_scale=1.0),
    "scale-heads-16": replace(FEW, softmax_scale=1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_sparse_decode(name: str) -> None:
    result = run(CASES[name])
    assert result.passed, str(result)


@pytest.fixture
def no_teams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls are computed as larger ones are."""
    monkeypatch.setattr(sparse_decode, "team", lambda _: None)
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.usefixtures("no_teams")
@pytest.mark.parametrize("name", CASES)
def test_without_teams(name: str) -> None:
    result = run(CASES[name])
    assert result.passed, str(result)


@pytest.mark.parametrize(("heads", "B"), [(128, 40), (16, 70), (16, 5), (64, 3)])
def test_replay_sees_new_lengths_and_indices(heads: int, B: int) -> None:
    """The last two calls are computed by teams."""
    case = replace(V32, Hq=heads, B=B, lengths=True)
    call, later = case.call(), replace(case, seed=1).call()
    moving = ("k_cache", "indices", "topk_length", "q")
    static = {name: call.arguments[name].clone() for name in moving}
    # rows that the first call does not name hold NaN; what a row holds must come with the indices
    arguments = {**call.arguments, **static, "backend": "hopper"}
    deepseek.flash_mla_with_kvcache(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = deepseek.flash_mla_with_kvcache(**arguments)
    for name in moving:
        static[name].copy_(later.arguments[name])
    graph.replay()
    want = deepseek.flash_mla_with_kvcache(**{**later.arguments, "backend": "hopper"})
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


@pytest.mark.parametrize("heads", [64, 16, 8])
@pytest.mark.parametrize("power", [-40, 0, 30])
def test_scales_and_heads_of_any_magnitude(heads: int, power: int) -> None:
    """Up to 64 heads rows keep their scales: these lie up to 2^24 apart, heads up to 2^9, and q has any size."""
    case = replace(V32, Hq=heads, B=90 if heads == 64 else 3, topk=300)
    call, generator = case.call(), torch.Generator().manual_seed(power)

    def powers(lowest: int, shape: tuple[int, ...]) -> torch.Tensor:
        return (2.0 ** torch.randint(lowest, 1, shape, generator=generator)).cuda()

    rows = call.arguments["k_cache"].view(torch.uint8)[..., 512:528]
    scales = rows.contiguous().view(torch.float32)
    rows.copy_((scales * powers(-24, scales.shape)).view(torch.uint8))
    call.arguments["q"].mul_(powers(-9, (heads, 1)) * 2.0**power)
    call.arguments["softmax_scale"] = call.reference["softmax_scale"] = 0.05 * 2.0**-power
    (_, *rest), *_ = call.reference["pools"]
    call.reference["pools"] = [(format_rows(call.arguments["k_cache"], "fp8_ds_mla"), *rest)]
    verdict = check(*case.invoke(call), *case.truth(call), torch.bfloat16)
    assert not verdict.failures, verdict


def test_int64_indices_name_what_int32_ones_do() -> None:
    call = replace(V32, lengths=True).call()
    out, lse = deepseek.flash_mla_with_kvcache(**call.arguments, backend="hopper")
    indices = call.arguments["indices"].long()
    # past 32 bits, where the low half alone would name a row
    indices[indices < 0] = (1 << 32) + 5
    wide = {**call.arguments, "indices": indices, "topk_length": call.arguments["topk_length"].long()}
    again = deepseek.flash_mla_with_kvcache(**wide, backend="hopper")
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_out_past_32_bits() -> None:
    """The last request of 33000 with 128 heads begins past element 2^31 of out."""
    B = 33000
    q = torch.zeros(B, 1, 128, 576, dtype=torch.bfloat16, device="cuda")
    cache = torch.arange(64, device="cuda").to(torch.bfloat16).view(1, 64, 1, 1).expand(1, 64, 1, 576).contiguous()
    indices = (torch.arange(B, device="cuda", dtype=torch.int32) % 64).view(B, 1, 1)
    out, _ = deepseek.flash_mla_with_kvcache(q, cache, None, None, 512, indices=indices, backend="hopper")
    assert torch.equal(out[:, 0, ::127, ::73], indices.to(out.dtype).expand(B, 2, 8))
