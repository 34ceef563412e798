"""The kernel that copies new rows of K and V into their pages, as they are: token i of request b to position start + i.

A thread claims tokens, and copies the rows of all heads. Rows are bytes, a multiple of 8, so that one kernel serves
every dtype and width. A row is dropped, not clamped, where its position lies past the table or its block outside of the
cache: a write to any other place would destroy another request's rows.

**Bound.** Memory: each row read once and written once.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from flash_mla.kernels.cpu.config import BLOCK
from flash_mla.kernels.cpu.ir import I8, I64, Value, vector
from flash_mla.kernels.cpu.run import Run

ARGUMENTS = (
    *("next", "k", "v", "k_cache", "v_cache", "table", "starts", "counts"),
    *("N", "P", "heads", "starts_wide", "counts_wide", "table_row", "table_wide", "table_blocks", "Nblk"),
    *("k_b", "k_h", "k_r", "k_bytes", "k_cache_b", "k_cache_h", "k_cache_p", "k_cache_k"),
    *("v_b", "v_h", "v_r", "v_bytes", "v_cache_b", "v_cache_h", "v_cache_p", "v_cache_k"),
)
"""The arguments, 8 bytes each, the addresses in the order of AppendArgs: N = B P tokens, of which a request takes its
first `counts`; strides and the widths of rows in bytes; v_bytes is 0 where there is no V."""

CHUNK = 32
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class Appending:
    """The kernel: there is one."""


class Append(Run):
    """The kernel that is being written."""

    def __init__(self) -> None:
        super().__init__(ARGUMENTS)

    def build(self) -> ir.Module:
        """Claim tokens until there are none."""
        g, a = self.g, self.a
        with self.claimed("N") as (n, _):
            b, i = n // a["P"], n % a["P"]
            position = self.given("starts", b, g.const(0)) + i
            inside = (position >= 0) & (position < a["table_blocks"] * BLOCK)
            with g.when(inside & (i < self.given("counts", b, a["P"]))):
                row = self.pointer("table") + b * a["table_row"]
                block = g.integer(row, position // BLOCK, a["table_wide"])
                with g.when((block >= 0) & (block < a["Nblk"])), g.loop(0, a["heads"]) as h:
                    for x in ("k", "v"):
                        to = self.place(f"{x}_cache", b, h) + block * a[f"{x}_cache_p"]
                        to = to + position % BLOCK * a[f"{x}_cache_k"]
                        self.copy(self.place(x, b, h) + i * a[f"{x}_r"], to, a[f"{x}_bytes"])
        g.finish()
        return self.module

    def place(self, name: str, b: Value, h: Value) -> Value:
        """Where a head of a request starts."""
        return self.pointer(name) + b * self.a[f"{name}_b"] + h * self.a[f"{name}_h"]

    def copy(self, row: Value, to: Value, size: Value) -> None:
        """Copy so many bytes, a multiple of 8."""
        whole = size // CHUNK * CHUNK
        for start, stop, step, kind in ((0, whole, CHUNK, vector(I8, CHUNK)), (whole, size, 8, I64)):
            with self.g.loop(start, stop, step) as at:
                (to + at).store((row + at).load(kind))
