"""Prefill: P query tokens a request over contiguous or paged K and V, out = softmax(q k^T * scale + mask) v.

Grid: (B * Hq * query tiles), the query tiles of a head running fastest and from the last one back: under causality the
last is the longest, and starting it first shortens the tail. A program walks the key tiles that its rows can see. Tiles
that every row sees whole run without any test; the rest, and every tile under a mask or a block mask, test each score.

A block mask is not tested in the loop: `compact_kernel` writes, once, a list of the kept 64-token blocks of every
(request, head, block row), cut by length and causality, and a program walks that list. So a False block costs neither a
load nor a product, and the loop keeps its pipeline.

Bound: FLOPs, 2 * P * S_kv * (D + Dv) a head, half of that when causal. At D 128 a tile of 128 x 64 does 64 FLOP a byte
of K and V, and L2 serves what the heads' programs share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import LN2, LOG2E, attend, normalise, sink_factor, widen
from flash_mla.kernels.triton.share import BLOCK, block_id, slot
from flash_mla.kernels.triton.strides import row_stride, strides
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import cut_columns, mask_kind, power_of_2, precision, smem_bytes, widening

# --- Config ---


@dataclass(frozen=True)
class Config:
    """Tiles of one prefill problem on one target; the fields are decode.Config's."""

    tile_m: int
    tile_n: int
    d_main: int
    d_rest: int
    dv_tile: int
    reuse: bool
    widen: str
    precision: str
    warps: int
    stages: int


def config(
    *, P: int, D: int, Dv: int, paged: bool, alias: bool, mask: int, block_mask: bool, itemsize: int, target: Target
) -> Config:
    """The tiles for these dims: pure arithmetic, no device. mask: bytes of an element (tiles.MASK_BYTES)."""
    columns = cut_columns(D, Dv, alias, itemsize, target)
    dv_tile = columns.dv_tile

    # rows: as many as the accumulator's registers allow, 256 a thread at 8 warps being the whole file
    tile_m = 128 if dv_tile <= 256 else 64
    if itemsize == 4 or (dv_tile > 256 and not target.wgmma):
        tile_m = 32
    if block_mask:
        tile_m = min(tile_m, 64)  # one row of the block mask: a block that only a neighbour keeps is not computed
    most_m = min(tile_m, max(16, power_of_2(P)))

    def fits(tile_m: int, stages: int, tile_n: int) -> bool:
        in_place = target.in_place and tile_m >= 64 and itemsize < 4
        return smem_bytes(tile_m, tile_n, *columns.loaded, itemsize, stages, in_place, mask) <= target.smem

    # 128 keys a tile on Hopper at D 128: 435 TFLOP/s causal on the H200 against 386 at 64; a page has 64
    plain = (columns.d_main, columns.d_rest, dv_tile) == (128, 0, 128) and not (paged or mask or block_mask)
    wide = ((3, 128),) if target.wgmma and most_m >= 64 and itemsize < 4 and plain else ()
    tries = [(most_m, *tiles) for tiles in (*wide, (3, 64), (2, 64), (3, 32), (2, 32), (2, 16))]
    tries += [(m, *tiles) for m in (64, 32, 16) if m < most_m for tiles in ((3, 32), (2, 32), (2, 16), (1, 16))]
    found = next((tiles for tiles in tries if fits(*tiles)), None)
    tile_m, stages, tile_n = found or (16, 1, 16)
    products = precision(itemsize, target) if found else "ieee"  # see decode.config
    warps = 8 if tile_m * dv_tile > 64 * 128 or (target.wgmma and tile_m == 128) else 4
    return Config(
        tile_m, tile_n, *columns, widening(itemsize, target), products, warps, stages,
    )  # fmt: skip


# --- Steps ---


@triton.jit
def key_end(seq_lens_ptr, b, S_kv):
    """Keys that request b has: seq_lens[b], no more than the cache or K holds; clamped before it is narrowed."""
    if seq_lens_ptr is not None:
        return tl.maximum(tl.minimum(tl.load(seq_lens_ptr + b), S_kv), 0).to(tl.int32)
    else:
        return S_kv


@triton.jit
def first_position(start_pos_ptr, b, S_kv):
    """Position of request b's first query, inside the cache."""
    if start_pos_ptr is not None:
        return tl.maximum(tl.minimum(tl.load(start_pos_ptr + b), S_kv), 0).to(tl.int32)
    else:
        return 0


@triton.jit
def tile_rows(base, t, offs_n, table_row_ptr, stride_n, STRIDE_T: tl.constexpr, Nblk):
    """Pointers to the rows of tokens t + offs_n, which lie in one block."""
    if table_row_ptr is not None:
        first = block_id(table_row_ptr, t, Nblk) * stride_n + slot(t) * STRIDE_T
    else:
        first = tl.cast(t, tl.int64) * STRIDE_T
    return base + first + offs_n * STRIDE_T


