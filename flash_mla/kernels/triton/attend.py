"""The steps that decode and prefill share: one key tile of attention, and the end of the online softmax.

Scores are kept in base 2: `s = (q . k) * softmax_scale * log2(e)`, so that `exp` is one `exp2`. A row that has seen no
key holds row_max -inf, row_sum 0 and acc 0; every step keeps it so, without NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-2.0e38)
"""In natural units; in base 2 it is -2.9e38, so that a score may be added to it in FP32."""


CONVERT = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
"""PTX: four e4m3 to FP16."""
CONVERT_BITS = tl.constexpr("""{
    .reg .b32 low, high, sign, scale;
    mov.b32 scale, 0x5c005c00;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, low, 0x80008000;
    shr.u32 low, low, 1;
    and.b32 low, low, 0x3f803f80;
    or.b32 low, low, sign;
    mul.rn.f16x2 $0, low, scale;
    and.b32 sign, high, 0x80008000;
    shr.u32 high, high, 1;
    and.b32 high, high, 0x3f803f80;
    or.b32 high, high, sign;
    mul.rn.f16x2 $1, high, scale;
}""")
"""The same by integer arithmetic, two bytes an instruction: see `widen`."""


@triton.jit
def widen(x, WIDEN: tl.constexpr):
    """A tile as the dots take it; exact. See tiles.widening for the choice."""
    # NOTE: is_pure=False keeps Triton from moving the conversion past the tile's way through shared memory, where each
    # of the two products would then do it on its own, from bytes
    if WIDEN == "fp8_once":
        x = x.to(tl.uint8, bitcast=True)
        x = tl.inline_asm_elementwise(CONVERT, "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4)
    if WIDEN == "fp8_bits_once":
        x = tl.inline_asm_elementwise(CONVERT_BITS, "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4)
    if WIDEN == "fp8":
        x = x.to(tl.float16)
    if WIDEN == "fp8_bits":
        # e4m3 (bias 7) moved into FP16's fields (bias 15) is the value times 2^-8, subnormals included
        bits = x.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = (half.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    return x


@triton.jit
def power_of(most, EXPONENT: tl.constexpr):
    """The power of two, as FP32's bits, that takes a row's largest number [TILE_M] to 2^EXPONENT and above."""
    bits = most.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 0x08000000), 0x7F000000) - EXPONENT * 0x800000


@triton.jit
def high_low(x, low):
    """FP32 below 2^8 in e4m3, four bits; where `low`, what that leaves, another four. What is not finite as NaN."""
    x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
    high = x.to(tl.float8e4nv).to(tl.float32)
    return tl.where(low, x - high, x).to(tl.float8e4nv)


@triton.jit
def twice(rows):
    """Where the terms of 2 * n rows come from, two a row, 8 apart: one thread of a product has both."""
    return rows // 16 * 8 + rows % 8


@triton.jit
def add_terms(x):
    """[2 * n, columns] of `twice` to [n, columns]."""
    n: tl.constexpr = x.shape[0] // 2
    return tl.reshape(tl.sum(tl.reshape(x, (n // 8, 2, 8, x.shape[1])), 1), (n, x.shape[1]))


@triton.jit
def bias(mask):
    """A floating mask in base 2; -inf only where it is -inf, which finfo.min times log2(e) would be too."""
    wide = mask if mask.dtype == tl.float64 else mask.to(tl.float32)
    finite = tl.maximum(wide, LOWEST).to(tl.float32) * LOG2E
    return tl.where(wide == float("-inf"), float("-inf"), finite)


CUT = tl.constexpr(64)
"""Products of e4m3 that wgmma, which keeps some 14 bits of a sum, adds by itself; such sums are added in FP32. At
magnitudes of 20 (scores in the thousands) out is off by 1.2e-2 of its largest element, without the cuts by 3.4e-1; they
take 8 % of the time (H200, 128 heads)."""


@triton.jit
def hide(
    scores,
    tokens,  # this and the next but mask_len and stride_mt, in dims that broadcast to the scores'
    stored,
    limit,
    mask_rows,
    mask_len,
    stride_mt,
    row_live,
    mask_first,
    MASK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Scores as `attend`'s arguments say: a floating mask added, in base 2; -inf where a row does not see a key."""
    keep = tokens < limit
    if MASK != "none":
        column = tokens - mask_first if TAIL else tokens
        inside = stored & (column < mask_len)
        if TAIL:
            inside = inside & (column >= 0)
        seen = row_live & inside
        mask_tile = mask_rows + column.to(tl.int64) * stride_mt
        if MASK == "bool":
            allowed = tl.load(mask_tile, mask=seen, other=0) != 0
            if TAIL:
                allowed = allowed | (column < 0)
            keep = keep & allowed
        else:
            added = bias(tl.load(mask_tile, mask=seen, other=float("-inf")))
            if TAIL:
                added = tl.where(column < 0, 0.0, added)
            scores += added
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def attend(
    acc,  # [TILE_M, DV_TILE] FP32
    row_max,  # [TILE_M] FP32, base 2
    row_sum,  # [TILE_M] FP32
    q,  # [TILE_M, D_MAIN]
    q_rest,  # [TILE_M, D_REST]; q where D_REST is 0
    scale,  # above 0, times log2(e)
    k_rows,  # [TILE_N] pointers to the rows of K
    v_rows,  # [TILE_N] pointers to the rows of V
    tokens,  # [TILE_N] their positions
    end,  # rows at and past it are not read
    limit,  # [TILE_M] keys that a row may see
    mask_rows,  # [TILE_M] pointers to the rows of the mask
    mask_len,
    stride_mt,
    row_live,  # [TILE_M]
    offs_d,
    offs_r,
    offs_v,
    D: tl.constexpr,
    DV: tl.constexpr,
    MASK: tl.constexpr,
    TEST: tl.constexpr,
    D_REST: tl.constexpr,
    REUSE: tl.constexpr,
    FLIP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    rest_rows=None,  # [TILE_N] likewise for the columns from D_MAIN on, as if column 0 lay there; None: k_rows
    row_scale=None,  # [TILE_M], E4M3: what the products of q are multiplied by
    E4M3: tl.constexpr = False,  # q is [2 * TILE_M, ...]: e4m3, each row in two terms (`twice`)
    TAIL: tl.constexpr = False,
    mask_first=0,  # TAIL: the token of the mask's first column; earlier ones are all seen
):
    """One key tile, one online-softmax step.

    Without TEST every row sees every token of the tile, and no mask is read.
    The dot with K goes over the D_MAIN columns and, where the head has them, over the rest; REUSE takes V from K's main
    columns, which are then read once. With E4M3, K is multiplied as it was copied. FLIP negates the scores:
    scale is a magnitude, so that a row's maximum may be taken before the product.
    """
    stored = tokens < end
    d_live = (offs_d < D)[None, :]
    r_live = (offs_r < D)[None, :]
    v_live = (offs_v < DV)[None, :]
    if TEST:
        d_live = d_live & stored[:, None]
        r_live = r_live & stored[:, None]
        v_live = v_live & stored[:, None]
    k = tl.load(k_rows[:, None] + offs_d[None, :], mask=d_live, other=0.0)
    if E4M3:
        scores = tl.dot(q, tl.trans(k), max_num_imprecise_acc=CUT)
        k = widen(k, WIDEN)
    else:
        k = widen(k, WIDEN).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [TILE_M, TILE_N]
    if D_REST > 0:
        if rest_rows is None:
            rest_rows = k_rows
        k_rest = tl.load(rest_rows[:, None] + offs_r[None, :], mask=r_live, other=0.0)
        if E4M3:
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, max_num_imprecise_acc=CUT)
        else:
            k_rest = widen(k_rest, WIDEN).to(q.dtype)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    if E4M3:
        scores = add_terms(scores) * row_scale[:, None]

    if FLIP:
        scores = -scores
    # scores times `unit` are in base 2: the product is folded into the exponent
    unit = scale
    if MASK == "float":
        scores *= scale
        unit = 1.0
    if TEST:
        scores = hide(
            scores, tokens[None, :], stored[None, :], limit[:, None], mask_rows[:, None] if MASK != "none" else None,
            mask_len, stride_mt, row_live[:, None], mask_first, MASK, TAIL,
        )  # fmt: skip

    # online softmax
    row_max_new = tl.maximum(row_max, tl.max(scores, 1) * unit)
    # a row without a key yet: subtract 0, so that exp2(-inf) is 0 and not exp2(-inf + inf)
    shift = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    p = tl.exp2(scores * unit - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    v = k
    if not REUSE:
        v = widen(tl.load(v_rows[:, None] + offs_v[None, :], mask=v_live, other=0.0), WIDEN).to(q.dtype)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max_new, row_sum


@triton.jit
def normalise(acc, row_max, row_sum):
    """(out, base-2 lse) of a finished row; 0 and -inf where it saw no key."""
    empty = row_sum == 0.0
    out = acc * (1.0 / tl.where(empty, 1.0, row_sum))[:, None]
    lse2 = tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
    return out, lse2


@triton.jit
def sink_factor(lse2, sink):
    """exp(lse) / (exp(lse) + exp(sink)): what is left of a row's weight beside one logit that gives no value."""
    # exp2 overflows to inf for a sink far above lse, and 1 / inf is the right limit
    # a row without a key is 0 already; a sink of -inf would make it NaN
    return tl.where(lse2 == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp2(sink * LOG2E - lse2)))
