"""decode_over_pages: every layout of a serving engine against float64, and that it reads the pages where they lie."""

from __future__ import annotations

import math
import os

import pytest
import torch

from flash_mla import GradientError, ShapeError, decode_over_pages, deepseek, pages
from flash_mla.errors import BlockCountError, BlockTableError, LayoutError, SequenceLengthError
from flash_mla.reference import decode_reference
from flash_mla.testing import check

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
BACKENDS = [None, "triton"] if DEVICE == "cuda" else ["cpu", "triton"] if INTERPRET else ["cpu"]
LENGTHS = (130, 3, 0, 65)


def rope_columns(D):
    return 64 if D == 576 else 16


def pool(gen, N, page, Hk, D, dtype, layout, packing):
    """(k, v or None, k_rope or None) pools that hold NaN outside of their columns."""
    shape = {"NHD": (N, page, Hk), "HND": (N, Hk, page)}[layout]
    draw = lambda *s: torch.randn(*s, generator=gen).to(dtype).to(DEVICE)  # noqa: E731
    if packing == "apart":
        return draw(*shape, D), draw(*shape, D), None
    if packing == "tensor":
        both = draw(2, *shape, D)
        return both[0], both[1], None
    if packing == "row":
        both = draw(*shape, 2 * D + 8)
        return both[..., :D], both[..., D : 2 * D], None
    if packing == "padded":
        both = draw(*shape, 2, D + 16)
        return both[..., 0, :D], both[..., 1, :D], None
    if packing == "latent":
        return draw(*shape, D), None, None
    rope = rope_columns(D)
    return draw(*shape, D - rope), None, draw(*shape, rope + 8)[..., :rope]  # split


