"""dk and dv: a program keeps those of one key tile and walks the queries that see it; see backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.kernels.triton.attend import LOG2E
from flash_mla.kernels.triton.backward import load_rows, weigh
from flash_mla.kernels.triton.prefill import first_position, key_end
from flash_mla.kernels.triton.share import BLOCK


@triton.jit
def add_queries(
    dk,  # [TILE_N, D_MAIN] FP32
    dk_rest,
    dv,  # [TILE_N, DV_TILE] FP32
    k,
    k_rest,
    v,
    scale,
    first,  # row of the tile's first query
    live,  # rows of this head that have a gradient
    tokens,  # [TILE_N]
    end,  # keys of the request
    start,  # position of row 0
    q_head,
    d_out_head,
    lse_head,
    shift_head,
    left_head,
    mask_head,
    STRIDE_Q: tl.constexpr,
    STRIDE_O: tl.constexpr,
    stride_ms,
    stride_mt,
    offs_m,
    offs_d,
    offs_r,
    offs_v,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_REST: tl.constexpr,
    SINK: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries, in the keys' kernel: scores as [TILE_N, TILE_M]."""
    rows = first + offs_m
    row_live = rows < live
    q_rows = q_head + tl.cast(first, tl.int64) * STRIDE_Q + offs_m * STRIDE_Q
    q = load_rows(q_rows, row_live, offs_d, D)
    d_out = load_rows(d_out_head + tl.cast(first, tl.int64) * STRIDE_O + offs_m * STRIDE_O, row_live, offs_v, DV)
    lse2 = tl.load(lse_head + rows, mask=row_live, other=float("inf"))
    shift = tl.load(shift_head + rows, mask=row_live, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if D_REST > 0:
        q_rest = load_rows(q_rows, row_live, offs_r, D)
        scores = tl.dot(k_rest, tl.trans(q_rest), scores, input_precision=PRECISION)
    limit = tl.zeros_like(rows) + end
    if CAUSAL:
        limit = tl.minimum(limit, start + rows + 1)
    mask_tile = mask_head
    seen = row_live
    if MASK != "none":
        mask_tile = mask_head + rows.to(tl.int64)[None, :] * stride_ms + tokens.to(tl.int64)[:, None] * stride_mt
        seen = row_live[None, :] & (tokens < end)[:, None]
    p = weigh(scores, scale, lse2[None, :], tokens[:, None], limit[None, :], mask_tile, seen, MASK, TEST)
    d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    weights = p
    if SINK:
        left = tl.load(left_head + rows, mask=row_live, other=0.0)
        d_p *= left[None, :]
        weights *= left[None, :]
    dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    d_s = (p * (d_p - shift[None, :])).to(q.dtype)
    dk = tl.dot(d_s, q, dk, input_precision=PRECISION)
    if D_REST > 0:
        dk_rest = tl.dot(d_s, q_rest, dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv


@triton.jit
def keys_kernel(
    q_ptr,  # [B, Hq, P, D]
    k_ptr,  # [B, Hk, S_kv, D]
    v_ptr,  # [B, Hk, S_kv, DV]
    d_out_ptr,  # [B, Hq, P, DV]
    lse2_ptr,  # prepare_kernel's
    shift_ptr,
    left_ptr,
    live_ptr,  # [B, Hq] int32
    seq_lens_ptr,  # [B]
    start_pos_ptr,  # [B]
    mask_ptr,  # [B, Hq, P, S_kv]
    kept_ptr,  # columns_kernel's
    num_kept_ptr,
    dk_ptr,  # [B, Hk, S_kv, D]
    dv_ptr,  # [B, Hk, S_kv, DV]
    softmax_scale,
    Hk,
    P,
    S_kv,
    block_rows,
    stride_qb, stride_qh,
    stride_kb, stride_kh,
    stride_vb, stride_vh,
    stride_ob, stride_oh,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_lb, stride_lh,  # of num_kept; 0 where the list is shared
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_Q: tl.constexpr,  # of a row, as of K, V and dout: constants, so that rows are immediate offsets
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_O: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool", "float"
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    DV_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # the first key tiles, which most queries see, of every head come first
    key_head = tl.program_id(0) % Hk
    tiles = (S_kv + TILE_N - 1) // TILE_N
    t = tl.program_id(0) // Hk % tiles * TILE_N
    b = tl.program_id(0) // Hk // tiles
    b64 = b.to(tl.int64)
    tokens = t + tl.arange(0, TILE_N)
    offs_m = tl.arange(0, TILE_M)
    offs_d = tl.arange(0, D_MAIN)
    offs_r = D_MAIN + tl.arange(0, max(D_REST, 1))
    offs_v = tl.arange(0, DV_TILE)
    end = key_end(seq_lens_ptr, b, S_kv)
    start = first_position(start_pos_ptr, b, S_kv)
    stored = tokens < end
    scale = softmax_scale * LOG2E

    # load K and V
    k_rows = k_ptr + b64 * stride_kb + key_head.to(tl.int64) * stride_kh + tokens.to(tl.int64) * STRIDE_K
    v_rows = v_ptr + b64 * stride_vb + key_head.to(tl.int64) * stride_vh + tokens.to(tl.int64) * STRIDE_V
    k = load_rows(k_rows, stored, offs_d, D)
    v = load_rows(v_rows, stored, offs_v, DV)
    k_rest = k
    dk = tl.zeros([TILE_N, D_MAIN], tl.float32)
    dk_rest = dk
    if D_REST > 0:
        k_rest = load_rows(k_rows, stored, offs_r, D)
        dk_rest = tl.zeros([TILE_N, D_REST], tl.float32)
    dv = tl.zeros([TILE_N, DV_TILE], tl.float32)

    # query tiles from the first row that sees a key of this tile; from `whole` on, rows see all of them
    begin = 0
    whole = 0
    if CAUSAL:
        begin = tl.maximum(t - start, 0) // TILE_M * TILE_M
        whole = (tl.maximum(t + TILE_N - 1 - start, 0) + TILE_M - 1) // TILE_M * TILE_M
    for i in tl.range(0, RATIO, num_stages=1):
        head = key_head * RATIO + i
        head64 = head.to(tl.int64)
        row = (b64 * Hk * RATIO + head64) * P
        live = tl.load(live_ptr + b64 * Hk * RATIO + head64)
        if t >= end:
            live = 0
        q_head = q_ptr + b64 * stride_qb + head64 * stride_qh
        d_out_head = d_out_ptr + b64 * stride_ob + head64 * stride_oh
        mask_head = mask_ptr
        if MASK != "none":
            mask_head = mask_ptr + b64 * stride_mb + head64 * stride_mh
        left_head = lse2_ptr
        if left_ptr is not None:
            left_head = left_ptr + row
        if kept_ptr is not None:
            PARTS: tl.constexpr = 64 // TILE_M
            listed = b64 * stride_lb + head64 * stride_lh + t // BLOCK
            kept = kept_ptr + listed * block_rows
            for j in tl.range(0, tl.load(num_kept_ptr + listed) * PARTS):
                first = tl.load(kept + j // PARTS) * BLOCK + j % PARTS * TILE_M
                dk, dk_rest, dv = add_queries(
                    dk, dk_rest, dv, k, k_rest, v, scale, first, live, tokens, end, start, q_head, d_out_head,
                    lse2_ptr + row, shift_ptr + row, left_head, mask_head, STRIDE_Q, STRIDE_O, stride_ms, stride_mt,
                    offs_m, offs_d, offs_r, offs_v, D, DV, D_REST, left_ptr is not None, CAUSAL, MASK, True, PRECISION,
                )  # fmt: skip
        else:
            tested = live if MASK != "none" else tl.minimum(whole, live)
            for first in tl.range(begin, tested, TILE_M):
                dk, dk_rest, dv = add_queries(
                    dk, dk_rest, dv, k, k_rest, v, scale, first, live, tokens, end, start, q_head, d_out_head,
                    lse2_ptr + row, shift_ptr + row, left_head, mask_head, STRIDE_Q, STRIDE_O, stride_ms, stride_mt,
                    offs_m, offs_d, offs_r, offs_v, D, DV, D_REST, left_ptr is not None, CAUSAL, MASK, True, PRECISION,
                )  # fmt: skip
            if MASK == "none":
                for first in tl.range(tl.maximum(begin, whole), live, TILE_M):
                    # what is past `end` in this tile is not finite, and not stored
                    dk, dk_rest, dv = add_queries(
                        dk, dk_rest, dv, k, k_rest, v, scale, first, live, tokens, end, start, q_head, d_out_head,
                        lse2_ptr + row, shift_ptr + row, left_head, mask_head, STRIDE_Q, STRIDE_O, stride_ms, stride_mt,
                        offs_m, offs_d, offs_r, offs_v, D, DV, D_REST, left_ptr is not None, CAUSAL, MASK, False,
                        PRECISION,
                    )  # fmt: skip

    # write; keys past the request's length get 0
    inside = (tokens < S_kv)[:, None]
    dk_rows = dk_ptr + b64 * stride_dkb + key_head.to(tl.int64) * stride_dkh + tokens.to(tl.int64) * stride_dkt
    dv_rows = dv_ptr + b64 * stride_dvb + key_head.to(tl.int64) * stride_dvh + tokens.to(tl.int64) * stride_dvt
    dk = tl.where(stored[:, None], dk * softmax_scale, 0.0).to(dk_ptr.dtype.element_ty)
    tl.store(dk_rows[:, None] + offs_d[None, :], dk, mask=inside & (offs_d < D)[None, :])
    if D_REST > 0:
        dk_rest = tl.where(stored[:, None], dk_rest * softmax_scale, 0.0).to(dk_ptr.dtype.element_ty)
        tl.store(dk_rows[:, None] + offs_r[None, :], dk_rest, mask=inside & (offs_r < D)[None, :])
    dv = tl.where(stored[:, None], dv, 0.0).to(dv_ptr.dtype.element_ty)
    tl.store(dv_rows[:, None] + offs_v[None, :], dv, mask=inside & (offs_v < DV)[None, :])
