"""The backward of sparse prefill: dq and dkv of rows that query tokens name, with the equations of backward.py.

    ds = scale p (f dout v^T - g)      dq = ds k
    dkv[row] = sum over the (token, slot) that name it, and over heads, of ds q + f p dout

Prepared rows (lse2, g, f) come from backward.prepare_kernel, whose rows are here the tokens. Then, for a chunk of the
tokens after the other, three kernels:

    sparse_queries_kernel  (tokens * head tiles)  gathers K once; keeps dq; writes f p and ds [token, head, slot]
    sparse_keys_kernel     (tokens * key tiles)   products of those with q and dout: a partial row a (token, slot)
    sum_kernel             (rows of kv)           adds the partial rows that name a row, in the order of tokens

A slot is the place of a key in its token's list. Which slots name a row comes from a stable sort of indices, so
that no sum depends on the order of programs: no atomics, the same bits always, and each product is computed
once: 5 of them, 2.5 times the forward's. The chunk bounds the workspace. Atomic sums of dkv in FP32 took 12.3 ms, this
way 15.6, sort and sum included, of 34 ms in all (H200, 4096 tokens, 128 heads, topk 2048).

Bound: FLOPs, 2 tokens topk Hq (3 D + 2 Dv); the workspace is topk (2 Hq + D) elements a token, each written once and
read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from flash_mla.kernels.triton.attend import LOG2E
from flash_mla.kernels.triton.backward import load_rows
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import head_tiles, least_rest, power_of_2, precision

# --- Config ---


@dataclass(frozen=True)
class Config:
    """Tiles of the three kernels.

    tile_m heads by tile_n keys of the queries' kernel, with d_main + d_rest columns of K; keys_m heads by keys_n keys
    by keys_d columns of the keys' kernel; slots: topk up to a whole tile of either.
    rows: tokens of a tile of prepare_kernel.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    d_main: int
    d_rest: int
    keys_m: int
    keys_n: int
    keys_d: int
    keys_warps: int
    slots: int
    precision: str
    rows: int


QUERIES = ((64, 64, 8), (64, 32, 8), (32, 32, 8), (32, 16, 8), (16, 16, 4))
"""(tile_m, tile_n, warps), best first where they fit. Q and dout of 64 heads leave room for one tile of keys: in place
that is one stage; elsewhere it is two, since one would keep a tile for each product that reads it."""
KEYS = ((128, 128, 64, 8), (128, 64, 64, 4), (64, 64, 64, 4), (64, 32, 32, 4), (32, 32, 32, 4), (16, 16, 16, 4))
"""(keys_m, keys_n, keys_d, warps), likewise, in two stages."""