# --- Kernels ---


@triton.jit
def compact_kernel(
    block_mask_ptr,  # [B or 1, Hq or 1, ceil(P / 64), ceil(S_kv / 64)] bool
    seq_lens_ptr,  # [B]
    start_pos_ptr,  # [B]
    kept_ptr,  # [B, H, block rows, block columns] int32: column of the i-th kept block
    num_kept_ptr,  # [B, H, block rows] int32
    H,
    block_rows,
    block_columns,
    P,
    S_kv,
    stride_b, stride_h, stride_m, stride_n,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """List the kept blocks of one block row. Grid: (block rows * B, H)."""
    block_row = tl.program_id(0) % block_rows
    h = tl.program_id(1)
    b = tl.program_id(0) // block_rows
    # keys that any row of this block row can see
    end = key_end(seq_lens_ptr, b, S_kv)
    if CAUSAL:
        last_row = tl.minimum((block_row + 1) * BLOCK, P) - 1
        end = tl.minimum(end, first_position(start_pos_ptr, b, S_kv) + last_row + 1)
    flags = block_mask_ptr + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + block_row.to(tl.int64) * stride_m)
    row = (b.to(tl.int64) * H + h) * block_rows + block_row
    count = 0
    for first in tl.range(0, block_columns, TILE, num_stages=1):
        column = first + tl.arange(0, TILE)
        inside = (column < block_columns) & (column * BLOCK < end)
        keep = tl.load(flags + column.to(tl.int64) * stride_n, mask=inside, other=0).to(tl.int32)
        position = count + tl.cumsum(keep, 0) - 1
        tl.store(kept_ptr + row * block_columns + position, column, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.store(num_kept_ptr + row, count)


@triton.jit
def prefill_kernel(
    q_ptr,  # [B, Hq, P, D]
    k_ptr,  # [B, Hk, S_kv, D] or [B, Hk, Nblk, 64, D]
    v_ptr,  # [B, Hk, S_kv, Dv] or [B, Hk, Nblk, 64, Dv]
    table_ptr,  # [B, table_blocks]
    seq_lens_ptr,  # [B]
    start_pos_ptr,  # [B]
    mask_ptr,  # [B, Hq, P, S_kv]
    kept_ptr,  # [B or 1, Hq or 1, ceil(P / 64), block_columns]
    num_kept_ptr,  # [B or 1, Hq or 1, ceil(P / 64)]
    q_descale_ptr,  # [B, Hk]
    k_descale_ptr,  # [B, Hk]
    v_descale_ptr,  # [B, Hk]
    sink_ptr,  # [Hq]
    out_ptr,  # [B, Hq, P, Dv] contiguous
    lse_ptr,  # [B, Hq, P] contiguous
    softmax_scale,  # its magnitude; FLIP has its sign
    Hq,
    P,
    S_kv,
    Nblk,
    mask_len,
    block_columns,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_tb,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_lb, stride_lh,  # of num_kept; 0 where the list is shared
    stride_qdb, stride_qdh, stride_kdb, stride_kdh, stride_vdb, stride_vdh,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_KT: tl.constexpr,  # a constant, so that a tile's rows are immediate offsets from one address
    STRIDE_VT: tl.constexpr,
    FLIP: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool", "float"
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    DV_TILE: tl.constexpr,
    REUSE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m_tiles = (P + TILE_M - 1) // TILE_M
    m_tile = m_tiles - 1 - tl.program_id(0) % m_tiles
    head = tl.program_id(0) // m_tiles % Hq
    b = tl.program_id(0) // m_tiles // Hq
    kv_head = head // RATIO
    b64 = b.to(tl.int64)
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)  # [TILE_M]
    row_live = rows < P
    offs_n = tl.arange(0, TILE_N)
    offs_d = tl.arange(0, D_MAIN)
    offs_r = D_MAIN + tl.arange(0, max(D_REST, 1))
    offs_v = tl.arange(0, DV_TILE)

    # the scale of the scores
    scale = softmax_scale * LOG2E
    if q_descale_ptr is not None:
        scale *= tl.load(q_descale_ptr + b64 * stride_qdb + kv_head * stride_qdh)
    if k_descale_ptr is not None:
        scale *= tl.load(k_descale_ptr + b64 * stride_kdb + kv_head * stride_kdh)
    scale = tl.maximum(scale, 1e-30)  # at 0, -inf * scale would be NaN

    # load q
    q_tile = q_ptr + (b64 * stride_qb + head.to(tl.int64) * stride_qh) + (rows.to(tl.int64) * stride_qs)[:, None]
    q = widen(tl.load(q_tile + offs_d[None, :], mask=row_live[:, None] & (offs_d < D)[None, :], other=0.0), WIDEN)
    if D_REST > 0:
        r_live = row_live[:, None] & (offs_r < D)[None, :]
        q_rest = widen(tl.load(q_tile + offs_r[None, :], mask=r_live, other=0.0), WIDEN)
    else:
        q_rest = q

    k_head = k_ptr + (b64 * stride_kb + kv_head.to(tl.int64) * stride_kh)
    v_head = v_ptr + (b64 * stride_vb + kv_head.to(tl.int64) * stride_vh)
    table_row = table_ptr
    if table_ptr is not None:
        table_row = table_ptr + b64 * stride_tb
    mask_rows = mask_ptr
    if MASK != "none":
        mask_rows = mask_ptr + (b64 * stride_mb + head.to(tl.int64) * stride_mh) + rows.to(tl.int64) * stride_ms

    # the keys that some row sees, [0, end), and that every row sees, [0, whole)
    end = key_end(seq_lens_ptr, b, S_kv)
    limit = tl.zeros([TILE_M], tl.int32) + end
    whole = end
    if CAUSAL:
        start = first_position(start_pos_ptr, b, S_kv)
        limit = tl.minimum(limit, start + rows + 1)
        whole = tl.minimum(end, start + m_tile * TILE_M + 1)
        end = tl.minimum(end, start + tl.minimum((m_tile + 1) * TILE_M, P))

    acc = tl.zeros([TILE_M, DV_TILE], tl.float32)
    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)

    if kept_ptr is not None:
        # the list of kept blocks
        listed = b64 * stride_lb + head.to(tl.int64) * stride_lh + m_tile * TILE_M // BLOCK
        kept = kept_ptr + listed * block_columns
        PARTS: tl.constexpr = 64 // TILE_N
        tiles = tl.load(num_kept_ptr + listed) * PARTS
        for i in tl.range(0, tiles):
            t = tl.load(kept + i // PARTS) * BLOCK + i % PARTS * TILE_N
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q, q_rest, scale,
                k_rows=tile_rows(k_head, t, offs_n, table_row, stride_kn, STRIDE_KT, Nblk),
                v_rows=tile_rows(v_head, t, offs_n, table_row, stride_vn, STRIDE_VT, Nblk),
                tokens=t + offs_n, end=end, limit=limit, mask_rows=mask_rows, mask_len=mask_len,
                stride_mt=stride_mt, row_live=row_live, offs_d=offs_d, offs_r=offs_r, offs_v=offs_v, D=D, DV=DV,
                MASK=MASK, TEST=True, D_REST=D_REST, REUSE=REUSE, FLIP=FLIP, WIDEN=WIDEN, PRECISION=PRECISION,
            )  # fmt: skip
    else:
        if MASK == "none":
            whole = whole // TILE_N * TILE_N
            for t in tl.range(0, whole, TILE_N):
                acc, row_max, row_sum = attend(
                    acc, row_max, row_sum, q, q_rest, scale,
                    k_rows=tile_rows(k_head, t, offs_n, table_row, stride_kn, STRIDE_KT, Nblk),
                    v_rows=tile_rows(v_head, t, offs_n, table_row, stride_vn, STRIDE_VT, Nblk),
                    tokens=t + offs_n, end=end, limit=limit, mask_rows=mask_rows, mask_len=mask_len,
                    stride_mt=stride_mt, row_live=row_live, offs_d=offs_d, offs_r=offs_r, offs_v=offs_v, D=D, DV=DV,
                    MASK=MASK, TEST=False, D_REST=D_REST, REUSE=REUSE, FLIP=FLIP, WIDEN=WIDEN, PRECISION=PRECISION,
                )  # fmt: skip
        else:
            whole = 0
        for t in tl.range(whole, end, TILE_N):
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q, q_rest, scale,
                k_rows=tile_rows(k_head, t, offs_n, table_row, stride_kn, STRIDE_KT, Nblk),
                v_rows=tile_rows(v_head, t, offs_n, table_row, stride_vn, STRIDE_VT, Nblk),
                tokens=t + offs_n, end=end, limit=limit, mask_rows=mask_rows, mask_len=mask_len,
                stride_mt=stride_mt, row_live=row_live, offs_d=offs_d, offs_r=offs_r, offs_v=offs_v, D=D, DV=DV,
                MASK=MASK, TEST=True, D_REST=D_REST, REUSE=REUSE, FLIP=FLIP, WIDEN=WIDEN, PRECISION=PRECISION,
            )  # fmt: skip

    # write
    out, lse2 = normalise(acc, row_max, row_sum)
    if v_descale_ptr is not None:
        out *= tl.load(v_descale_ptr + b64 * stride_vdb + kv_head * stride_vdh)
    if sink_ptr is not None:
        out *= sink_factor(lse2, tl.load(sink_ptr + head))[:, None]
    out_row = (b64 * Hq + head) * P + rows  # [TILE_M]
    out_tile = out_ptr + out_row[:, None] * DV + offs_v[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=row_live[:, None] & (offs_v < DV)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + out_row, lse2 * LN2, mask=row_live)


