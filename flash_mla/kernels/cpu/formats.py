"""How numbers lie in memory: elements widened to FP32 vectors and rounded back, and the row formats of FP8 caches.

A row is read in chunks of 2W columns, two FP32 vectors of W lanes. BF16 is widened in pairs: 2W values are W 32-bit
words, whose lower halves (shifted) and upper halves (masked) are the even and the odd columns; a dot product does not
care about the order of columns, and q and out pass in the same order in and out. e4m3 that is not staged is read the
same way, in 16-bit words of two. Every other element is read in natural order. What is left of a row, always a multiple
of 8 columns, is read in natural order with zeros behind it.

e4m3 becomes FP16 by shifting: its exponent and mantissa are FP16's upper ones but for the bias (7, not 15), so the
bits are the value times 2^-8, subnormal ones too. 0x7f and 0xff are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

from flash_mla.kernels.cpu.ir import F16, F32, F64, I8, I16, I32, Code, Value, vector
from flash_mla.kernels.cpu.lanes import fill_lanes

SIZE = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "fp8": 1, "code": 1, "bool": 1}
"""Bytes of an element; "code" is an e4m3 code that is read times 1 / CODE."""
SPLIT = ("bf16", "code")
"""What is read as even and odd columns."""
CODE = 256.0
"""An e4m3 code's value over that of its bits as FP16."""


def widen(p: Value, dtype: str, n: int) -> Value:
    """n stored elements as an FP32 vector in natural order; bool as 1.0 and 0.0."""
    if dtype == "f32":
        return p.load(vector(F32, n))
    if dtype == "f64":
        return p.load(vector(F64, n)).cast("fptrunc", vector(F32, n))
    if dtype == "f16":
        return p.load(vector(F16, n)).cast("fpext", vector(F32, n))
    if dtype == "bf16":
        return (p.load(vector(I16, n)).cast("zext", vector(I32, n)) << 16).bits(vector(F32, n))
    if dtype == "bool":
        return p.load(vector(I8, n)).differs(0).cast("uitofp", vector(F32, n))
    x = e4m3(p, n).cast("fpext", vector(F32, n))
    return x if dtype == "code" else x * CODE


def e4m3(p: Value, n: int) -> Value:
    """n codes as FP16 times 2^-8; NaN stays NaN."""
    bits = p.load(vector(I8, n)).cast("sext", vector(I16, n)) << 7
    bits = bits & -0x4080  # sign, 0, 7 bits: 0xBF80
    nan = (bits | -0x8000).equals(-0x4080).cast("sext", vector(I16, n))
    return (bits | nan).bits(vector(F16, n))


def chunk(p: Value, dtype: str, W: int, half: int) -> Value:
    """One of the two vectors of a chunk at p."""
    if dtype == "bf16":
        words = p.load(vector(I32, W))
        return (words & -0x10000 if half else words << 16).bits(vector(F32, W))
    if dtype == "code":
        words = p.load(vector(I16, W))
        bits = (words if half else words << 8).op(1, "ashr", "") & -0x4080  # sign, 0, 7 bits
        nan = (bits + 0x80) & 0x4000  # 7 ones alone carry
        return (bits | nan).bits(vector(F16, W)).cast("fpext", vector(F32, W))
    return widen(p + half * W * SIZE[dtype], dtype, W)


def tail(p: Value, dtype: str, W: int, half: int, columns: int) -> Value:
    """One of the vectors of the last `columns` of a row; zeros behind them."""
    left = min(columns - half * W, W)
    parts, at = [], half * W
    while left:  # by powers of two, which LLVM loads whole
        n = 1 << (left.bit_length() - 1)
        parts.append(widen(p + at * SIZE[dtype], dtype, n))
        at, left = at + n, left - n
    whole = parts[0]
    for part in parts[1:]:
        n = whole.type.count
        wide = fill_lanes(part, max(n, part.type.count))
        whole = whole.shuffle(range(n + part.type.count), wide)
    return fill_lanes(whole, W)


def round_bf16(x: Value) -> Value:
    """FP32 lanes as I32 whose upper halves are BF16, rounded to nearest even."""
    kind = vector(I32, x.type.count)
    bits = x.bits(kind)
    return x.compare("uno", x).pick(bits | 0x400000, bits + ((bits >> 16) & 1) + 0x7FFF)