def config(*, Hq: int, D: int, Dv: int, topk: int, itemsize: int, target: Target) -> Config:
    """The first tiles that fit: pure arithmetic, no device."""
    d_main, d_rest = head_tiles(D, least_rest(target))
    heads, parts = max(16, power_of_2(Hq)), 2 if itemsize == 4 else 1

    def queries_fit(tile_m: int, tile_n: int) -> bool:
        rows = min(tile_m, heads) * (2 * d_main + d_rest) + tile_n * (d_main + d_rest)
        return (rows + 2 * tile_m * tile_n) * parts * itemsize <= target.smem

    def keys_fit(tile_m: int, tile_n: int, tile_d: int) -> bool:
        return 2 * min(tile_m, heads) * (tile_n + 2 * tile_d) * parts * itemsize <= target.smem

    tile_m, tile_n, warps = next((x for x in QUERIES if queries_fit(*x[:2])), QUERIES[-1])
    keys_m, keys_n, keys_d, keys_warps = next((x for x in KEYS if keys_fit(*x[:3])), KEYS[-1])
    least = max(16, power_of_2(topk))
    tile_n, keys_n = min(tile_n, least), min(keys_n, least)
    return Config(
        tile_m=min(tile_m, heads),
        tile_n=tile_n,
        warps=warps,
        stages=1 if target.in_place else 2,
        d_main=d_main,
        d_rest=d_rest,
        keys_m=min(keys_m, heads),
        keys_n=keys_n,
        keys_d=min(keys_d, max(16, power_of_2(D))),
        keys_warps=keys_warps,
        slots=-(-topk // max(tile_n, keys_n)) * max(tile_n, keys_n),
        precision=precision(itemsize, target),
        rows=max(16, min(64, 8192 // max(power_of_2(Dv), 16))),
    )


def smaller(config: Config) -> Config | None:
    """The next config to try where a device refuses this one: smaller tiles, of both kernels."""
    sizes = ("tile_m", "tile_n", "keys_m", "keys_n", "keys_d")
    instead = replace(config, **{name: max(getattr(config, name) // 2, 16) for name in sizes})
    if instead != config:
        return instead
    return replace(config, precision="ieee") if config.precision == "tf32x3" else None


# --- Kernels ---


@triton.jit
def named_count(length_ptr, token, topk):
    """Slots of a token that count."""
    count = tl.cast(topk, tl.int32)
    if length_ptr is not None:
        count = tl.maximum(tl.minimum(tl.load(length_ptr + token), topk), 0).to(tl.int32)
    return count


@triton.jit
def sparse_queries_kernel(
    q_ptr,  # [tokens, Hq, D]
    index_ptr,  # [tokens, topk]
    length_ptr,  # [tokens]
    kv_ptr,  # [kv_rows, D]
    d_out_ptr,  # [tokens, Hq, DV]
    lse2_ptr,  # [Hq, tokens], prepare_kernel's, as the two that follow
    shift_ptr,
    left_ptr,
    dq_ptr,  # [tokens, Hq, D]
    p_ptr,  # [tokens, Hq, SLOTS]: f p
    ds_ptr,  # [tokens, Hq, SLOTS]
    softmax_scale,
    Hq,
    topk,
    kv_rows,
    stride_qs, stride_qh,
    stride_is,
    stride_os, stride_oh,
    stride_lh,  # of lse2, shift and left
    stride_dqs, stride_dqh,
    STRIDE_KV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head_tiles = (Hq + TILE_M - 1) // TILE_M
    token = (tl.program_id(0) // head_tiles).to(tl.int64)
    heads = tl.program_id(0) % head_tiles * TILE_M + tl.arange(0, TILE_M)
    head_live = heads < Hq
    heads64 = heads.to(tl.int64)
    offs_n = tl.arange(0, TILE_N)
    offs_d = tl.arange(0, D_MAIN)
    offs_r = D_MAIN + tl.arange(0, max(D_REST, 1))
    scale = softmax_scale * LOG2E

    # load the token's heads; dout is 0 in the columns of K that are not V
    q_rows = q_ptr + token * stride_qs + heads64 * stride_qh
    q = load_rows(q_rows, head_live, offs_d, D)
    d_out = load_rows(d_out_ptr + token * stride_os + heads64 * stride_oh, head_live, offs_d, DV)
    q_rest = q
    dq = tl.zeros([TILE_M, D_MAIN], tl.float32)
    dq_rest = dq
    if D_REST > 0:
        q_rest = load_rows(q_rows, head_live, offs_r, D)
        dq_rest = tl.zeros([TILE_M, D_REST], tl.float32)
    row = heads64 * stride_lh + token
    lse2 = tl.load(lse2_ptr + row, mask=head_live, other=float("inf"))
    shift = tl.load(shift_ptr + row, mask=head_live, other=0.0)
    left = shift
    if left_ptr is not None:
        left = tl.load(left_ptr + row, mask=head_live, other=0.0)
    weights = (token * Hq + heads64) * SLOTS

    count = named_count(length_ptr, token, topk)
    for first in tl.range(0, count, TILE_N):
        slots = first + offs_n
        index = tl.load(index_ptr + token * stride_is + slots, mask=slots < count, other=-1).to(tl.int64)
        live = (index >= 0) & (index < kv_rows)
        rows = kv_ptr + tl.where(live, index, 0) * STRIDE_KV
        k = load_rows(rows, live, offs_d, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [TILE_M, TILE_N]
        if D_REST > 0:
            k_rest = load_rows(rows, live, offs_r, D)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        # hidden scores may be far above lse2, and exp2 of them infinite
        p = tl.where(live[None, :], tl.exp2(scores * scale - lse2[:, None]), 0.0)
        d_p = tl.dot(d_out, tl.trans(k), input_precision=PRECISION)
        weight = p
        if left_ptr is not None:
            d_p *= left[:, None]
            weight *= left[:, None]
        d_s = (p * (d_p - shift[:, None]) * softmax_scale).to(k.dtype)
        places = weights[:, None] + slots[None, :]
        tl.store(p_ptr + places, weight.to(k.dtype), mask=head_live[:, None])
        tl.store(ds_ptr + places, d_s, mask=head_live[:, None])
        dq = tl.dot(d_s, k, dq, input_precision=PRECISION)
        if D_REST > 0:
            dq_rest = tl.dot(d_s, k_rest, dq_rest, input_precision=PRECISION)

    # write
    dq_rows = dq_ptr + token * stride_dqs + heads64 * stride_dqh
    element = dq_ptr.dtype.element_ty
    tl.store(dq_rows[:, None] + offs_d[None, :], dq.to(element), mask=head_live[:, None] & (offs_d < D)[None, :])
    if D_REST > 0:
        inside = head_live[:, None] & (offs_r < D)[None, :]
        tl.store(dq_rows[:, None] + offs_r[None, :], dq_rest.to(element), mask=inside)


@triton.jit
def sparse_keys_kernel(
    q_ptr,  # [tokens, Hq, D]
    length_ptr,  # [tokens]
    d_out_ptr,  # [tokens, Hq, DV]
    p_ptr,  # [tokens, Hq, SLOTS]
    ds_ptr,  # [tokens, Hq, SLOTS]
    partial_ptr,  # [tokens, SLOTS, D]
    Hq,
    topk,
    stride_qs, stride_qh,
    stride_os, stride_oh,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // (SLOTS // TILE_N)).to(tl.int64)
    first = tl.program_id(0) % (SLOTS // TILE_N) * TILE_N
    if first >= named_count(length_ptr, token, topk):
        return
    slots = first + tl.arange(0, TILE_N)
    partial = partial_ptr + (token * SLOTS + slots) * D

    # what names no row holds anything in a partial: nobody reads it
    for head in tl.range(0, Hq, TILE_M, num_stages=1):
        heads = head + tl.arange(0, TILE_M)
        head_live = heads < Hq
        heads64 = heads.to(tl.int64)
        places = ((token * Hq + heads64) * SLOTS)[:, None] + slots[None, :]
        p = tl.load(p_ptr + places, mask=head_live[:, None], other=0.0)
        d_s = tl.load(ds_ptr + places, mask=head_live[:, None], other=0.0)
        q_rows = q_ptr + token * stride_qs + heads64 * stride_qh
        d_out_rows = d_out_ptr + token * stride_os + heads64 * stride_oh
        for column in tl.range(0, D, TILE_D):
            offs = column + tl.arange(0, TILE_D)
            q = load_rows(q_rows, head_live, offs, D)
            d_out = load_rows(d_out_rows, head_live, offs, DV)
            dkv = tl.dot(tl.trans(d_s), q, input_precision=PRECISION)  # [TILE_N, TILE_D]
            dkv = tl.dot(tl.trans(p), d_out, dkv, input_precision=PRECISION)
            here = partial[:, None] + offs[None, :]
            inside = (offs < D)[None, :]
            if head > 0:
                dkv += tl.load(here, mask=inside, other=0.0).to(tl.float32)
            tl.store(here, dkv.to(partial_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    partial_ptr,  # [tokens * SLOTS, D]
    order_ptr,  # slots by the row they name, of one row by token
    start_ptr,  # [kv_rows + 1]: where a row's slots of the chunk begin in order
    token,  # of the tokens that order counts, the chunk's first
    dkv_ptr,  # [kv_rows, D] FP32, added to
    topk,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(start_ptr + row)
    last = tl.load(start_ptr + row + 1)
    if first == last:
        return
    offs_d = tl.arange(0, D_MAIN)
    offs_r = D_MAIN + tl.arange(0, max(D_REST, 1))
    dkv = tl.zeros([TILE, D_MAIN], tl.float32)
    rest = tl.zeros([TILE, max(D_REST, 1)], tl.float32)
    for i in tl.range(first, last, TILE):
        listed = i + tl.arange(0, TILE)
        live = listed < last
        slot = tl.load(order_ptr + listed, mask=live, other=0)
        rows = partial_ptr + ((slot // topk - token) * SLOTS + slot % topk) * D
        dkv += load_rows(rows, live, offs_d, D).to(tl.float32)
        if D_REST > 0:
            rest += load_rows(rows, live, offs_r, D).to(tl.float32)
    here = dkv_ptr + row * D
    tl.store(here + offs_d, tl.load(here + offs_d, mask=offs_d < D) + tl.sum(dkv, 0), mask=offs_d < D)
    if D_REST > 0:
        tl.store(here + offs_r, tl.load(here + offs_r, mask=offs_r < D) + tl.sum(rest, 0), mask=offs_r < D)
