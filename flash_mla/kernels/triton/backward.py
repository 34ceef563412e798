"""The backward of prefill: dq, dk and dv of contiguous K and V, from the saved lse (Dao 2023, FlashAttention-2).

With p = exp2(s - lse2) and s the scores in base 2, f what a sink leaves of a row and g the row's shift:

    dv = (f p)^T dout      ds = p (f dout v^T - g)      g = f rowsum(out dout) - dlse
    dq = scale ds k        dk = scale ds^T q

Three kernels, one after another (this file, backward_keys.py, backward_queries.py), none of which adds to what another
program writes: no atomics, the same bits always. `prepare_kernel` (grid: row tiles * B, Hq) reads out and dout once and
writes lse2, g, f. It finds the last row of each head that has a gradient too: the others read no row past it, so padded
queries cost nothing, and may hold NaN. `keys_kernel` (grid: B * Hk * key tiles) keeps dk and dv of a key tile in
registers and walks the query tiles that see it, of every head of the group. `queries_kernel` (grid: B * Hq * query
tiles, the longest first) keeps dq and walks keys. Both compute s and dout v^T, so that the whole is 7 products where
one kernel with atomics would do 5.

A block mask is walked by lists, as in prefill.py: of the kept columns of a block row, and (`columns_kernel`) of the
kept rows of a block column. A False block costs nothing in either.

Bound: FLOPs, 2 * P * S_kv * (4 D + 3 Dv) a head, half of that when causal. Measured beside cuDNN in
docs/design/backward.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from flash_mla.kernels.triton.attend import LOG2E, bias, sink_factor
from flash_mla.kernels.triton.prefill import first_position, key_end
from flash_mla.kernels.triton.share import BLOCK
from flash_mla.kernels.triton.target import Target
from flash_mla.kernels.triton.tiles import head_tiles, least_rest, power_of_2, precision

# --- Config ---


@dataclass(frozen=True)
class Tiles:
    """tile_m queries by tile_n keys of one of the two kernels."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the two kernels, and what they share: d_main + d_rest columns of K, dv_tile of V."""

    keys: Tiles
    queries: Tiles
    d_main: int
    d_rest: int
    dv_tile: int
    precision: str


ACCUMULATOR = 2**15
"""FP32 elements of dk and dv, or of dq, that 8 warps keep: half of the register file."""
TILES = ((64, 64, 8), (32, 64, 8), (32, 32, 4), (16, 32, 4), (32, 16, 8), (16, 16, 8))
"""(rows of the operand that is walked, rows of the one that is kept, warps), best first where they fit. What is kept
bounds the accumulators: 64 rows of D + Dv = 512 columns are 128 registers a thread of 8 warps."""
WIDE = (64, 128, 8)
"""Before TILES where it fills half of ACCUMULATOR: with more it spills 792 bytes a thread on sm_100."""
HOPPER = ((64, 128, 8, 3, 128), (64, 128, 8, 2, 192), (64, 64, 4, 2, 256), (32, 128, 8, 2, 320))
"""Before both on Hopper: the same, stages, columns of the accumulators at most; with blocks or a bool mask, those of
one warpgroup. Each warpgroup then has 64 kept rows of its own; two share them in TILES. H200, 32 heads, 8192 tokens,
causal: dk and dv of 128/128 at 445 TFLOP/s beside 233 of (64, 64, 8, 3), of 192/128 at 344 beside 241; dq of 128
columns at 479 beside 385 in two stages, of 192 at 419 beside 230. With 25 % of the blocks, dk and dv of 128/128 take
1.49 ms beside 2.74 of (64, 64, 8, 3), dq 0.76 beside 1.52; with a bool mask, 4096 tokens, 1.97 beside 3.72 and 0.84
beside 1.00. What they spill, 224 bytes a thread at most, is mostly addresses, outside of the loops."""


