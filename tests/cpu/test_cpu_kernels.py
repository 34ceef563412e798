"""The CPU's compiled kernels: other processors' code, the store, threads, and what only they promise."""

from __future__ import annotations

import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import llvmlite.binding as llvm
import pytest
import torch

from flash_mla import contract, deepseek, flash_mla_prefill, flash_mla_with_kvcache
from flash_mla.backends.cpu import engine
from flash_mla.kernels.cpu import config, store
from flash_mla.kernels.cpu.config import Spec, Target
from flash_mla.plan import plan
from flash_mla.problem import FP8, DecodeArgs
from flash_mla.quant import FORMATS
from flash_mla.reference import decode_reference
from flash_mla.testing import DecodeCase, PrefillCase, check, run

TARGETS = {
    "avx2": (Target("x86_64-unknown-linux-gnu", "haswell", "+avx2,+fma,+f16c"), r"ymm"),
    "avx512": (Target("x86_64-unknown-linux-gnu", "skylake-avx512", "+avx512bw,+avx512vl,+avx2,+fma,+f16c"), r"zmm"),
    "sapphire-rapids": (
        Target("x86_64-unknown-linux-gnu", "sapphirerapids", "+avx512bw,+avx512vl,+avx512bf16,+avx2,+fma,+f16c"),
        r"zmm",
    ),
    "windows": (Target("x86_64-pc-windows-msvc", "haswell", "+avx2,+fma,+f16c"), r"ymm"),
    "neoverse": (Target("aarch64-unknown-linux-gnu", "neoverse-v1"), r"fmla\s+v\d+\.4s"),
    "apple": (Target("arm64-apple-macosx", "apple-m1"), r"fmla\.4s"),
}
"""Processors that kernels are assembled for, and what their vector instructions look like."""

SPECS = {
    "gqa": Spec(128, 128, "bf16", "bf16", "bf16", 4, 4, 3, 8),
    "mla": Spec(576, 512, "bf16", "bf16", "bf16", 16, 4, 3, 8, alias=True),
    "fp16-mask": Spec(72, 40, "f16", "f16", "f16", 8, 4, 3, 8, mask="bool"),
    "fp8": Spec(128, 128, "fp8", "fp8", "bf16", 4, 4, 3, 8),
    "sparse": Spec(576, 512, "bf16", "fp8_ds_mla", "bf16", 16, 4, 3, 8, alias=True, source="sparse"),
    "prefill": Spec(192, 128, "bf16", "bf16", "bf16", 96, 24, 4, 8, source="rows"),
    "layout": Spec(72, 128, "f16", "f16", "f16", 72, 16, 6, 8, source="rows", layout=True, span=64),
    "sparse-128": Spec(576, 512, "bf16", "fp8_ds_mla", "bf16", 48, 16, 6, 8, alias=True, source="sparse"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", TARGETS)
def test_assembles_for(name, spec):
    """Vector code of the target's width, and no call of a helper (FP16 to FP32, exp, ..) that a host may lack."""
    target, pattern = TARGETS[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    wide = (target, "fma", spec.rows, spec.tile_m == 16)
    tile_m, tile_n = config.wide_tile(*wide) if spec.many else config.tile(spec.rows, target, spec.kv)
    spec = replace(spec, lanes=target.lanes, tile_m=tile_m, tile_n=tile_n)
    machine = store.machine(target)
    text = machine.emit_assembly(store.optimised(spec, machine))
    assert re.search(pattern, text)
    assert not re.findall(r"\b__\w*(?:hf|bf|sf|df)\w*|\b(?:exp|log|fma|roundeven)f?\b", text)


def test_other_processors_are_refused():
    assert "avx2" in config.lacks(Target("x86_64-unknown-linux-gnu", "nehalem", "+sse4.2"))
    assert "riscv" in config.lacks(Target("riscv64-unknown-linux-gnu", "generic"))
    assert config.lacks(TARGETS["apple"][0]) is None


# --- The store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x[:40] + bytes([x[40] ^ 1]) + x[41:], lambda x: b""])
def test_a_damaged_file_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = SPECS["gqa"]
    file = store.path(spec, config.host())
    store.load.__wrapped__(spec)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert store.stored(file) is None
    store.load.__wrapped__(spec)
    assert store.stored(file) is not None
    assert [x.name for x in file.parent.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path, monkeypatch):
    (tmp_path / "flash_mla").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.load.__wrapped__(SPECS["gqa"])["run"]


def test_threads_that_ask_at_once_compile_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled, count = store.compiled, 0

    def counted(spec, target):
        nonlocal count
        count += 1
        return compiled(spec, target)

    monkeypatch.setattr(store, "compiled", counted)
    together = threading.Barrier(4)

    def load(_):
        together.wait()
        return store.load.__wrapped__(SPECS["gqa"])["run"]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(load, range(4)))
    assert count == 1


def test_a_key_names_spec_and_processor():
    here = config.host()
    names = {
        store.path(SPECS["gqa"], here),
        store.path(replace(SPECS["gqa"], alias=True), here),
        store.path(SPECS["gqa"], replace(here, cpu="another")),
    }
    assert len(names) == 3


# --- Threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case",
    [
        DecodeCase("decode/threads", (5000, 17), Hq=8, Hk=2, D=128),
        DecodeCase("decode/threads-mla", (3000, 0, 700), Hq=128, Hk=1, D=576, Dv=512, alias=True),
        DecodeCase("decode/threads-many", (2500, 90), Hq=3, Hk=1, S_q=25, D=72, Dv=40, dtype=torch.float16),
        DecodeCase("decode/threads-mask", (2500,), Hq=3, Hk=1, S_q=5, mask="float-heads", dtype=torch.float16),
    ],
    ids=lambda case: case.name,
)
def test_any_number_of_threads_gives_the_same_bits(case, threads, monkeypatch):
    monkeypatch.setattr(engine, "TEAM_FLOPS", 0)
    x = case.call().arguments
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        results.append(flash_mla_with_kvcache(**x, return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
    verdict = check(*results[0], *decode_reference(**x), case.dtype)
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8], ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 64, None), (16, 1, 96, 64), (40, 1, 64, None)], ids=["gqa", "mla", "many"])
def test_a_request_gives_the_same_bits_alone_and_in_any_batch(shape, dtype):
    """Splits follow from a request's own length: not from other requests, nor from the width of the table."""
    Hq, Hk, D, Dv = shape
    lengths = (2600, 0, 130, 1200, 4000, 1)
    case = DecodeCase("decode/batch", lengths, Hq=Hq, Hk=Hk, D=D, Dv=Dv, alias=Dv is not None, dtype=dtype)
    x = case.call().arguments | {"softmax_scale": 0.1}
    whole = flash_mla_with_kvcache(**x, return_lse=True)
    for requests in ([0], [3], [3, 4], [5, 0, 2]):
        own = dict(x)
        for name in ("q", "k_cache", "v_cache", "block_table", "seq_lens"):
            own[name] = x[name][requests]
        if Dv is not None:
            own["v_cache"] = own["k_cache"][..., :Dv]
        columns = -(-int(own["seq_lens"].max()) // 64)
        own["block_table"] = own["block_table"][:, :columns].contiguous()
        part = flash_mla_with_kvcache(**own, return_lse=True)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[requests], b)


