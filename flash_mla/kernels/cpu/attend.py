"""The attention kernel: O = softmax(scale Q K^T + mask) V, one generator for every phase.

`build(spec)` writes `attend(args)`: decode and prefill, GQA and MLA, pages, plain rows and rows named by index. Every
thread of a team runs it, and claims items by an atomic counter: (request, heads that share a KV head, split of the
keys, group of rows). A row is a query of one of these heads: row r is query r % S_q of head r // S_q.

**Bound.** 2 (D + Dv) FLOP a row and key against D + Dv elements a key (MLA: D). A core with 98 GFLOP/s of FMA and 10
GB/s of DRAM breaks even at ten rows in BF16: GQA decode over a long cache is bound by memory, MLA and prefill by FMA.

**A step** is one block of 64 keys against all tiles of tile_m rows; its data stays in L1 and L2:

    scores    S [key, row] = K q^T: tile_m x tile_n accumulators of W lanes over D, each reduced across its lanes by one
              transposing tree: rows lie beside each other, W / tile_m keys in a vector
    softmax   so max, exp and sum are plain vector code; the running max is moved, `factor` keeps by how much
    values    O [row, 2W columns] = O factor + p V, tile_m x 2 accumulators over all keys of the block

K and V are read where they lie (BF16, FP16, FP32), widened in registers; what needs decoding (FP8) or gathering (rows
named by index) is staged in the thread's memory first, FP32, once for all tiles. While a block is worked on, the
next one is prefetched into L2, row by row: 40 % of the time from DRAM.

**Splits.** The keys of an item may be shared out; each part leaves its max, sum and O; who comes last merges them in
their order. How many there are depends on the shapes alone: any number of threads gives the same bits.

Scores stay natural (not base 2): a mask of finfo.min is then finite, as it is in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from flash_mla.kernels.cpu.config import BLOCK, Spec
from flash_mla.kernels.cpu.formats import SIZE, chunk, tail, widen
from flash_mla.kernels.cpu.ir import F32, F64, POINTER, Code, Value, vector
from flash_mla.kernels.cpu.item import FIELDS, Item
from flash_mla.kernels.cpu.lanes import exp, halve, interleave, lane_sums, rotate_max
from flash_mla.kernels.cpu.walk import Block, walk_named, walk_pages


class Attend(Item):
    """The kernel that is being written."""

    def build(self) -> ir.Module:
        """Claim items until there are none."""
        g, a = self.g, self.a
        claim, work, done = g.label("claim"), g.label("work"), g.label("done")
        g.place(claim)
        number = (self.args + 8 * FIELDS.index("next")).add_atomic(1, "monotonic")
        g.b.cbranch((number < a["work"]).v, work, done)
        g.b.position_at_end(work)
        self.begin(number)
        (walk_named if self.spec.source == "sparse" else walk_pages)(self, self.step)
        with g.when(a["splits"] > 1):
            self.merge(claim)
        self.store()
        g.goto(claim)
        g.b.position_at_end(done)
        g.finish()
        return self.module

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
        with g.loop(0, block.keys, s.tile_n) as j:
            keys = [block.k + (j + n).min(block.keys - 1) * block.k_row for n in range(s.tile_n)]
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
                self.prefetch_chunks(c, j, block)
                for half in (0, 1):
                    at = c * (s.chunk * SIZE[s.held])
                    multiply(c, half, [chunk(key[half] + at, s.held, W, half) for key in keys])
            for half in halves:
                end = whole * s.chunk * SIZE[s.held]
                multiply(g.const(whole), half, [tail(key[0] + end, s.held, W, half, s.D % s.chunk) for key in keys])
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

        vectors = (block.keys + (keys - 1)) // keys
        with g.either(least >= vectors * keys) as (all_seen, some):
            with all_seen, g.loop(0, vectors * keys, keys) as j:
                keep(j, scaled(j))
            with some, g.loop(0, vectors * keys, keys) as j:
                key = j.index().splat(W) + g.lanes([lane // s.tile_m for lane in range(W)])
                keep(j, (key < limit).pick(scaled(j), -math.inf))
        peak = rotate_max(top.get(), s.tile_m)
        base = peak.equals(-math.inf).pick(0.0, peak)  # a row that sees no key yet: exp(-inf) is 0
        factor = exp((m["max"] + at).load(self.V, 4) - base)
        (m["max"] + at).store(peak, 4)
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
        assert s.mask is not None
        rows = [(m["mask_rows"] + (t * s.tile_m + r) * 8).load(POINTER, 8) for r in range(s.tile_m)]
        rows = [row + block.mask_key * a["mask_k"] for row in rows]

        kind = s.mask

        def addend(p: Value, n: int) -> Value:
            x = widen(p, kind, n)
            if kind == "bool":
                return x.equals(0.0).pick(-math.inf, x * 0.0)
            if kind != "f64":
                return x
            least = float.fromhex("-0x1.fffffep127")  # finite in FP64, it hides nothing
            finite = p.load(vector(F64, n)) > -math.inf
            return finite.pick(x.max(least), x)

        even = a["mask_k"].equals(SIZE[s.mask])
        with g.loop(0, block.keys, W) as j:
            to = m["bias"] + j * (s.tile_m * 4)
            with g.either(even & (j + W <= block.keys)) as (vectors, single):
                with vectors:
                    to.store(interleave([addend(row + j * SIZE[s.mask], W) for row in rows]), 4)
                with single, g.loop(j, (j + W).min(block.keys)) as key:
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

    def columns(self, block: Block, c: Value, v: Value, halves: range, read: Callable[[Value, int], Value]) -> None:
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
            with g.loop(0, block.keys) as j:
                self.prefetch_v(c, t, j, block)
                xs = [read(v + j * block.v_row, half) for half in halves]
                for r in range(s.tile_m):
                    p = (scores + j * (s.tile_m * 4) + 4 * r).load(F32, 4).splat(W)
                    for half in halves:
                        sums[r, half].set(p.fma(xs[half], sums[r, half].get()))
            for (r, half), total in sums.items():
                (o + (r * s.chunk + half * W) * 4).store(total.get(), 4)

    def prefetch_chunks(self, c: Value, j: Value, block: Block) -> None:
        """Where there is one tile: ask for the next block's rows of K, in the columns at hand."""
        s = self.spec
        if block.ahead is not None and s.tiles == 1:
            for n in range(s.tile_n):
                self.g.prefetch(block.ahead[0] + (j + n) * block.k_row + c * (s.chunk * SIZE[s.kv]), 2)

    def prefetch_k(self, t: Value, j: Value, block: Block) -> None:
        """Where there are several: each asks for its share of each row."""
        s = self.spec
        if block.ahead is None or s.tiles == 1:
            return
        bytes_a_tile = -(-(s.D * SIZE[s.kv]) // (64 * s.tiles)) * 64
        for n in range(s.tile_n):
            row = block.ahead[0] + (j + n) * block.k_row + t * bytes_a_tile
            for line in range(0, bytes_a_tile, 64):
                self.g.prefetch(row + line, 2)

    def prefetch_v(self, c: Value, t: Value, j: Value, block: Block) -> None:
        """Ask for the next block's V, a share of it in each iteration, in the order of memory."""
        # NOTE: lines in the order of memory took a long GQA decode from 74 to 92 % of the read rate; asked for in the
        # columns at hand (a line of each row, row after row), they arrive too late for half of the time
        s = self.spec
        if block.ahead is None or s.alias:
            return
        lines = -(-s.Dv * SIZE[s.kv] // 64)  # of a row
        chunks = -(-s.Dv // s.chunk)
        line = ((c * s.tiles + t) * BLOCK + j) * lines // (chunks * s.tiles)
        self.g.prefetch(block.ahead[1] + line // lines * block.v_row + line % lines * 64, 2)


def build(spec: Spec) -> ir.Module:
    """The module with `attend(args)`, args as FIELDS names them, and `member(_, _, args)` for LLVM's OpenMP."""
    module = Attend(spec).build()
    member = Code(module, "member", [POINTER] * 3)
    module.globals["attend"].attributes.add("noinline")  # its code once
    member.b.call(module.globals["attend"], [member.args[2].v])
    member.finish()
    return module
