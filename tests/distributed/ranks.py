"""Start processes that form a gloo group on the loopback interface, and what they do there.

A rank returns {name: failures}; pytest's process asks that every list of every rank is empty. The functions below run
on NCCL too, with device="cuda".
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flash_mla import FlashMLAError, GradientError, PagedKVCache, RankError, ShapeError
from flash_mla.distributed import ContextCache, ShardedAttention, local_cache, local_table
from flash_mla.problem import FP8
from flash_mla.reference import decode_reference, prefill_reference
from flash_mla.testing import DecodeCase, PrefillCase
from flash_mla.testing.budget import check
from flash_mla.testing.hostile import Source, same_bits

Failures = dict[str, list[str]]
ROOT = Path(__file__).parents[2]
SECONDS = 600  # for all that one set of processes does: 22 s of CPU a rank where no kernel is compiled yet

# --- Processes --------------------------------------------------------------------------------------------------------


def run(size: int, work: Callable[[int, str], Failures], folder: Path, device: str = "cpu") -> list[Failures | None]:
    """What `work` returned on each of `size` ranks; None where a rank ended without."""
    context = mp.get_context("forkserver")
    # NOTE: torch and flash_mla take 5 s of a CPU to import; the server does it once, in one thread, before it forks
    context.set_forkserver_preload(["flash_mla.distributed", "flash_mla.testing"])
    args = (size, work, str(folder), device)
    processes = [context.Process(target=_main, args=(rank, *args), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    for process in processes:
        if process.is_alive():
            process.kill()
    files = [folder / f"rank{rank}" for rank in range(size)]
    return [torch.load(file) if file.exists() else None for file in files]


def _main(rank: int, size: int, work: Callable[[int, str], Failures], folder: str, device: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    result = work(size, device)
    torch.save(result, f"{folder}/rank{rank}.part")
    os.rename(f"{folder}/rank{rank}.part", f"{folder}/rank{rank}")
    if work is lose_a_rank:
        os._exit(0)  # a group without one of its ranks would be waited for
    dist.destroy_process_group()


# --- Decode -----------------------------------------------------------------------------------------------------------

# ranks without a key, blocks that end exactly, requests shorter than their new tokens
LENGTHS = (0, 1, 64, 65, 127, 129, 300, 5)
MLA = DecodeCase("mla", LENGTHS, Hq=4, Hk=1, D=96, Dv=64, alias=True, softmax_scale=0.1)
GQA = DecodeCase("gqa", LENGTHS, Hq=4, Hk=2)
DECODE = {
    case.name: case
    for case in (
        MLA,
        GQA,
        replace(GQA, name="fp32", dtype=torch.float32, sink=True),
        replace(GQA, name="fp16-pool", dtype=torch.float16, layout="pool", shared=2, index_dtype=torch.int64),
        replace(MLA, name="fp8-descale", dtype=FP8, descale="tensor"),
        replace(MLA, name="bf16-over-fp8", kv_dtype=FP8, sink=True),
        replace(MLA, name="queries", S_q=4, sink=True),
        replace(GQA, name="queries-fp32", S_q=3, dtype=torch.float32),
        replace(GQA, name="mask-bool", mask="bool"),
        replace(GQA, name="mask-float-heads", S_q=2, mask="float-heads", dtype=torch.float32),
        replace(MLA, name="mask-bool-rows", S_q=3, mask="bool-rows", layout="pool"),
        replace(GQA, name="negative-scale", softmax_scale=-0.2, dtype=torch.float32),
        replace(GQA, name="all-empty", lengths=(0, 0)),
        replace(GQA, name="no-request", lengths=()),
        replace(GQA, name="no-spare", lengths=(64, 1), spare=0),
        replace(MLA, name="long", lengths=(2000, 3, 1500), S_q=2, sink=True),
    )
}


def random_cases(n: int) -> dict[str, DecodeCase]:
    """Cases of any lengths, heads, dtypes, layouts and masks; the same on all ranks."""
    draw, cases = random.Random(5), {}
    for i in range(n):
        alias = draw.random() < 0.5
        S_q = draw.choice((1, 1, 2, 5, 8))
        cases[f"random-{i}"] = DecodeCase(
            f"random-{i}",
            tuple(draw.choice((draw.randrange(9), 64 * draw.randrange(9), draw.randrange(700))) for _ in range(4)),
            Hq=8,
            Hk=1 if alias else 2,
            D=draw.choice((64, 128)),
            Dv=64,
            S_q=S_q,
            dtype=draw.choice((torch.float32, torch.bfloat16, torch.float16)),
            layout=draw.choice(("slab", "sliced", "pool")),
            alias=alias,
            mask=draw.choice((None, None, "bool", "float-rows", "bool-heads")),
            sink=draw.random() < 0.5,
            spare=draw.randrange(3),
            softmax_scale=draw.choice((0.12, 0.3, -0.1)),
            seed=i,
        )
    return cases


def judge_decode(attention: ShardedAttention, case: DecodeCase, tail: torch.Tensor | None = None) -> list[str]:
    """A hostile case cut into this rank's share: its heads and its blocks, against float64 of the whole."""
    call = case.call().arguments
    whole = dict(call)
    if tail is not None:
        whole["mask"] = tail_over_all(tail, case.lengths)
    true_out, true_lse = decode_reference(**whole)
    rank, size = attention.context.rank, attention.context.size
    heads, kv_heads = attention.head_slices(case.Hq, case.Hk)
    sink = call["attn_sink"]
    mask, tail = (x if x is None or x.shape[1] == 1 else x[:, heads] for x in (call["mask"], tail))
    descales = {
        name: x if not isinstance(x, torch.Tensor) else x[:, kv_heads]
        for name, x in call.items()
        if name.endswith("descale")
    }
    q = call["q"][:, heads].contiguous()
    options = {
        "softmax_scale": case.softmax_scale,
        "attn_sink": None if sink is None else sink[heads],
        "return_lse": True,
        **descales,
    }
    k, table = local_cache(call["k_cache"][:, kv_heads], call["block_table"], rank, size)
    v, _ = local_cache(call["v_cache"][:, kv_heads], call["block_table"], rank, size)
    v = k[..., : case.Dv] if case.alias else v
    step = attention.step(q.shape, k.shape, table, call["seq_lens"], mask, tail_mask=tail)
    out, lse = attention.decode(q, k, v, table, step, **options)
    failures = [*check(out, lse, true_out[:, heads], true_lse[:, heads], case.budget).failures]

    # every rank of the context holds the same bits
    for other in attention.context.all_gather(out) if out.numel() else ():
        if not same_bits(other, out):
            failures.append("another rank holds other bits")
    # the rank's blocks where the whole cache lies
    own = local_table(call["block_table"], rank, size)
    caches = [call[name][:, kv_heads] for name in ("k_cache", "v_cache")]
    step = attention.step(q.shape, caches[0].shape, own, call["seq_lens"], mask, tail_mask=tail, check_values=False)
    again, _ = attention.decode(q, *caches, own, step, **options)
    if not same_bits(again, out):
        failures.append("other bits from the whole cache by a table of this rank's columns")
    # a share of the heads
    if q.shape[1] % size == 0:
        part, part_lse = attention.decode(q, *caches, own, step, **options, scatter_heads=True)
        share = slice(rank * q.shape[1] // size, (rank + 1) * q.shape[1] // size)
        if not (same_bits(part, out[:, share]) and same_bits(part_lse, lse[:, share])):
            failures.append("scatter_heads gives other bits")
    return failures


def tail_over_all(tail: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The mask over all keys that a tail mask means, one request at a time."""
    S_q = tail.shape[-1]
    shape = (len(lengths), tail.shape[1], S_q, max(lengths, default=0))
    hidden = False if tail.dtype == torch.bool else -torch.inf
    mask = torch.full(shape, hidden, dtype=tail.dtype, device=tail.device)
    for b, length in enumerate(lengths):
        first = max(length - S_q, 0)
        mask[b, ..., :first] = tail.dtype == torch.bool
        mask[b, ..., first:length] = tail.expand(len(lengths), -1, -1, -1)[b, ..., S_q - (length - first) :]
    return mask


def tails(device: str) -> dict[str, torch.Tensor]:
    """Tail masks of 4 new tokens: a tree, one that differs by request and head, and biases."""
    source = Source(3, device)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool, device=device)
    bias = source.normal((1, 1, 4, 4), torch.float32)
    return {
        "tail-tree": tree[None, None],
        "tail-random": source.chance((len(LENGTHS), 4, 4, 4), 0.6),
        "tail-bias": bias.masked_fill(source.chance((1, 1, 4, 4), 0.3), -torch.inf),
    }


def judge_all_decodes(attention: ShardedAttention, device: str, prefix: str) -> Failures:
    cases = {name: replace(case, device=device) for name, case in (DECODE | random_cases(16)).items()}
    found = {f"{prefix}{name}": judge_decode(attention, case) for name, case in cases.items()}
    for name, tail in tails(device).items():
        for case in (replace(cases["gqa"], S_q=4), replace(cases["mla"], S_q=4, sink=True)):
            found[f"{prefix}{name}-{case.name}"] = judge_decode(attention, case, tail)
    return found


# --- Prefill ----------------------------------------------------------------------------------------------------------

PREFILL = {
    case.name: case
    for case in (
        PrefillCase("prompt", 700, B=1),
        PrefillCase("prompt-ragged", 300, lengths=(300, 70), sink=True, dtype=torch.float32),
        PrefillCase("prompt-widths", 130, Hk=1, D=96, Dv=64),
        PrefillCase("prompt-full", 200, causal=False, lengths=(10, 200)),
        PrefillCase("prompt-short", 5),
        PrefillCase("prompt-none", 0),
        PrefillCase("prompt-fp8", 260, dtype=FP8, descale="tensor"),
    )
}


def judge_prefill(attention: ShardedAttention, case: PrefillCase) -> list[str]:
    call = case.call()
    true_out, true_lse = prefill_reference(**call.reference)
    whole = call.arguments
    q, k, v = (attention.shard_prompt(whole[name], 2) for name in ("q", "k", "v"))
    gathered = attention.gather_prompt(k, v, num_tokens=case.P)
    failures = [
        f"{name} gathered is not the whole"
        for name, x in zip(("k", "v"), gathered, strict=True)
        if not same_bits(x, whole[name])
    ]
    options = {name: whole[name] for name in ("seq_lens", "attn_sink", "q_descale", "k_descale", "v_descale")}
    causal = case.causal is None or case.causal
    out, lse = attention.prefill(q, *gathered, causal=causal, return_lse=True, **options)
    true = (attention.shard_prompt(x, 2) for x in (true_out, true_lse))
    return [*failures, *check(out, lse, *true, case.dtype).failures]


# --- What else a rank does --------------------------------------------------------------------------------------------


def judge_cache(attention: ShardedAttention, device: str) -> list[str]:
    """ContextCache beside one PagedKVCache through the same appends, forks and truncations."""
    source, B, failures = Source(7, device), 4, []
    pool = {"dtype": torch.float32, "device": device, "pool_blocks": 40, "max_seq_len": 1024}
    whole = PagedKVCache(B, 2, 64, **pool)
    cache = ContextCache(PagedKVCache(B, 2, 64, **pool), attention)

    def append(T: int, num_tokens: list[int], requests: list[int]) -> None:
        rows = [source.normal((len(requests), 2, T, 64), torch.float32) for _ in range(2)]
        for target in (whole, cache):
            target.append(*rows, num_tokens, requests)

    append(200, [200, 0, 63], [0, 1, 2])
    for target in (whole, cache):
        target.fork(0, 3)
    append(70, [1, 70], [3, 2])
    for target in (whole, cache):
        target.truncate([130, 64], [3, 2])
        target.free([1])
    with torch.device("meta"):  # what default device there is does not matter
        before = cache.lengths
        for wrong in (lambda: cache.free([4]), lambda: cache.truncate([131], [3]), lambda: cache.fork(0, 2)):
            try:
                wrong()
                failures.append("a wrong call was taken")
            except FlashMLAError:
                pass
        if cache.lengths != before:
            failures.append("a refused call changed lengths")
    append(3, [3, 3, 3, 3], [3, 1, 0, 2])
    if cache.lengths != whole.lengths:
        failures.append(f"lengths {cache.lengths}, not {whole.lengths}")
    if cache.seq_lens.tolist() != whole.seq_lens.tolist():
        failures.append("seq_lens differ")
    q = source.normal((B, 4, 3, 64), torch.float32)
    pages = cache.pages
    with torch.device("meta"):
        step = attention.step(q.shape, pages.k_cache.shape, pages.block_table, cache.seq_lens)
        out = attention.decode(q, pages.k_cache, pages.v_cache, pages.block_table, step)
    true = decode_reference(q, whole.k_cache, whole.v_cache, whole.block_table, whole.seq_lens)
    return [*failures, *check(out, None, *true, torch.float32).failures]


def judge_refusals(mesh: DeviceMesh, attention: ShardedAttention, device: str) -> list[str]:
    """Where one rank's call is wrong, all ranks raise, and the group serves on."""
    rank, size, failures = attention.context.rank, attention.context.size, []
    call = replace(GQA, device=device).call().arguments
    q, k, table, seq_lens = (call[name] for name in ("q", "k_cache", "block_table", "seq_lens"))
    own = local_table(table, rank, size)

    def refused(want: str, table: torch.Tensor, seq_lens: torch.Tensor, **options: Any) -> None:
        try:
            attention.step(q.shape, k.shape, table, seq_lens, **options)
        except FlashMLAError as error:
            if type(error).__name__ != want:
                failures.append(f"{error!r}, not {want}")
        else:
            failures.append(f"no {want}")

    bad = torch.full_like(own, 10**6) if rank == 1 else own
    refused("BlockTableError" if rank == 1 else "RankError", bad, seq_lens)
    others = seq_lens.clone()
    others[6] -= int(rank == 1)
    refused("RankError", own, others)
    refused("RankError", own, seq_lens, v_head_dim=32 if rank == 1 else None)
    refused("SequenceLengthError", own, seq_lens - 1)
    refused("MaskShapeError", own, seq_lens, mask=torch.ones(1, 1, 1, 299, dtype=torch.bool, device=device))
    refused("MaskShapeError", own, seq_lens, tail_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device))
    try:
        ShardedAttention(mesh, heads="rows")
        failures.append("no ShapeError for a dim that the mesh lacks")
    except ShapeError:
        pass
    step = attention.step(q.shape, k.shape, own, seq_lens)
    learning = q.clone().requires_grad_()
    try:
        attention.decode(learning, k, call["v_cache"], own, step).float().sum().backward()
        failures.append("a gradient was dropped")
    except GradientError:
        pass
    return failures


def judge_compiled(attention: ShardedAttention, device: str) -> list[str]:
    """A compiled function breaks its graph at the exchange, and gives the same bits."""
    call = replace(GQA, S_q=2, device=device).call().arguments
    own = local_table(call["block_table"], attention.context.rank, attention.context.size)
    caches = (call["k_cache"], call["v_cache"], own)

    def decode(q: torch.Tensor) -> torch.Tensor:
        step = attention.step(q.shape, caches[0].shape, own, call["seq_lens"], check_values=False)
        return attention.decode(q, *caches, step) * 2

    compiled = torch.compile(decode, backend="eager")
    return [] if same_bits(compiled(call["q"]), decode(call["q"])) else ["compiled, other bits"]


def judge_bench(device: str) -> list[str]:
    """The bench of two cards runs, and its result is right."""
    spec = importlib.util.spec_from_file_location("two_cards", ROOT / "docs" / "bench" / "two_cards.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sizes = {
            "batch": 2, "tokens": 300, "heads": 4, "prompt": 150, "prompt-heads": 2, "rounds": 2, "aim": 1e9,
        }  # fmt: skip
        bench.main([f"--{name}={value}" for name, value in {"device": device, **sizes}.items()])
    wanted = dist.get_rank() == 0
    return [] if ("exchange" in printed.getvalue()) == wanted else [printed.getvalue()]


def judge_one_dim_for_both(mesh: DeviceMesh, device: str) -> list[str]:
    """Heads and blocks over the same ranks: all-gather q's heads, decode, and keep the own heads of the result."""
    attention = ShardedAttention(mesh, context="context", heads="context")
    case = replace(MLA, S_q=2, device=device)
    call = case.call().arguments
    true_out, true_lse = decode_reference(**call)
    heads, _ = attention.head_slices(case.Hq, 1)
    q = attention.gather_heads(call["q"][:, heads])
    failures = [] if same_bits(q, call["q"]) else ["q gathered is not the whole"]
    own = local_table(call["block_table"], attention.context.rank, attention.context.size)
    step = attention.step(q.shape, call["k_cache"].shape, own, call["seq_lens"])
    caches = (call["k_cache"], call["v_cache"])
    out, lse = attention.decode(q, *caches, own, step, softmax_scale=0.1, return_lse=True, scatter_heads=True)
    return [*failures, *check(out, lse, true_out[:, heads], true_lse[:, heads], case.dtype).failures]


# --- What a set of processes does -------------------------------------------------------------------------------------


def context_only(size: int, device: str) -> Failures:
    """All ranks along one dim."""
    mesh = init_device_mesh(device, (size,), mesh_dim_names=("context",))
    attention = ShardedAttention(mesh, context="context")
    found = judge_all_decodes(attention, device, "")
    found |= {name: judge_prefill(attention, replace(case, device=device)) for name, case in PREFILL.items()}
    found["cache"] = judge_cache(attention, device)
    found["refusals"] = judge_refusals(mesh, attention, device)
    if size == 2:  # dynamo costs each process seconds
        found["compiled"] = judge_compiled(attention, device)
    found["bench"] = judge_bench(device)
    found["one-dim"] = judge_one_dim_for_both(mesh, device)
    return found


def context_and_heads(size: int, device: str) -> Failures:
    """As above over four ranks, then a mesh of 2 x 2."""
    found = context_only(size, device)
    mesh = init_device_mesh(device, (2, size // 2), mesh_dim_names=("context", "heads"))
    both = ShardedAttention(mesh, context="context", heads="heads")
    found |= judge_all_decodes(both, device, "2x2-")
    only = ShardedAttention(mesh, heads="heads")
    found["heads-only"] = judge_decode(only, replace(MLA, S_q=2, device=device))
    return found


def lose_a_rank(size: int, device: str) -> Failures:
    """Rank 1 does not come to a decode, then not to a step, then dies; rank 0 gets a RankError each time. Over gloo."""
    call = replace(GQA, device=device).call().arguments
    names = {"mesh_dim_names": ("context",)}
    hasty, hasty_too, patient = (
        DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=seconds)), device, **names)
        for seconds in (1, 1, 10)
    )
    own = local_table(call["block_table"], dist.get_rank(), size)
    arguments = (call["q"], call["k_cache"], call["v_cache"], own)
    shapes = (call["q"].shape, call["k_cache"].shape, own, call["seq_lens"])
    found: Failures = {}
    world = init_device_mesh(device, (size,), **names)
    for name, mesh in (("compiled", world), ("late", hasty), ("late step", hasty_too), ("dead", patient)):
        attention = ShardedAttention(mesh, context="context")
        step = attention.step(*shapes)
        attention.decode(*arguments, step)  # all are there
        dist.barrier()
        if name == "compiled":
            continue
        if dist.get_rank() == 1:
            if name == "dead":
                os._exit(0)
            time.sleep(2)
            continue
        begin = time.monotonic()
        try:
            if name == "late step":
                attention.step(*shapes)
            else:
                attention.decode(*arguments, step)
            found[name] = ["no error"]
        except RankError as error:
            what = "comparison of arguments" if name == "late step" else "all_gather"
            named = f"{what} of rank 0" in error.given and "died" in error.cause
            found[name] = [] if named else [str(error)]
        if time.monotonic() - begin > 20:
            found[name].append("the error came late")
    return found