def config(*, P: int, S_kv: int, D: int, Dv: int, mask: int, block_mask: bool, itemsize: int, target: Target) -> Config:
    """The tiles for these dims: pure arithmetic, no device. mask: bytes of an element (tiles.MASK_BYTES)."""
    d_main, d_rest = head_tiles(D, least_rest(target))
    d, dv_tile = d_main + d_rest, value_tile(Dv)
    plain = not mask and not block_mask

    def first(columns: int, length: int, walked: int) -> Tiles:
        """columns: of the accumulators; length, walked: rows there are to keep and to walk."""
        hopper = [x for x in HOPPER if columns <= x[4] and (plain or (x[2] == 4 and mask <= 1))]
        tries = [x[:4] for x in hopper] if itemsize < 4 and target.wgmma else []
        fitting = [x for x in TILES if x[1] * columns * 8 <= ACCUMULATOR * x[2]]
        if itemsize < 4 and not block_mask and WIDE[1] * columns * 2 <= ACCUMULATOR:
            fitting.insert(0, WIDE)
        tries += [(*tiles, stages) for tiles in fitting for stages in (3, 2, 1)]
        found = (*TILES[-1], 1)
        for move, keep, warps, stages in tries:
            small = keep > max(16, power_of_2(length)) or move > max(16, power_of_2(walked))
            if not small and smem_bytes(move, keep, d, dv_tile, itemsize, stages, mask, target) <= target.smem:
                found = (move, keep, warps, stages)
                break
        return Tiles(found[0], found[1], found[2], found[3])

    keys = first(d + dv_tile, S_kv, P)
    kept = first(d, P, S_kv)
    queries = Tiles(kept.tile_n, kept.tile_m, kept.warps, kept.stages)
    return Config(keys, queries, d_main, d_rest, dv_tile, precision(itemsize, target))


def value_tile(Dv: int) -> int:
    """Columns of a tile of V."""
    return max(power_of_2(Dv), 16)


