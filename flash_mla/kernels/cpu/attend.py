"""The attention kernel: O = softmax(scale Q K^T + mask) V, one generator for every phase.

`build(spec)` writes `attend(args)`: decode and prefill, GQA and MLA, pages, plain rows and rows named by index. Every
thread of a team runs it, and claims items by an atomic counter: (request, heads that share a KV head, split of the
keys, group of rows). A row is a query of one of these heads: row r is query r % S_q of head r // S_q.

**Bound.** 4 (D + Dv) / 2 FLOP a row and key against (D + Dv) elements a key. A core with 98 GFLOP/s of FMA and 10 GB/s of DRAM
breaks even at about 10 rows in BF16: GQA decode over a long cache is bound by memory, MLA and prefill by FMA.

**A step** is one block of 64 keys against all tiles of tile_m rows; its data stays in L1 and L2:

    scores    S [key, row] = K q^T: tile_m x tile_n accumulators of W lanes over D, each reduced across its lanes by one
              transposing tree: rows lie beside each other, W / tile_m keys in a vector
    softmax   so max, exp and sum are plain vector code; the running max is moved, `factor` keeps by how much
    values    O [row, 2W columns] = O factor + p V, tile_m x 2 accumulators over all keys of the block

K and V are read where they lie (BF16, FP16, FP32), widened in registers; what needs decoding (FP8) or gathering (rows
named by index) is staged in the thread's memory first, FP32, once for all tiles. While a block is worked on, the
next one is prefetched into L2, row by row: 40 % of the time from DRAM.

**Splits.** Keys of one item may be shared out; each part leaves its max, sum and O, and whoever finishes last merges them in
their order. How many there are depends on the shapes alone, so the result is the same bits for any number of threads.

Scores stay natural (not base 2): a mask of finfo.min is then finite, as it is in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from flash_mla.kernels.cpu.config import BLOCK, Spec
from flash_mla.kernels.cpu.formats import (
    ROWS,
    SIZE,
    chunk,
    narrow,
    stage_row,
    store_pair,
    tail,
    widen,
)
from flash_mla.kernels.cpu.ir import F32, F64, I1, I8, I32, I64, POINTER, Code, Value, vector
from flash_mla.kernels.cpu.lanes import exp, halve, interleave, lane_sums, log, rotate_max

FIELDS = (
    # counters of the call
    "next slot "
    # items: how many, and how they divide; rows R of an item's heads, S_q of each; `share` item heads use one KV head
    "work heads groups splits R S_q share "
    # keys: lengths and starts [B] (or 0: `cap` keys, start 0), 8-byte ones where wide; from_end: start = length - S_q
    "lens lens_wide cap starts starts_wide causal from_end "
    "table table_wide table_row Nblk "
    "q k v out lse max_logits sink mask layout q_descale k_descale v_descale scale "
    # strides in bytes: b request, h head, r query, p page, k row of a page or key
    "q_b q_h q_r k_b k_h k_p k_k v_b v_h v_p v_k out_b out_h out_r lse_b lse_h lse_r sink_h sink_r "
    "mask_b mask_h mask_r mask_k layout_b layout_h layout_r layout_k "
    "q_descale_b q_descale_h k_descale_b k_descale_h v_descale_b v_descale_h "
    # rows named by index, in one cache or two
    + " ".join(f"{x}{n}" for n in (0, 1) for x in "cache indices wide topk count count_wide limit page c_p c_k i_b i_h".split())
    # memory: of the threads, of the splits, and how many parts of each item are done
    + " memory partial done"
).split()
"""The arguments, 8 bytes each."""


class Block(NamedTuple):
    """The keys of a step: pointers to the first row of K and V, bytes from row to row, how many rows; limit(t) is the
    key of each lane's row of tile t past which it sees none, counted from the block's first, and the least of them."""

    k: Value
    k_row: Any
    v: Value
    v_row: Any
    count: Value
    limit: Callable[[Value], tuple[Value, Value]]
    mask_key: Value
    ahead: tuple[Value, Value] | None


class Attend:
    """The kernel that is being written. `a` are the arguments by name, `m` the thread's memory."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.module = ir.Module("flash_mla")
        self.g = g = Code(self.module, "attend", [POINTER])
        self.args = g.args[0]
        self.a = {name: (self.args + 8 * i).load(I64, 8) for i, name in enumerate(FIELDS)}
        self.V, self.I = vector(F32, spec.lanes), vector(I32, spec.lanes)
        self.zero, self.low = g.const(0.0, self.V), g.const(-math.inf, self.V)
        parts, size = spec.memory()
        slot = (self.args + 8 * FIELDS.index("slot")).add_atomic(1, "monotonic")
        memory = self.pointer("memory") + slot * size
        self.m = {name: memory + part.at for name, part in parts.items()}

    def pointer(self, name: str) -> Value:
        return self.a[name].cast("inttoptr", POINTER)

    def integer(self, base: Value, i: Value, wide: Value) -> Value:
        """Element i of an array of int32, or of int64 where wide, as I64."""
        g = self.g
        x = g.variable(g.const(0))
        with g.either(wide.differs(0)) as (yes, no):
            with yes:
                x.set((base + i * 8).load(I64))
            with no:
                x.set((base + i * 4).load(I32).cast("sext", I64))
        return x.get()

    def build(self) -> ir.Module:
        """Claim items until there are none."""
        g, a = self.g, self.a
        claim, work, done = g.label("claim"), g.label("work"), g.label("done")
        g.place(claim)
        item = (self.args + 8 * FIELDS.index("next")).add_atomic(1, "monotonic")
        g.b.cbranch((item < a["work"]).v, work, done)
        g.b.position_at_end(work)
        # NOTE: the last rows of a causal call see the most keys, and come first
        self.group = a["groups"] - 1 - item % a["groups"]
        x = item // a["groups"]
        self.split = x % a["splits"]
        x = x // a["splits"]
        self.h, self.b = x % a["heads"], x // a["heads"]
        self.bounds()
        self.load_q()
        walk = {"table": self.walk_pages, "rows": self.walk_pages, "sparse": self.walk_named}[self.spec.source]
        walk()
        with g.when(a["splits"] > 1):
            self.merge(claim)
        self.store()
        g.goto(claim)
        g.b.position_at_end(done)
        g.finish()
        return self.module

    # --- An item ------------------------------------------------------------------------------------------------------

    def bounds(self) -> None:
        """Rows [r0, r0 + nr), keys [0, n), the position of query 0."""
        g, a, rows = self.g, self.a, self.spec.rows
        self.r0 = self.group * rows
        self.nr = (a["R"] - self.r0).min(rows)
        self.live_tiles = (self.nr + (self.spec.tile_m - 1)) // self.spec.tile_m
        self.scale = (self.args + 8 * FIELDS.index("scale")).load(F32) * self.descale("q") * self.descale("k")
        if self.spec.source == "sparse":
            return
        length = g.variable(a["cap"])
        with g.when(a["lens"].differs(0)):
            length.set(self.integer(self.pointer("lens"), self.b, a["lens_wide"]).max(0).min(a["cap"]))
        self.length = length.get()
        start = g.variable(a["from_end"].differs(0).pick(self.length - a["S_q"], 0))
        with g.when(a["starts"].differs(0)):
            start.set(self.integer(self.pointer("starts"), self.b, a["starts_wide"]).max(0).min(a["cap"]))
        self.start, self.causal = start.get(), a["causal"].differs(0)
        last = self.r0 % a["S_q"] + self.nr
        reach = (self.start + last.min(a["S_q"])).max(0).min(self.length)
        self.n = self.causal.pick(reach, self.length)
        self.first, self.stop = self.part_of((self.n + (BLOCK - 1)) // BLOCK)

    def part_of(self, blocks: Value) -> tuple[Value, Value]:
        """This split's blocks."""
        splits = self.a["splits"]
        return blocks * self.split // splits, blocks * (self.split + 1) // splits

    def descale(self, name: str) -> Value:
        """The descale of q, k or v for this request and KV head; 1 where there is none."""
        a, name = self.a, f"{name}_descale"
        x = self.g.variable(self.g.const(1.0, F32))
        with self.g.when(a[name].differs(0)):
            head = self.h // a["share"]
            x.set((self.pointer(name) + self.b * a[f"{name}_b"] + head * a[f"{name}_h"]).load(F32))
        return x.get()

    def row(self, name: str, r: Value) -> Value:
        """Where row r of the item's heads starts in q, out, lse, mask or layout."""
        a = self.a
        head, i = self.h * (a["R"] // a["S_q"]) + r // a["S_q"], r % a["S_q"]
        return self.pointer(name) + self.b * a[f"{name}_b"] + head * a[f"{name}_h"] + i * a[f"{name}_r"]

    def load_q(self) -> None:
        """Widen q to [tile, chunk, tile_m, 2W] FP32; set each row's limit, a max of -inf, a sum of 0 and O = 0."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        pairs = "bf16" if s.held == "bf16" else None  # columns in the order of K's chunks
        with g.loop(0, self.live_tiles * s.tile_m) as r:
            row = (self.r0 + r).min(self.a["R"] - 1)
            source = self.row("q", row)
            to = m["q"] + ((r // s.tile_m) * (s.padded(s.D) * s.tile_m) + r % s.tile_m * s.chunk) * 4
            with g.loop(0, s.D // s.chunk) as c:
                for half in (0, 1):
                    at = source + c * (s.chunk * SIZE[s.q])
                    x = chunk(at, s.q, W, half) if pairs or s.q != "bf16" else widen(at + half * W * 2, "bf16", W)
                    (to + c * (s.chunk * s.tile_m * 4) + half * W * 4).store(x, 4)
            for half in self.tail_halves(s.D):
                c = s.D // s.chunk
                x = tail(source + c * s.chunk * SIZE[s.q], s.q, W, half, s.D % s.chunk)
                (to + (c * s.chunk * s.tile_m + half * W) * 4).store(x, 4)
            if s.source != "sparse":
                own = self.causal.pick((self.start + row % self.a["S_q"] + 1).min(self.length), self.length).index()
                for k in range(0, W, s.tile_m):
                    lane = (r // s.tile_m) * W + r % s.tile_m + k
                    (m["limit"] + lane * 4).store(own, 4)
            if s.mask:
                start = self.row("mask", row).cast("ptrtoint", I64)
                (m["mask_rows"] + r * 8).store(start, 8)
        with g.loop(0, self.live_tiles) as t:
            (m["max"] + t * (4 * W)).store(self.low, 4)
            (m["sum"] + t * (4 * W)).store(self.zero, 4)
            if s.source != "sparse":
                limits = [(m["limit"] + t * (4 * W) + 4 * r).load(I32, 4) for r in range(s.tile_m)]
                least = limits[0]
                for x in limits[1:]:
                    least = least.min(x)
                (m["low"] + t * 8).store(least.cast("sext", I64), 8)
        self.clear_o()

    def clear_o(self) -> None:
        """O = 0."""
        with self.g.loop(0, self.spec.rows * self.spec.padded(self.spec.Dv) * 4, self.spec.lanes * 4) as at:
            (self.m["o"] + at).store(self.zero, 4)

    def tail_halves(self, columns: int) -> range:
        """The vectors of what whole chunks leave of a row."""
        return range(-(-(columns % self.spec.chunk) // self.spec.lanes))

    # --- Which keys ---------------------------------------------------------------------------------------------------

    def walk_pages(self) -> None:
        """Blocks [first, stop) of this item's KV head, through the table or one after another."""
        g, a, s, m = self.g, self.a, self.spec, self.m
        head = self.h // a["share"]
        k, v = (self.pointer(x) + self.b * a[f"{x}_b"] + head * a[f"{x}_h"] for x in "kv")
        table = self.pointer("table") + self.b * a["table_row"]

        def page(i: Value) -> Value:
            if s.source == "rows":
                return i
            return self.integer(table, i, a["table_wide"]).max(0).min(a["Nblk"] - 1)

        with g.loop(self.first, self.stop) as i:
            kept = g.const(True, I1)
            if s.layout:
                kept = (self.row("layout", self.r0 // BLOCK) + i * a["layout_k"]).load(I8).differs(0)
            with g.when(kept):
                here, following = page(i), page((i + 1).min(self.stop - 1))
                pages = k + here * a["k_p"], v + here * a["v_p"]
                ahead = k + following * a["k_p"], v + following * a["v_p"]
                count = (self.n - i * BLOCK).min(BLOCK)

                def limit(t: Value, i: Value = i) -> tuple[Value, Value]:
                    own = (m["limit"] + t * (4 * s.lanes)).load(self.I, 4) - (i * BLOCK).index().splat(s.lanes)
                    return own, (m["low"] + t * 8).load(I64, 8) - i * BLOCK

                rows = (pages[0], a["k_k"], pages[1], a["v_k"])
                if s.staged:
                    rows = self.stage_pages(pages, count, ahead)
                self.step(Block(*rows, count, limit, i * BLOCK, None if s.staged else ahead))

    def stage_pages(
        self, pages: tuple[Value, Value], count: Value, ahead: tuple[Value, Value]
    ) -> tuple[Value, int, Value, int]:
        """Decode the rows of a block into the thread's memory; ask for the next block's."""
        g, s, a = self.g, self.spec, self.a
        strides = []
        for name, page, following, columns in zip("kv", pages, ahead, (s.D, s.Dv), strict=True):
            stride = columns * SIZE[s.held]
            strides.append(stride)
            if name == "v" and s.alias:
                return self.m["k"], strides[0], self.m["k"], strides[0]
            with g.loop(0, count) as j:
                for line in range(0, columns * SIZE[s.kv], 64):
                    g.prefetch(following + j * a[f"{name}_k"] + line, 2)
                stage_row(g, page + j * a[f"{name}_k"], self.m[name] + j * stride, s.kv, columns, s.lanes)
        return self.m["k"], strides[0], self.m["v"], strides[1]

    def walk_named(self) -> None:
        """The rows that the query names, 64 indices at a time: those that name one are gathered, and no others."""
        g, a, s = self.g, self.a, self.spec
        counts = []
        for n in range(s.sets):
            count = g.variable(a[f"topk{n}"])
            with g.when(a[f"count{n}"].differs(0)):
                given = self.integer(self.pointer(f"count{n}"), self.b, a[f"count_wide{n}"])
                count.set(given.max(0).min(a[f"topk{n}"]))
            counts.append(count.get())
        blocks = [(count + (BLOCK - 1)) // BLOCK for count in counts]
        total = blocks[0] if s.sets == 1 else blocks[0] + blocks[1]
        first, stop = self.part_of(total)
        before = g.const(0)
        for n in range(s.sets):
            with g.loop((first - before).max(0), (stop - before).min(blocks[n])) as i:
                count = self.gather(n, i * BLOCK, (counts[n] - i * BLOCK).min(BLOCK))
                limit = count.index().splat(s.lanes)
                with g.when(count > 0):
                    rows = (self.m["k"], s.D * SIZE[s.held])
                    self.step(Block(*rows, *rows, count, lambda t, x=limit, y=count: (x, y), count, None))
            before = before + blocks[n]

    def gather(self, n: int, first: Value, named: Value) -> Value:
        """Stage the rows of indices [first, first + named) of cache n; how many name a row."""
        g, a, s = self.g, self.a, self.spec
        form = ROWS.get(s.kv)
        indices = self.pointer(f"indices{n}") + self.b * a[f"i_b{n}"] + self.h * a[f"i_h{n}"]
        rows, scales = self.m["addresses"], self.m["addresses"] + 8 * (BLOCK + 8)
        count = g.variable(g.const(0))
        with g.loop(first, first + named) as j:
            index = self.integer(indices, j, a[f"wide{n}"])
            inside = (index >= 0) & (index < a[f"limit{n}"])
            index = inside.pick(index, 0)
            page, slot = index // a[f"page{n}"], index % a[f"page{n}"]
            here = count.get()
            base = a[f"cache{n}"] + page * a[f"c_p{n}"]
            if form and form.scales_apart:
                (scales + here * 8).store(base + a[f"page{n}"] * form.width + slot * form.scale_bytes, 8)
                (rows + here * 8).store(base + slot * form.width, 8)
            else:
                (rows + here * 8).store(base + slot * a[f"c_k{n}"], 8)
            count.set(here + inside.cast("zext", I64))
        count = count.get()
        stored = form.width if form else s.D * SIZE[s.kv]
        with g.loop(0, count) as j:
            # NOTE: eight rows ahead: the latency of DRAM, and its fill buffers are not all taken
            following = (rows + (j + 8).min(count - 1) * 8).load(POINTER, 8)
            for line in range(0, stored, 64):
                g.prefetch(following + line, 3)
            row = (rows + j * 8).load(POINTER, 8)
            scale = (scales + j * 8).load(POINTER, 8) if form and form.scales_apart else row
            stage_row(g, row, self.m["k"] + j * (s.D * SIZE[s.held]), s.kv, s.D, s.lanes, scale)
        return count

    # --- A step -------------------------------------------------------------------------------------------------------

    def step(self, block: Block) -> None:
        """All tiles of rows against one block."""
        with self.g.loop(0, self.live_tiles) as t:
            self.scores(t, block)
            self.softmax(t, block)
        self.values(block)

    def scores(self, t: Value, block: Block) -> None:
        """S [key, row] of a tile, before the scale."""
        g, s, W = self.g, self.spec, self.spec.lanes
        q = self.m["q"] + t * (s.padded(s.D) * s.tile_m * 4)
        to = self.scores_of(t)
        whole, halves = s.D // s.chunk, self.tail_halves(s.D)
        with g.loop(0, block.count, s.tile_n) as j:
            keys = [block.k + (j + n).min(block.count - 1) * block.k_row for n in range(s.tile_n)]
            self.prefetch_k(t, j, block)
            # NOTE: the two halves of a word are loaded apart: kept in a register between them it would spill
            keys = [(key, g.unknown(key)) for key in keys]
            sums = [[g.variable(self.zero) for _ in range(s.tile_m)] for _ in keys]

            def multiply(c: Value, half: int, xs: list[Value], sums: list = sums) -> None:
                for r in range(s.tile_m):
                    y = (q + c * (s.chunk * s.tile_m * 4) + (r * s.chunk + half * W) * 4).load(self.V, 4)
                    for x, row in zip(xs, sums, strict=True):
                        row[r].set(x.fma(y, row[r].get()))

            with g.loop(0, whole) as c:
                for half in (0, 1):
                    at = c * (s.chunk * SIZE[s.held])
                    multiply(c, half, [chunk(key[half] + at, s.held, W, half) for key in keys])
            for half in halves:
                at = whole * s.chunk * SIZE[s.held]
                multiply(g.const(whole), half, [tail(key[0] + at, s.held, W, half, s.D % s.chunk) for key in keys])
            for n, row in enumerate(sums):
                total = halve(lane_sums([x.get() for x in row]), s.tile_m)
                (to + (j + n) * (s.tile_m * 4)).store(total, 4)

    def scores_of(self, t: Value) -> Value:
        """Where the scores of a tile lie."""
        return self.m["scores"] + t * ((BLOCK + self.spec.lanes) * self.spec.tile_m * 4)

    def softmax(self, t: Value, block: Block) -> None:
        """Scale, mask and hide; move the running max; p = exp(S - max), and its sum."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        scores, at = self.scores_of(t), t * (4 * W)
        keys = W // s.tile_m  # of a vector
        top = g.variable((m["max"] + at).load(self.V, 4))
        scale = self.scale.splat(W)
        limit, least = block.limit(t)
        if s.mask:
            self.load_mask(t, block)

        def scaled(j: Value) -> Value:
            z = (scores + j * (s.tile_m * 4)).load(self.V, 4) * scale
            return z + (m["bias"] + j * (s.tile_m * 4)).load(self.V, 4) if s.mask else z

        def keep(j: Value, z: Value) -> None:
            top.set(top.get().max(z))
            (scores + j * (s.tile_m * 4)).store(z, 4)

        vectors = (block.count + (keys - 1)) // keys
        with g.either(least >= vectors * keys) as (all_seen, some):
            with all_seen, g.loop(0, vectors * keys, keys) as j:
                keep(j, scaled(j))
            with some, g.loop(0, vectors * keys, keys) as j:
                key = j.index().splat(W) + g.lanes([lane // s.tile_m for lane in range(W)])
                keep(j, (key < limit).pick(scaled(j), -math.inf))
        top = rotate_max(top.get(), s.tile_m)
        base = top.equals(-math.inf).pick(0.0, top)  # a row that sees no key yet: exp(-inf) is 0
        factor = exp((m["max"] + at).load(self.V, 4) - base)
        (m["max"] + at).store(top, 4)
        (m["factor"] + at).store(factor, 4)
        total = g.variable((m["sum"] + at).load(self.V, 4) * factor)
        with g.loop(0, vectors * W, W) as x:
            p = exp((scores + x * 4).load(self.V, 4) - base)
            (scores + x * 4).store(p, 4)
            total.set(total.get() + p)
        (m["sum"] + at).store(total.get(), 4)

    def load_mask(self, t: Value, block: Block) -> None:
        """The mask's addends of a tile, [key, row]: a vector of keys of each row, turned; one by one at the end."""
        g, s, m, a, W = self.g, self.spec, self.m, self.a, self.spec.lanes
        assert s.mask
        rows = [(m["mask_rows"] + (t * s.tile_m + r) * 8).load(POINTER, 8) for r in range(s.tile_m)]
        rows = [row + block.mask_key * a["mask_k"] for row in rows]

        def addend(p: Value, n: int) -> Value:
            x = widen(p, s.mask, n)
            if s.mask == "bool":
                return x.equals(0.0).pick(-math.inf, x * 0.0)
            if s.mask != "f64":
                return x
            least = float.fromhex("-0x1.fffffep127")  # finite in FP64, it hides nothing
            finite = p.load(vector(F64, n)) > -math.inf
            return finite.pick(x.max(least), x)

        even = a["mask_k"].equals(SIZE[s.mask])
        with g.loop(0, block.count, W) as j:
            to = m["bias"] + j * (s.tile_m * 4)
            with g.either(even & (j + W <= block.count)) as (vectors, single):
                with vectors:
                    to.store(interleave([addend(row + j * SIZE[s.mask], W) for row in rows]), 4)
                with single, g.loop(j, (j + W).min(block.count)) as key:
                    for r, row in enumerate(rows):
                        x = addend(row + key * a["mask_k"], 1)
                        (m["bias"] + (key * s.tile_m + r) * 4).store(x, 4)

    def values(self, block: Block) -> None:
        """O = O factor + p V, by chunks of columns."""
        g, s, W = self.g, self.spec, self.spec.lanes
        whole, halves = s.Dv // s.chunk, self.tail_halves(s.Dv)
        with g.loop(0, whole) as c:
            at = block.v + c * (s.chunk * SIZE[s.held])
            self.columns(block, c, at, range(2), lambda p, half: chunk(p, s.held, W, half))
        if halves:
            at = block.v + whole * s.chunk * SIZE[s.held]
            columns = s.Dv % s.chunk
            self.columns(block, g.const(whole), at, halves, lambda p, half: tail(p, s.held, W, half, columns))

    def columns(
        self, block: Block, c: Value, v: Value, halves: range, read: Callable[[Value, int], Value]
    ) -> None:
        """One chunk of columns of O, all tiles."""
        g, s, W = self.g, self.spec, self.spec.lanes
        with g.loop(0, self.live_tiles) as t:
            o = self.m["o"] + (c * (s.rows * s.chunk) + t * (s.tile_m * s.chunk)) * 4
            scores = self.scores_of(t)
            factor = (self.m["factor"] + t * (4 * W)).load(self.V, 4)
            sums = {}
            for r in range(s.tile_m):
                for half in halves:
                    old = (o + (r * s.chunk + half * W) * 4).load(self.V, 4)
                    sums[r, half] = g.variable(old * factor.shuffle([r] * W))
            with g.loop(0, block.count) as j:
                self.prefetch_v(c, j, block)
                xs = [read(v + j * block.v_row, half) for half in halves]
                for r in range(s.tile_m):
                    p = (scores + j * (s.tile_m * 4) + 4 * r).load(F32, 4).splat(W)
                    for half in halves:
                        sums[r, half].set(p.fma(xs[half], sums[r, half].get()))
            for (r, half), total in sums.items():
                (o + (r * s.chunk + half * W) * 4).store(total.get(), 4)

    def prefetch_k(self, t: Value, j: Value, block: Block) -> None:
        """Ask for the next block's rows of K, each tile for its share of each row."""
        s = self.spec
        if block.ahead is None:
            return
        bytes_a_tile = -(-(s.D * SIZE[s.kv]) // (64 * s.tiles)) * 64
        for n in range(s.tile_n):
            row = block.ahead[0] + (j + n) * block.k_row + t * bytes_a_tile
            for line in range(0, bytes_a_tile, 64):
                self.g.prefetch(row + line, 2)

    def prefetch_v(self, c: Value, j: Value, block: Block) -> None:
        """Ask for the next block's V, in the columns at hand."""
        s = self.spec
        if block.ahead is None or s.alias or s.tiles > 1:
            return
        self.g.prefetch(block.ahead[1] + j * block.v_row + c * (s.chunk * SIZE[s.kv]), 2)

    # --- The end of an item -------------------------------------------------------------------------------------------

    def merge(self, claim: ir.Block) -> None:
        """Leave this split's max, sum and O; the last to do so merges all, in their order, and goes on to store."""
        g, a, s, m, W = self.g, self.a, self.spec, self.m, self.spec.lanes
        one = (self.b * a["heads"] + self.h) * a["groups"] + self.group  # the item without its split
        parts = self.pointer("partial") + one * a["splits"] * s.partial
        own = parts + self.split * s.partial
        with g.loop(0, s.partial, 4 * W) as at:
            (own + at).store((m["max"] + at).load(self.V, 4), 4)
        counter = self.pointer("done") + one * 8
        before = counter.add_atomic(1, "acq_rel")
        last = g.label("last")
        g.b.cbranch((before + 1).equals(a["splits"]).v, last, claim)
        g.b.position_at_end(last)
        counter.store(g.const(0), 8)  # for the next call
        with g.loop(0, self.live_tiles * (4 * W), 4 * W) as t:
            top = g.variable(self.low)
            with g.loop(0, a["splits"]) as part:
                top.set(top.get().max((parts + part * s.partial + t).load(self.V, 4)))
            (m["max"] + t).store(top.get(), 4)
            (m["sum"] + t).store(self.zero, 4)
        self.clear_o()
        with g.loop(0, a["splits"]) as part:
            source = parts + part * s.partial
            with g.loop(0, self.live_tiles) as t:
                top = (m["max"] + t * (4 * W)).load(self.V, 4)
                base = top.equals(-math.inf).pick(0.0, top)
                factor = exp((source + t * (4 * W)).load(self.V, 4) - base)
                at = m["sum"] + t * (4 * W)
                at.store((source + s.state + t * (4 * W)).load(self.V, 4).fma(factor, at.load(self.V, 4)), 4)
                with g.loop(0, s.padded(s.Dv) // s.chunk) as c:
                    for r in range(s.tile_m):
                        for half in (0, 1):
                            x = (c * (s.rows * s.chunk) + t * (s.tile_m * s.chunk) + (r * s.chunk + half * W)) * 4
                            o = m["o"] + x
                            y = (source + 2 * s.state + x).load(self.V, 4)
                            o.store(y.fma(factor.shuffle([r] * W), o.load(self.V, 4)), 4)

    def store(self) -> None:
        """out = O / sum by V's descale and the sink's share; lse = max + ln sum."""
        g, a, s, m, W = self.g, self.a, self.spec, self.m, self.spec.lanes
        descale = self.descale("v")
        with g.loop(0, self.nr) as r:
            at = (r // s.tile_m * W + r % s.tile_m) * 4
            top = (m["max"] + at).load(F32, 4)
            parts = [(m["sum"] + at + 4 * k).load(F32, 4) for k in range(0, W, s.tile_m)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            row = self.r0 + r
            for name, x in (("lse", top.splat(4) + log(total.splat(4))), ("max_logits", top.splat(4))):
                with g.when(a[name].differs(0)):
                    self.scalar_row(self.pointer(name), row).store(x.shuffle([0]))
            weight = g.variable(total)
            with g.when(a["sink"].differs(0)):
                i = row // a["S_q"] + self.h * (a["R"] // a["S_q"])
                sink = (self.pointer("sink") + i * a["sink_h"] + row % a["S_q"] * a["sink_r"]).load(F32)
                base = top.equals(-math.inf).pick(0.0, top)
                extra = exp((sink - base).splat(4)).shuffle([0]).bits(F32)
                weight.set(total + extra)
            weight = weight.get()
            inverse = weight.equals(0.0).pick(0.0, descale / weight).splat(W)
            o = m["o"] + (r * s.chunk) * 4
            out = self.row("out", row)
            whole = s.Dv // s.chunk

            def read(c: Value, half: int, o: Value = o, inverse: Value = inverse) -> Value:
                return (o + (c * (s.rows * s.chunk) + half * W) * 4).load(self.V, 4) * inverse

            with g.loop(0, whole) as c:
                to = out + c * (s.chunk * SIZE[s.out])
                if s.held == "bf16":
                    store_pair(to, read(c, 0), read(c, 1))
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


def build(spec: Spec) -> ir.Module:
    """The module with `attend(args)`, args as FIELDS names them, and `member(_, _, args)` for LLVM's OpenMP."""
    module = Attend(spec).build()
    member = Code(module, "member", [POINTER] * 3)
    member.b.call(module.globals["attend"], [member.args[2].v])
    member.finish()
    return module
