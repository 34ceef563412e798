"""A step with few rows (decode): columns lie in lanes, and K and V are read where they lie.

    scores    S [key, row] = K q^T: tile_m x tile_n accumulators of W lanes over D, each reduced across its lanes by one
              transposing tree: rows lie beside each other, W / tile_m keys in a vector
    softmax   so max, exp and sum are plain vector code; the running max is moved, `factor` keeps by how much
    values    O [row, 2W columns] = O factor + p V, tile_m x 2 accumulators over all keys of the block

K and V (BF16, FP16, FP32) are widened in registers; what needs decoding (FP8) or gathering (rows named by index) is
staged in the thread's memory first, FP32, once for all tiles. While a block is worked on, the next one is prefetched
into L2, line by line.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flash_mla.kernels.cpu.attend import Attend
from flash_mla.kernels.cpu.config import BLOCK
from flash_mla.kernels.cpu.formats import SIZE, SPLIT, chunk, tail, widen
from flash_mla.kernels.cpu.ir import F32, Value
from flash_mla.kernels.cpu.lanes import exp, halve, lane_sums, rotate_max
from flash_mla.kernels.cpu.walk import Block


class Few(Attend):
    """The kernel for decode."""

    def load_q(self) -> None:
        """Widen q to [tile, chunk, tile_m, 2W]."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        with g.loop(0, self.live_tiles * s.tile_m) as r:
            source = self.row("q", (self.r0 + r).min(self.a["R"] - 1))
            to = m["q"] + ((r // s.tile_m) * (s.padded(s.D) * s.tile_m) + r % s.tile_m * s.chunk) * 4
            with g.loop(0, s.D // s.chunk) as c:
                x = widen(source + c * (s.chunk * SIZE[s.q]), s.q, s.chunk)
                for half in (0, 1):  # columns in the order of K's chunks
                    lanes = range(half, s.chunk, 2) if s.held in SPLIT else range(half * W, half * W + W)
                    (to + c * (s.chunk * s.tile_m * 4) + half * W * 4).store(x.shuffle(lanes), 4)
            for half in self.tail_halves(s.D):
                whole = s.D // s.chunk
                x = tail(source + whole * s.chunk * SIZE[s.q], s.q, W, half, s.D % s.chunk)
                (to + (whole * s.chunk * s.tile_m + half * W) * 4).store(x, 4)

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
        return self.m["scores"] + t * (self.spec.width * self.spec.tile_m * 4)

    def softmax(self, t: Value, block: Block) -> None:
        """Scale, mask and hide; move the running max; p = exp(S - max), and its sum."""
        g, s, m, W = self.g, self.spec, self.m, self.spec.lanes
        scores, at = self.scores_of(t), t * (4 * W)
        keys = W // s.tile_m  # of a vector
        top = g.variable((m["max"] + at).load(self.V, 4))
        scale = self.scale.splat(W)
        limit, least, _ = block.limit(t)
        if s.mask:
            self.load_mask(t * s.tile_m, s.tile_m, block, s.tile_m)

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
        base, total = self.move_max(at, rotate_max(top.get(), s.tile_m))
        with g.loop(0, vectors * W, W) as x:
            p = exp((scores + x * 4).load(self.V, 4) - base)
            (scores + x * 4).store(p, 4)
            total.set(total.get() + p)
        (m["sum"] + at).store(total.get(), 4)

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

            def add(j: Value) -> None:
                xs = [read(v + j * block.v_row, half) for half in halves]
                for r in range(s.tile_m):
                    p = (scores + j * (s.tile_m * 4) + 4 * r).load(F32, 4).splat(W)
                    for half in halves:
                        sums[r, half].set(p.fma(xs[half], sums[r, half].get()))

            # NOTE: two keys an iteration: counting and finding the line to ask for took 15 % of a decode in L2
            even = block.keys // 2 * 2
            with g.loop(0, even, 2) as j:
                self.prefetch_v(c, t, j, block)
                add(j)
                add(j + 1)
            with g.when(even < block.keys):
                add(even)
            for (r, half), total in sums.items():
                (o + (r * s.chunk + half * W) * 4).store(total.get(), 4)

    def prefetch_chunks(self, c: Value, j: Value, block: Block) -> None:
        """Where there is one tile: ask for the next block's rows of K, in the columns at hand."""
        s = self.spec
        if block.ahead is not None and s.tiles == 1 and not s.staged:
            for n in range(s.tile_n):
                self.g.prefetch(block.ahead[0](j + n) + c * (s.chunk * SIZE[s.kv]), 2)

    def prefetch_k(self, t: Value, j: Value, block: Block) -> None:
        """Where there are several, or rows are named: each asks for its share of each row."""
        s = self.spec
        if block.ahead is None or (s.tiles == 1 and not s.staged):
            return
        bytes_a_tile = -(-s.stored // (64 * s.tiles)) * 64
        for n in range(s.tile_n):
            row = block.ahead[0](j + n) + t * bytes_a_tile
            for line in range(0, bytes_a_tile, 64):
                self.g.prefetch(row + line, 2)

    def prefetch_v(self, c: Value, t: Value, j: Value, block: Block) -> None:
        """Ask for the next block's V, a share of it for each two keys, in the order of memory."""
        # NOTE: lines in the order of memory took a long GQA decode from 74 to 92 % of the read rate; asked for in the
        # columns at hand (a line of each row, row after row), they arrive too late for half of the time
        s = self.spec
        if block.ahead is None or s.alias:
            return
        lines = -(-s.Dv * SIZE[s.kv] // 64)  # of a row
        chunks = -(-s.Dv // s.chunk)
        first = ((c * s.tiles + t) * BLOCK + j) * lines // (chunks * s.tiles)
        for n in range(-(-2 * lines // (chunks * s.tiles))):
            line = first + n
            self.g.prefetch(block.ahead[1](line // lines) + line % lines * 64, 2)