def prepare_rows(Dv: int) -> int:
    """Rows of a tile of prepare_kernel."""
    return max(16, min(64, 8192 // value_tile(Dv)))


def smem_bytes(move: int, keep: int, d: int, dv: int, itemsize: int, stages: int, mask: int, target: Target) -> int:
    """The most that a kernel keeps in shared memory: the kept tiles, stages of the walked ones, p and ds, the mask.

    FP32's products take three of TF32: their operands lie there twice.
    """
    parts = 2 if itemsize == 4 else 1
    buffers = max(stages if target.in_place else stages - 1, 1)
    tiles = keep * (d + dv) * parts + move * (d + dv) * (buffers + parts - 1)
    return (tiles + 2 * parts * move * keep) * itemsize + stages * move * keep * mask


def smaller(config: Config) -> Config | None:
    """The next config to try where a device refuses this one: fewer stages, then fewer rows, of both kernels."""

    def less(tiles: Tiles) -> Tiles:
        if tiles.stages > 1:
            return replace(tiles, stages=tiles.stages - 1)
        if tiles.tile_m > 16 or tiles.tile_n > 16:
            return replace(tiles, tile_m=max(tiles.tile_m // 2, 16), tile_n=max(tiles.tile_n // 2, 16))
        return tiles

    instead = replace(config, keys=less(config.keys), queries=less(config.queries))
    if instead != config:
        return instead
    return replace(config, precision="ieee") if config.precision == "tf32x3" else None


# --- Steps ---


@triton.jit
def load_rows(rows, live, offs, WIDTH: tl.constexpr):
    """[rows, offs] at row pointers; 0 in rows that are not live and in columns past WIDTH."""
    return tl.load(rows[:, None] + offs[None, :], mask=live[:, None] & (offs < WIDTH)[None, :], other=0.0)


@triton.jit
def weigh(scores, scale, lse2, tokens, limit, mask_tile, seen, MASK: tl.constexpr, TEST: tl.constexpr):
    """p of a tile of products, in either orientation: lse2, tokens and limit broadcast. Without TEST nothing hides."""
    scores *= scale
    if TEST:
        keep = tokens < limit
        if MASK == "bool":
            keep = keep & (tl.load(mask_tile, mask=seen, other=0) != 0)
        if MASK == "float":
            scores += bias(tl.load(mask_tile, mask=seen, other=float("-inf")))
    p = tl.exp2(scores - lse2)
    if TEST:
        # hidden scores may be far above lse2, and exp2 of them infinite
        p = tl.where(keep, p, 0.0)
    return p


# --- Kernels ---


@triton.jit
def prepare_kernel(
    out_ptr,  # [B, Hq, P, DV]
    d_out_ptr,
    lse_ptr,  # [B, Hq, P]
    d_lse_ptr,
    sink_ptr,  # [Hq]
    lse2_ptr,  # [B, Hq, P], contiguous as what follows: base 2, +inf in a row without a key or a gradient
    shift_ptr,
    left_ptr,  # with a sink
    d_sink_ptr,  # with a sink: the row's share of its gradient
    live_ptr,  # [B, Hq, row tiles] int32: past the tile's last row that has a gradient, or 0
    P,
    stride_ob, stride_oh, stride_os,
    stride_db, stride_dh, stride_ds,
    stride_lb, stride_lh, stride_ls,
    stride_gb, stride_gh, stride_gs,
    DV: tl.constexpr,
    TILE_M: tl.constexpr,
    DV_TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(P, TILE_M)
    tile = tl.program_id(0) % tiles
    h = tl.program_id(1).to(tl.int64)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tile * TILE_M + tl.arange(0, TILE_M)
    row_live = rows < P
    rows64 = rows.to(tl.int64)
    offs_v = tl.arange(0, DV_TILE)
    out = load_rows(out_ptr + b * stride_ob + h * stride_oh + rows64 * stride_os, row_live, offs_v, DV)
    d_out = load_rows(d_out_ptr + b * stride_db + h * stride_dh + rows64 * stride_ds, row_live, offs_v, DV)
    lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + rows64 * stride_ls, mask=row_live, other=float("-inf"))
    d_lse = tl.zeros([TILE_M], tl.float32)
    if d_lse_ptr is not None:
        d_lse = tl.load(d_lse_ptr + b * stride_gb + h * stride_gh + rows64 * stride_gs, mask=row_live, other=0.0)
    # a row without keys has lse -inf, in sparse prefill +inf
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    empty = lse == float("-inf")
    d_lse = tl.where(empty, 0.0, d_lse)
    active = ((tl.max((d_out != 0.0).to(tl.int32), 1) > 0) | (d_lse != 0.0)) & (lse != float("-inf"))
    product = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    product = tl.where(active, product, 0.0)
    shift = product
    row = (b * tl.num_programs(1) + h) * P + rows
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + h)
        left = sink_factor(lse * LOG2E, sink)
        shift *= left
        tl.store(left_ptr + row, left, mask=row_live)
        # NOTE: what the sink takes, not 1 - left, of which little is right where that is little
        tl.store(d_sink_ptr + row, -sink_factor(sink * LOG2E, lse) * product, mask=row_live)
    tl.store(lse2_ptr + row, tl.where(active, lse * LOG2E, float("inf")), mask=row_live)
    tl.store(shift_ptr + row, shift - d_lse, mask=row_live)
    live = tl.max(tl.where(active, rows + 1, 0), 0)
    tl.store(live_ptr + (b * tl.num_programs(1) + h) * tiles + tile, live)


@triton.jit
def columns_kernel(
    block_mask_ptr,  # [B or 1, Hq or 1, block rows, block columns] bool
    seq_lens_ptr,  # [B]
    start_pos_ptr,  # [B]
    kept_ptr,  # [B, H, block columns, block rows] int32: row of the i-th kept block
    num_kept_ptr,  # [B, H, block columns] int32
    H,
    block_rows,
    block_columns,
    P,
    S_kv,
    stride_b, stride_h, stride_m, stride_n,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """prefill.compact_kernel along columns: the kept blocks of one block column. Grid: (block columns * B, H)."""
    column = tl.program_id(0) % block_columns
    h = tl.program_id(1)
    b = tl.program_id(0) // block_columns
    stored = column * BLOCK < key_end(seq_lens_ptr, b, S_kv)
    start = first_position(start_pos_ptr, b, S_kv)
    flags = block_mask_ptr + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + column.to(tl.int64) * stride_n)
    listed = (b.to(tl.int64) * H + h) * block_columns + column
    count = 0
    for first in tl.range(0, block_rows, TILE, num_stages=1):
        row = first + tl.arange(0, TILE)
        inside = (row < block_rows) & stored
        if CAUSAL:
            inside = inside & (start + tl.minimum((row + 1) * BLOCK, P) > column * BLOCK)
        keep = tl.load(flags + row.to(tl.int64) * stride_m, mask=inside, other=0).to(tl.int32)
        tl.store(kept_ptr + listed * block_rows + count + tl.cumsum(keep, 0) - 1, row, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.store(num_kept_ptr + listed, count)
