"""A step with many rows on a processor that multiplies BF16 in pairs: `vdpbf16ps` (AVX-512), `bfdot` (NEON).

Such an instruction adds x[2i] y[2i] + x[2i + 1] y[2i + 1] to FP32 lane i: what `many.py` holds in an element of 4 bytes
is a pair here, and the rest of its schedule stays.

    scores    a pair is two columns: K is read where it lies, a word broadcast, nothing is widened; q is turned by words
    softmax   as before; the weights of keys 2i and 2i + 1, rounded to BF16, share an element, in row 2i of the scores
    values    a pair is two keys: V of the block is paired once for all rows (V[2i, n] beside V[2i + 1, n])

The sum of the weights is of those before rounding: lse stays FP32's. The instructions take numbers below 2^-126 as 0.
"""

from __future__ import annotations

from flash_mla.kernels.cpu.formats import round_bf16
from flash_mla.kernels.cpu.ir import BF16, I16, I32, Value, Variable, vector
from flash_mla.kernels.cpu.lanes import exp
from flash_mla.kernels.cpu.many import Many
from flash_mla.kernels.cpu.walk import Block

DOT = {"avx512bf16": "llvm.x86.avx512bf16.dpbf16ps.512", "neon": "llvm.aarch64.neon.bfdot.v4f32.v8bf16"}
"""LLVM's function for total + the sums of the products of pairs, by unit."""


def beside(first: Value, second: Value) -> Value:
    """The upper halves of FP32 lanes, in pairs: first's is the lower."""
    kind = vector(I32, first.type.count)
    return ((first.bits(kind) >> 16) | (second.bits(kind) & -0x10000)).bits(first.type)


class Pairs(Many):
    """The kernel for prefill, by products of pairs."""

    together = 2
    padding = 2
    """Weights and V are filled up to a multiple of so many keys, with zeros."""

    def multiply(self, x: Value, y: Value, total: Value) -> Value:
        kind = vector(BF16, 2 * self.spec.lanes)
        return total.call(DOT[self.spec.unit], self.V, x.bits(kind), y.bits(kind))

    def widen_k(self, block: Block) -> tuple[Value, int | Value]:
        """K as it lies."""
        return block.k, block.k_row

    def weigh(self, v: Value, base: Value, reach: Value, total: Variable) -> None:
        """Keys j and j + 1 side by side in row j; 0 from `reach` on."""
        with self.g.loop(0, self.filled(reach), 2) as j:
            weights = []
            for key in (j, j + 1):
                p = exp(self.score(key, v).load(self.V, 4) - base)
                weights.append((key < reach).pick(p, self.zero))
                total.set(total.get() + weights[-1])
            self.score(j, v).store(self.rounded(*weights), 4)

    def rounded(self, first: Value, second: Value) -> Value:
        """FP32 lanes rounded to BF16, in pairs."""
        if self.spec.unit == "neon":
            return beside(round_bf16(first).bits(self.V), round_bf16(second).bits(self.V))
        # NOTE: one instruction (`vcvtneps2bf16`) where integers take six
        kind, W = vector(I32, self.spec.lanes), self.spec.lanes
        low, high = (
            x.cast("fptrunc", vector(BF16, W)).bits(vector(I16, W)).cast("zext", kind) for x in (first, second)
        )
        return (low | (high << 16)).bits(self.V)

    def filled(self, keys: Value) -> Value:
        """Keys up to the next multiple of `padding`."""
        return (keys + (self.padding - 1)) // self.padding * self.padding

    def values(self, block: Block) -> None:
        self.pair_v(block)
        super().values(block._replace(v=self.m["pairs"], v_row=2 * self.spec.padded(self.spec.Dv)))

    def pair(self, j: Value, c: Value) -> Value:
        """Where chunk c of V of keys j and j + 1 lies."""
        return self.m["pairs"] + (j // 2 * self.spec.padded(self.spec.Dv) + c * self.spec.chunk) * 4

    def pair_v(self, block: Block) -> None:
        """Write V of the block to m["pairs"], keys 2i and 2i + 1 side by side."""
        g, s, W = self.g, self.spec, self.spec.lanes

        def row(j: Value, there: tuple[Value, Value] | None) -> None:
            sources = [block.v + (j + n).min(block.keys - 1) * block.v_row for n in (0, 1)]

            def pair(c: Value, half: int, rest: bool) -> None:
                xs = [self.part(source, s.held, s.Dv, c, half, rest) for source in sources]
                if there:  # slots past the last key may hold NaN
                    xs = [own.pick(x, self.zero) for own, x in zip(there, xs, strict=True)]
                (self.pair(j, c) + half * (4 * W)).store(beside(*xs), 4)

            self.each_vector(s.Dv, pair)

        whole = block.keys // 2 * 2
        with g.loop(0, whole, 2) as j:
            row(j, None)
        with g.loop(whole, self.filled(block.keys), 2) as j:
            row(j, (j < block.keys, j + 1 < block.keys))
