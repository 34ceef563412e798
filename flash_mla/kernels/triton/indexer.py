"""Indexer: how much each key matters to a query token (DeepSeek sparse attention; topk.py selects).

    score[i, t] = scale[t] * sum_h weights[i, h] * max(q[i, h] . k[t], 0)

Keys are the rows of the product and (query, head) pairs its columns, so that the sum over heads stays inside a thread
and its three neighbours. Grid: key chunks by query tiles, over pages for each request. A chunk is a fixed number of
keys, so that long and short rows cost what they hold; a chunk that no query of the tile sees is left at once.

Bound, prefill: 2 * H * D FLOP a (query, key), 16384 for DSA's 64 heads of 128. Beside the FP8 tensor cores, the max and
the multiply-add of every product take at least half of the cores' issue slots: what overlaps them are the other
programs of the SM, so tiles are small. Decode: 132 bytes a key.

NOTE: on Hopper the FP8 product accumulates in about 14 bits over its 128 columns, as DeepGEMM's does.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import widen
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import power_of_2, widening

# --- Config ---


@dataclass(frozen=True)
class Config:
    """tile_n keys by tile_q queries of head_tile heads and d_tile columns; a program walks chunk keys.

    widen: as in attend.widen; "" multiplies e4m3 itself.
    """

    tile_n: int
    tile_q: int
    head_tile: int
    d_tile: int
    chunk: int
    widen: str
    warps: int
    stages: int


def config(*, B: int, S_q: int, H: int, D: int, width: int, target: Target) -> Config:
    """128 columns of the product: two queries of 64 heads. Chunks of few queries are the longest of four lengths whose
    programs fill half of the GPU, which has room for 3 an SM of 128 columns and 6 of 64.
    """
    head_tile = max(power_of_2(H), 16)
    tile_q = max(1, min(128 // head_tile, power_of_2(S_q)))
    native = target.backend == "cuda" and target.arch >= 89
    # NOTE: H200, 64 requests of 32768 keys: one query 82 us in chunks of 1408 (1024: 84, 1856: 89), two 98 in chunks of
    # 1856 and 4 stages (1024 and 3: 103)
    longest, resident, stages = (1856, 3, 4) if tile_q * head_tile > 64 else (1408, 6, 3)
    if target.backend == "interpreter":
        chunk = 128
    elif S_q > 8:
        chunk, stages = 4096, 3
    else:
        tiles, programs = -(-S_q // tile_q) * B, resident * target.multiprocessors // 2
        chunk = next((n for n in (longest, 1024, 512) if tiles * -(-width // n) >= programs), 256)
    widen = "" if native else widening(1, target)
    return Config(64, tile_q, head_tile, max(power_of_2(D), 32), chunk, widen, 4, stages)


# --- Scores ---


@triton.jit
def score_keys(k, q, weights, scales, TILE_N: tl.constexpr, TILE_Q: tl.constexpr, HEAD_TILE: tl.constexpr):
    """Scores [TILE_N, TILE_Q] of keys [TILE_N, D] for q [TILE_Q * HEAD_TILE, D]."""
    products = tl.dot(k, tl.trans(q))
    weighted = tl.maximum(products, 0.0) * weights[None, :]
    return tl.sum(tl.reshape(weighted, [TILE_N, TILE_Q, HEAD_TILE]), 2) * scales[:, None]


@triton.jit
def ragged_kernel(
    q_ptr,  # [S_q, H, D]
    k_ptr,  # [S_kv, D]
    scale_ptr,  # [S_kv]
    weight_ptr,  # [S_q, H]
    start_ptr,  # [S_q]
    end_ptr,  # [S_q]
    out_ptr,  # [S_q, S_kv]
    S_q,
    S_kv,
    stride_qs, stride_qh, stride_kt, stride_st, stride_ws, stride_wh, stride_starts, stride_ends, stride_os,
    H: tl.constexpr,
    D: tl.constexpr,
    CLEAN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_Q: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Keys laid end to end; query i sees start[i] <= t < end[i]."""
    # the query tiles of one chunk run side by side: its keys stay in L2
    query_tiles = (S_q + TILE_Q - 1) // TILE_Q
    first_query = tl.program_id(0) % query_tiles * TILE_Q
    chunk = tl.program_id(0) // query_tiles * CHUNK

    queries = first_query + tl.arange(0, TILE_Q)
    query_live = queries < S_q
    starts = tl.load(start_ptr + queries * stride_starts, mask=query_live, other=S_kv)
    starts = tl.minimum(tl.maximum(starts, 0), S_kv).to(tl.int32)
    ends = tl.load(end_ptr + queries * stride_ends, mask=query_live, other=0)
    ends = tl.minimum(tl.maximum(ends, 0), S_kv).to(tl.int32)
    first = tl.minimum(tl.maximum(tl.min(starts, 0), chunk), chunk + CHUNK) // TILE_N * TILE_N
    last = tl.minimum(tl.max(ends, 0), chunk + CHUNK)

    # load q
    rows = tl.arange(0, TILE_Q * HEAD_TILE)
    query, head = first_query + rows // HEAD_TILE, rows % HEAD_TILE
    offs_d = tl.arange(0, D_TILE)
    row_live = (query < S_q) & (head < H)
    q_rows = q_ptr + query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=row_live[:, None] & (offs_d < D)[None, :], other=0.0)
    q = widen(q, WIDEN)
    weight_rows = weight_ptr + query.to(tl.int64) * stride_ws + head.to(tl.int64) * stride_wh
    weights = tl.load(weight_rows, mask=row_live, other=0.0)

    out_rows = out_ptr + queries.to(tl.int64) * stride_os
    offs_n = tl.arange(0, TILE_N)
    if CLEAN:
        for t in tl.range(chunk, tl.minimum(first, S_kv), TILE_N):
            hide(out_rows, t + offs_n, query_live, S_kv, TILE_N, TILE_Q)
    for t in tl.range(first, last, TILE_N, num_stages=STAGES):
        tokens = t + offs_n
        # NOTE: rows past the last are read as the last, not masked: 256 instructions a tile instead of 325
        stored = tl.minimum(tokens, S_kv - 1).to(tl.int64)
        k_tile = k_ptr + (stored * stride_kt)[:, None] + offs_d[None, :]
        k = widen(tl.load(k_tile, mask=(offs_d < D)[None, :], other=0.0), WIDEN)
        scores = score_keys(k, q, weights, tl.load(scale_ptr + stored * stride_st), TILE_N, TILE_Q, HEAD_TILE)
        seen = (tokens[:, None] >= starts[None, :]) & (tokens[:, None] < ends[None, :])
        if CLEAN:
            scores = tl.where(seen, scores, float("-inf"))
            seen = query_live[None, :] & (tokens < S_kv)[:, None]
        tl.store(out_rows[None, :] + tokens[:, None], scores, mask=seen)
    if CLEAN:
        hidden = tl.maximum(first, (last + TILE_N - 1) // TILE_N * TILE_N)
        for t in tl.range(hidden, tl.minimum(chunk + CHUNK, S_kv), TILE_N):
            hide(out_rows, t + offs_n, query_live, S_kv, TILE_N, TILE_Q)


@triton.jit
def hide(out_rows, tokens, live, width, TILE_N: tl.constexpr, TILE_Q: tl.constexpr):
    """Write -inf for tokens that none of the queries sees."""
    out_tile = out_rows[None, :] + tokens[:, None]
    hidden = tl.full([TILE_N, TILE_Q], float("-inf"), tl.float32)
    tl.store(out_tile, hidden, mask=live[None, :] & (tokens < width)[:, None])


@triton.jit
def paged_kernel(
    q_ptr,  # [B, S_q, H, D]
    k_ptr,  # [num_blocks, page, D]
    scale_ptr,  # [num_blocks, page]
    weight_ptr,  # [B, S_q, H]
    table_ptr,  # [B, table_blocks]
    limit_ptr,  # [B, S_q]: query i sees t < limit
    out_ptr,  # [B, S_q, width]
    B,
    S_q,
    num_blocks,
    table_blocks,
    width,
    stride_qb, stride_qs, stride_qh, stride_kn, stride_kt, stride_sn, stride_st,
    stride_wb, stride_ws, stride_wh, stride_tb, stride_lb, stride_ls, stride_ob, stride_os,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    IDS: tl.constexpr,  # not fewer than the pages that a chunk touches
    CLEAN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_Q: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Keys in pages; query i of request b sees t < limit[b, i]."""
    query_tiles = (S_q + TILE_Q - 1) // TILE_Q
    first_query = tl.program_id(0) % query_tiles * TILE_Q
    b = (tl.program_id(0) // query_tiles % B).to(tl.int64)
    chunk = tl.program_id(0) // query_tiles // B * CHUNK

    queries = first_query + tl.arange(0, TILE_Q)
    query_live = queries < S_q
    limits = tl.load(limit_ptr + b * stride_lb + queries * stride_ls, mask=query_live, other=0)
    there = tl.minimum(tl.cast(table_blocks, tl.int64) * PAGE, width)
    limits = tl.minimum(tl.maximum(limits, 0), there).to(tl.int32)
    last = tl.minimum(tl.max(limits, 0), chunk + CHUNK)

    # load q
    rows = tl.arange(0, TILE_Q * HEAD_TILE)
    query, head = first_query + rows // HEAD_TILE, rows % HEAD_TILE
    offs_d = tl.arange(0, D_TILE)
    row_live = (query < S_q) & (head < H)
    q_rows = q_ptr + b * stride_qb + query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=row_live[:, None] & (offs_d < D)[None, :], other=0.0)
    q = widen(q, WIDEN)
    weight_rows = weight_ptr + b * stride_wb + query.to(tl.int64) * stride_ws + head.to(tl.int64) * stride_wh
    weights = tl.load(weight_rows, mask=row_live, other=0.0)

    table_row = table_ptr + b * stride_tb
    out_rows = out_ptr + b * stride_ob + queries.to(tl.int64) * stride_os
    offs_n = tl.arange(0, TILE_N)
    # NOTE: the chunk's page ids are read at once and picked in registers, so that no copy of keys depends on a load in
    # the loop (H200, B 64 x 32k: 84 us; 105 with the next id read one tile ahead)
    first_page = chunk // PAGE
    ids = tl.load(table_row + tl.minimum(first_page + tl.arange(0, IDS), table_blocks - 1))
    ids = tl.minimum(tl.maximum(ids, 0), num_blocks - 1).to(tl.int32)
    for t in tl.range(chunk, last, TILE_N, num_stages=STAGES):
        tokens = t + offs_n
        slots = t % PAGE + offs_n
        block = tl.sum(tl.where(tl.arange(0, IDS) == t // PAGE - first_page, ids, 0), 0).to(tl.int64)
        k_tile = k_ptr + block * stride_kn + (slots * stride_kt)[:, None] + offs_d[None, :]
        k = widen(tl.load(k_tile, mask=(offs_d < D)[None, :], other=0.0), WIDEN)
        scales = tl.load(scale_ptr + block * stride_sn + slots * stride_st)
        scores = score_keys(k, q, weights, scales, TILE_N, TILE_Q, HEAD_TILE)
        seen = tokens[:, None] < limits[None, :]
        if CLEAN:
            scores = tl.where(seen, scores, float("-inf"))
            seen = query_live[None, :] & (tokens < width)[:, None]
        tl.store(out_rows[None, :] + tokens[:, None], scores, mask=seen)
    if CLEAN:
        hidden = tl.maximum(chunk, (last + TILE_N - 1) // TILE_N * TILE_N)
        for t in tl.range(hidden, tl.minimum(chunk + CHUNK, width), TILE_N):
            hide(out_rows, t + offs_n, query_live, width, TILE_N, TILE_Q)


# --- Launch ---


def constants(config: Config, H: int, D: int, clean: bool) -> dict[str, int | bool | str]:
    """What both kernels end with."""
    return dict(
        H=H,
        D=D,
        CLEAN=clean,
        TILE_N=config.tile_n,
        TILE_Q=config.tile_q,
        HEAD_TILE=config.head_tile,
        D_TILE=config.d_tile,
        CHUNK=config.chunk,
        WIDEN=config.widen,
        STAGES=config.stages,
    )


def ragged_arguments(
    config: Config,
    *,
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    width: int,
    clean: bool,
) -> dict[str, Tensor | int | bool | str]:
    """ragged_kernel's arguments: q [S_q, H, D], k [S_kv, D] and the others as its comments say."""
    S_q, H, D = q.shape
    return dict(
        q_ptr=q,
        k_ptr=k,
        scale_ptr=k_scale,
        weight_ptr=weights,
        start_ptr=starts,
        end_ptr=ends,
        out_ptr=out,
        S_q=S_q,
        S_kv=width,
        **strides("q", "sh", q),
        **strides("k", "t", k),
        **strides("s", "t", k_scale),
        **strides("w", "sh", weights),
        stride_starts=starts.stride(0),
        stride_ends=ends.stride(0),
        **strides("o", "s", out),
        **constants(config, H, D, clean),
    )


def paged_arguments(
    config: Config,
    *,
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    block_table: Tensor,
    limits: Tensor,
    out: Tensor,
    width: int,
    clean: bool,
) -> dict[str, Tensor | int | bool | str]:
    """paged_kernel's arguments: tensors as its comments say."""
    B, S_q, H, D = q.shape
    num_blocks, page = k.shape[:2]
    return dict(
        q_ptr=q,
        k_ptr=k,
        scale_ptr=k_scale,
        weight_ptr=weights,
        table_ptr=block_table,
        limit_ptr=limits,
        out_ptr=out,
        B=B,
        S_q=S_q,
        num_blocks=num_blocks,
        table_blocks=block_table.shape[1],
        width=width,
        **strides("q", "bsh", q),
        **strides("k", "nt", k),
        **strides("s", "nt", k_scale),
        **strides("w", "bsh", weights),
        **strides("t", "b", block_table),
        **strides("l", "bs", limits),
        **strides("o", "bs", out),
        PAGE=page,
        IDS=power_of_2(-(-config.chunk // page) + (config.chunk % page > 0)),
        **constants(config, H, D, clean),
    )


def grid(config: Config, B: int, S_q: int, width: int) -> tuple[int, int, int]:
    """(query tiles * B * key chunks, 1, 1): the only dim of a grid that reaches beyond 65535."""
    return -(-S_q // config.tile_q) * B * -(-width // config.chunk), 1, 1
