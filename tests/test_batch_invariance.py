"""batch_invariant=True: a request's rows are the same bits alone and in any batch, and right."""

from __future__ import annotations

import os

import pytest
import torch

from flash_mla import PagedKVCache, ShapeError, decode_over_pages, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.backends import hopper
from flash_mla.problem import FP8
from flash_mla.reference import decode_reference
from flash_mla.testing import DecodeCase, check

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRET
BACKENDS = [*([] if hopper.available() else ["hopper"]), "triton"] if ON_GPU else ["triton" if INTERPRET else "cpu"]
pytestmark = [] if ON_GPU else pytest.mark.usefixtures("cpu_engine")

# pieces are 2048 tokens or more (the interpreter's: 64), and at most sixteen (four) a request: lengths around their end
LENGTHS = (65, 70, 0, 330, 1, 64)
LONG = (2049, 70, 0, 4500, 1, 2048, 4096, 4097, 33000, 66001, 128, 8191, 8193)
SMALL = {
    "gqa": dict(Hq=8, Hk=2, D=32),
    "gqa-tokens": dict(Hq=4, Hk=2, D=32, S_q=3, sink=True, layout="pool"),
    "mla": dict(Hq=4, Hk=1, D=48, Dv=32, alias=True),
    "mask": dict(Hq=4, Hk=2, D=32, S_q=2, mask="bool-rows"),
    "fp8": dict(Hq=4, Hk=2, D=32, dtype=FP8, descale="tensor"),
}
LARGE = {
    "gqa": dict(Hq=32, Hk=8, D=128, layout="pool"),
    "gqa-many-rows": dict(Hq=64, Hk=2, D=128, S_q=4, sink=True, layout="pool"),
    "gqa-fp8": dict(Hq=32, Hk=8, D=128, dtype=FP8, descale="tensor", layout="pool"),
    "gqa-256": dict(Hq=8, Hk=4, D=256, S_q=2),
    "mla-128-heads": dict(Hq=128, Hk=1, D=576, Dv=512, alias=True, sink=True, layout="pool"),
    "mla-64-heads": dict(Hq=64, Hk=1, D=576, Dv=512, alias=True, S_q=2, layout="pool"),
    "mla-16-heads": dict(Hq=16, Hk=1, D=576, Dv=512, alias=True, layout="pool"),
}
CASES = LARGE if ON_GPU else SMALL


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """At most four pieces of a block or more, where the interpreter takes milliseconds a block."""
    if INTERPRET:
        from flash_mla.kernels.triton import combine, decode, share

        for module in (combine, decode, share):
            monkeypatch.setattr(module, "PIECE", 1)
            monkeypatch.setattr(module, "MOST_PIECES", 4)


def arguments(name: str):
    """A hostile call of all requests."""
    lengths, device = (LONG, "cuda") if ON_GPU else (LENGTHS, "cpu")
    case = DecodeCase(name, lengths, device=device, softmax_scale=0.1, **CASES[name])
    return case, case.call().arguments


def cache_of(cache, requests, order):
    """The cache of some requests, its blocks in another order."""
    pool = cache.stride(0) == 0
    own = cache[:1] if pool else cache[requests]
    blocks = own.view(torch.uint8)[:, :, order].view(cache.dtype)
    return blocks.expand(len(requests), -1, -1, -1, -1) if pool else blocks


def some(x, requests):
    """The same call with some of its requests, in that order: their pages elsewhere, the table as wide as they need."""
    B, Nblk = x["q"].shape[0], x["k_cache"].shape[2]
    own = {n: t[requests] if isinstance(t, torch.Tensor) and t.shape[0] == B and n != "attn_sink" else t
           for n, t in x.items() if n not in ("k_cache", "v_cache")}  # fmt: skip
    order = torch.randperm(Nblk, generator=torch.Generator().manual_seed(1)).to(x["q"].device)
    own["k_cache"] = cache_of(x["k_cache"], requests, order)
    if x["v_cache"].data_ptr() == x["k_cache"].data_ptr():
        own["v_cache"] = own["k_cache"][..., : x["v_cache"].shape[-1]]
    else:
        own["v_cache"] = cache_of(x["v_cache"], requests, order)
    table = own["block_table"][:, : max(1, -(-int(own["seq_lens"].max()) // 64))]
    own["block_table"] = order.argsort().int()[table.clamp(0, Nblk - 1).long()].contiguous()
    return own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_request_is_the_same_in_every_batch(name, backend):
    case, x = arguments(name)
    out, lse = flash_mla_with_kvcache(**x, batch_invariant=True, return_lse=True, backend=backend)
    # NOTE: float64 takes minutes for the long ones; the split that their other tests hold against it stands in
    expected = flash_mla_with_kvcache(**x, return_lse=True, backend=backend) if ON_GPU else decode_reference(**x)
    verdict = check(out, lse, *(t.double() for t in expected), case.budget)
    assert verdict.passed, verdict.failures
    B = len(case.lengths)
    alone = [0, 3] if INTERPRET else range(B)
    batches = [*([b] for b in alone), [*range(B)][::-1], [1, 3, 3], [B - 1] * (4 if INTERPRET else 40) + [0]]
    for requests in batches:
        own = some(x, requests)
        again = flash_mla_with_kvcache(**own, batch_invariant=True, return_lse=True, backend=backend)
        assert torch.equal(again[0], out[requests]), f"requests {requests}"
        assert torch.equal(again[1], lse[requests]), f"requests {requests}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_door_gives_the_same(backend):
    """With metadata, into `out`, compiled, over an engine's pages, and of a PagedKVCache."""
    case, x = arguments("gqa")
    del x["mask"]
    options = dict(batch_invariant=True, backend=backend)
    expected = flash_mla_with_kvcache(**x, **options)
    metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"], check_values=False)
    out = torch.full_like(expected, float("nan"))
    assert torch.equal(flash_mla_with_kvcache(**x, metadata=metadata, out=out, **options), expected)
    compiled = torch.compile(flash_mla_with_kvcache, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**x, metadata=metadata, **options), expected)

    # the pages of request b as an engine's pool
    b = 3
    one = some(x, [b])
    pages = [one[n][0].transpose(0, 1) for n in ("k_cache", "v_cache")]
    options["softmax_scale"] = case.softmax_scale
    result = decode_over_pages(one["q"], *pages, one["block_table"], one["seq_lens"], layout="HND", **options)
    assert torch.equal(result, expected[b : b + 1])

    rows = [one[n][0][:, one["block_table"][0].long()].flatten(1, 2)[None, :, : case.lengths[b]]
            for n in ("k_cache", "v_cache")]  # fmt: skip
    cache = PagedKVCache(1, case.Hk, case.D, max_seq_len=case.lengths[b], device=case.device)
    cache.append(*rows)
    assert torch.equal(cache.decode(one["q"], **options), expected[b : b + 1])


def test_it_is_a_flag():
    _, x = arguments("gqa")
    with pytest.raises(ShapeError, match="batch_invariant"):
        flash_mla_with_kvcache(**x, batch_invariant=2)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replay_with_other_lengths(backend):
    _, x = arguments("gqa")
    metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"], check_values=False)
    options = dict(metadata=metadata, batch_invariant=True, backend=backend)
    flash_mla_with_kvcache(**x, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_mla_with_kvcache(**x, **options)
    x["seq_lens"] //= 2
    graph.replay()
    assert torch.equal(out, flash_mla_with_kvcache(**x, **options))
