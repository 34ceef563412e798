"""The compiled kernels of `kernels/cpu`, bound to problems: what is compiled, the arguments, threads and splits.

A call fills one array of 8-byte arguments and runs the kernel in torch's OpenMP team: nothing here grows with the
number of requests, no value of a tensor is read, and nothing is allocated but a thread's memory, once.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_mla.problem import (
    BLOCK,
    FP8,
    DecodeArgs,
    DecodeProblem,
    PrefillArgs,
    PrefillProblem,
    Problem,
    SparseArgs,
    SparseProblem,
)

if TYPE_CHECKING:
    from flash_mla.kernels.cpu.config import Spec

Values = dict[str, Any]
"""Arguments by the kernels' names: integers, floats, and tensors, which stand for their addresses."""

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    FP8: "fp8",
    torch.bool: "bool",
}
"""What the kernels call an element type."""

ROWS = 32
"""Most rows of an item: q and O of 32 MLA rows are 140 KiB, beside 74 KiB of K a block, in an L2 of 512 KiB."""
ITEMS = 32
"""Items that a call is split into, at least, where its keys allow: enough for the threads of a desktop."""
SPLIT_BLOCKS = 8
"""Blocks that a split has at least."""
TEAM_FLOPS = 4_000_000
"""Work from which on a team is woken: about 50 us of one core, five times what waking costs."""


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        import llvmlite  # noqa: F401
    except ImportError:
        return "llvmlite is not installed: pip install 'flash-mla[cpu]'"
    from flash_mla.kernels.cpu import config, team

    return config.lacks(config.host()) or (None if team.team() else "torch's OpenMP runtime has no known entry point")


# --- What is compiled -------------------------------------------------------------------------------------------------


