"""Time the CPU's compiled kernels beside what else a machine offers: one thread, least CPU time, in random order.

    OMP_NUM_THREADS=1 python docs/bench/cpu_kernels.py [seconds a case [pattern of case names]]

`gather` copies the pages into a contiguous KV and calls torch's op: SDPA with a group's heads as rows (over BF16 where
the cache is FP8), and for MLA the flash op with V = K (its last columns dropped). Of a chunk that is written, it writes
the rows by an index first. `torch` is the library's own path without llvmlite. `read` reads 64 MiB
in shuffled blocks of 16 KiB; `peak` is a loop of FMAs. A pattern (`re.search`) runs the cases that it finds: on a
shared machine the table is taken in pieces, each while nothing else runs.
"""

from __future__ import annotations

import ctypes
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flash_mla import deepseek, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata, mha_fwd_kvcache
from flash_mla.backends.cpu import engine
from flash_mla.bench.timing import device_name
from flash_mla.indexer import topk_indices
from flash_mla.kernels.cpu import config, store
from flash_mla.kernels.cpu.ir import F32, I32, I64, POINTER, Code, vector
from flash_mla.plan import plan
from flash_mla.problem import FP8
from flash_mla.quant import FORMATS

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
PATTERN = re.compile(sys.argv[2] if len(sys.argv) > 2 else "")
BLOCKS = 4096
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def compiled(module: ir.Module, name: str) -> int:
    machine = store.machine(config.host())
    parsed = llvm.parse_assembly(str(module))
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    code = llvm.create_mcjit_compiler(parsed, machine)
    code.finalize_object()
    store.ENGINES.append(code)
    return code.get_function_address(name)


def reader() -> Callable[[], None]:
    """Sum 64 MiB, block by block in random order."""
    module = ir.Module("read")
    g = Code(module, "read", [POINTER, I64, POINTER])
    memory, n, order = g.args
    sums = [g.variable(g.const(0, vector(I32, 8))) for _ in range(4)]
    with g.loop(0, n) as i:
        block = memory + (order + i * 8).load(I64) * 16384
        with g.loop(0, 16384, 128) as at:
            for k, total in enumerate(sums):
                total.set(total.get() + (block + at + 32 * k).load(vector(I32, 8)))
    memory.store(sums[0].get() + sums[1].get() + sums[2].get() + sums[3].get())
    g.finish()
    read = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(compiled(module, "read"))
    x, order = torch.ones(BLOCKS * 16384, dtype=torch.uint8), torch.randperm(BLOCKS)
    return lambda: read(x.data_ptr(), BLOCKS, order.data_ptr())


def multiplier() -> Callable[[], None]:
    """FMAs on ten accumulators."""
    module = ir.Module("peak")
    g = Code(module, "peak", [POINTER])
    x = g.args[0].load(F32, 4).splat(8)
    sums = [g.variable(g.const(float(i), x.type)) for i in range(10)]
    with g.loop(0, 1 << 18):
        for total in sums * 4:
            total.set(total.get().fma(x, x))
    all_of = sums[0].get()
    for total in sums[1:]:
        all_of = all_of + total.get()
    g.args[0].store(all_of, 4)
    g.finish()
    peak = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled(module, "peak"))
    buffer = (ctypes.c_float * 64)(0.5)
    return lambda: peak(ctypes.addressof(buffer))


READ, PEAK = reader(), multiplier()
READ_BYTES, PEAK_FLOPS = BLOCKS * 16384, 2 * 8 * 10 * 4 * (1 << 18)


@contextmanager
def through_torch(call: Callable[[], object]) -> Iterator[None]:
    """The same call goes without the kernels. Either way is planned anew by a call that is not timed; then 64 MiB are
    read, so that the next call finds no more in the caches than its peers do."""
    before = engine.missing
    plan.cache_clear()
    engine.missing = lambda: "left out"
    call()
    READ()
    yield
    engine.missing = before
    plan.cache_clear()
    call()
    READ()


