"""A step with many rows on AMX: products of tiles of 16 rows of 64 bytes.

`tdpbf16ps` adds A B to C: A is 16 rows of 32 BF16, B 16 pairs of rows of 16 columns (as `pairs.py` lays them out), C 16
x 16 FP32. Four tiles of C are worked on at a time, by two of A and two of B: a load of 1 KiB a product, not two.

    scores    C [32 keys, 32 rows of q] = A (K where it lies) B (q by pairs of columns), over D; then, by vectors,
              scale, mask, hide and max. The scores of four blocks wait for their softmax, and V beside them
    softmax   the weights of 32 keys are turned, so that those of a row lie in one line: m["weights"] [row, key]
    values    C [32 rows, 32 columns] += A (weights) B (V by pairs of keys), on O itself, which is scaled before, where
              a row's max has moved: once in 256 keys, so that 32 products pay for a load and a store of O

D and Dv are multiples of 32. A tile reads 16 rows of K whatever the length: what lies past it enters scores of keys
that nobody looks at. A page has them; of plain rows (`source` "rows") the last block is copied first.

Tiles come from L1 at 99 % of the peak and from L2 at 75 % (Emerald Rapids), where their 16 rows do not fall into one
set of L1: so scores lie by tile, V by chunk.
"""

from __future__ import annotations

from llvmlite import ir

from flash_mla.kernels.cpu.config import BLOCK
from flash_mla.kernels.cpu.ir import I8, I32, I64, Value, Variable, vector
from flash_mla.kernels.cpu.lanes import exp, turn
from flash_mla.kernels.cpu.many import Rows
from flash_mla.kernels.cpu.pairs import Pairs
from flash_mla.kernels.cpu.walk import Block

SIDE = 16
"""Rows of a tile, and FP32 columns."""
LEEWAY = 8.0
"""How far a score may pass what weights are relative to: e^8 of one, beside sums in FP32 of which BF16 keeps 8 bits."""
A, B = (4, 5), (6, 7)
"""The registers of A and of B; C has 0 to 3."""


