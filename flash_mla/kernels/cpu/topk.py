"""The selection kernel: the columns of the k greatest scores of a row, in ascending order.

A score becomes an integer of the same order: its bits, the lower 31 turned over where it is negative; -0 is made +0
before. NaN, -inf and columns outside of [start, end) are NONE, below all. Three passes find the k-th greatest: a
histogram of its upper 11 bits; of the next 11, of the scores that share those; of the last 10. A fourth writes the
columns of what lies above it, and of what equals it as many as there is room for, from the left.

**Bound.** A pass reads 4 bytes a score from L2; the first adds to a counter a score, the others look at a vector and go
on where none of its lanes counts. A thread's memory: the histogram and the columns chosen, with room for one too many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from flash_mla.kernels.cpu.ir import F32, I32, I64, Value, Variable, vector
from flash_mla.kernels.cpu.run import Run

ARGUMENTS = (
    *("next", "slot", "rows", "N", "k", "scores", "scores_row", "starts", "starts_wide", "ends", "ends_wide"),
    *("out", "out_row", "memory", "memory_bytes"),
)
"""The arguments, 8 bytes each; scores_row and out_row in bytes."""

LEVELS = ((21, 11), (10, 11), (0, 10))
"""(shift, bits) of the passes that find the threshold."""
HISTOGRAM = 4 << 11
"""Bytes of the counters."""
NONE = -(2**31)
"""The key of what is never taken. Numbers are above it by more than the first pass tells apart."""


@dataclass(frozen=True)
class Selection:
    """The kernel for vectors of so many lanes."""

    lanes: int

    def memory(self, k: int) -> int:
        """Bytes of a thread's memory."""
        return -(-(HISTOGRAM + 4 * (k + 1)) // 64) * 64


class Topk(Run):
    """The kernel that is being written."""

    def __init__(self, spec: Selection) -> None:
        super().__init__(ARGUMENTS)
        self.W = spec.lanes
        self.counts = self.own_memory(self.a["memory_bytes"])
        self.chosen = self.counts + HISTOGRAM

    def build(self) -> ir.Module:
        """Claim rows until there are none."""
        g, a = self.g, self.a
        with self.claimed("rows") as (row, _):
            self.scores = self.pointer("scores") + row * a["scores_row"]
            self.first = self.given("starts", row, g.const(0), a["N"])
            self.stop = self.given("ends", row, a["N"], a["N"])
            self.emit(row, *self.threshold())
        g.finish()
        return self.module

    def keys(self, t: Value, n: int) -> Value:
        """The keys of n columns from t on, as I32: a vector, or one number."""
        x = (self.scores + t * 4).load(vector(F32, n) if n > 1 else F32) + 0.0
        bits = x.bits(vector(I32, n) if n > 1 else I32)
        ordered = bits.op(bits.op(31, "ashr", "") & 0x7FFFFFFF, "xor", "")
        return (x > -math.inf).pick(ordered, NONE)

    def each(self, wanted: Callable[[Value], Value] | None, body: Callable[[Value, Value], None]) -> None:
        """body(column, key) for columns in order; a vector whose keys are none of them `wanted` is passed over."""
        g, W = self.g, self.W
        whole = self.first + (self.stop - self.first) // W * W
        with g.loop(self.first, whole, W) as t:
            if wanted is None:
                for lane in range(W):
                    body(t + lane, self.keys(t + lane, 1))
            else:
                hits = wanted(self.keys(t, W)).bits(ir.IntType(W))
                with g.when(hits.differs(0)), g.loop(t, t + W) as one:
                    body(one, self.keys(one, 1))
        with g.loop(whole, self.stop) as one:
            body(one, self.keys(one, 1))

    def threshold(self) -> tuple[Value, Value]:
        """The key of the k-th greatest, and how many equal to it are taken; (NONE, 0) where there are not so many."""
        g, a = self.g, self.a
        need, prefix, short = g.variable(a["k"]), g.variable(g.const(0, I32)), g.variable(g.const(0, I32))
        for shift, bits in LEVELS:
            above = shift + bits
            self.count(shift, bits, prefix if above < 32 else None)
            digit = self.find(1 << bits, need)
            if above == 32:  # NONE has digit 0, and no number has
                short.set((digit <= 0).pick(g.const(1, I32), 0))
            prefix.set((prefix.get() << bits) | digit.max(0))
        key = prefix.get().op(NONE, "xor", "")
        few = short.get().differs(0)
        return few.pick(g.const(NONE, I32), key), few.pick(g.const(0), need.get())

    def count(self, shift: int, bits: int, prefix: Variable | None) -> None:
        """The histogram of digit [shift, shift + bits) of the keys whose upper bits are the prefix."""
        g = self.g
        with g.loop(0, 4 << bits, 4 * self.W) as at:
            (self.counts + at).store(g.const(0, vector(I32, self.W)), 4)
        known = g.const(0, I32) if prefix is None else prefix.get()

        def shares(key: Value) -> Value:
            upper = key.op(NONE, "xor", "") >> (shift + bits)
            return upper.equals(known if upper.type == I32 else known.splat(self.W))

        def add(_: Value, key: Value) -> None:
            digit = (key.op(NONE, "xor", "") >> shift) & ((1 << bits) - 1)
            counter = self.counts + digit.cast("zext", I64) * 4
            counts = 1 if prefix is None else shares(key).cast("zext", I32)
            counter.store(counter.load(I32, 4) + counts, 4)

        self.each(None if prefix is None else shares, add)

    def find(self, digits: int, need: Variable) -> Value:
        """From the greatest digit on, the one whose scores fill what is needed; `need` is what they leave. -1: none."""
        g = self.g
        digit, left = g.variable(g.const(-1, I32)), g.variable(need.get())
        with g.loop(0, digits) as i:
            d = (g.const(digits - 1) - i).index()
            n = (self.counts + d.cast("zext", I64) * 4).load(I32, 4).cast("zext", I64)
            open_ = digit.get() < 0
            filled = open_ & (n >= left.get())
            digit.set(filled.pick(d, digit.get()))
            left.set((open_ & (n < left.get())).pick(left.get() - n, left.get()))
        need.set(left.get())
        return digit.get()

    def emit(self, row: Value, threshold: Value, room: Value) -> None:
        """Write the columns, and -1 behind them."""
        g, a = self.g, self.a
        number, left = g.variable(g.const(0)), g.variable(room)

        def take(t: Value, key: Value) -> None:
            # NOTE: written whether taken or not: a branch would be guessed wrong for every score that is taken
            (self.chosen + number.get() * 4).store(t.index(), 4)
            equal = key.equals(threshold) & (left.get() > 0)
            number.set(number.get() + ((key > threshold) | equal).cast("zext", I64))
            left.set(left.get() - equal.cast("zext", I64))

        self.each(lambda keys: keys >= threshold.splat(self.W), take)
        out = self.pointer("out") + row * a["out_row"]
        with g.loop(0, number.get()) as i:
            (out + i * 4).store((self.chosen + i * 4).load(I32, 4), 4)
        with g.loop(number.get(), a["k"]) as i:
            (out + i * 4).store(g.const(-1, I32), 4)