def show(
    name: str, calls: dict[str, Callable[[], object]], flops: float, bytes_read: float, beside_torch: bool = False
) -> None:
    """Measure, and print one row of the table; beside our own path through torch, if wanted."""
    calls = {**calls, "read": READ, "peak": PEAK}
    if beside_torch:
        calls["torch"] = calls["ours"]
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, 1e9)
    end, rounds = time.process_time() + SECONDS, 0
    while rounds < 3 or time.process_time() < end:
        rounds += 1
        for key in random.sample(list(calls), len(calls)):
            with through_torch(calls[key]) if key == "torch" else nullcontext():
                start = time.process_time()
                calls[key]()
                least[key] = min(least[key], time.process_time() - start)
    ours = least["ours"]
    peak = flops / ours / (PEAK_FLOPS / least["peak"])
    rate = bytes_read / ours / (READ_BYTES / least["read"])
    peers = "; ".join(f"{key} {x / ours:.2f}x" for key, x in least.items() if key not in ("ours", "read", "peak"))
    print(f"| {name} | {ours * 1e3:.3f} | {peak:.0%} | {rate:.0%} | {peers} |", flush=True)


def decode(name: str, B: int, Hq: int, Hk: int, D: int, S: int, Dv: int | None = None, dtype=torch.bfloat16) -> None:
    n, alias, Dv = S // 64, Dv is not None, Dv or D
    k = torch.randn(B, Hk, n, 64, D).to(dtype)
    v = k[..., :Dv] if alias else torch.randn(B, Hk, n, 64, Dv).to(dtype)
    table = torch.stack([torch.randperm(n) for _ in range(B)]).int()
    lengths, q = torch.full((B,), S, dtype=torch.int32), torch.randn(B, Hq, 1, D).to(dtype)
    metadata = get_mla_metadata(q.shape, k.shape, table, lengths, v_head_dim=Dv)
    scale = 192**-0.5 if alias else D**-0.5
    call = lambda: flash_mla_with_kvcache(q, k, v, table, lengths, None, metadata, softmax_scale=scale)  # noqa: E731
    buffers = k.new_empty(B, Hk, n, 64, D), k.new_empty(B, Hk, n, 64, Dv)

    def gather() -> object:
        for b in range(B):
            ids = table[b].long()
            for pages, buffer in zip((k, v)[: 1 if alias else 2], buffers, strict=False):
                torch.index_select(as_bytes(pages[b]), 1, ids, out=as_bytes(buffer[b]))
        rows = [x.flatten(2, 3).to(torch.bfloat16 if dtype == FP8 else dtype) for x in buffers]
        if alias:
            return flash(q.view(B, 1, Hq, D), rows[0], rows[0])[0][..., :Dv]
        return sdpa(q.to(rows[0].dtype).view(B, Hk, Hq // Hk, D), *rows)

    columns = D if alias else D + Dv
    calls = {"ours": call, "gather": gather}
    show(name, calls, 2.0 * B * Hq * S * (D + Dv), float(B * S * Hk * columns * k.element_size()), B < 1024)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes, which torch indexes."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def chunk(name: str, H: int, D: int, P: int, before: int, writes: bool = False) -> None:
    """P tokens of a prompt after those that lie in the cache, or that are written to it in the same call."""
    S, n = before + P, -(-(before + P) // 64)
    k, v, *buffers = (torch.randn(1, H, n, 64, D).bfloat16() for _ in range(4))
    q, *rows = (torch.randn(1, H, P, D).bfloat16() for _ in range(3))
    table, start = torch.randperm(n).int()[None], torch.tensor([before], dtype=torch.int32)
    new = dict(zip("kv", rows, strict=True)) if writes else {}
    mask = torch.arange(S) <= torch.arange(P)[:, None] + before
    places = torch.arange(before, S)

    def gather() -> object:
        ids = table[0].long()
        for x, cache, buffer in zip(rows, (k, v), buffers, strict=True):
            if writes:
                cache[0][:, ids[places // 64], places % 64] = x[0]
            torch.index_select(cache[0], 1, ids, out=buffer[0])
        return sdpa(q, *(x.flatten(2, 3)[:, :, :S] for x in buffers), attn_mask=mask)

    calls = {"ours": lambda: mha_fwd_kvcache(q, k, v, table, start_pos=start, **new), "gather": gather}
    show(name, calls, 4.0 * H * D * (P * before + P * (P + 1) / 2), 4.0 * S * H * D, beside_torch=True)


def prefill(name: str, H: int, D: int, Dv: int, P: int) -> None:
    q, k, v = (torch.randn(1, H, P, x).bfloat16() for x in (D, D, Dv))
    calls = {"ours": lambda: flash_mla_prefill(q, k, v), "SDPA": lambda: sdpa(q, k, v, is_causal=True)}
    show(name, calls, H * P * (P + 1.0) * (D + Dv), 0.0)


def block_sparse(name: str, P: int) -> None:
    q, k, v = (torch.randn(1, 4, P, 128).bfloat16() for _ in range(3))
    layout = torch.rand(1, 1, P // 64, P // 64) < 0.25
    calls = {
        "ours": lambda: flash_mla_prefill(q, k, v, layout, causal=False),
        "dense": lambda: flash_mla_prefill(q, k, v, causal=False),
    }
    show(name, calls, 4 * 4.0 * P * P * 128 * layout.float().mean().item(), 0.0)


def sparse(name: str, Hq: int, S: int, topk: int = 2048) -> None:
    form = FORMATS["fp8_ds_mla"]
    pages = form.quantise(torch.randn(S // 64, 64, 1, 576).bfloat16())
    q, indices = torch.randn(1, 1, Hq, 576).bfloat16(), torch.randperm(S)[:topk].int().view(1, 1, topk)
    schedule = deepseek.get_mla_metadata()[0]
    call = lambda: deepseek.flash_mla_with_kvcache(  # noqa: E731
        q, pages, None, None, 512, schedule, is_fp8_kvcache=True, indices=indices
    )
    show(name, {"ours": call}, 2.0 * Hq * topk * 1088, 656.0 * topk, beside_torch=True)


def sparse_rows(name: str, Hq: int, topk: int, queries: int) -> None:
    """Rows of BF16 that each query names, of 8192."""
    rows, q = torch.randn(8192, 1, 576).bfloat16(), torch.randn(queries, Hq, 576).bfloat16()
    indices = torch.stack([torch.randperm(8192)[:topk] for _ in range(queries)]).int()[:, None]

    def gather() -> object:
        named = [rows[:, 0].index_select(0, ids[0].long())[None, None] for ids in indices]
        return [flash(x[None, None], keys, keys)[0][..., :512] for x, keys in zip(q, named, strict=True)]

    calls = {"ours": lambda: deepseek.flash_mla_sparse_fwd(q, rows, indices, 0.07), "gather": gather}
    show(name, calls, 2.0 * queries * Hq * topk * 1088, 1152.0 * queries * topk, beside_torch=True)


def select(name: str, rows: int, N: int, k: int = 2048) -> None:
    scores = torch.randn(rows, N)
    calls = {"ours": lambda: topk_indices(scores, k), "torch.topk": lambda: scores.topk(k)}
    show(name, calls, 0.0, 4.0 * rows * N)


def long(name: str, S: int) -> None:
    """One request of S tokens, MLA, 16 heads; and how much the peak of memory rises beside the cache."""
    n = S // 64
    k = torch.empty(1, 1, n, 64, 576, dtype=torch.bfloat16)
    for page in range(0, n, 1024):
        k[0, 0, page : page + 1024].normal_()
    table, lengths = torch.randperm(n).int()[None], torch.full((1,), S, dtype=torch.int32)
    q = torch.randn(1, 16, 1, 576).bfloat16()
    metadata = get_mla_metadata(q.shape, k.shape, table, lengths, v_head_dim=512)
    call = partial(flash_mla_with_kvcache, q, k, k[..., :512], table, lengths, None, metadata, softmax_scale=0.07)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    show(f"{name}, {more:.0f} MiB beside the cache", {"ours": call}, 2.0 * 16 * S * 1088, 1152.0 * S)


def cases() -> Iterator[tuple[str, Callable[[str], None]]]:
    """Names, and what measures them."""
    for S in (256, 1024, 16384):
        yield f"GQA 32/8 D 128, S {S}", partial(decode, B=1, Hq=32, Hk=8, D=128, S=S)
    yield "GQA 32/8 D 128, B 16, S 4096", partial(decode, B=16, Hq=32, Hk=8, D=128, S=4096)
    for dtype in (torch.bfloat16, torch.float16, FP8):
        yield f"GQA 32/8 D 128, S 4096, {dtype}", partial(decode, B=1, Hq=32, Hk=8, D=128, S=4096, dtype=dtype)
    yield "MHA 32/32 D 128, S 2048", partial(decode, B=1, Hq=32, Hk=32, D=128, S=2048)
    for B in (1, 64, 1024):
        yield f"GQA 8/1 D 64, S 64, B {B}", partial(decode, B=B, Hq=8, Hk=1, D=64, S=64)
    for B, heads in ((1, 16), (16, 16), (1, 128)):
        yield f"MLA {heads} heads, B {B}, S 4096", partial(decode, B=B, Hq=heads, Hk=1, D=576, S=4096, Dv=512)
    yield "MLA 16 heads, one request of 1M tokens", partial(long, S=1 << 20)
    for D, Dv in ((64, 64), (128, 128), (192, 128)):
        for P, H in ((512, 8), (2048, 8), (8192, 1)):
            yield f"causal prefill, {H} heads, D {D}/{Dv}, P {P}", partial(prefill, H=H, D=D, Dv=Dv, P=P)
    yield "block-sparse 25 %, P 2048, D 128", partial(block_sparse, P=2048)
    for heads in (16, 128):
        for S in (8192, 131072):
            name = f"sparse fp8_ds_mla, {heads} heads, topk 2048, s_kv {S}"
            yield name, partial(sparse, Hq=heads, S=S)
    for heads, topk in ((16, 128), (16, 512), (128, 512)):
        yield f"short: fp8_ds_mla, {heads} heads, topk {topk}", partial(sparse, Hq=heads, S=8192, topk=topk)
    for heads, queries in ((16, 1), (16, 16), (128, 1)):
        name = f"short: BF16 rows, {heads} heads, topk 512, {queries} queries"
        yield name, partial(sparse_rows, Hq=heads, topk=512, queries=queries)
    for heads, S in ((16, 64), (16, 128), (16, 512), (128, 128), (128, 512)):
        yield f"short: MLA {heads} heads, S {S}", partial(decode, B=1, Hq=heads, Hk=1, D=576, S=S, Dv=512)
    for Hq, Hk, D, S in ((32, 8, 128, 64), (32, 8, 128, 512), (14, 2, 64, 512), (12, 12, 64, 128)):
        yield f"short: GQA {Hq}/{Hk} D {D}, S {S}", partial(decode, B=1, Hq=Hq, Hk=Hk, D=D, S=S)
    for S in (64, 1024):
        yield f"short: GQA 32/8 D 128 FP8, S {S}", partial(decode, B=1, Hq=32, Hk=8, D=128, S=S, dtype=FP8)
    for P, before, writes in ((16, 0, False), (16, 0, True), (128, 0, True), (128, 1024, True), (128, 4096, False)):
        name = f"short: chunk of {P} after {before}{', written' if writes else ''}, 8 heads D 128"
        yield name, partial(chunk, H=8, D=128, P=P, before=before, writes=writes)
    for P in (16, 64, 128):
        yield f"short: causal prefill, 8 heads, D 128, P {P}", partial(prefill, H=8, D=128, Dv=128, P=P)
    for rows, N in ((1, 8192), (1, 131072), (16, 32768)):
        yield f"top-k 2048 of {N} scores, {rows} rows", partial(select, rows=rows, N=N)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{device_name('cpu')}, torch {torch.__version__}, one thread\n")
    print("| case | ms | of FMA peak | of read rate | over |\n| --- | --- | --- | --- | --- |")
    for name, measure in cases():
        if re.search(PATTERN, name):
            measure(name)
