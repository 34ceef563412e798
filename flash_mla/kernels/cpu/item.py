"""An item of work: its arguments and memory, its rows and keys, and how it ends.

An item is (request, heads that share a KV head, split of the keys, group of rows). Row r is query r % S_q of head
r // S_q: all queries of a KV head in decode, those of one head in prefill, the heads of one query in sparse attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llvmlite import ir

from flash_mla.kernels.cpu.config import BLOCK, Spec
from flash_mla.kernels.cpu.formats import CODE, SIZE, SPLIT, narrow, store_pair
from flash_mla.kernels.cpu.ir import F32, I32, I64, Value, vector
from flash_mla.kernels.cpu.lanes import exp, interleave, log
from flash_mla.kernels.cpu.run import Run

COUNTERS = ("next", "slot")
EACH = (
    # FP32; memory of the threads, of the splits, and how many parts of each item are done
    *("scale", "memory", "partial", "done"),
    *("q", "out", "lse", "k", "v", "table", "table_row", "table_wide", "lens", "lens_wide"),
)
"""The arguments that every call sets."""
OTHERS = (
    # items: how many, and how they divide (a split has `part` blocks at least); rows R of an item's heads, S_q of each;
    # `share` item heads use one KV head
    "work heads groups splits part R S_q share "
    # keys: lengths and starts [B] (or 0: `cap` keys, start 0), 8-byte ones where wide; from_end: start = length - S_q
    "cap starts starts_wide causal from_end Nblk "
    "rope max_logits sink mask layout q_descale k_descale v_descale "
    # strides in bytes: b request, h head, r query, p page, k row of a page or key
    "q_b q_h q_r k_b k_h k_p k_k v_b v_h v_p v_k rope_b rope_h rope_p rope_k "
    "out_b out_h out_r lse_b lse_h lse_r sink_h sink_r "
    "mask_b mask_h mask_r mask_k layout_b layout_h layout_r layout_k "
    "q_descale_b q_descale_h k_descale_b k_descale_h v_descale_b v_descale_h "
    # rows named by index, in one cache or two
    "cache0 indices0 wide0 topk0 count0 count0_wide limit0 page0 c_p0 c_k0 i_b0 i_h0 "
    "cache1 indices1 wide1 topk1 count1 count1_wide limit1 page1 c_p1 c_k1 i_b1 i_h1"
)
FIELDS = (*COUNTERS, *EACH, *OTHERS.split())
"""The arguments, 8 bytes each."""


class Place(NamedTuple):
    """Which item: its group of rows, split of the keys, item head and request. Its keys are [0, n) of a request of
    `length`, whose query 0 stands at `start`; they need so many splits, and this one's are the blocks [first, stop).
    """

    group: Value
    split: Value
    h: Value
    b: Value
    length: Value
    start: Value
    n: Value
    splits: Value
    first: Value
    stop: Value


class Item(Run):
    """The item that is being worked on; `m` are the parts of the thread's memory."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(FIELDS)
        self.spec, g = spec, self.g
        self.V, self.I = vector(F32, spec.lanes), vector(I32, spec.lanes)
        self.zero, self.lowest = g.const(0.0, self.V), g.const(-math.inf, self.V)
        parts, size = spec.memory()
        memory = self.own_memory(size)
        self.m = {name: memory + part.at for name, part in parts.items()}

    def begin(self, number: Value, claim: ir.Block) -> None:
        """Begin the item of this number; claim another where its keys need fewer splits."""
        g, a, s = self.g, self.a, self.spec
        self.number, self.place = number, self.locate(number)
        self.group, self.split, self.h, self.b, self.length, self.start, self.n, self.splits, *_ = self.place
        has_keys = g.label("has_keys")
        g.b.cbranch((self.split < self.splits).v, has_keys, claim)
        g.b.position_at_end(has_keys)
        self.r0, self.nr = self.rows_of(self.group)
        self.live_tiles = (self.nr + (s.tile_m - 1)) // s.tile_m
        self.live_vectors = self.live_tiles * (s.tile_m // s.deep)
        self.causal = a["causal"].differs(0)
        self.scale = self.at["scale"].load(F32) * self.descale("q") * self.descale("k")
        self.begin_partial()
        self.load_q()
        self.begin_rows()

    def rows_of(self, group: Value) -> tuple[Value, Value]:
        """The first of a group's rows, and how many they are."""
        span = self.spec.span or self.spec.rows
        return group * span, (self.a["R"] - group * span).min(span)

    def locate(self, number: Value) -> Place:
        """The item of this number: the groups of a split adjoin, then splits, heads and requests."""
        g, a, block = self.g, self.a, self.spec.block
        # NOTE: the last rows of a causal call see the most keys, and come first
        group = a["groups"] - 1 - number % a["groups"]
        x = number // a["groups"]
        split = x % a["splits"]
        x = x // a["splits"]
        h, b = x % a["heads"], x // a["heads"]
        if self.spec.source == "sparse":
            none = g.const(0)
            return Place(group, split, h, b, none, none, none, a["splits"], *self.named(b, split))
        length = self.given("lens", b, a["cap"], a["cap"])
        start = self.given("starts", b, a["from_end"].differs(0).pick(length - a["S_q"], 0), a["cap"])
        r0, nr = self.rows_of(group)
        last = (r0 % a["S_q"] + nr).min(a["S_q"])
        n = a["causal"].differs(0).pick((start + last).max(0).min(length), length)
        blocks = (n + (block - 1)) // block
        # NOTE: by the item's own keys, so that a longer request beside it changes no bit
        splits = (blocks // a["part"]).max(1).min(a["splits"])
        return Place(group, split, h, b, length, start, n, splits, *part_of(blocks, split, splits))

    def named(self, b: Value, split: Value) -> tuple[Value, Value]:
        """The blocks of a split of the rows that are named by index."""
        blocks = [(self.count(n, b) + (BLOCK - 1)) // BLOCK for n in range(self.spec.sets)]
        return part_of(blocks[0] if len(blocks) == 1 else blocks[0] + blocks[1], split, self.a["splits"])

    def count(self, n: int, b: Value) -> Value:
        """How many indices request b has in cache n."""
        most = self.a[f"topk{n}"]
        return self.given(f"count{n}", b, most, most)

    def following(self) -> Place:
        """What this thread will most likely claim next; this item again, where there are no more."""
        number = self.at["next"].load_atomic(I64, "monotonic")
        return self.locate((number < self.a["work"]).pick(number, self.number))

    def begin_partial(self) -> None:
        """Where max, sum and O lie: in the thread's memory, or among those of the item's other splits."""
        a, s, m = self.a, self.spec, self.m
        one = (self.b * a["heads"] + self.h) * a["groups"] + self.group  # the item without its split
        self.parts = self.pointer("partial") + one * a["splits"] * s.partial
        self.counter = self.pointer("done") + one * 8
        self.keep((self.splits > 1).pick(self.parts + self.split * s.partial, m["own"]))

    def keep(self, at: Value) -> None:
        """max, sum and O are those at this address."""
        s = self.spec
        self.m |= {"max": at, "sum": at + s.state, "o": at + 2 * s.state}

    def descale(self, name: str) -> Value:
        """The descale of q, k or v for this request and KV head; 1 where there is none."""
        a, name = self.a, f"{name}_descale"
        x = self.g.variable(self.g.const(1.0, F32))
        with self.g.when(a[name].differs(0)):
            head = self.h // a["share"]
            x.set((self.pointer(name) + self.b * a[f"{name}_b"] + head * a[f"{name}_h"]).load(F32))
        # NOTE: codes of K and V are staged without their factor: it costs an operation a vector there, and none here
        return x.get() * CODE if self.spec.kv == "fp8" and name != "q_descale" else x.get()

    def row(self, name: str, r: Value) -> Value:
        """Where row r of the item's heads starts in q, out, lse, mask or layout."""
        a = self.a
        head, i = self.h * (a["R"] // a["S_q"]) + r // a["S_q"], r % a["S_q"]
        return self.pointer(name) + self.b * a[f"{name}_b"] + head * a[f"{name}_h"] + i * a[f"{name}_r"]

    def load_q(self) -> None:
        """Widen q to FP32, in the order in which scores read it."""
        raise NotImplementedError

    def begin_rows(self) -> None:
        """Set each row's limit, where its mask lies, a max of -inf, a sum of 0 and O = 0."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        with g.loop(0, self.live_vectors * s.deep) as r:
            row = (self.r0 + r).min(self.a["R"] - 1)
            if s.source != "sparse":
                own = self.causal.pick((self.start + row % self.a["S_q"] + 1).min(self.length), self.length).index()
                for k in range(0, W, s.deep):
                    lane = (r // s.deep) * W + r % s.deep + k
                    (m["limit"] + lane * 4).store(own, 4)
            if s.mask:
                start = self.row("mask", row).cast("ptrtoint", I64)
                (m["mask_rows"] + r * 8).store(start, 8)
        with g.loop(0, self.live_vectors) as t:
            for name in ("max", "peak"):
                (m[name] + t * (4 * W)).store(self.lowest, 4)
            (m["sum"] + t * (4 * W)).store(self.zero, 4)
            if s.source != "sparse":
                limits = [(m["limit"] + t * (4 * W) + 4 * r).load(I32, 4) for r in range(s.deep)]
                least = most = limits[0]
                for x in limits[1:]:
                    least, most = least.min(x), most.max(x)
                (m["low"] + t * 8).store(least.cast("sext", I64), 8)
                (m["high"] + t * 8).store(most.cast("sext", I64), 8)
        self.clear_o()

    def clear_o(self) -> None:
        """O = 0."""
        with self.g.loop(0, self.spec.rows * self.spec.padded(self.spec.Dv) * 4, self.spec.lanes * 4) as at:
            (self.m["o"] + at).store(self.zero, 4)

    def tail_halves(self, columns: int) -> range:
        """The vectors of what whole chunks leave of a row."""
        return range(-(-(columns % self.spec.chunk) // self.spec.lanes))

    # --- The end ------------------------------------------------------------------------------------------------------

    def merge(self, claim: ir.Block) -> None:
        """Claim another item, unless all other splits are done: then add them up in their order, in the first's place,
        and go on to store."""
        g, s, W, parts = self.g, self.spec, self.spec.lanes, self.parts
        before = self.counter.add_atomic(1, "acq_rel")
        last = g.label("last")
        g.b.cbranch((before + 1).equals(self.splits).v, last, claim)
        g.b.position_at_end(last)
        self.counter.store(g.const(0), 8)  # for the next call
        with g.loop(0, self.live_vectors) as t:
            at = t * (4 * W)
            top, total = g.variable(self.lowest), g.variable(self.zero)
            with g.loop(0, self.splits) as part:
                top.set(top.get().max((parts + part * s.partial + at).load(self.V, 4)))
            base = top.get().equals(-math.inf).pick(0.0, top.get())
            with g.loop(0, self.splits) as part:
                source = parts + part * s.partial
                factor = exp((source + at).load(self.V, 4) - base)
                total.set((source + s.state + at).load(self.V, 4).fma(factor, total.get()))
                first = part.equals(0)
                with g.loop(0, s.padded(s.Dv) // s.chunk) as c:
                    for r in range(s.deep):
                        for half in (0, 1):
                            x = (c * (s.rows * s.chunk) + t * (s.deep * s.chunk) + (r * s.chunk + half * W)) * 4
                            o, y = (p + 2 * s.state + x for p in (parts, source))
                            old = first.pick(self.zero, o.load(self.V, 4))
                            o.store(y.load(self.V, 4).fma(factor.shuffle([r] * W), old), 4)
            (parts + at).store(top.get(), 4)
            (parts + s.state + at).store(total.get(), 4)

    def store(self) -> None:
        """out = O / sum by V's descale and the sink's share; lse = max + ln sum."""
        g, a, s, m, W = self.g, self.a, self.spec, self.m, self.spec.lanes
        descale = self.descale("v")
        with g.loop(0, self.nr) as r:
            at = (r // s.deep * W + r % s.deep) * 4
            top = (m["max"] + at).load(F32, 4)
            parts = [(m["sum"] + at + 4 * k).load(F32, 4) for k in range(0, W, s.deep)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            row = self.r0 + r
            for name, x in (("lse", top.splat(4) + log(total.splat(4))), ("max_logits", top.splat(4))):
                with g.when(a[name].differs(0)):
                    self.scalar_row(self.pointer(name), row).store(x.shuffle([0]))
            weighed = g.variable(total)
            with g.when(a["sink"].differs(0)):
                i = row // a["S_q"] + self.h * (a["R"] // a["S_q"])
                sink = (self.pointer("sink") + i * a["sink_h"] + row % a["S_q"] * a["sink_r"]).load(F32)
                base = top.equals(-math.inf).pick(0.0, top)
                extra = exp((sink - base).splat(4), above=True).shuffle([0]).bits(F32)
                weighed.set(total + extra)
            weight = weighed.get()
            inverse = weight.equals(0.0).pick(0.0, descale / weight).splat(W)
            o = m["o"] + (r * s.chunk) * 4
            out = self.row("out", row)
            whole = s.Dv // s.chunk

            def read(c: Value, half: int, o: Value = o, inverse: Value = inverse) -> Value:
                return (o + (c * (s.rows * s.chunk) + half * W) * 4).load(self.V, 4) * inverse

            with g.loop(0, whole) as c:
                to = out + c * (s.chunk * SIZE[s.out])
                if s.held in SPLIT and s.out == "bf16":
                    store_pair(to, read(c, 0), read(c, 1))
                elif s.held in SPLIT:
                    narrow(to, interleave([read(c, 0), read(c, 1)]), s.out)
                else:
                    for half in (0, 1):
                        narrow(to + half * W * SIZE[s.out], read(c, half), s.out)
            for half in self.tail_halves(s.Dv):
                left = min(s.Dv % s.chunk - half * W, W)
                to = out + (whole * s.chunk + half * W) * SIZE[s.out]
                narrow(to, read(g.const(whole), half).shuffle(range(left)), s.out)

    def scalar_row(self, base: Value, r: Value) -> Value:
        """Where row r lies in lse and max_logits."""
        a = self.a
        head = self.h * (a["R"] // a["S_q"]) + r // a["S_q"]
        return base + self.b * a["lse_b"] + head * a["lse_h"] + r % a["S_q"] * a["lse_r"]


def part_of(blocks: Value, split: Value, splits: Value) -> tuple[Value, Value]:
    """The blocks of a split."""
    return blocks * split // splits, blocks * (split + 1) // splits