@pytest.mark.parametrize("byte", [0x7F, 0xFF], ids=["huge", "nan"])
@pytest.mark.parametrize(
    "case",
    [
        PrefillCase("prefill/memory", 90, mask="float-heads"),
        PrefillCase("prefill/memory-layout", 200, mask="bool", sparse="heads", causal=True),
        DecodeCase("decode/memory", (90, 17), Hq=4, Hk=2, mask="float"),
        DecodeCase("decode/memory-many", (90, 17), Hq=64, Hk=2, mask="float"),
    ],
    ids=lambda case: case.name,
)
def test_what_a_threads_memory_held_does_not_matter(case, byte, monkeypatch):
    """The same bits over memory of zeros and of NaN: nothing is read before it is written."""
    monkeypatch.setattr(engine, "MEMORY", engine.Memory())
    first = run(case)
    assert first.passed, str(first)
    outs = []
    for fill in (0, byte):
        engine.MEMORY.threads.fill_(fill)
        call = case.call()
        function = flash_mla_prefill if isinstance(case, PrefillCase) else flash_mla_with_kvcache
        outs.append(function(**call.arguments, return_lse=True))
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.37, 3.3, 11.0])
def test_fp8_descales_are_exact_at_any_magnitude(factor):
    """Scores past 150: q times a descale that no power of two is must not be rounded to BF16."""
    x = DecodeCase("decode/fp8-descale", (300, 130), Hq=8, D=128, dtype=FP8).call().arguments
    x |= {"q_descale": torch.full((2, 2), factor), "k_descale": torch.tensor([[factor, 1.7], [0.9, factor]])}
    verdict = check(*flash_mla_with_kvcache(**x, return_lse=True), *decode_reference(**x), FP8)
    assert verdict.passed, verdict.failures
    assert verdict.out_error < 1e-2


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -3e38, -1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_finite_mask_hides_nothing(value, dtype):
    """Where every key has the same large addend, softmax is that of no mask, as far as FP32 tells scores apart."""
    if value < torch.finfo(dtype).min:
        value = torch.finfo(dtype).min
    x = DecodeCase("decode/finite-mask", (70,), dtype=torch.float32).call().arguments
    x["mask"] = torch.full((1, 1, 1, 70), value, dtype=dtype)
    out, lse = flash_mla_with_kvcache(**x, return_lse=True)
    mean = torch.stack([x["v_cache"][0, :, x["block_table"][0, :2].tolist()].flatten(1, 2)[:, :70].mean(1)])
    torch.testing.assert_close(out[:, :, 0], mean.repeat_interleave(2, 1), atol=1e-6, rtol=1e-5)
    assert lse.isfinite().all()