def narrow(p: Value, x: Value, dtype: str) -> None:
    """Store FP32 lanes in natural order, rounded."""
    n = x.type.count
    if dtype == "f16":
        x = x.cast("fptrunc", vector(F16, n))
    elif dtype == "bf16":
        x = (round_bf16(x) >> 16).cast("trunc", vector(I16, n))
    p.store(x)


def store_pair(p: Value, even: Value, odd: Value) -> None:
    """Store the two vectors of a BF16 chunk."""
    p.store((round_bf16(even) >> 16) | (round_bf16(odd) & -0x10000))


# --- Row formats ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A latent row of an FP8 cache (`quant.RowFormat`): `codes` e4m3 columns with a scale for each `tile` of them (0:
    no scales; e8m0 or FP32), then `rope` BF16 columns. Offsets are bytes from the row; `scales_apart`: the scales of a
    page lie behind its rows, `scale_bytes` a row. width: bytes from row to row.
    """

    codes: int
    rope: int
    tile: int
    e8m0: bool
    scale_at: int
    rope_at: int
    width: int
    scale_bytes: int = 0

    @property
    def scales_apart(self) -> bool:
        return self.scale_bytes > 0


ROWS = {
    "fp8_ds_mla": Row(512, 64, 128, False, 512, 528, 656),
    "model1": Row(448, 64, 64, True, 0, 448, 576, scale_bytes=8),
    "v4.1": Row(512, 0, 32, True, 512, 528, 528),
    "flat": Row(576, 0, 0, False, 576, 576, 576),
    "fp8_token": Row(512, 64, 512, False, 0, 512, 640, scale_bytes=4),
}


def scale_factor(p: Value, e8m0: bool) -> Value:
    """The stored scale at p as FP32; e8m0 is an exponent byte, 0 is 2^-127 and 255 is NaN."""
    if not e8m0:
        return p.load(F32)
    code = p.load(I8).cast("zext", I32)
    special = (code.equals(0)).pick(0x400000, code.equals(255).pick(code * 0 + 0x400000, 0))
    return ((code << 23) | special).bits(F32)


def stage_row(g: Code, row: Value, to: Value, kv: str, columns: int, W: int, scales: Value | None = None) -> None:
    """Write the row at `row` to `to` as the products read it: e4m3 as FP32 times 1 / CODE, other elements as they are.

    kv is an element type or a row format, whose scales lie at `scales` (None: in the row).
    """
    if kv in ROWS:
        decode_row(g, row, to, ROWS[kv], row if scales is None else scales, W)
    elif kv == "fp8":
        decode_codes(g, row, to, columns, None, W)
    else:
        size = columns * SIZE[kv]
        whole = size // (4 * W) * (4 * W)
        with g.loop(0, whole, 4 * W) as at:
            (to + at).store((row + at).load(vector(I32, W)))
        for left in range(whole, size, 16):
            (to + left).store((row + left).load(vector(I32, 4)))


def decode_codes(g: Code, row: Value, to: Value, columns: int, factor: Value | None, W: int) -> None:
    """Write `columns` e4m3 codes at `row` as FP32, times `factor` (in every lane); None: times 1 / CODE."""

    def decode(c: Value, n: int) -> None:
        half = e4m3(row + c, n)
        for k in range(0, n, min(W, n)):
            lanes = min(W, n)
            x = half.shuffle(range(k, k + lanes)).cast("fpext", vector(F32, lanes))
            (to + (c + k) * 4).store(x if factor is None else x * CODE * factor)

    whole = columns // (2 * W) * (2 * W)
    with g.loop(0, whole, 2 * W) as c:
        decode(c, 2 * W)
    for at in range(whole, columns, 8):
        decode(g.const(at), 8)


def decode_row(g: Code, row: Value, to: Value, form: Row, scales: Value, W: int) -> None:
    """Write the latent row at `row` as FP32."""
    if form.tile:
        size = 1 if form.e8m0 else 4
        with g.loop(0, form.codes // form.tile) as t:
            factor = scale_factor(scales + form.scale_at + t * size, form.e8m0).splat(W)
            first = t * form.tile
            decode_codes(g, row + first, to + first * 4, form.tile, factor, W)
    else:
        decode_codes(g, row, to, form.codes, g.const(1.0, vector(F32, W)), W)
    if form.rope:
        with g.loop(0, form.rope, W) as c:
            (to + (c + form.codes) * 4).store(widen(row + form.rope_at + c * 2, "bf16", W))
