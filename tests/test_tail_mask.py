"""tail_mask on decode: a mask over the newest tokens alone, on every backend and through every door."""

from __future__ import annotations

import os

import pytest
import torch

from flash_mla import MaskShapeError, PagedKVCache, decode_over_pages, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.backends import hopper
from flash_mla.problem import FP8
from flash_mla.reference import decode_reference
from flash_mla.testing import DecodeCase, check

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = [*([] if hopper.available() else ["hopper"]), "triton"] if ON_GPU else ["triton" if INTERPRET else "cpu"]
pytestmark = [] if ON_GPU else pytest.mark.usefixtures("cpu_engine")

# shorter than S_q, none, ends of blocks, and new tokens in one, two and (of 70) three blocks
LENGTHS = (130, 3, 0, 65, 64, 1)
SMALL = {
    "gqa": dict(Hq=4, Hk=2, D=64, S_q=5),
    "mla": dict(Hq=4, Hk=1, D=80, Dv=64, alias=True, S_q=3, sink=True),
    "fp8": dict(Hq=4, Hk=2, D=64, S_q=2, dtype=FP8, descale="tensor"),
    "many": dict(Hq=2, Hk=1, D=64, S_q=70, layout="pool"),
}
LARGE = SMALL | {
    "gqa-128": dict(Hq=32, Hk=8, D=128, S_q=8),
    "gqa-64-rows": dict(Hq=32, Hk=2, D=128, S_q=8, layout="serving"),
    "mla-16-heads": dict(Hq=16, Hk=1, D=576, Dv=512, alias=True, S_q=8),
    "mla-128-heads": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True, S_q=4, sink=True),
    "mla-many": dict(Hq=16, Hk=1, D=576, Dv=512, alias=True, S_q=70),
}
CASES = LARGE if ON_GPU else SMALL


def draw(case: DecodeCase, shape: str, dtype: torch.dtype) -> torch.Tensor:
    """A mask that hides a third of the new tokens, all of them from one query."""
    gen = torch.Generator().manual_seed(0)
    B, Hq = len(case.lengths) if "b" in shape else 1, case.Hq if "h" in shape else 1
    seen = torch.rand(B, Hq, case.S_q, case.S_q, generator=gen) < 0.67
    seen[:, :, 0] = False
    if dtype == torch.bool:
        return seen.to(DEVICE)
    bias = torch.randn(seen.shape, generator=gen)
    return torch.where(seen, bias, -torch.inf).to(dtype).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [("", torch.bool), ("bh", torch.bool), ("b", torch.float32), ("h", torch.bfloat16)]
)
@pytest.mark.parametrize("name", CASES)
def test_it_covers_the_newest_tokens(name, shape, dtype, backend):
    lengths = (*LENGTHS, 4100, 700) if ON_GPU else LENGTHS
    case = DecodeCase(name, lengths, device=DEVICE, softmax_scale=0.1, **CASES[name])
    x = case.call().arguments
    del x["mask"], x["tail_mask"]
    tail = draw(case, shape, dtype)
    if backend == "hopper" and (dtype != torch.bool or case.D == 80):
        backend = None  # another one serves
    out, lse = flash_mla_with_kvcache(**x, tail_mask=tail, return_lse=True, backend=backend)
    verdict = check(out, lse, *decode_reference(**x, tail_mask=tail), case.budget)
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_door_takes_it(backend):
    case = DecodeCase("doors", (130,), Hq=4, Hk=2, D=64, S_q=3, device=DEVICE)
    x = case.call().arguments
    del x["mask"], x["tail_mask"]
    tail = draw(case, "", torch.bool)
    options = dict(tail_mask=tail, backend=backend)
    expected = flash_mla_with_kvcache(**x, **options)
    metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"], check_values=False)
    compiled = torch.compile(flash_mla_with_kvcache, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**x, metadata=metadata, **options), expected)
    pages = [x[n][0].transpose(0, 1) for n in ("k_cache", "v_cache")]
    for causal in (True, False):
        result = decode_over_pages(
            x["q"], *pages, x["block_table"], x["seq_lens"], layout="HND", causal=causal, **options
        )
        assert torch.equal(result, expected)
    blocks = x["block_table"][0, :3].long()
    rows = [x[n][0][:, blocks].flatten(1, 2)[None, :, :130] for n in ("k_cache", "v_cache")]
    cache = PagedKVCache(1, case.Hk, case.D, max_seq_len=130, device=DEVICE)
    cache.append(*rows)
    torch.testing.assert_close(cache.decode(x["q"], **options), expected)


def test_it_is_a_square_alone():
    x = DecodeCase("wrong", (130,), S_q=3).call().arguments
    del x["tail_mask"]
    square = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for wrong in (square[..., :2], square[:, :, :1], square[0], square.expand(2, 1, 3, 3)):
        with pytest.raises(MaskShapeError, match="tail_mask"):
            flash_mla_with_kvcache(**x, tail_mask=wrong)
    x["mask"] = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    with pytest.raises(MaskShapeError, match="one of them"):
        flash_mla_with_kvcache(**x, tail_mask=square)