def spec(problem: Problem) -> Spec | None:
    """The kernel of a problem, its mask's element type left open; None where torch serves."""
    if missing():
        return None
    from flash_mla.kernels.cpu.config import Spec, host, tile

    if isinstance(problem, SparseProblem):
        rows, alias, out = problem.Hq, True, problem.dtype
    else:
        rows = problem.ratio * problem.S_q if isinstance(problem, DecodeProblem) else problem.P
        alias, out = problem.alias, problem.out_dtype
    rows = max(rows, 1)
    tile_m, tile_n = tile(rows, host())
    kv = NAMES[problem.dtype]
    if isinstance(problem, SparseProblem) and problem.format is not None:
        kv = problem.format
    made = Spec(
        D=problem.D,
        Dv=problem.Dv,
        q=NAMES[problem.dtype],
        kv=kv,
        out=NAMES[out],
        rows=min(-(-rows // tile_m) * tile_m, ROWS),
        tile_m=tile_m,
        tile_n=tile_n,
        lanes=host().lanes,
        alias=alias,
    )
    if isinstance(problem, SparseProblem):
        return replace(made, source="sparse", sets=len(problem.sets))
    if isinstance(problem, PrefillProblem):
        return replace(made, source="table" if problem.paged else "rows", layout=problem.block_mask)
    return made


class Kernel:
    """A compiled kernel, and how its calls are cut into items."""

    def __init__(self, spec: Spec) -> None:
        from flash_mla.kernels.cpu import store, team
        from flash_mla.kernels.cpu.item import FIELDS

        run = team.team()
        assert run is not None
        self.spec, self.run, self.entries = spec, run, store.load(spec)
        self.alone = team.alone(self.entries["attend"])
        self.memory = spec.memory()[1]
        self.fields = {name: i for i, name in enumerate(FIELDS)}

    def launch(self, values: Values, blocks: int, rows: int) -> None:
        """Run items of `rows` rows (and requests x heads, in values) over at most `blocks` blocks of keys each."""
        spec = self.spec
        groups = -(-rows // spec.rows)
        items = values.pop("B") * values["heads"] * groups
        if not items:
            return
        splits = max(1, min(-(-ITEMS // items), blocks // SPLIT_BLOCKS)) if items < ITEMS else 1
        work = items * splits
        flops = 2 * BLOCK * blocks * items * min(rows, spec.rows) * (spec.D + spec.Dv)
        threads = min(torch.get_num_threads(), work) if flops > TEAM_FLOPS else 1
        own = memory(threads * self.memory, work * spec.partial if splits > 1 else 0)
        packed = (ctypes.c_int64 * len(self.fields))()
        values |= {"work": work, "groups": groups, "splits": splits, "R": rows, **own}
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.data_ptr()
            elif isinstance(value, float):
                value = struct.unpack("<i", struct.pack("<f", value))[0]
            packed[self.fields[name]] = value or 0
        if threads == 1:
            self.alone(ctypes.addressof(packed))
        else:
            self.run(self.entries, ctypes.addressof(packed), threads)


kernel = lru_cache(maxsize=None)(Kernel)


class Memory(threading.local):
    """What the calls of one Python thread work in; it grows to the largest call."""

    def __init__(self) -> None:
        self.threads = torch.empty(0, dtype=torch.uint8)
        self.partial = torch.empty(0, dtype=torch.uint8)
        self.done = torch.zeros(ITEMS, dtype=torch.int64)


MEMORY = Memory()


def memory(threads: int, partial: int) -> Values:
    """At least so many bytes for the threads and the splits, and the splits' counters, which every call leaves at 0."""
    if MEMORY.threads.numel() < threads + BLOCK:
        MEMORY.threads = torch.empty(threads + BLOCK, dtype=torch.uint8)
    if MEMORY.partial.numel() < partial:
        MEMORY.partial = torch.empty(partial, dtype=torch.uint8)
    start = -(-MEMORY.threads.data_ptr() // BLOCK) * BLOCK
    return {"memory": start, "partial": MEMORY.partial, "done": MEMORY.done}


# --- Arguments --------------------------------------------------------------------------------------------------------


def strides(name: str, x: Tensor | None, **dims: int) -> Values:
    """The tensor and its strides in bytes: `dims` names the stride of each dim that is walked."""
    if x is None:
        return {}
    size, steps = x.element_size(), x.stride()
    return {name: x, **{f"{name}_{key}": steps[dim] * size for key, dim in dims.items()}}


def integers(name: str, x: Tensor | None) -> Values:
    """Integers that lie one after another, int32 or int64."""
    if x is None:
        return {}
    return {name: x.contiguous(), f"{name}_wide": int(x.dtype == torch.int64)}


def decode(problem: DecodeProblem, spec: Spec, args: DecodeArgs) -> None:
    """A decode call: the rows of an item are all queries of a KV head."""
    keys = problem.table_blocks * BLOCK if problem.Nblk else 0
    if args.mask is not None:
        keys = min(keys, args.mask.shape[-1])
        spec = replace(spec, mask=NAMES[args.mask.dtype])
    values = {
        "B": problem.B,
        "heads": problem.Hk,
        "share": 1,
        "S_q": problem.S_q,
        "cap": keys,
        "causal": int(args.mask is None),
        "from_end": 1,
        "Nblk": problem.Nblk,
        **integers("lens", args.seq_lens),
        **paged(args.block_table),
        **shared(args),
    }
    kernel(spec).launch(values, -(-keys // BLOCK), problem.ratio * problem.S_q)


def paged(table: Tensor) -> Values:
    """The block table."""
    return {**strides("table", table, row=0), "table_wide": int(table.dtype == torch.int64)}


def shared(args: DecodeArgs | PrefillArgs) -> Values:
    """What decode and prefill pass alike."""
    cache = {"b": 0, "h": 1, "p": 2, "k": 3} if args.k.dim() == 5 else {"b": 0, "h": 1, "k": 2}
    return {
        "scale": float(args.softmax_scale),
        **strides("q", args.q, b=0, h=1, r=2),
        **strides("k", args.k, **cache),
        **strides("v", args.v, **cache),
        **strides("out", args.out, b=0, h=1, r=2),
        **strides("lse", args.lse, b=0, h=1, r=2),
        **strides("mask", args.mask, b=0, h=1, r=2, k=3),
        **strides("sink", args.attn_sink, h=0),
        **strides("q_descale", args.q_descale, b=0, h=1),
        **strides("k_descale", args.k_descale, b=0, h=1),
        **strides("v_descale", args.v_descale, b=0, h=1),
    }


def prefill(problem: PrefillProblem, spec: Spec, args: PrefillArgs) -> None:
    """A prefill call: the rows of an item are queries of one head, so that a group of them ends at one key."""
    keys = problem.S_kv
    if args.block_table is not None:
        keys = args.block_table.shape[1] * BLOCK if args.k.shape[2] else 0
        if args.seq_lens is None:
            keys = min(keys, problem.P)
    if args.mask is not None:
        keys = min(keys, args.mask.shape[-1])
        spec = replace(spec, mask=NAMES[args.mask.dtype])
    values = {
        "B": problem.B,
        "heads": problem.Hq,
        "share": problem.ratio,
        "S_q": problem.P,
        "cap": keys,
        "causal": int(problem.causal),
        **integers("lens", args.seq_lens),
        **integers("starts", args.start_pos),
        **shared(args),
        **strides("layout", args.block_mask, b=0, h=1, r=2, k=3),
    }
    if args.block_table is not None:
        values |= {"Nblk": args.k.shape[2], **paged(args.block_table)}
    else:
        values |= {f"{x}_p": BLOCK * values[f"{x}_k"] for x in "kv"}
    kernel(spec).launch(values, -(-keys // BLOCK), problem.P)


def sparse(problem: SparseProblem, spec: Spec, args: SparseArgs) -> None:
    """A sparse call: an item is a query token, its rows are the heads, each of which is a `query` of the item."""
    values: Values = {
        "B": problem.B,
        "heads": problem.S_q,
        "share": 1,
        "S_q": problem.Hq,
        "scale": float(args.softmax_scale),
        "max_logits": args.max_logits,
        **strides("q", args.q, b=0, h=1, r=2),
        **strides("out", args.out, b=0, h=1, r=2),
        **strides("lse", args.lse, b=0, h=1, r=2),
        **strides("sink", args.attn_sink, r=0),
    }
    blocks = 0
    for n, keys in enumerate(args.keys):
        pages, page = keys.cache.shape[:2]
        size = keys.cache.element_size()
        index = keys.indices.element_size()
        values |= {
            f"cache{n}": keys.cache,
            f"c_p{n}": keys.cache.stride(0) * size,
            f"c_k{n}": keys.cache.stride(1) * size,
            f"page{n}": max(page, 1),
            f"limit{n}": pages * page,
            f"indices{n}": keys.indices,
            f"wide{n}": int(keys.indices.dtype == torch.int64),
            f"i_b{n}": keys.indices.stride(0) * index,
            f"i_h{n}": keys.indices.stride(1) * index,
            f"topk{n}": keys.indices.shape[2],
        }
        if keys.lengths is not None:
            values |= {f"count{n}": keys.lengths.contiguous(), f"count_wide{n}": int(keys.lengths.dtype == torch.int64)}
        blocks += -(-keys.indices.shape[2] // BLOCK)
    kernel(spec).launch(values, blocks, problem.Hq)
