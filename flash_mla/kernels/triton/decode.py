"""Decode: S_q query tokens a request over its paged cache, out = softmax(q k^T * scale + mask) v.

Grid: (M tiles * programs). The S_q * ratio query rows that share a KV head are packed into M tiles; the M tiles of one
share run side by side, so that their reads of the same K meet in L2. With SPLIT, `programs` programs cut the line of
work units (see share.py) into equal shares whatever the lengths; a program walks the items of its share, writes an item
that it holds whole straight to `out`, and any other as a partial result in FP32 (`combine.py`): an item that began
before the share in slot 2 * program, one that runs past its end in slot 2 * program + 1 (its slot 2 * program if it is
also the program's first). Without SPLIT a program is one item; with PIECES a piece of one (see share.py), whose slot
has the program's number.

Bound: bytes of K and V, B * S * (D + Dv) * Hk * itemsize, of which MLA's alias reads only D: V is the first Dv columns
of the K tile that is already on the chip. At 16 rows a KV byte of BF16 meets about 32 FLOP, far below the GPU's ratio;
at 64 and more rows the tensor cores decide.

NOTE: a block id is clamped to the cache before it is used and a length to its table row, so that no value in either
makes a read outside the cache; K and V rows past the length are loaded as 0, never read, so that NaN there has no path
to the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import LOG2E, attend, high_low, normalise, power_of, twice, widen
from flash_mla.kernels.triton.item import store_item
from flash_mla.kernels.triton.share import (
    BLOCK,
    MOST_PIECES,
    PIECE,
    VARYING,
    block_id,
    first_unit,
    pieces,
    request_length,
    slot,
    units,
)
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import cut_columns, mask_kind, power_of_2, precision, smem_bytes, widening

# --- Config ---


@dataclass(frozen=True)
class Config:
    """Tiles of one decode problem on one target.

    tile_m query rows by tile_n tokens, which divide 64 and are in one page or in whole ones; d_main + d_rest columns of
    K, dv_tile of V; reuse says V is taken from the K tile; programs is 0 where every item is one program; pdl lets the
    combine start before decode has ended (programmatic dependent launch, NVIDIA from sm_90); pieces: of an item in a
    batch-invariant call, 0 in others; latent: the kernel is decode_latent.py's; e4m3: scores are products of e4m3.
    """

    tile_m: int
    tile_n: int
    d_main: int
    d_rest: int
    dv_tile: int
    reuse: bool
    widen: str
    precision: str
    programs: int
    pdl: bool
    warps: int
    stages: int
    pieces: int = 0
    latent: bool = False
    e4m3: bool = False


PIPELINED = ((4, 64), (3, 64), (4, 32), (3, 32), (4, 16), (3, 16))
"""(stages, tile_n) that load a tile while another is computed, best first."""
WIDEST = ((4, 64), (3, 64), (2, 64), (3, 32), (2, 32), (2, 16), (1, 16))


def config(
    *,
    B: int,
    Hq: int,
    Hk: int,
    S_q: int,
    D: int,
    Dv: int,
    capacity: int,
    alias: bool,
    mask: int,
    itemsize: int,
    target: Target,
    batch_invariant: bool = False,
    latent: bool = False,
) -> Config:
    """The tiles for these dims: pure arithmetic, no device.

    Args:
        capacity: tokens that a row of the table covers.
        mask: bytes of an element (tiles.MASK_BYTES).
        itemsize: bytes of an element of K; q's may be 2 where it is 1.
        batch_invariant: the tiles are then the same for every B and capacity, as they are otherwise too.
        latent: K is an FP8 latent whose rows Hopper's copies can bring.
    """
    rows = S_q * (Hq // Hk)
    columns = cut_columns(D, Dv, alias, itemsize, target)

    # 64 rows fill Hopper's matrix instruction; elsewhere the accumulator's registers set the limit
    most_m = min(64 if target.wgmma and itemsize < 4 else 32, max(16, power_of_2(rows)))

    def smem(tile_m: int, stages: int, tile_n: int) -> int:
        wgmma = target.wgmma and tile_m == 64
        return smem_bytes(tile_m, tile_n, *columns.loaded, itemsize, stages, wgmma, mask)

    # 64 rows: the widest instruction first (H200, MLA of 128 heads: 214 TFLOP/s at 64 keys, 196 at 32). Fewer: two
    # programs an SM hide each other's waits (16 heads: 83 % of copy bandwidth against 80 with one); where not even
    # small tiles fit twice, one program with the largest that fits
    half = target.smem // 2 - 1024
    tries: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [(64, target.smem, WIDEST)]
    # NOTE: 32 rows of 576 in FP16 do not fit beside FP8 on its way to FP16 in registers: two tiles of 16 rows take 0.42
    # ms where one of 32 took 5.0 (H200, 128 requests of 4096 tokens, 16 heads, two tokens)
    for m in (16,) if itemsize == 1 and columns.d_main > 256 else (32, 16):
        tries += [(m, half, PIPELINED), (m, target.smem, PIPELINED + WIDEST)]
    fits = (
        (m, *tiles)
        for m, budget, candidates in tries
        for tiles in candidates
        if m <= most_m and smem(m, *tiles) <= budget
    )
    found = next(fits, None)
    tile_m, stages, tile_n = found or (16, *WIDEST[-1])
    # NOTE: three TF32 products keep q and a tile of K twice, in registers: with rows of 576 that is 5 to 10 KB of stack
    # a thread. Exact products by 8 warps spill nothing: 58 us against 231 (H200, 4 requests of 448 tokens, 8 heads)
    wide = target.backend == "cuda" and itemsize == 4 and columns.d_main > 256
    products = "ieee" if wide or not found else precision(itemsize, target)
    warps = 8 if wide or tile_m * columns.dv_tile > 32 * 256 else 4
    per_sm = max(1, min(2, target.smem // smem(tile_m, stages, tile_n)))
    few, e4m3 = latent and rows <= 32, latent and rows > 32
    if few:
        tile_m, tile_n, stages, warps, per_sm = max(16, power_of_2(rows)), 64, 2, 4, 2
    elif e4m3:
        held = e4m3_bytes(columns.d_main, columns.d_rest, columns.dv_tile, 3, mask)
        tile_m, tile_n, stages, warps, per_sm = 64, 64, 3 if held <= target.smem else 2, 8, 1

    # cut requests unless there are so many items that the last one's length does not matter
    programs = max(1, target.multiprocessors * per_sm // -(-rows // tile_m))
    blocks = -(-capacity // 64)
    if blocks == 1 or B * Hk >= programs * blocks:
        programs = 0
    most_pieces = pieces(capacity) if batch_invariant else 0
    if batch_invariant:
        programs = B * Hk * most_pieces
    # an early combine saves 7 us of 23 where decode leaves SMs idle (H200, one request of 1024 tokens), and costs 37 us
    # of 73 where it does not (32768 tokens): the combine's programs then take decode's place
    idle = B * Hk * blocks <= target.multiprocessors
    pdl = target.backend == "cuda" and target.arch >= 90 and idle
    return Config(
        tile_m, tile_n, *columns, widening(itemsize, target, once=True), products, programs, pdl, warps, stages,
        most_pieces, few, e4m3,
    )  # fmt: skip


def e4m3_bytes(d_main: int, d_rest: int, dv_tile: int, stages: int, mask: int) -> int:
    """`tiles.smem_bytes` where scores are products of e4m3, 64 x 64: two terms of q, and V and the probabilities in
    FP16, beside K as it is copied (220 KiB with 3 stages)."""
    d = d_main + d_rest
    return 64 * ((stages - 1) * d + d_rest + 2 * (dv_tile + 64) + 2 * d) + stages * 64 * 64 * mask


# --- Kernel ---


@triton.jit(do_not_specialize_on_alignment=VARYING)
def decode_kernel(
    q_ptr,  # [B, Hq, S_q, D]
    k_ptr,  # [B, Hk, Nblk, PAGE, D]; D_MAIN columns where rope_ptr has the rest
    v_ptr,  # [B, Hk, Nblk, PAGE, Dv]
    rope_ptr,  # [B, Hk, Nblk, PAGE, D - D_MAIN], or None: K's rows are whole
    table_ptr,  # [B, ceil(capacity / PAGE)]
    seq_lens_ptr,  # [B]
    mask_ptr,  # [B, Hq, S_q, L]
    q_descale_ptr,  # [B, Hk]
    k_descale_ptr,  # [B, Hk]
    v_descale_ptr,  # [B, Hk]
    sink_ptr,  # [Hq]
    out_ptr,  # [B, Hq, S_q, Dv], last dim contiguous
    lse_ptr,  # [B, Hq, S_q] contiguous
    partial_ptr,  # see combine.py; rows m_tiles * TILE_M
    softmax_scale,  # its magnitude; FLIP has its sign
    B, Hk, Nblk, capacity, mask_len,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn,
    stride_ob, stride_oh, stride_os,
    stride_tb,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_qdb, stride_qdh, stride_kdb, stride_kdh, stride_vdb, stride_vdh,
    S_Q: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_KT: tl.constexpr,  # a constant, so that a tile's rows are immediate offsets from one address
    STRIDE_VT: tl.constexpr,
    STRIDE_RT: tl.constexpr,
    PAGE: tl.constexpr,
    FLIP: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool", "float"
    TAIL: tl.constexpr,  # its first column is the first of the S_Q newest tokens
    SPLIT: tl.constexpr,
    PIECE: tl.constexpr,  # units of a piece at least; 0: shares
    MOST_PIECES: tl.constexpr,
    PDL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    DV_TILE: tl.constexpr,
    REUSE: tl.constexpr,
    WIDEN: tl.constexpr,
    WIDEN_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    E4M3: tl.constexpr,  # as in attend
):  # fmt: skip
    M_TILES: tl.constexpr = (S_Q * RATIO + TILE_M - 1) // TILE_M
    m_tile = tl.program_id(0) % M_TILES
    program = tl.program_id(0) // M_TILES
    programs = tl.num_programs(0) // M_TILES
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)  # [TILE_M] row = query * RATIO + head of the group
    row_live = rows < S_Q * RATIO
    query = rows // RATIO
    offs_n = tl.arange(0, TILE_N)
    offs_d = tl.arange(0, D_MAIN)
    offs_r = D_MAIN + tl.arange(0, max(D_REST, 1))
    offs_v = tl.arange(0, DV_TILE)

    if PDL:  # the combine may start: it waits for this kernel's end before it reads anything but lengths
        tl.extra.cuda.gdc_launch_dependents()

    b, request_start, share_start, end = first_unit(
        seq_lens_ptr, B, Hk, capacity, program, programs, SPLIT, PIECE, MOST_PIECES
    )
    unit = share_start
    while unit < end:
        # the item: KV head kv_head of request b, blocks [unit, stop) of [item_start, item_end)
        seq_len = request_length(seq_lens_ptr, b, capacity)
        size = units(seq_len)
        kv_head = (unit - request_start) // size
        item_start = request_start + kv_head * size
        item_end = item_start + size
        stop = tl.minimum(end, item_end)
        t_begin = (unit - item_start) * BLOCK
        t_end = tl.minimum((stop - item_start) * BLOCK, seq_len)
        b64 = b.to(tl.int64)
        head = kv_head * RATIO + rows % RATIO

        # the scale of the scores
        scale = softmax_scale * LOG2E
        if q_descale_ptr is not None:
            scale *= tl.load(q_descale_ptr + b64 * stride_qdb + kv_head * stride_qdh)
        if k_descale_ptr is not None:
            scale *= tl.load(k_descale_ptr + b64 * stride_kdb + kv_head * stride_kdh)
        scale = tl.maximum(scale, 1e-30)  # at 0, -inf * scale would be NaN

        # load q; in two terms, each row twice
        q_at = tl.arange(0, 2 * TILE_M if E4M3 else TILE_M)
        q_low = (q_at % 16 >= 8)[:, None]
        q_at = m_tile * TILE_M + (twice(q_at) if E4M3 else q_at)
        q_head = kv_head * RATIO + q_at % RATIO
        q_rows = b64 * stride_qb + q_head.to(tl.int64) * stride_qh + (q_at // RATIO).to(tl.int64) * stride_qs
        q_tile = q_ptr + q_rows[:, None]
        q_live = (q_at < S_Q * RATIO)[:, None]
        q = widen(tl.load(q_tile + offs_d[None, :], mask=q_live & (offs_d < D)[None, :], other=0.0), WIDEN_Q)
        q_rest = q
        if D_REST > 0:
            q_rest = tl.load(q_tile + offs_r[None, :], mask=q_live & (offs_r < D)[None, :], other=0.0)
            q_rest = widen(q_rest, WIDEN_Q)
        row_scale = None
        if E4M3:
            q, q_rest = q.to(tl.float32), q_rest.to(tl.float32)
            power = power_of(tl.maximum(tl.max(tl.abs(q), 1), tl.max(tl.abs(q_rest), 1)), 7)
            inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)[:, None]
            row_scale = tl.max(tl.reshape(power, (TILE_M // 8, 2, 8)), 1)
            row_scale = tl.reshape(row_scale, (TILE_M,)).to(tl.float32, bitcast=True)
            q = high_low(q * inverse, q_low)
            q_rest = high_low(q_rest * inverse, q_low)

        k_head = k_ptr + (b64 * stride_kb + kv_head.to(tl.int64) * stride_kh)
        v_head = v_ptr + (b64 * stride_vb + kv_head.to(tl.int64) * stride_vh)
        if rope_ptr is not None:
            rope_head = rope_ptr + (b64 * stride_rb + kv_head.to(tl.int64) * stride_rh) - D_MAIN
        table_row = table_ptr + b64 * stride_tb
        mask_rows = mask_ptr
        if MASK != "none":
            mask_rows = mask_ptr + (b64 * stride_mb + head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_ms)
            limit = tl.zeros([TILE_M], tl.int32) + seq_len
        else:
            limit = seq_len - (S_Q - 1) + query  # causal: query i sees t <= seq_len - S_q + i

        acc = tl.zeros([TILE_M, DV_TILE], tl.float32)
        row_max = tl.full([TILE_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([TILE_M], tl.float32)

        # a tile's pages, one for all its tokens or one for each; read one tile ahead, so that nothing waits for them
        SPREAD: tl.constexpr = PAGE < TILE_N
        last = tl.maximum(t_end - 1, 0)
        ahead = tl.minimum(t_begin + offs_n, last) if SPREAD else t_begin
        page_next = block_id(table_row, ahead, Nblk, PAGE)
        for t in tl.range(t_begin, t_end, TILE_N):
            page = page_next
            ahead = tl.minimum(t + TILE_N + offs_n, last) if SPREAD else tl.minimum(t + TILE_N, last)
            page_next = block_id(table_row, ahead, Nblk, PAGE)
            first = slot(t + offs_n, PAGE) if SPREAD else slot(t, PAGE)
            along = 0 if SPREAD else offs_n
            rest_rows = None
            if rope_ptr is not None:
                rest_rows = rope_head + (page * stride_rn + first * STRIDE_RT) + along * STRIDE_RT
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q, q_rest, scale,
                k_rows=k_head + (page * stride_kn + first * STRIDE_KT) + along * STRIDE_KT,
                v_rows=v_head + (page * stride_vn + first * STRIDE_VT) + along * STRIDE_VT,
                tokens=t + offs_n, end=seq_len, limit=limit, mask_rows=mask_rows, mask_len=mask_len,
                stride_mt=stride_mt, row_live=row_live, offs_d=offs_d, offs_r=offs_r, offs_v=offs_v, D=D, DV=DV,
                MASK=MASK, TEST=True, D_REST=D_REST, REUSE=REUSE, FLIP=FLIP, WIDEN=WIDEN, PRECISION=PRECISION,
                rest_rows=rest_rows, TAIL=TAIL, mask_first=seq_len - S_Q, row_scale=row_scale, E4M3=E4M3,
            )  # fmt: skip

        # write the item, or this share's part of it
        out, lse2 = normalise(acc, row_max, row_sum)
        if v_descale_ptr is not None:
            out *= tl.load(v_descale_ptr + b64 * stride_vdb + kv_head * stride_vdh)
        store_item(
            out, row_max, row_sum, lse2, rows, row_live, head, query, b64, program, programs,
            part=(unit > share_start).to(tl.int32), cut=(unit > item_start) | (stop < item_end),
            partial_ptr=partial_ptr, sink_ptr=sink_ptr, out_ptr=out_ptr, lse_ptr=lse_ptr, heads=Hk * RATIO,
            stride_ob=stride_ob, stride_oh=stride_oh, stride_os=stride_os, S_Q=S_Q, DV=DV, SPLIT=SPLIT, PIECE=PIECE,
            PARTIAL_ROWS=M_TILES * TILE_M, DV_TILE=DV_TILE, COLUMNS=DV_TILE,
        )  # fmt: skip

        # on to the next head, or request
        unit = stop
        if unit == request_start + size * Hk:
            request_start = unit
            b += 1


# --- Launch ---


def grid(config: Config, rows: int, items: int) -> tuple[int, int, int]:
    """(M tiles * programs, 1, 1) for S_q * ratio rows and B * Hk items: no other dim of a grid reaches beyond 65535."""
    return -(-rows // config.tile_m) * (config.programs or items), 1, 1


def partial_numel(config: Config, rows: int) -> int:
    """FP32 elements of the workspace: two slots a program (a piece: one), each a row, its maximum and its sum."""
    slots = config.programs * (1 if config.pieces else 2)
    return slots * -(-rows // config.tile_m) * config.tile_m * (config.dv_tile + 2)


def same_constants(
    config: Config,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rope: Tensor | None,
    block_table: Tensor,
    mask: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    out: Tensor,
    flip: bool,
    tail: bool,
) -> dict[str, int | bool | str]:
    """The arguments after softmax_scale that decode_kernel and decode_latent_kernel have in common."""
    B, Hq, S_q, _ = q.shape
    _, Hk, Nblk, page, Dv = v.shape
    return dict(
        B=B, Hk=Hk, Nblk=Nblk, capacity=block_table.shape[1] * page, mask_len=0 if mask is None else mask.shape[3],
        **strides("q", "bhs", q), **strides("k", "bhn", k), **strides("r", "bhn", k_rope),
        **strides("o", "bhs", out), **strides("t", "b", block_table), **strides("m", "bhst", mask),
        **strides("qd", "bh", q_descale), **strides("kd", "bh", k_descale), **strides("vd", "bh", v_descale),
        S_Q=S_q, RATIO=Hq // Hk, DV=Dv, STRIDE_KT=k.stride(3), STRIDE_RT=0 if k_rope is None else k_rope.stride(3),
        PAGE=page, FLIP=flip, MASK=mask_kind(mask), TAIL=tail, SPLIT=config.programs > 0,
        PIECE=PIECE if config.pieces else 0, MOST_PIECES=MOST_PIECES, PDL=config.pdl, TILE_M=config.tile_m,
        TILE_N=config.tile_n, WIDEN=config.widen,
    )  # fmt: skip


def constants(config: Config, *, q: Tensor, v: Tensor, **others: Any) -> dict[str, int | bool | str]:
    """decode_kernel's arguments after softmax_scale: all that one problem fixes, of `same_constants`' arguments."""
    return dict(
        **same_constants(config, q=q, v=v, **others), **strides("v", "bhn", v), D=q.shape[3], STRIDE_VT=v.stride(3),
        D_MAIN=config.d_main, D_REST=config.d_rest, DV_TILE=config.dv_tile, REUSE=config.reuse,
        WIDEN_Q=config.widen if q.element_size() == 1 and not config.e4m3 else "", PRECISION=config.precision,
        E4M3=config.e4m3,
    )  # fmt: skip
