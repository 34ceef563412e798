"""dq: a program keeps that of one query tile and walks the keys that it sees; see backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_mla.kernels.triton.attend import LOG2E
from flash_mla.kernels.triton.backward import load_rows, weigh
from flash_mla.kernels.triton.prefill import first_position, key_end
from flash_mla.kernels.triton.share import BLOCK


@triton.jit
def add_keys(
    dq,  # [TILE_M, D_MAIN] FP32
    dq_rest,
    q,
    q_rest,
    d_out,
    lse2,  # [TILE_M]
    shift,
    left,
    scale,
    first,  # token of the tile's first key
    end,
    limit,  # [TILE_M]
    k_head,
    v_head,
    mask_rows,  # [TILE_M]
    row_live,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    stride_mt,
    offs_n,
    offs_d,
    offs_r,
    offs_v,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_REST: tl.constexpr,
    SINK: tl.constexpr,
    MASK: tl.constexpr,
    TEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys, in the queries' kernel: scores as [TILE_M, TILE_N]."""
    tokens = first + offs_n
    stored = tokens < end
    k_rows = k_head + tl.cast(first, tl.int64) * STRIDE_K + offs_n * STRIDE_K
    k = load_rows(k_rows, stored, offs_d, D)
    v = load_rows(v_head + tl.cast(first, tl.int64) * STRIDE_V + offs_n * STRIDE_V, stored, offs_v, DV)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if D_REST > 0:
        k_rest = load_rows(k_rows, stored, offs_r, D)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    mask_tile = mask_rows
    seen = row_live
    if MASK != "none":
        mask_tile = mask_rows[:, None] + tokens.to(tl.int64)[None, :] * stride_mt
        seen = row_live[:, None] & stored[None, :]
    p = weigh(scores, scale, lse2[:, None], tokens[None, :], limit[:, None], mask_tile, seen, MASK, TEST)
    d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    if SINK:
        d_p *= left[:, None]
    d_s = (p * (d_p - shift[:, None])).to(k.dtype)
    dq = tl.dot(d_s, k, dq, input_precision=PRECISION)
    if D_REST > 0:
        dq_rest = tl.dot(d_s, k_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse2_ptr,
    shift_ptr,
    left_ptr,
    live_ptr,
    seq_lens_ptr,
    start_pos_ptr,
    mask_ptr,
    kept_ptr,  # prefill.compact_kernel's
    num_kept_ptr,
    dq_ptr,  # [B, Hq, P, D]
    softmax_scale,
    Hq,
    P,
    S_kv,
    block_columns,
    stride_qb, stride_qh,
    stride_kb, stride_kh,
    stride_vb, stride_vh,
    stride_ob, stride_oh,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_lb, stride_lh,
    stride_dqb, stride_dqh, stride_dqs,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_O: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    DV_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m_tiles = (P + TILE_M - 1) // TILE_M
    m_tile = m_tiles - 1 - tl.program_id(0) % m_tiles
    head = tl.program_id(0) // m_tiles % Hq
    b = tl.program_id(0) // m_tiles // Hq
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    key_head = (head // RATIO).to(tl.int64)
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)
    live = tl.load(live_ptr + b64 * Hq + head64)
    row_live = rows < live
    rows64 = rows.to(tl.int64)
    offs_n = tl.arange(0, TILE_N)
    offs_d = tl.arange(0, D_MAIN)
    offs_r = D_MAIN + tl.arange(0, max(D_REST, 1))
    offs_v = tl.arange(0, DV_TILE)
    scale = softmax_scale * LOG2E

    # load the rows
    q_rows = q_ptr + b64 * stride_qb + head64 * stride_qh + rows64 * STRIDE_Q
    q = load_rows(q_rows, row_live, offs_d, D)
    d_out = load_rows(d_out_ptr + b64 * stride_ob + head64 * stride_oh + rows64 * STRIDE_O, row_live, offs_v, DV)
    q_rest = q
    dq = tl.zeros([TILE_M, D_MAIN], tl.float32)
    dq_rest = dq
    if D_REST > 0:
        q_rest = load_rows(q_rows, row_live, offs_r, D)
        dq_rest = tl.zeros([TILE_M, D_REST], tl.float32)
    row = (b64 * Hq + head64) * P + rows
    lse2 = tl.load(lse2_ptr + row, mask=row_live, other=float("inf"))
    shift = tl.load(shift_ptr + row, mask=row_live, other=0.0)
    left = shift
    if left_ptr is not None:
        left = tl.load(left_ptr + row, mask=row_live, other=0.0)
    k_head = k_ptr + b64 * stride_kb + key_head * stride_kh
    v_head = v_ptr + b64 * stride_vb + key_head * stride_vh
    mask_rows = mask_ptr
    if MASK != "none":
        mask_rows = mask_ptr + b64 * stride_mb + head64 * stride_mh + rows64 * stride_ms

    # the keys that some row sees, [0, end), and that every row sees, [0, whole)
    end = key_end(seq_lens_ptr, b, S_kv)
    limit = tl.zeros_like(rows) + end
    whole = end
    last = end
    if CAUSAL:
        start = first_position(start_pos_ptr, b, S_kv)
        limit = tl.minimum(limit, start + rows + 1)
        whole = tl.minimum(end, start + m_tile * TILE_M + 1)
        last = tl.minimum(end, start + tl.minimum((m_tile + 1) * TILE_M, P))
    if m_tile * TILE_M >= live:
        whole = 0
        last = 0

    if kept_ptr is not None:
        PARTS: tl.constexpr = 64 // TILE_N
        listed = b64 * stride_lb + head64 * stride_lh + m_tile * TILE_M // BLOCK
        kept = kept_ptr + listed * block_columns
        count = tl.load(num_kept_ptr + listed) * PARTS
        if last == 0:
            count = 0
        for j in tl.range(0, count):
            first = tl.load(kept + j // PARTS) * BLOCK + j % PARTS * TILE_N
            dq, dq_rest = add_keys(
                dq, dq_rest, q, q_rest, d_out, lse2, shift, left, scale, first, end, limit, k_head, v_head, mask_rows,
                row_live, STRIDE_K, STRIDE_V, stride_mt, offs_n, offs_d, offs_r, offs_v, D, DV, D_REST,
                left_ptr is not None, MASK, True, PRECISION,
            )  # fmt: skip
    else:
        whole = whole // TILE_N * TILE_N
        if MASK != "none":
            whole = 0
        if MASK == "none":
            for first in tl.range(0, whole, TILE_N):
                dq, dq_rest = add_keys(
                    dq, dq_rest, q, q_rest, d_out, lse2, shift, left, scale, first, end, limit, k_head, v_head,
                    mask_rows, row_live, STRIDE_K, STRIDE_V, stride_mt, offs_n, offs_d, offs_r, offs_v, D, DV, D_REST,
                    left_ptr is not None, MASK, False, PRECISION,
                )  # fmt: skip
        for first in tl.range(whole, last, TILE_N):
            dq, dq_rest = add_keys(
                dq, dq_rest, q, q_rest, d_out, lse2, shift, left, scale, first, end, limit, k_head, v_head, mask_rows,
                row_live, STRIDE_K, STRIDE_V, stride_mt, offs_n, offs_d, offs_r, offs_v, D, DV, D_REST,
                left_ptr is not None, MASK, True, PRECISION,
            )  # fmt: skip

    # write
    inside = (rows < P)[:, None]
    dq_rows = dq_ptr + b64 * stride_dqb + head64 * stride_dqh + rows64 * stride_dqs
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_rows[:, None] + offs_d[None, :], dq, mask=inside & (offs_d < D)[None, :])
    if D_REST > 0:
        dq_rest = (dq_rest * softmax_scale).to(dq_ptr.dtype.element_ty)
        tl.store(dq_rows[:, None] + offs_r[None, :], dq_rest, mask=inside & (offs_r < D)[None, :])
