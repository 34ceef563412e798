"""The kernel that quantises rows into the pages of an FP8 cache: e4m3 codes, a scale for each tile, rope as it is.

A thread claims rows. Two walks over a tile of columns: the greatest finite magnitude, as an integer (FP32's order);
then the codes. The scale is the least power of two whose 448-fold that magnitude does not pass, so that every byte is
the one that `quant.RowFormat.quantise` writes.

**Bound.** Memory: 2 bytes a column read, one written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from flash_mla.kernels.cpu.formats import widen
from flash_mla.kernels.cpu.ir import F32, I8, I32, I64, Value, vector
from flash_mla.kernels.cpu.run import Run

ARGUMENTS = (
    *("next", "N", "rows", "rows_row", "slots", "slots_wide", "tokens", "page", "descale"),
    *("codes", "codes_block", "codes_row", "scales", "scales_block", "scales_row", "rope", "rope_block", "rope_row"),
)
"""The arguments, 8 bytes each; strides in bytes; descale is FP32's bits."""

INFINITY = 0x7F800000
LARGEST = 0x43E00000
"""FP32's bits of 448, e4m3's largest number."""
LEAST_NORMAL = 0x3C800000
"""Of 2^-6, e4m3's least normal number."""
SCALE_MIN = 1e-4
"""As in quant.py."""


@dataclass(frozen=True)
class Quantising:
    """The kernel for a row format and vectors of so many lanes.

    `quantised` columns of a row have a scale of scale_size bytes (FP32, e8m0; 0: none) for each `tile`; scale_bytes of
    scales a row, zeros behind them; then `rope` columns of BF16.
    """

    lanes: int
    quantised: int
    rope: int
    tile: int
    scale_size: int
    scale_bytes: int


def e4m3(x: Value) -> Value:
    """The codes of FP32 lanes, rounded to nearest even, saturating; NaN keeps its sign."""
    bits = x.bits(vector(I32, x.type.count))
    magnitude = bits & 0x7FFFFFFF
    size = magnitude.min(LARGEST)
    # 3 of 23 bits of the mantissa stay, and the exponent's bias is 7, not 127
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # multiples of 2^-9, the last bit of an FP32 from 2^14 on
    small = (size.bits(x.type) + 16384.0).bits(bits.type) - 0x46800000
    code = (size < LEAST_NORMAL).pick(small, normal)
    code = (magnitude > INFINITY).pick(0x7F, code) | ((bits >> 24) & 0x80)
    return code.cast("trunc", vector(I8, x.type.count))


class Rows(Run):
    """The kernel that is being written."""

    def __init__(self, spec: Quantising) -> None:
        super().__init__(ARGUMENTS)
        self.spec = spec

    def build(self) -> ir.Module:
        """Claim rows until there are none; those of slots outside of the pages are passed over."""
        g, a = self.g, self.a
        with self.claimed("N") as (n, _):
            slot = g.integer(self.pointer("slots"), n, a["slots_wide"])
            with g.when((slot >= 0) & (slot < a["tokens"])):
                block, at = slot // a["page"], slot % a["page"]
                parts = ("codes", "scales", "rope")
                to = {x: self.pointer(x) + block * a[f"{x}_block"] + at * a[f"{x}_row"] for x in parts}
                self.write(self.pointer("rows") + n * a["rows_row"], to)
        g.finish()
        return self.module

    def write(self, row: Value, to: dict[str, Value]) -> None:
        """The bytes of a row."""
        g, s = self.g, self.spec
        if s.scale_size:
            with g.loop(0, s.quantised // s.tile) as t:
                first = t * s.tile
                scale = self.scale(row + first * 2)
                kind = {1: I8, 4: I32}[s.scale_size]
                stored = scale if s.scale_size == 4 else (scale >> 23).cast("trunc", kind)
                (to["scales"] + t * s.scale_size).store(stored)
                inverse = (g.const(0x7F000000, I32) - scale).bits(F32).splat(s.lanes)
                self.codes(row + first * 2, to["codes"] + first, s.tile, lambda x: x * inverse)
            for pad in range(s.quantised // s.tile * s.scale_size, s.scale_bytes):
                (to["scales"] + pad).store(g.const(0, I8))
        else:
            descale = self.a["descale"].index().bits(F32).splat(s.lanes)
            self.codes(row, to["codes"], s.quantised, lambda x: x / descale)
        with g.loop(0, 2 * s.rope, 8) as at:
            (to["rope"] + at).store((row + 2 * s.quantised + at).load(I64))

    def scale(self, row: Value) -> Value:
        """FP32's bits of the scale of the tile at `row`."""
        g, W = self.g, self.spec.lanes
        most = g.variable(g.const(0, vector(I32, W)))
        with g.loop(0, self.spec.tile, W) as c:
            magnitude = widen(row + c * 2, "bf16", W).bits(vector(I32, W)) & 0x7FFFFFFF
            most.set(most.get().max((magnitude < INFINITY).pick(magnitude, 0)))
        greatest = most.get()
        while (lanes := greatest.type.count) > 1:
            half = range(lanes // 2)
            greatest = greatest.shuffle(half).max(greatest.shuffle([i + lanes // 2 for i in half]))
        bits = (greatest.bits(vector(F32, 1)) / 448.0).max(SCALE_MIN).bits(I32)
        return (bits + 0x7FFFFF) & INFINITY

    def codes(self, row: Value, to: Value, columns: int, scaled: Callable[[Value], Value]) -> None:
        """The codes of so many columns."""
        W = self.spec.lanes
        with self.g.loop(0, columns, W) as c:
            (to + c).store(e4m3(scaled(widen(row + c * 2, "bf16", W))))