class Tiles(Pairs):
    """The kernel for prefill, on AMX."""

    padding = 2 * SIDE

    # --- The instructions ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Say what the eight tiles are: palette 1, 16 rows of 64 bytes."""
        bytes_of = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8]
        self.m["tiles"].store(self.g.lanes(bytes_of, I8), 64)
        self.g.call("llvm.x86.ldtilecfg", self.m["tiles"])

    def close(self) -> None:
        self.g.call("llvm.x86.tilerelease")

    def tile_load(self, register: int, source: Value, stride: Value | int) -> None:
        self.g.call("llvm.x86.tileloadd64", self.g.const(register, I8), source, self.g.wide(stride))

    def tile_store(self, register: int, to: Value, stride: int) -> None:
        self.g.call("llvm.x86.tilestored64", self.g.const(register, I8), to, self.g.wide(stride))

    def tile_clear(self, register: int) -> None:
        self.g.call("llvm.x86.tilezero", self.g.const(register, I8))

    def tile_multiply(self, c: int, a: int, b: int) -> None:
        self.g.call("llvm.x86.tdpbf16ps", *(self.g.const(x, I8) for x in (c, a, b)))

    # --- Steps --------------------------------------------------------------------------------------------------------

    @property
    def across(self) -> int:
        """Tiles beside each other that cover the rows of a tile of rows."""
        return self.spec.tile_m // SIDE

    def widen_k(self, block: Block) -> tuple[Value, int | Value]:
        """K as it lies; the last of plain rows as a copy, with room for whole tiles. V first."""
        g, s = self.g, self.spec
        # NOTE: pairing reads V, or a latent, in the order of memory, which the processor fetches ahead by itself; asked
        # for by us, lines took the fill buffers that tiles are loaded through: 2.6 ms against 2.1 (MLA, 128 heads)
        self.pair_v(block)
        if s.source != "rows":
            return block.k, block.k_row
        k, row = g.variable(block.k), g.variable(g.wide(block.k_row))
        with g.when(block.keys < BLOCK):
            with g.loop(0, block.keys) as j, g.loop(0, 2 * s.D, 64) as at:
                line = (block.k + j * block.k_row + at).load(vector(I32, SIDE))
                (self.m["copy"] + j * (2 * s.D) + at).store(line, 64)
            k.set(self.m["copy"])
            row.set(g.const(2 * s.D))
        return k.get(), row.get()

    def begin_rows(self) -> None:
        super().begin_rows()
        self.waiting = self.g.variable(self.g.const(0))
        self.clear_reach()

    def clear_reach(self) -> None:
        with self.g.loop(0, self.spec.tiles) as t:
            self.reach_of(t).store(self.g.const(0), 8)

    def reach_of(self, t: Value) -> Value:
        """Where it says how many of the keys that wait tile t goes through."""
        return self.m["reach"] + t * 8

    def score(self, j: Value, v: Value) -> Value:
        """[tile, key, row]: 16 rows of a tile of C lie in 32 lines one after another, not in one set of L1."""
        s = self.spec
        return self.m["scores"] + (v // self.across * s.width + j) * (s.tile_m * 4) + v % self.across * 64

    def pair(self, j: Value, c: Value) -> Value:
        """[chunk, pair of keys, column], for the same reason."""
        s = self.spec
        return self.pairs_of(c) + (self.waiting.get() + j) // 2 * (s.chunk * 4)

    def pairs_of(self, c: Value) -> Value:
        """Where chunk c of V starts; chunks lie a line apart, not in one set of L1."""
        return self.m["pairs"] + c * self.spec.paired

    def scores(self, t: Value, k: Value, k_row: int | Value, reach: Value, block: Block) -> None:
        g, s, m = self.g, self.spec, self.m
        width, waiting = s.tile_m * 4, self.waiting.get()
        q = m["q"] + t * (s.tile_m * self.wide_row)
        rows = Rows(self, t, reach, block)
        with g.loop(0, reach, 2 * SIDE) as j:
            key = k + j * k_row
            for c in range(2 * self.across):
                self.tile_clear(c)
            with g.loop(0, s.D, 2 * SIDE) as d:
                for n in range(2):
                    self.tile_load(A[n], key + g.wide(k_row) * (n * SIDE) + d * 2, k_row)
                    for v in range(self.across):
                        if n == 0:
                            self.tile_load(B[v], q + d // 2 * width + v * 64, width)
                        self.tile_multiply(n * self.across + v, A[n], B[v])
            for n in range(2):
                for v in range(self.across):
                    self.tile_store(n * self.across + v, self.score(waiting + j + n * SIDE, rows.vectors[v]), width)
            with g.loop(j, j + 2 * SIDE) as one:
                places = [self.score(waiting + one, v) for v in rows.vectors]
                sums = [g.variable(p.load(self.V, 4)) for p in places]
                rows.finish(one, [sums])
                for p, total in zip(places, sums, strict=True):
                    p.store(total.get(), 4)
        rows.store_max()

    def after_scores(self, t: Value, reach: Value) -> None:
        """The scores wait for those of the next blocks."""
        self.reach_of(t).store(self.waiting.get() + self.filled(reach), 8)

    def moved(self, old: Value, peak: Value) -> Value:
        """The largest score, once it is far above what weights were relative to: else O is scaled at nearly every step,
        since one of 16 rows moves."""
        if self.spec.source == "sparse":  # its max_logits are asked for
            return peak
        return (peak > old + LEEWAY).pick(peak, old)

    def weigh(self, v: Value, base: Value, reach: Value, total: Variable) -> None:
        """p = exp(S - base), turned: [row, key]."""
        with self.g.loop(0, reach, 2 * SIDE) as j:
            words = []
            for i in range(SIDE):
                pair = []
                for key in (j + 2 * i, j + (2 * i + 1)):
                    p = exp(self.score(key, v).load(self.V, 4) - base)
                    total.set(total.get() + p)
                    pair.append(p)
                words.append(self.rounded(*pair))
            for r, x in enumerate(turn(words)):
                (self.m["weights"] + (v * SIDE + r) * (2 * self.spec.keys) + j * 2).store(x, 64)

    def values(self, block: Block) -> None:
        """The block waits; once there is no room for another, all keys that wait are attended to."""
        g, s = self.g, self.spec
        self.waiting.set(self.waiting.get() + self.filled(block.keys))
        with g.when(self.waiting.get() > s.keys - s.block):
            self.end()

    def end(self) -> None:
        """Softmax and values of the keys that wait."""
        g, s = self.g, self.spec
        with g.loop(0, self.live_tiles) as t:
            reach = self.reach_of(t).load(I64, 8)
            with g.when(reach > 0):
                self.softmax(t, reach)
                with g.loop(0, s.Dv // s.chunk) as c:
                    self.value_tiles(t * s.tile_m, c, reach)
        self.clear_reach()
        self.waiting.set(g.const(0))

    def value_tiles(self, first: Value, c: Value, reach: Value) -> None:
        """O += weights V of one tile of rows and one chunk of columns."""
        g, s, m = self.g, self.spec, self.m
        o, width, line = m["o"] + (c * s.rows + first) * (s.chunk * 4), s.chunk * 4, 2 * s.keys
        self.scale_o(o, first)
        places = [(a, half, o + a * SIDE * width + half * 64) for a in range(self.across) for half in (0, 1)]
        for a, half, place in places:
            self.tile_load(2 * a + half, place, width)
        with g.loop(0, reach, 2 * SIDE) as j:
            pairs = self.pairs_of(c) + j // 2 * width
            for a in range(self.across):
                self.tile_load(A[a], m["weights"] + (first + a * SIDE) * line + j * 2, line)
                for half in (0, 1):
                    if a == 0:
                        self.tile_load(B[half], pairs + half * 64, width)
                    self.tile_multiply(2 * a + half, A[a], B[half])
        for a, half, place in places:
            self.tile_store(2 * a + half, place, width)

    def scale_o(self, o: Value, first: Value) -> None:
        """O times the rows' factors, where one of them is not 1."""
        g, s, W = self.g, self.spec, self.spec.lanes
        with g.loop(0, s.tile_m, W) as r:
            factors = (self.m["factor"] + (first + r) * 4).load(self.V, 4)
            with g.when(factors.differs(1.0).bits(ir.IntType(W)).differs(0)), g.loop(r, r + W) as one:
                factor = (self.m["factor"] + (first + one) * 4).load(self.V.element, 4).splat(W)
                for half in (0, 1):
                    at = o + one * (s.chunk * 4) + half * (4 * W)
                    at.store(at.load(self.V, 4) * factor, 4)
