"""The attention kernel: O = softmax(scale Q K^T + mask) V, one generator for every phase.

The kernel is `run(args)`: decode and prefill, GQA and MLA, pages, plain rows and rows named by index. Every
thread of a team runs it, and claims items by an atomic counter: (request, heads that share a KV head, split of the
keys, group of rows). A row is a query of one of these heads: row r is query r % S_q of head r // S_q.

**Bound.** 2 (D + Dv) FLOP a row and key against D + Dv elements a key (MLA: D). A core with 98 GFLOP/s of FMA and 10
GB/s of DRAM breaks even at ten rows in BF16: GQA decode over a long cache is bound by memory, MLA and prefill by FMA.

**A step** is one block of 64 keys against all rows of the item; its data stays in L1 and L2. There are two kinds of
step, `few.py` (decode) and `many.py` (prefill), which differ in what lies in the lanes of a vector.

**Splits.** The keys of an item may be shared out; each part leaves its max, sum and O; who comes last merges them in
their order. How many there are depends on the shapes and on the item's own keys: any number of threads gives the same
bits.

Scores stay natural (not base 2): a mask of finfo.min is then finite, as it is in FP32.
"""

from __future__ import annotations

import math

from llvmlite import ir

from flash_mla.kernels.cpu.formats import SIZE, widen
from flash_mla.kernels.cpu.ir import F64, POINTER, Value, Variable, vector
from flash_mla.kernels.cpu.item import Item
from flash_mla.kernels.cpu.lanes import exp, interleave
from flash_mla.kernels.cpu.walk import Block, walk_named, walk_pages


class Attend(Item):
    """The kernel that is being written."""

    def build(self) -> ir.Module:
        """Claim items until there are none."""
        g = self.g
        self.open()
        with self.claimed("work") as (number, claim):
            self.begin(number, claim)
            (walk_named if self.spec.source == "sparse" else walk_pages)(self, self.step)
            self.end()
            with g.when(self.splits > 1):
                self.merge(claim)
            self.keep((self.splits > 1).pick(self.parts, self.m["own"]))
            self.store()
        self.close()
        g.finish()
        return self.module

    def open(self) -> None:
        """What a thread does before its first item."""

    def close(self) -> None:
        """What it does after its last."""

    def step(self, block: Block) -> None:
        """All rows against one block."""
        raise NotImplementedError

    def end(self) -> None:
        """What is left to do after an item's last block."""

    def move_max(self, at: Value, peak: Value) -> tuple[Value, Variable]:
        """Make `peak` the max of a vector of rows, which lie at `at`, and m["factor"] what their sums and O are then to
        be multiplied by: what weights are relative to, and the sum so far."""
        m = self.m
        base = peak.equals(-math.inf).pick(0.0, peak)  # a row that sees no key yet: exp(-inf) is 0
        factor = exp((m["max"] + at).load(self.V, 4) - base)
        (m["max"] + at).store(peak, 4)
        (m["factor"] + at).store(factor, 4)
        return base, self.g.variable((m["sum"] + at).load(self.V, 4) * factor)

    def load_mask(self, first: Value, rows: int, block: Block, width: int) -> None:
        """The mask's addends of rows [first, first + rows), to m["bias"] as [key, row], `width` rows from key to key:
        a vector of keys of each row, turned; one by one at the end."""
        g, m, a, W = self.g, self.m, self.a, self.spec.lanes
        kind = self.spec.mask
        assert kind is not None
        starts = [(m["mask_rows"] + (first + r) * 8).load(POINTER, 8) for r in range(rows)]
        starts = [row + block.mask_key * a["mask_k"] for row in starts]

        def addend(p: Value, n: int) -> Value:
            x = widen(p, kind, n)
            if kind == "bool":
                return x.equals(0.0).pick(-math.inf, x * 0.0)
            if kind != "f64":
                return x
            least = float.fromhex("-0x1.fffffep127")  # finite in FP64, it hides nothing
            finite = p.load(vector(F64, n)) > -math.inf
            return finite.pick(x.max(least), x)

        bias = m["bias"] + first % width * 4
        even = a["mask_k"].equals(SIZE[kind])
        with g.loop(0, block.keys, W) as j, g.either(even & (j + W <= block.keys)) as (vectors, single):
            with vectors:
                turned = interleave([addend(row + j * SIZE[kind], W) for row in starts])
                if rows == width:
                    (bias + j * (width * 4)).store(turned)
                else:
                    for n in range(W):
                        part = turned.shuffle(range(n * rows, (n + 1) * rows))
                        (bias + (j + n) * (width * 4)).store(part)
            with single, g.loop(j, (j + W).min(block.keys)) as key:
                for r, row in enumerate(starts):
                    (bias + (key * width + r) * 4).store(addend(row + key * a["mask_k"], 1))