# --- Launch ---

COMPACT_TILE = 256
"""Blocks of a row that compact_kernel takes a step: 16384 keys."""


def compact(
    block_mask: Tensor,
    *,
    P: int,
    S_kv: int,
    causal: bool,
    seq_lens: Tensor | None,
    start_pos: Tensor | None,
    kernel: triton.JITFunction = compact_kernel,
    dim: int = 2,
) -> tuple[Tensor, Tensor]:
    """(kept, num_kept) of block_mask [B, Hq, block rows, block columns]; [B or 1, Hq or 1, ...] int32.

    A list is written once for all heads, or all requests, that share the mask (stride 0) and have the same limits.
    There is one for each block row (dim 2), or by backward.columns_kernel for each block column (dim 3).
    """
    B, Hq, block_rows, block_columns = block_mask.shape
    shared = block_mask.stride(0) == 0 and seq_lens is None and start_pos is None
    lists = 1 if shared else B, 1 if block_mask.stride(1) == 0 else Hq
    num_kept = torch.empty((*lists, block_mask.shape[dim]), dtype=torch.int32, device=block_mask.device)
    kept = torch.empty((*num_kept.shape, block_mask.shape[5 - dim]), dtype=torch.int32, device=block_mask.device)
    kernel[(block_mask.shape[dim] * lists[0], lists[1])](
        block_mask_ptr=block_mask, seq_lens_ptr=seq_lens, start_pos_ptr=start_pos, kept_ptr=kept,
        num_kept_ptr=num_kept, H=lists[1], block_rows=block_rows, block_columns=block_columns, P=P, S_kv=S_kv,
        **strides("", "bhmn", block_mask), CAUSAL=causal, TILE=COMPACT_TILE,
    )  # fmt: skip
    return kept, num_kept