def test_nan_codes_stay_nan():
    x = DecodeCase("decode/nan", (70, 70), dtype=FP8).call().arguments
    clean = flash_mla_with_kvcache(**x)
    block = int(x["block_table"][1, 0])
    for code in (0x7F, 0xFF):
        x["v_cache"].view(torch.uint8)[1, 0, block, 3, 5] = code
        out = flash_mla_with_kvcache(**x)
        assert out[1, :2, 0, 5].isnan().all()
        assert torch.equal(out[0], clean[0])
        assert not out[1, 2:].isnan().any()


def test_every_fp8_code_is_read_as_torch_reads_it():
    """V holds all 256 codes, and one key is seen."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    k = torch.zeros(1, 1, 1, 64, 256, dtype=FP8)
    v = codes.expand(1, 1, 1, 64, 256).contiguous()
    q = torch.zeros(1, 1, 1, 256, dtype=FP8)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = flash_mla_with_kvcache(q, k, v, table, lengths)
    assert torch.equal(out.flatten().nan_to_num(nan=1e4), codes.bfloat16().nan_to_num(nan=1e4))


def test_every_e8m0_scale_is_read_as_torch_reads_it():
    """MODEL1 rows whose first tile is ones, under each scale; one row is seen at a time."""
    form = FORMATS["model1"]
    pages = form.quantise(torch.ones(4, 64, 1, 512, dtype=torch.bfloat16))
    scales = form.parts(pages).scales.flatten(0, 1)
    code = torch.arange(256, dtype=torch.uint8)
    scales[:, :7] = code[:, None]
    form.parts(pages).scales.copy_(scales.view(4, 64, 8))
    q = torch.zeros(256, 1, 1, 512, dtype=torch.bfloat16)
    indices = torch.arange(256, dtype=torch.int32).view(256, 1, 1)
    out, _ = deepseek.flash_mla_with_kvcache(
        q, pages, None, None, 512, deepseek.get_mla_metadata()[0], is_fp8_kvcache=True, indices=indices
    )
    want = form.dequantise(pages).view(256, 512)
    kept = (code > 10) & (code < 240)
    assert torch.equal(out.view(256, 512)[kept], want[kept])
    assert out.view(256, 512)[255, :448].isnan().all()


def test_time_follows_what_is_used():
    """Four requests of 250 tokens: as fast over a serving engine's pool of 256 MiB as over one of 4 MiB."""

    def seconds(blocks):
        pool = torch.zeros(blocks, 64, 2, 128, dtype=torch.bfloat16)
        cache = pool.permute(2, 0, 1, 3)[None].expand(4, -1, -1, -1, -1)
        table = torch.arange(16, dtype=torch.int32).view(4, 4) * (blocks // 16)
        q, lengths = torch.randn(4, 8, 1, 128).bfloat16(), torch.full((4,), 250, dtype=torch.int32)
        problem = plan_of(q, cache, table, lengths)
        times = []
        for _ in range(7):
            start = time.process_time()
            problem()
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(8192) < 3 * seconds(128) + 1e-3


def plan_of(q, cache, table, lengths):
    """A decode launch over a page view that the public function does not take."""
    problem = contract.decode_problem(q, cache, cache, table, alias=True, mask="none", descale=False, sink=False)
    out = torch.empty_like(q)
    args = DecodeArgs(q, cache, cache, table, lengths, None, None, None, None, None, 0.1, out, None)
    return lambda: plan(problem, "cpu").launch(args)


def test_a_huge_gap_between_scores():
    """exp of what is far below the max is 0, and of what is hidden too; a row of them is 0 and -inf."""
    q = torch.full((1, 1, 3, 8), 50.0)
    k = torch.zeros(1, 1, 1, 64, 8)
    k[0, 0, 0, 0] = 50.0
    v = torch.randn(1, 1, 1, 64, 8)
    mask = torch.ones(1, 1, 3, 64, dtype=torch.bool)
    mask[0, 0, 1, 0] = False
    mask[0, 0, 2] = False
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 64, dtype=torch.int32)
    out, lse = flash_mla_with_kvcache(q, k, v, table, lengths, mask, softmax_scale=1.0, return_lse=True)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 0, 0])
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 0, 1:].mean(0))
    assert (out[0, 0, 2] == 0).all()
    torch.testing.assert_close(lse[0, 0], torch.tensor([20000.0, math.log(63), -math.inf]))


