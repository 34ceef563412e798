"""A step with many rows (prefill): rows lie in lanes for scores, columns for values.

    wide      K of the block is widened to FP32 once for all rows, into L2: its elements are then broadcast
    scores    S [key, row] = K q^T, q turned once an item: 3W rows x tile_n keys of accumulators over D. Nothing is
              summed across lanes; scale, mask, hiding and the running max are done while a tile is in registers
    softmax   p = exp(S - max) and its sum, in place
    values    O [row, 2W columns] = O factor + p V, 6 rows x 2 accumulators over the keys; V is widened in registers,
              and stays in L1 while all rows pass

A tile of rows goes no further than the last key that one of them sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flash_mla.kernels.cpu.attend import Attend
from flash_mla.kernels.cpu.formats import SIZE, chunk, tail, widen
from flash_mla.kernels.cpu.ir import F32, Value, Variable
from flash_mla.kernels.cpu.lanes import exp, turn
from flash_mla.kernels.cpu.walk import Block

UNROLL = 4
"""Columns of an iteration of scores."""
MOST_COLUMNS, SOME_COLUMNS = 256, 192
"""q of a tile stays in L1 (3W rows of 256 columns: 24 KiB); of wider rows, so many columns are taken at a time."""


class Many(Attend):
    """The kernel for prefill."""

    together = 1
    """Keys whose weights lie in one element of the scores."""

    @property
    def wide_row(self) -> int:
        """Bytes of a row of q and of K as products read them."""
        return 4 * self.spec.padded(self.spec.depth)

    def multiply(self, x: Value, y: Value, total: Value) -> Value:
        """total + x y."""
        return x.fma(y, total)

    def read(self, p: Value, dtype: str, c: Value, half: int) -> Value:
        """Vector `half` of chunk c of a row of D columns, in the order of K's chunks."""
        s, W = self.spec, self.spec.lanes
        at = p + c * (s.chunk * SIZE[dtype])
        if dtype == "bf16" and s.held != "bf16":
            return widen(at + half * W * 2, "bf16", W)
        return chunk(at, dtype, W, half)

    def part(self, row: Value, dtype: str, columns: int, c: Value, half: int, rest: bool) -> Value:
        """Vector `half` of chunk c of a row of so many columns; where whole chunks leave it, 0 past the row's end."""
        s = self.spec
        if rest:
            end = columns // s.chunk * s.chunk * SIZE[dtype]
            return tail(row + end, dtype, s.lanes, half, columns % s.chunk)
        return self.read(row, dtype, c, half)

    def each_vector(self, columns: int, body: Callable[[Value, int, bool], None]) -> None:
        """body(chunk, half, whether it is what whole chunks leave) for the vectors of a row."""
        whole = columns // self.spec.chunk
        with self.g.loop(0, whole) as c:
            for half in (0, 1):
                body(c, half, False)
        for half in self.tail_halves(columns):
            body(self.g.const(whole), half, True)

    def load_q(self) -> None:
        """Turn q to [tile, column, 3W rows] FP32."""
        g, s, W = self.g, self.spec, self.spec.lanes
        kind = "f32" if s.pairs else s.q
        per_tile = s.tile_m // W
        with g.loop(0, self.live_vectors) as v:
            rows = [self.row("q", (self.r0 + v * W + i).min(self.a["R"] - 1)) for i in range(W)]
            to = self.m["q"] + v // per_tile * (s.tile_m * self.wide_row) + v % per_tile * (4 * W)

            def copy(c: Value, half: int, rest: bool) -> None:
                xs = [self.part(row, kind, s.depth, c, half, rest) for row in rows]
                for column, x in enumerate(turn(xs)):
                    (to + (c * s.chunk + (half * W + column)) * (s.tile_m * 4)).store(x, 4)

            self.each_vector(s.depth, copy)

    def step(self, block: Block) -> None:
        g, s = self.g, self.spec
        k, row = self.widen_k(block)
        with g.loop(0, self.live_tiles) as t:
            reach = self.reach(t, block)
            with g.when(reach > 0):
                if s.mask:
                    for v in range(s.tile_m // s.lanes):
                        self.load_mask(t * s.tile_m + v * s.lanes, s.lanes, block, s.tile_m)
                self.scores(t, k, row, reach, block)
                self.after_scores(t, reach)
        self.values(block)

    def after_scores(self, t: Value, reach: Value) -> None:
        """What follows the scores of tile t."""
        self.softmax(t, reach)

    def reach(self, t: Value, block: Block) -> Value:
        """How many keys of the block tile t goes through."""
        if self.spec.tile_m % self.spec.tile_rows:  # a tile of values has rows of two tiles of scores
            return block.keys
        per_tile = self.spec.tile_m // self.spec.lanes
        most = block.limit(t * per_tile)[2]
        for v in range(1, per_tile):
            most = most.max(block.limit(t * per_tile + v)[2])
        return most.min(block.keys)

    def widen_k(self, block: Block) -> tuple[Value, int | Value]:
        """K as FP32 rows, and their stride."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        if s.held == "f32" and s.staged:
            return block.k, block.k_row
        with g.loop(0, block.keys) as j:
            source, to = block.k + j * block.k_row, m["wide"] + j * self.wide_row

            def copy(c: Value, half: int, rest: bool, source: Value = source, to: Value = to) -> None:
                x = self.part(source, s.held, s.D, c, half, rest)
                (to + (c * s.chunk + half * W) * 4).store(x, 4)

            self.each_vector(s.D, copy)
        return m["wide"], self.wide_row

    def scores(self, t: Value, k: Value, k_row: int | Value, reach: Value, block: Block) -> None:
        """S [key, row] of a tile, scaled, masked and hidden; m["peak"] holds the new max."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        per_tile, width = s.tile_m // W, s.tile_m * 4
        q = m["q"] + t * (s.tile_m * self.wide_row)
        to = m["scores"] + t * width
        rows = Rows(self, t, reach, block)
        columns = s.depth if s.depth <= MOST_COLUMNS else SOME_COLUMNS
        with g.loop(0, s.depth, columns) as c0, g.loop(0, reach, s.tile_n) as j:
            keys = [k + (j + n).min(block.keys - 1) * k_row for n in range(s.tile_n)]
            places = [[to + (j + n) * (s.rows * 4) + v * W * 4 for v in range(per_tile)] for n in range(s.tile_n)]
            first = c0.equals(0)
            start = lambda p: self.zero if columns == s.depth else first.pick(self.zero, p.load(self.V, 4))  # noqa: E731
            sums = [[g.variable(start(p)) for p in row] for row in places]
            self.prefetch(t, j, block)
            with g.loop(c0, (c0 + columns).min(s.depth), UNROLL) as c:
                for u in range(UNROLL):
                    ys = [(q + (c + u) * width + v * W * 4).load(self.V, 4) for v in range(per_tile)]
                    for key, totals in zip(keys, sums, strict=True):
                        x = (key + (c + u) * 4).load(F32, 4).splat(W)
                        for y, total in zip(ys, totals, strict=True):
                            total.set(self.multiply(x, y, total.get()))
            with g.when(c0 + columns >= s.depth):
                rows.finish(j, sums)
            for row, totals in zip(places, sums, strict=True):
                for p, total in zip(row, totals, strict=True):
                    p.store(total.get(), 4)
        rows.store_max()

    def prefetch(self, t: Value, j: Value, block: Block) -> None:
        """Ask for the next block's rows [j, j + tile_n), each tile for its share of their lines."""
        s = self.spec
        if block.ahead is None:
            return
        rows = [(block.ahead[0], s.stored)]
        if not s.alias:
            rows.append((block.ahead[1], s.Dv * SIZE[s.kv]))
        for row, size in rows:
            share = -(-size // (64 * s.tiles)) * 64
            with self.g.loop(j, j + s.tile_n) as key:
                for line in range(0, share, 64):
                    self.g.prefetch(row(key) + t * share + line, 2)

    def softmax(self, t: Value, reach: Value) -> None:
        """Move the running max; p = exp(S - max), and its sum."""
        g, m, W = self.g, self.m, self.spec.lanes
        per_tile = self.spec.tile_m // W
        with g.loop(t * per_tile, (t + 1) * per_tile) as v:
            at = v * (4 * W)
            peak = self.moved((m["max"] + at).load(self.V, 4), (m["peak"] + at).load(self.V, 4))
            base, total = self.move_max(at, peak)
            self.weigh(v, base, reach, total)
            (m["sum"] + at).store(total.get(), 4)

    def moved(self, old: Value, peak: Value) -> Value:
        """What weights are relative to, from now on: the largest score."""
        return peak

    def weigh(self, v: Value, base: Value, reach: Value, total: Variable) -> None:
        """p = exp(S - base) of vector v of the rows, in place; add to its sum."""
        with self.g.loop(0, reach) as j:
            at = self.score(j, v)
            p = exp(at.load(self.V, 4) - base)
            at.store(p, 4)
            total.set(total.get() + p)

    def score(self, j: Value, v: Value) -> Value:
        """Where the scores of key j lie, of vector v of the rows."""
        return self.m["scores"] + j * (self.spec.rows * 4) + v * (4 * self.spec.lanes)

    def values(self, block: Block) -> None:
        """O = O factor + p V: all columns of a tile of rows, or all rows of a chunk, so that V stays in L1."""
        g, s, W = self.g, self.spec, self.spec.lanes
        kind = "f32" if s.pairs else s.held
        size = s.chunk * SIZE[kind]
        whole, left = s.Dv // s.chunk, s.Dv % s.chunk

        def tile(r: Value, c: Value) -> None:
            self.columns(r, c, block.v + c * size, block, range(2), lambda p, half: chunk(p, kind, W, half))

        if s.Dv <= MOST_COLUMNS:
            with g.loop(0, self.nr, s.tile_rows) as r, g.loop(0, whole) as c:
                tile(r, c)
        else:
            with g.loop(0, whole) as c, g.loop(0, self.nr, s.tile_rows) as r:
                tile(r, c)
        if left:
            with g.loop(0, self.nr, s.tile_rows) as r:
                read = lambda p, half: tail(p, kind, W, half, left)  # noqa: E731
                self.columns(r, g.const(whole), block.v + whole * size, block, self.tail_halves(s.Dv), read)

    def columns(
        self, first: Value, c: Value, v: Value, block: Block, halves: range, read: Callable[[Value, int], Value]
    ) -> None:
        """One chunk of columns of O, of a tile of rows."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        rows, reach = s.tile_rows, self.reach(first // s.tile_m, block)
        with g.when(reach > 0):  # else its factor is that of an earlier block
            o = m["o"] + (c * (s.rows * s.chunk) + first * s.chunk) * 4
            sums = {}
            for r in range(rows):
                factor = (m["factor"] + (first + r) * 4).load(F32, 4).splat(W)
                for half in halves:
                    sums[r, half] = g.variable((o + (r * s.chunk + half * W) * 4).load(self.V, 4) * factor)
            with g.loop(0, reach, self.together) as j:
                xs = [read(v + j * block.v_row, half) for half in halves]
                for r in range(rows):
                    p = (m["scores"] + j * (s.rows * 4) + (first + r) * 4).load(F32, 4).splat(W)
                    for x, half in zip(xs, halves, strict=True):
                        sums[r, half].set(self.multiply(p, x, sums[r, half].get()))
            for (r, half), total in sums.items():
                (o + (r * s.chunk + half * W) * 4).store(total.get(), 4)


class Rows:
    """The rows of tile t while its scores against a block are made: their limits, and the max so far."""

    def __init__(self, of: Many, t: Value, reach: Value, block: Block) -> None:
        self.of, W = of, of.spec.lanes
        per_tile = of.spec.tile_m // W
        self.vectors = [t * per_tile + v for v in range(per_tile)]
        # NOTE: tile_n may go past the keys that there are, where the mask's addends are what memory held
        self.least, end, self.limits = reach, reach.index().splat(W), []
        for vector in self.vectors:
            limit, low, _ = block.limit(vector)
            self.limits.append(limit.min(end))
            self.least = self.least.min(low)
        self.tops = [of.g.variable((of.m["peak"] + v * (4 * W)).load(of.V, 4)) for v in self.vectors]
        self.scale = of.scale.splat(W)

    def finish(self, j: Value, sums: list[list[Variable]]) -> None:
        """Scale, mask and hide the products of keys j, j + 1, ..; move the max."""
        g, s, W = self.of.g, self.of.spec, self.of.spec.lanes
        for n, totals in enumerate(sums):
            for v, total in enumerate(totals):
                z = total.get() * self.scale
                if s.mask:
                    z = z + (self.of.m["bias"] + (j + n) * (s.tile_m * 4) + v * W * 4).load(self.of.V, 4)
                total.set(z)
        with g.when(self.least < j + len(sums)):
            for n, totals in enumerate(sums):
                key = (j + n).index().splat(W)
                for limit, total in zip(self.limits, totals, strict=True):
                    total.set((key < limit).pick(total.get(), -math.inf))
        for totals in sums:
            for total, top in zip(totals, self.tops, strict=True):
                top.set(top.get().max(total.get()))

    def store_max(self) -> None:
        """Leave the max in m["peak"]."""
        for vector, top in zip(self.vectors, self.tops, strict=True):
            (self.of.m["peak"] + vector * (4 * self.of.spec.lanes)).store(top.get(), 4)
