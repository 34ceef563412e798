"""Vector mathematics that LLVM has no instruction for: exp, log, sums across lanes, interleaving."""

from __future__ import annotations

import math

from flash_mla.kernels.cpu.ir import F32, I32, Value, vector

LOG2E = math.log2(math.e)
LEAST, MOST = -87.0, 88.5
"""exp below LEAST is taken as 0 (it is 1.6e-38), above MOST it is inf."""

EXP2 = (1.3264727e-3, 9.6715126e-3, 5.5507337e-2, 0.24022242, 0.69314698, 1.0)
"""2^f for |f| <= 1/2, highest power first: the minimax polynomial that is 1 at 0, relative error 2e-7 in FP32."""

ROUND = 1.5 * 2**23
"""Added to an FP32 number of less than 2^22, it rounds it to an integer, which the low bits then hold."""

LOG = (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
"""ln m = 2 atanh(s), s = (m - 1) / (m + 1), over s: powers of s^2, highest first; |s| <= 0.172, error 2e-9."""


def polynomial(x: Value, coefficients: tuple[float, ...]) -> Value:
    """Horner's rule, highest power first."""
    total = x.fma(coefficients[0], coefficients[1])
    for c in coefficients[2:]:
        total = total.fma(x, c)
    return total


def exp(x: Value, above: bool = False) -> Value:
    """e^x of FP32 lanes, relative error 3e-7; 0 for -inf, NaN for NaN. above: x may be above MOST."""
    tiny = x < LEAST
    x = x.max(LEAST)
    if above:
        x = x.min(MOST)
    shifted = x.fma(LOG2E, ROUND)
    part = x.fma(LOG2E, (shifted - ROUND) * -1.0)
    power = ((shifted.bits(vector(I32, x.type.count)) + 127) << 23).bits(x.type)
    return tiny.pick(0.0, polynomial(part, EXP2) * power)


def log(x: Value) -> Value:
    """ln x of FP32 lanes; -inf for 0, x itself where it is not finite."""
    kind = vector(I32, x.type.count)
    bits = x.bits(kind)
    # mantissa in [sqrt(1/2), sqrt(2)), as it would be for a negative exponent of 2
    exponent = (bits - 0x3F3504F3).op(23, "ashr", "")
    m = (bits - (exponent << 23)).bits(x.type)
    s = (m - 1.0) / (m + 1.0)
    y = polynomial(s * s, LOG) * s + exponent.cast("sitofp", x.type) * math.log(2)
    return x.equals(0.0).pick(-math.inf, (x < math.inf).pick(y, x))


def lane_sums(vs: list[Value]) -> Value:
    """The sum of each of 1, 2 or 4 vectors, one a lane: interleaved inside 128 bits, then halved."""
    W = vs[0].type.count
    steps = ([[0, W, 1, W + 1], [2, W + 2, 3, W + 3]], [[0, 1, W, W + 1], [2, 3, W + 2, W + 3]])
    for step in steps[: len(vs).bit_length() - 1]:
        low, high = ([q + x for q in range(0, W, 4) for x in lanes] for lanes in step)
        vs = [a.shuffle(low, b) + a.shuffle(high, b) for a, b in zip(vs[::2], vs[1::2], strict=True)]
    return vs[0]


def halve(x: Value, lanes: int) -> Value:
    """Add the upper half of a vector to the lower until so many lanes are left."""
    while (w := x.type.count) > lanes:
        x = x.shuffle(range(w // 2)) + x.shuffle(range(w // 2, w))
    return x


def rotate_max(x: Value, period: int) -> Value:
    """In each lane the largest of the lanes that are equal to it modulo `period`."""
    W = x.type.count
    step = W // 2
    while step >= period:
        x = x.max(x.shuffle([(lane + step) % W for lane in range(W)]))
        step //= 2
    return x


def interleave(vs: list[Value]) -> Value:
    """v0[0] v1[0] .. v0[1] v1[1] ..: a power of two of vectors as one."""
    if len(vs) == 1:
        return vs[0]
    a, b = interleave(vs[::2]), interleave(vs[1::2])
    n = a.type.count
    return a.shuffle([x for lane in range(n) for x in (lane, n + lane)], b)


def turn(vs: list[Value]) -> list[Value]:
    """W vectors of W lanes, turned: vector i holds lane i of each."""
    W = len(vs)
    low, high = ([lane for x in range(start, start + W // 2) for lane in (x, W + x)] for start in (0, W // 2))
    for _ in range(W.bit_length() - 1):
        pairs = list(zip(vs[: W // 2], vs[W // 2 :], strict=True))
        vs = [a.shuffle(lanes, b) for a, b in pairs for lanes in (low, high)]
    return vs


def fill_lanes(x: Value, lanes: int) -> Value:
    """A shorter FP32 vector with zeros behind it."""
    n = x.type.count
    if n == lanes:
        return x
    zeros = Value(x.b, vector(F32, n)([0.0] * n))
    return x.shuffle([*range(n), *([n] * (lanes - n))], zeros)
