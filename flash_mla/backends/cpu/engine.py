"""The compiled kernels of `kernels/cpu`, bound to problems: what is compiled, the arguments, threads and splits.

A problem is bound once: its kernel, its items, and the arguments that all its calls share. A call copies them, puts its
addresses in, and runs the kernel in torch's OpenMP team: nothing here grows with the number of requests, no value of a
tensor is read, and nothing is allocated but a thread's memory, once.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_mla.problem import (
    BLOCK,
    FP8,
    Attention,
    DecodeArgs,
    DecodeProblem,
    PrefillArgs,
    PrefillProblem,
    SparseArgs,
    SparseProblem,
)

if TYPE_CHECKING:
    from flash_mla.kernels.cpu.build import Kernel
    from flash_mla.kernels.cpu.config import Spec

logger = logging.getLogger("flash_mla")

BY_ADDRESS = True
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
MANY = {"fma": 24, "avx512bf16": 16, "neon": 16, "amx": 8}
"""Rows of an item from which on they lie in lanes, by unit: pairs of BF16 are not widened, so that fewer rows pay."""
MANY_ROWS = {"fma": (96, 64), "avx512bf16": (96, 64), "neon": (96, 64), "amx": (192, 128)}
"""Most rows of such an item, for D up to 256 and above: K is widened once for all of them; q, O, scores and K take 170
KiB at 96 rows of D 128. AMX's are on cores with 2 MiB of L2."""
TILE_ROWS = 12
"""What its rows are a multiple of: whole tiles of values, of 6 or 12 rows (`Spec.tile_rows`)."""
ITEMS = 32
"""Items that a call is split into, at least, where its keys allow: enough for the threads of a desktop."""
SPLIT_BLOCKS, SPLIT_BYTES = 8, 1 << 17
"""Blocks that a split has at least; twice as many where it leaves more bytes than these to be merged (64 rows of a
latent, on AMX, where merging eight took 0.7 ms of 2.6)."""
TEAM_FLOPS = 4_000_000
"""Work from which on a team is woken: about 50 us of one core, five times what waking costs."""


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, or None. Logged once: torch's ops serve instead."""
    reason = lacking()
    if reason is not None:
        logger.info("the CPU backend runs torch's ops: %s", reason)
    return reason


def lacking() -> str | None:
    try:
        import llvmlite  # noqa: F401
    except ImportError:
        return "llvmlite is not installed: pip install 'flash-mla[cpu]'"
    from flash_mla.kernels.cpu import config, team

    return config.lacks(config.host()) or (None if team.team() else "torch's OpenMP runtime has no known entry point")


def refuse(problem: Attention) -> str | None:
    """Why torch must serve, or None."""
    if (reason := missing()) is not None:
        return reason
    if isinstance(problem, SparseProblem) and problem.format is not None:
        from flash_mla.kernels.cpu.formats import ROWS

        if problem.format not in ROWS:
            return f"rows of {problem.format}: the compiled kernels read {', '.join(ROWS)}"
    return None


def config(problem: Attention) -> Call:
    """The problem bound to its kernel, which the first call compiles."""
    if isinstance(problem, SparseProblem):
        return Sparse(problem)
    return Decode(problem) if isinstance(problem, DecodeProblem) else Prefill(problem)


def bind(problem: Attention, config: Call) -> Callable[[Any], None]:
    """What fills args.out and args.lse of a call."""
    return config.launch