def grid(config: Config, B: int, Hq: int, P: int) -> tuple[int, int, int]:
    """(B * Hq * query tiles, 1, 1)."""
    return B * Hq * -(-P // config.tile_m), 1, 1


def arguments(
    config: Config,
    *,
    S_kv: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    start_pos: Tensor | None,
    mask: Tensor | None,
    kept: Tensor | None,
    num_kept: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    attn_sink: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor | None,
    causal: bool,
) -> dict[str, Tensor | float | int | bool | str | None]:
    """prefill_kernel's arguments."""
    _, Hq, P, D = q.shape
    paged = block_table is not None
    # one list serves all requests, or all heads
    lists = (0, 0) if num_kept is None else [num_kept.stride(i) if num_kept.shape[i] > 1 else 0 for i in (0, 1)]
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, table_ptr=block_table, seq_lens_ptr=seq_lens, start_pos_ptr=start_pos,
        mask_ptr=mask, kept_ptr=kept, num_kept_ptr=num_kept, q_descale_ptr=q_descale, k_descale_ptr=k_descale,
        v_descale_ptr=v_descale, sink_ptr=attn_sink, out_ptr=out, lse_ptr=lse, softmax_scale=abs(softmax_scale),
        Hq=Hq, P=P, S_kv=S_kv, Nblk=k.shape[2] if paged else 0, mask_len=0 if mask is None else mask.shape[3],
        block_columns=0 if kept is None else kept.shape[3], **strides("q", "bhs", q), **strides("k", "bh", k),
        **strides("v", "bh", v), stride_kn=k.stride(2) if paged else 0, stride_vn=v.stride(2) if paged else 0,
        **strides("t", "b", block_table), **strides("m", "bhst", mask), stride_lb=lists[0], stride_lh=lists[1],
        **strides("qd", "bh", q_descale), **strides("kd", "bh", k_descale), **strides("vd", "bh", v_descale),
        RATIO=Hq // k.shape[1], D=D, DV=v.shape[-1], STRIDE_KT=row_stride(k), STRIDE_VT=row_stride(v),
        FLIP=softmax_scale < 0, CAUSAL=causal, MASK=mask_kind(mask), TILE_M=config.tile_m, TILE_N=config.tile_n,
        D_MAIN=config.d_main, D_REST=config.d_rest, DV_TILE=config.dv_tile, REUSE=config.reuse, WIDEN=config.widen,
        PRECISION=config.precision,
    )  # fmt: skip