def test_a_problem_is_bound_once(monkeypatch):
    """The second call of a problem finds the kernel of the first; another mask dtype is another kernel."""
    specs = []
    made = engine.Entries
    monkeypatch.setattr(engine, "Entries", lambda spec, memory: specs.append(spec.mask) or made(spec, memory))
    plan.cache_clear()
    x = DecodeCase("decode/bound", (70,)).call().arguments
    for mask in (None, None, torch.zeros(1, 1, 1, 70), torch.zeros(1, 1, 1, 70), torch.zeros(1, 1, 1, 70).half()):
        flash_mla_with_kvcache(**x | {"mask": mask})
    assert specs == [None, "f32", "f16"]


@pytest.mark.parametrize("split", [False, True], ids=["rows", "split-latent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("page", [16, 32, 128, 192])
def test_pages_of_other_sizes_and_split_latents(page, dtype, split):
    """An engine's pool, NaN in the slots past the lengths, K and its rope part in one row or in two caches."""
    B, Hq, D, Dv = 2, 16, 96, 64
    generator = torch.Generator().manual_seed(page)
    blocks = 768 // page
    rows = torch.randn(B, blocks * page, D, generator=generator).to(dtype)
    lengths = torch.tensor([700, 333], dtype=torch.int32)
    table = torch.randperm(B * blocks, generator=generator).view(B, blocks).int()
    unused = torch.arange(blocks * page)[None, :, None] >= lengths[:, None, None]
    stored = rows.float().masked_fill(unused, math.nan).to(dtype)
    pool = torch.zeros(B * blocks, page, 1, D, dtype=dtype)
    pool.view(torch.uint8)[table.long()] = stored.view(torch.uint8).view(B, blocks, page, 1, -1)
    parts = [x.contiguous() if split else x for x in (pool[..., :Dv], pool[..., Dv:])]
    view, k, rope = (x.permute(2, 0, 1, 3)[None].expand(B, -1, -1, -1, -1) for x in (pool, *parts))
    q = torch.randn(B, Hq, 1, D, generator=generator).to(dtype)
    problem = contract.decode_problem(q, view, k, table, alias=True)
    if split:
        problem = problem._replace(k_strides=k.stride(), v_strides=k.stride(), rope_strides=rope.stride())
    out = torch.full((B, Hq, 1, Dv), math.nan, dtype=torch.bfloat16)
    keys = (k, k, rope) if split else (view, k, None)
    args = DecodeArgs(q, *keys[:2], table, lengths, None, None, None, None, None, 0.1, out, None, keys[2])
    plan(problem, "cpu").launch(args)
    scores = torch.einsum("bhd,btd->bht", q[:, :, 0].double(), rows.double()) * 0.1
    weights = scores.masked_fill(unused[..., 0][:, None], -math.inf).softmax(-1)
    verdict = check(out[:, :, 0], None, weights @ rows[..., :Dv].double(), torch.zeros(B, Hq).double(), dtype)
    assert verdict.passed, verdict.failures


def test_a_sparse_call_that_is_remembered_asks_for_its_plan(monkeypatch):
    """What serves may change under a call that passed its checks: here the kernels, then torch's ops."""
    form = FORMATS["fp8_ds_mla"]
    pages = form.quantise(torch.randn(2, 64, 1, 576).bfloat16())
    q, indices = torch.randn(1, 1, 16, 576).bfloat16(), torch.arange(64, dtype=torch.int32).view(1, 1, 64)
    schedule, served = deepseek.get_mla_metadata()[0], []
    monkeypatch.setattr(engine.Sparse, "launch", lambda self, args: served.append("kernels"))
    for reason in (None, "left out"):
        monkeypatch.setattr(engine, "missing", lambda reason=reason: reason)
        plan.cache_clear()
        deepseek.flash_mla_with_kvcache(q, pages, None, None, 512, schedule, is_fp8_kvcache=True, indices=indices)
    plan.cache_clear()
    assert served == ["kernels"]