def spec(problem: Attention, rows: int, **more: Any) -> Spec:
    """The kernel for items of so many rows, its mask's element type left open; `more` are fields of Spec."""
    from flash_mla.kernels.cpu.config import Spec, host, tile, unit_of, wide_tile

    q, D, Dv = NAMES[problem.dtype], problem.D, problem.Dv
    unit = unit_of(host(), q, more["kv"], D, Dv, more.get("page", BLOCK))
    # NOTE: rows of K of a latent that are shared by 128 heads gain nothing: q, O and K fill L2 either way
    wide = isinstance(problem, DecodeProblem) and D > 256 and unit == "fma"
    span = 0
    if rows >= MANY[unit] and not wide:
        even = bool(more.get("layout")) or not isinstance(problem, PrefillProblem)
        tile_m, tile_n = wide_tile(host(), unit, rows, even)
        span = BLOCK if more.get("layout") else MANY_ROWS[unit][D > 256]
        span = -(-min(span, rows) // tile_m) * tile_m
        held = span if unit == "amx" else -(-span // TILE_ROWS) * TILE_ROWS
    else:
        unit = "fma"
        tile_m, tile_n = tile(rows, host(), more["kv"])
        held = min(-(-rows // tile_m) * tile_m, ROWS)
    return Spec(
        D=D,
        Dv=Dv,
        q=q,
        unit=unit,
        rows=held,
        span=span,
        tile_m=tile_m,
        tile_n=tile_n,
        lanes=host().lanes,
        **more,
    )


# --- Calls ------------------------------------------------------------------------------------------------------------


Arguments = Any
"""The kernels' arguments: an array of 8-byte integers."""


def arguments(names: Sequence[str], **values: int) -> Arguments:
    """The arguments of these names; 0 where no value is given."""
    return (ctypes.c_int64 * len(names))(*(values.get(name, 0) for name in names))


def integers(x: Tensor) -> tuple[int, bool]:
    """The address of contiguous integers, and whether they are of 8 bytes."""
    return x.data_ptr(), x.dtype == torch.int64


class Call:
    """A problem bound to its kernel.

    Args:
        spec: the kernel.
        requests, heads, rows: an item is a group of `rows` rows of one of the heads of one of the requests.
        blocks: of keys, at most, that an item sees.
        values: arguments that every call shares, by name.
    """

    def __init__(self, spec: Spec, requests: int, heads: int, rows: int, blocks: int, **values: int) -> None:
        from flash_mla.kernels.cpu.item import COUNTERS, EACH, FIELDS

        self.spec, self.at = spec, {name: i for i, name in enumerate(FIELDS)}
        groups = -(-rows // (spec.span or spec.rows))
        items = requests * heads * groups
        # NOTE: in decode by what one request is, so that its bits are the same in every batch. By count, not measured,
        # merging costs a batch of 16 at most 4 %: 33 KiB a split, whose 8 blocks are of 72 KiB (MLA, 16 heads)
        alone = heads * groups if spec.source == "table" else items
        least = SPLIT_BLOCKS * (1 if spec.partial <= SPLIT_BYTES else 2)
        splits = max(1, min(-(-ITEMS // alone), blocks // least)) if 0 < alone < ITEMS else 1
        self.work = items * splits
        self.partial = self.work * spec.partial if splits > 1 else 0
        self.counters = items if splits > 1 else 0
        flops = 2 * BLOCK * blocks * items * min(rows, spec.rows) * (spec.D + spec.Dv)
        self.alone = flops < TEAM_FLOPS
        part = least * BLOCK // spec.block
        values |= {"work": self.work, "heads": heads, "groups": groups, "splits": splits, "part": part, "R": rows}
        self.template = arguments(FIELDS, **values)
        # NOTE: one write in place of fourteen, which cost a microsecond
        self.each, self.first = struct.Struct(f"<f4x{len(EACH) - 1}q"), 8 * len(COUNTERS)
        self.entries: dict[str | None, Entries] = {}

    def launch(self, args: Any) -> None:
        """One call."""
        raise NotImplementedError

    def copy(self) -> Arguments:
        """A copy of the arguments that all calls share."""
        return type(self.template).from_buffer_copy(self.template)

    def put(self, packed: Arguments, name: str, x: Tensor | None, dims: str) -> None:
        """The address of a tensor that may be missing, and its strides: `dims` names that of each dim."""
        if x is None:
            return
        at, size = self.at, x.element_size()
        packed[at[name]] = x.data_ptr()
        for dim, stride in zip(dims, x.stride(), strict=True):
            packed[at[f"{name}_{dim}"]] = stride * size

    def put_integers(self, packed: Arguments, name: str, x: Tensor | None) -> Tensor | None:
        """The address of [B] integers, int32 or int64; gives back what lies there, to be kept during the call."""
        if x is None:
            return None
        x = x.contiguous()
        packed[self.at[name]], packed[self.at[f"{name}_wide"]] = integers(x)
        return x

    def run(self, packed: Arguments, args: Any, mask: torch.dtype | None, *keys: int) -> None:
        """Run the kernel for masks of this dtype; keys: what EACH names from k on, as far as the call has it."""
        if not self.work:
            return
        kind = None if mask is None else NAMES[mask]
        entries = self.entries.get(kind)
        if entries is None:
            made = replace(self.spec, mask=kind)
            entries = self.entries[kind] = Entries(made, made.memory()[1])
        threads = 1 if self.alone else min(torch.get_num_threads(), self.work)
        memory = MEMORY.reserve(threads * entries.memory, self.partial, self.counters)
        lse = 0 if args.lse is None else args.lse.data_ptr()
        given = (args.softmax_scale, *memory, args.q.data_ptr(), args.out.data_ptr(), lse, *keys)
        self.each.pack_into(packed, self.first, *given)
        entries.run(packed, threads)


class Entries:
    """A compiled kernel, which runs in this thread or in a team, and the bytes a thread needs."""

    def __init__(self, spec: Kernel, memory: int) -> None:
        from flash_mla.kernels.cpu import store, team

        run = team.team()
        assert run is not None
        self.team, self.memory = run, memory
        self.addresses = store.load(spec)
        self.alone = team.alone(self.addresses["run"])

    def run(self, packed: Arguments, threads: int) -> None:
        """Run the kernel on its arguments."""
        if threads == 1:
            self.alone(packed)
        else:
            self.team(self.addresses, ctypes.addressof(packed), threads)


class Memory(threading.local):
    """What the calls of one Python thread work in; it grows to the largest call."""

    def __init__(self) -> None:
        self.done = torch.zeros(ITEMS, dtype=torch.int64, device="cpu")
        self.threads = self.partial = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.addresses = (0, 0, self.done.data_ptr())

    def reserve(self, threads: int, partial: int = 0, counters: int = 0) -> tuple[int, int, int]:
        """The addresses of at least so many bytes for the threads, for the splits, and of so many counters of splits,
        which every call leaves at 0."""
        if self.done.numel() < counters:
            self.done = torch.zeros(counters, dtype=torch.int64, device="cpu")
            self.addresses = (*self.addresses[:2], self.done.data_ptr())
        if self.threads.numel() < threads + BLOCK or self.partial.numel() < partial:
            self.threads = torch.empty(max(threads + BLOCK, self.threads.numel()), dtype=torch.uint8, device="cpu")
            self.partial = torch.empty(max(partial, self.partial.numel()), dtype=torch.uint8, device="cpu")
            aligned = -(-self.threads.data_ptr() // BLOCK) * BLOCK
            self.addresses = (aligned, self.partial.data_ptr(), self.done.data_ptr())
        return self.addresses


MEMORY = Memory()


# --- Phases -----------------------------------------------------------------------------------------------------------


def strides(name: str, steps: tuple[int, ...], dtype: torch.dtype, dims: str) -> dict[str, int]:
    """Strides in bytes, by the kernels' names."""
    return {f"{name}_{dim}": step * dtype.itemsize for dim, step in zip(dims, steps, strict=True)}


def packed_strides(heads: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Strides of a contiguous [B, heads, rows, columns], the last dim left out."""
    return heads * rows * columns, rows * columns, columns


class Decode(Call):
    """Decode: the rows of an item are all queries of a KV head."""

    def __init__(self, problem: DecodeProblem) -> None:
        p = problem
        self.cap, self.tail = p.table_blocks * p.page if p.Nblk else 0, p.tail
        self.optional = p.mask != "none" or p.descale or p.sink
        rope = 0 if p.rope_strides is None else p.D - p.Dv
        more = strides("rope", p.rope_strides[:4], p.kv_dtype, "bhpk") if p.rope_strides else {}
        outer = packed_strides(p.Hq, p.S_q, p.Dv) if p.out_strides is None else p.out_strides[:3]
        kv, out = NAMES[p.kv_dtype], NAMES[p.out_dtype]
        super().__init__(
            spec(p, p.ratio * p.S_q, kv=kv, out=out, alias=p.alias, page=p.page, rope=rope),
            p.B,
            p.Hk,
            p.ratio * p.S_q,
            -(-self.cap // BLOCK),
            S_q=p.S_q,
            share=1,
            from_end=1,
            causal=int(p.mask == "none"),
            cap=self.cap,
            Nblk=p.Nblk,
            **strides("q", p.q_strides[:3], p.dtype, "bhr"),
            **strides("k", p.k_strides[:4], p.kv_dtype, "bhpk"),
            **strides("v", p.v_strides[:4], p.kv_dtype, "bhpk"),
            **more,
            **strides("out", outer, p.out_dtype, "bhr"),
            **strides("lse", packed_strides(p.Hq, p.S_q, 1), torch.float32, "bhr"),
            sink_h=torch.float32.itemsize,
        )

    def launch(self, args: DecodeArgs) -> None:
        if self.tail:
            args = args._replace(mask=args.whole_mask(min(max(int(args.seq_lens.max()), 1), self.cap)))
        packed, lens = self.copy(), args.seq_lens.contiguous()
        if args.k_rope is not None:
            packed[self.at["rope"]] = args.k_rope.data_ptr()
        mask = put_optional(self, packed, args) if self.optional else None
        self.run(packed, args, mask, *keys_of(args, lens))
        args.mark_empty()


class Prefill(Call):
    """Prefill: the rows of an item are queries of one head, so that a group of them ends at one key."""

    def __init__(self, problem: PrefillProblem) -> None:
        p = problem
        self.cap = p.S_kv
        self.optional = p.mask != "none" or p.descale or p.sink
        outer = packed_strides(p.Hq, p.P, p.Dv)
        values: dict[str, int] = {}
        for name, steps in (("k", p.k_strides), ("v", p.v_strides)):
            if not p.paged:
                steps = (*steps[:2], BLOCK * steps[2], steps[2])
            values |= strides(name, steps[:4], p.dtype, "bhpk")
        made = spec(
            p,
            p.P,
            kv=NAMES[p.dtype],
            out=NAMES[p.out_dtype],
            alias=p.alias,
            source="table" if p.paged else "rows",
            layout=p.block_mask,
        )
        super().__init__(
            made,
            p.B,
            p.Hq,
            p.P,
            -(-self.cap // BLOCK),
            S_q=p.P,
            share=p.ratio,
            causal=int(p.causal),
            cap=self.cap,
            **values,
            **strides("q", p.q_strides[:3], p.dtype, "bhr"),
            **strides("out", outer, p.out_dtype, "bhr"),
            **strides("lse", packed_strides(p.Hq, p.P, 1), torch.float32, "bhr"),
            sink_h=torch.float32.itemsize,
        )

    def launch(self, args: PrefillArgs) -> None:
        packed, at = self.copy(), self.at
        lens = None if args.seq_lens is None else args.seq_lens.contiguous()
        if args.block_table is not None:
            packed[at["Nblk"]] = args.k.shape[2]
            packed[at["cap"]] = min(self.cap, BLOCK * args.block_table.shape[1]) if args.k.shape[2] else 0
        starts = self.put_integers(packed, "starts", args.start_pos)
        self.put(packed, "layout", args.block_mask, "bhrk")
        mask = put_optional(self, packed, args) if self.optional else None
        self.run(packed, args, mask, *keys_of(args, lens))
        del starts


def keys_of(args: DecodeArgs | PrefillArgs, lens: Tensor | None) -> tuple[int, ...]:
    """Where keys and values lie, and how many they are: what EACH names from k on."""
    table = args.block_table
    places = (0, 0, 0)
    if table is not None:
        address, wide = integers(table)
        places = (address, table.stride(0) * table.element_size(), wide)
    return (args.k.data_ptr(), args.v.data_ptr(), *places, *((0, 0) if lens is None else integers(lens)))


def put_optional(call: Call, packed: Arguments, args: DecodeArgs | PrefillArgs) -> torch.dtype | None:
    """Sink, descales and mask, as far as they are given; the mask's dtype."""
    at = call.at
    if args.attn_sink is not None:
        packed[at["sink"]] = args.attn_sink.data_ptr()
    call.put(packed, "q_descale", args.q_descale, "bh")
    call.put(packed, "k_descale", args.k_descale, "bh")
    call.put(packed, "v_descale", args.v_descale, "bh")
    if args.mask is None:
        return None
    call.put(packed, "mask", args.mask, "bhrk")
    packed[at["cap"]] = min(packed[at["cap"]], args.mask.shape[-1])
    return args.mask.dtype


NO_KEYS = (0,) * 7
"""In place of `keys_of`, where keys are named by index."""


class Sparse(Call):
    """Sparse: an item is a query token; its rows are the heads, which stand where queries do elsewhere."""

    def __init__(self, problem: SparseProblem) -> None:
        p = problem
        values: dict[str, int] = {}
        for n, keys in enumerate(p.sets):
            size = p.dtype.itemsize if p.format is None else 1
            values |= {f"c_p{n}": keys.cache_strides[0] * size, f"c_k{n}": keys.cache_strides[1] * size}
            values |= {f"topk{n}": keys.topk, f"page{n}": max(keys.page, 1), f"limit{n}": keys.pages * keys.page}
        kv, out = p.format or NAMES[p.dtype], NAMES[p.dtype]
        super().__init__(
            spec(p, p.Hq, kv=kv, out=out, alias=True, source="sparse", sets=len(p.sets)),
            p.B,
            p.S_q,
            p.Hq,
            sum(-(-keys.topk // BLOCK) for keys in p.sets),
            S_q=p.Hq,
            share=1,
            **values,
            **strides("q", p.q_strides[:3], p.dtype, "bhr"),
            **strides("out", packed_strides(p.S_q, p.Hq, p.Dv), p.dtype, "bhr"),
            **strides("lse", packed_strides(p.S_q, p.Hq, 1), torch.float32, "bhr"),
            sink_r=torch.float32.itemsize,
        )

    def launch(self, args: SparseArgs) -> None:
        packed, at = self.copy(), self.at
        for name, x in (("max_logits", args.max_logits), ("sink", args.attn_sink)):
            if x is not None:
                packed[at[name]] = x.data_ptr()
        kept = []
        for n, keys in enumerate(args.keys):
            packed[at[f"cache{n}"]], packed[at[f"indices{n}"]] = keys.cache.data_ptr(), keys.indices.data_ptr()
            size = keys.indices.element_size()
            packed[at[f"wide{n}"]] = size == torch.int64.itemsize
            packed[at[f"i_b{n}"]], packed[at[f"i_h{n}"]] = (step * size for step in keys.indices.stride()[:2])
            kept.append(self.put_integers(packed, f"count{n}", keys.lengths))
        self.run(packed, args, None, *NO_KEYS)
        del kept
        args.mark_empty()