def truth(x, layout, page):
    """Float64 (out, lse) by copying the used rows into blocks of 64."""
    x = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in x.items()}
    q, k, v, k_rope = x["q"], x["k_pages"], x["v_pages"], x["k_rope_pages"]
    k = k if k_rope is None else torch.cat([k.float(), k_rope.float()], -1).to(k.dtype)
    v = k[..., : x["Dv"]] if v is None else v
    if layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    blocks = 3
    caches = []
    for rows in (k, v):
        cache = torch.zeros(q.shape[0], k.shape[2], blocks, 64, rows.shape[-1])
        for b, length in enumerate(x["seq_lens"].tolist()):
            for t in range(length):
                cache[b, :, t // 64, t % 64] = rows[int(x["block_table"][b, t // page]), t % page].float()
        caches.append(cache)
    table = torch.arange(blocks, dtype=torch.int32).expand(q.shape[0], blocks).contiguous()
    mask = x["mask"]
    if not x["causal"] and mask is None:
        mask = torch.ones(1, 1, 1, blocks * 64, dtype=torch.bool)
    names = ("q_descale", "k_descale", "v_descale", "attn_sink", "softmax_scale")
    return decode_reference(q.float(), *caches, table, x["seq_lens"], mask, **{n: x[n] for n in names})


CASES = {
    "page-16": dict(page=16),
    "page-32-hnd": dict(page=32, layout="HND", Hk=2),
    "page-64": dict(page=64, packing="tensor"),
    "page-128": dict(page=128, packing="row"),
    "page-128-hnd": dict(page=128, packing="apart", layout="HND", Hk=2),
    "page-16-row": dict(page=16, packing="row", S_q=3),
    "page-32-padded": dict(page=32, packing="padded", dtype=torch.float16, sink=True),
    "mla": dict(page=64, packing="latent", Hk=1, Hq=8, D=80, Dv=64),
    "mla-page-16": dict(page=16, packing="latent", Hk=1, Hq=8, D=80, Dv=64, S_q=2),
    "mla-half": dict(page=32, packing="latent", Hk=1, Hq=16, D=128, Dv=64, dtype=torch.float32, mask=True),
    "mla-fp8": dict(page=64, packing="latent", Hk=1, Hq=4, D=576, Dv=512, kv_dtype=FP8, descale=True),
    "split": dict(page=64, packing="split", Hk=1, Hq=8, D=80, S_q=2),
    "split-page-16": dict(page=16, packing="split", Hk=1, Hq=8, D=80, sink=True),
    "split-fp8": dict(page=32, packing="split", Hk=1, Hq=8, D=576, kv_dtype=FP8, descale=True),
    "fp8": dict(page=16, dtype=FP8, descale=True),
    "bf16-over-fp8": dict(page=64, dtype=BF16, kv_dtype=FP8, descale=True),
    "fp16-over-fp8": dict(page=16, dtype=torch.float16, kv_dtype=FP8, descale=True, packing="tensor"),
    "mask": dict(page=16, S_q=2, mask=True),
    "full": dict(page=32, S_q=3, causal=False, sink=True),
    "full-mla": dict(page=16, packing="latent", Hk=1, Hq=4, D=80, Dv=64, S_q=2, causal=False),
    "negative-scale": dict(page=16, softmax_scale=-0.2),
    "fp32": dict(page=16, dtype=torch.float32, packing="row"),
}


def make(page, layout="NHD", packing="apart", Hq=4, Hk=2, D=64, Dv=None, S_q=1, dtype=BF16, kv_dtype=None, sink=False,
         descale=False, mask=False, causal=True, softmax_scale=None):  # fmt: skip
    gen = torch.Generator().manual_seed(0)
    B, pages = len(LENGTHS), -(-160 // page)
    N = B * pages + 3
    k, v, rope = pool(gen, N, page, Hk, D, kv_dtype or dtype, layout, packing)
    ids = torch.randperm(N - 1, generator=gen)[: B * pages].view(B, pages).to(torch.int32)
    used = set()
    for b, length in enumerate(LENGTHS):
        ids[b, -(-length // page) :] = 2**31 - 1
        used |= set(ids[b, : -(-length // page)].tolist())
    for x in (k, v, rope):  # pages that no request uses, and slots past a length, hold NaN
        if x is None:
            continue
        rows = x if layout == "NHD" else x.transpose(1, 2)
        rows = rows.view(torch.uint8) if x.dtype == FP8 else rows
        for n in range(N):
            if n not in used:
                rows[n] = 0x7F if x.dtype == FP8 else math.nan
        for b, length in enumerate(LENGTHS):
            if length % page:
                rows[int(ids[b, length // page]), length % page :] = 0x7F if x.dtype == FP8 else math.nan
    q = torch.randn(B, S_q, Hq, D, generator=gen).to(dtype).transpose(1, 2)
    factor = torch.rand(B, Hk, generator=gen) + 0.5 if descale else None
    made = {
        "q": q, "k_pages": k, "v_pages": v, "k_rope_pages": rope, "block_table": ids,
        "seq_lens": torch.tensor(LENGTHS, dtype=torch.int32),
        "mask": torch.rand(B, 1, S_q, 140, generator=gen) > 0.3 if mask else None,
        "q_descale": None, "k_descale": factor, "v_descale": factor, "causal": causal, "softmax_scale": softmax_scale,
        "attn_sink": torch.randn(Hq, generator=gen) if sink else None,
        "Dv": D - rope_columns(D) if packing == "split" else Dv or D,
    }  # fmt: skip
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in made.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_pages(name, backend):
    case = CASES[name]
    x = make(**case)
    layout, page = case.get("layout", "NHD"), case["page"]
    want, want_lse = truth(x, layout, page)
    Dv = x.pop("Dv")
    options = {"layout": layout, "v_head_dim": Dv if case.get("packing") == "latent" else None, "backend": backend}
    dtype = FP8 if x["k_pages"].dtype == FP8 else x["q"].dtype
    out, lse = decode_over_pages(**x, **options, return_lse=True)
    verdict = check(out.cpu(), lse.cpu(), want, want_lse, dtype)
    assert verdict.passed, verdict.failures
    assert out.dtype == (BF16 if x["q"].dtype == FP8 else x["q"].dtype)
    # into an out that lies as q does
    B, Hq, S_q, _ = x["q"].shape
    memory = torch.full((B, S_q, Hq, Dv + 8), math.nan, dtype=out.dtype, device=DEVICE)
    given = memory[..., :Dv].transpose(1, 2)
    again = decode_over_pages(**x, **options, out=given, check_values=False)
    assert again.data_ptr() == memory.data_ptr()
    assert torch.equal(again, out)
    assert memory[..., Dv:].isnan().all()
    # both once more: what the first calls left serves now
    assert all(map(torch.equal, decode_over_pages(**x, **options, return_lse=True), (out, lse)))
    memory.fill_(math.nan)
    assert torch.equal(decode_over_pages(**x, **options, out=given, check_values=False), out)
    assert memory[..., Dv:].isnan().all()


@pytest.mark.parametrize("packing", ["apart", "row", "split", "latent"])
def test_time_follows_what_is_used(packing):
    """A pool of 64 times the pages moves no more bytes."""

    def allocated(pages):
        k, v, rope = pool(torch.Generator(), pages, 16, 2, 64, torch.float32, "NHD", packing)
        q = torch.randn(2, 4, 1, 64)
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
        lens = torch.tensor([60, 33], dtype=torch.int32)
        call = lambda: decode_over_pages(q, k, v, table, lens, k_rope_pages=rope, backend="cpu")  # noqa: E731
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())

    assert allocated(1024) == allocated(16)


REFUSALS = {
    "page": (lambda x: x.update(k_pages=x["k_pages"][:, :8], v_pages=x["v_pages"][:, :8]), BlockCountError, "16, 32"),
    "layout": (lambda x: x.update(layout="DHN"), ShapeError, "NHD"),
    "columns": (lambda x: x.update(k_pages=x["k_pages"][..., :48]), ShapeError, "differ in D"),
    "heads": (lambda x: x.update(v_pages=x["v_pages"][:, :, :1]), ShapeError, "v_pages"),
    "twice": (lambda x: x.update(v_head_dim=32), ShapeError, "V is given twice"),
    "pools": (lambda x: x.update(v_pages=x["v_pages"][1:]), ShapeError, "num_blocks"),
    "none": (lambda x: x.update(k_pages=None), ShapeError, "not a tensor"),
    "rope-and-v": (lambda x: x.update(k_rope_pages=x["k_pages"][..., :16]), ShapeError, "D"),
    "last-dim": (lambda x: x.update(q=x["q"].transpose(1, 3).contiguous().transpose(1, 3)), LayoutError, "`q`"),
    "out-overlap": (lambda x: x.update(out=x["q"]), LayoutError, "overlaps"),
    "out-rows": (lambda x: x.update(out=x["q"][:1, :1].clone().expand(4, 4, 1, 64)), LayoutError, "several"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    change, error, words = REFUSALS[name]
    x = make(page=16)
    x.pop("Dv")
    change(x)
    with pytest.raises(error, match=words):
        decode_over_pages(**x)


def test_a_repeated_call_is_checked_no_less(monkeypatch):
    """The second call makes no views and still looks at what may differ: values, and what `out` lies on."""
    x = make(page=16)
    x.pop("Dv")
    out = torch.empty_like(x["q"])
    want = decode_over_pages(**x, out=out).clone()
    monkeypatch.setattr(pages, "page_views", None)
    assert torch.equal(decode_over_pages(**x, out=out.fill_(math.nan)), want)
    with pytest.raises(LayoutError, match="overlaps `q`"):
        decode_over_pages(**x, out=x["q"])
    with pytest.raises(BlockTableError):
        decode_over_pages(**x | {"block_table": torch.full_like(x["block_table"], 2**30)}, out=out)
    with pytest.raises(SequenceLengthError):
        decode_over_pages(**x | {"seq_lens": x["seq_lens"] - 1000}, out=out)


def test_deepseek_takes_pages_of_any_size():
    """The drop-in goes through the same door: pages of 16, 32 and 128 give what 64 give."""
    gen = torch.Generator().manual_seed(0)
    rows, q = torch.randn(512, 1, 576, generator=gen).to(BF16), torch.randn(2, 2, 16, 576, generator=gen).to(BF16)
    lens = torch.tensor([200, 77], dtype=torch.int32)
    results = []
    for page in (64, 16, 32, 128):
        table = torch.arange(512 // page, dtype=torch.int32).view(2, -1)
        cache = rows.view(-1, page, 1, 576)
        for causal in (True, False):
            results.append(deepseek.flash_mla_with_kvcache(q, cache, table, lens, 512, causal=causal, backend="cpu"))
    for i, (out, lse) in enumerate(results):
        torch.testing.assert_close(out, results[i % 2][0], rtol=1.6e-2, atol=1e-3)
        torch.testing.assert_close(lse, results[i % 2][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["page-16", "page-64", "mla", "split", "full", "mask", "fp8"])
def test_compiled_pages(name):
    """One graph, whose op reads the caller's pages; out, of q's strides, is written."""
    case = CASES[name]
    x = make(**case)
    Dv = x.pop("Dv")
    x |= {"layout": case.get("layout", "NHD"), "v_head_dim": Dv if case.get("packing") == "latent" else None}
    want, want_lse = decode_over_pages(**x, return_lse=True)
    torch._dynamo.reset()
    call = torch.compile(decode_over_pages, backend="aot_eager", fullgraph=True)
    given = torch.full_like(want.transpose(1, 2).contiguous(), math.nan).transpose(1, 2)
    out, lse = call(**x, return_lse=True, out=given)
    assert out.data_ptr() == given.data_ptr()
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("leaf", ["q", "k_pages"])
def test_a_gradient_is_refused(leaf, compiled):
    x = make(page=16, dtype=torch.float32)
    x.pop("Dv")
    x[leaf].requires_grad_()
    torch._dynamo.reset()
    call = torch.compile(decode_over_pages, backend="aot_eager", fullgraph=True) if compiled else decode_over_pages
    with pytest.raises(GradientError):
        call(**x).sum().backward()
