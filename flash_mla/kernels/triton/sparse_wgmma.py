"""Sparse attention on Hopper in Gluon, Triton with explicit layouts, copies and waits: sparse.py's mathematics.

Why beside sparse.py: there Triton gives both warpgroups the whole q k^T (its rule for chained dots), and issues the
next tile's gather only after the last product of this one. Here each warpgroup takes half of the scores' columns, and
the gather of tile i + 1 is under way while tile i is multiplied.

Grid: (head tiles, tokens, splits), as there. Eight warps without roles, for each key tile of 64:

    wait for the tile's rows       cp.async (BF16), or written by these warps (FP8)
    scores = q k^T                 wgmma m64n32k16, both operands in shared memory; 36 a warpgroup
    issue the next tile's rows     cp.async into the other buffer, or loads into registers
    softmax                        row maxima across the warpgroups through shared memory; p to shared memory in BF16
    acc += p v                     wgmma m64n256k16; meanwhile FP8's next tile is dequantised into the other buffer

Bound: 64 heads by 64 keys are 8.9 MFLOP, 2176 cycles of an SM's tensor cores; an instruction of q k^T takes 16 cycles
and reads 24 cycles' worth of shared memory, so 2750 at best. The rows, 72 KiB a tile, come from L2.

Shared memory: q 72 KiB, two tiles of 72 KiB, p 8 KiB. Takes D 576 (BF16: or 512), Dv 512 and one cache of evenly spaced
rows, in BF16 or fp8_ds_mla.

H200, 128 heads, topk 2048, commit c98d650: prefill 388 TFLOP/s at s_kv 131072, 412 at 8192 (FlashMLA 575 and 609 in
that run); FP8 decode 267 (351).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

try:
    from triton.experimental.gluon.language import thread_barrier
except ImportError:  # its name from Triton 3.9 on
    from triton.experimental.gluon.language import barrier as thread_barrier

TILE_M = gl.constexpr(64)
TILE_N = gl.constexpr(64)
MAIN = gl.constexpr(512)
REST = gl.constexpr(64)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)

MAIN_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
"""A warp takes a row of 512 columns in two instructions: one index, one address a row."""
REST_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
CODE_ROWS = gl.constexpr(gl.BlockedLayout([1, 1, 16], [1, 32, 1], [8, 1, 1], [2, 1, 0]))
"""[row, 16 codes, code]: 16 bytes a thread, which share one scale."""
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
HALVES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [], [64, 2]
    )
)
"""[TILE_M, 2], one number of a row from each warpgroup: a thread holds both for each of SCORES's rows that it holds."""
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def load_index(index_row, tile, count, rows, LAYOUT: gl.constexpr):
    """The tile's indices, -1 where none names a row."""
    offs = tile * TILE_N + gl.arange(0, TILE_N, layout=LAYOUT)
    index = gl.load(index_row + offs, mask=offs < count, other=-1).to(gl.int64)
    return gl.where((index >= 0) & (index < rows), index, -1)


@gluon.jit
def copy_rows(tile, rows_ptr, row_stride, index, FIRST: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Start to copy columns FIRST .. FIRST + WIDTH of the rows to shared memory; zeros for rows that no index names."""
    cols = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    live = gl.expand_dims(index >= 0, 1)
    pointers = gl.expand_dims(rows_ptr + gl.maximum(index, 0) * row_stride, 1) + gl.expand_dims(cols, 0)
    pointers, live = gl.broadcast(pointers, live)
    async_copy.async_copy_global_to_shared(tile, pointers, mask=live)


@gluon.jit
def load_codes(codes_ptr, codes_row, scale_ptr, scale_row, index, GROUP: gl.constexpr):
    """(codes [TILE_N, MAIN / 16, 16], scales [TILE_N, MAIN / 16]) of the rows, in registers."""
    blocks = gl.arange(0, MAIN // 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, CODE_ROWS)))
    code = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, CODE_ROWS)))
    safe = gl.expand_dims(gl.maximum(index, 0), 1)
    live = gl.expand_dims(index >= 0, 1)
    groups = gl.expand_dims(blocks * 16 // GROUP, 0)
    scales = gl.load(scale_ptr + safe * scale_row + groups, mask=live & (groups >= 0), other=0.0)
    pointers = gl.expand_dims(codes_ptr + safe * codes_row + gl.expand_dims(blocks * 16, 0), 2)
    pointers = pointers + gl.expand_dims(gl.expand_dims(code, 0), 1)
    codes = gl.load(pointers, mask=gl.expand_dims(live & (groups >= 0), 2), other=0)
    return codes, scales


@gluon.jit
def store_codes(tile, codes, scales):
    """Dequantise to BF16 into shared memory."""
    values = codes.to(gl.float8e4nv, bitcast=True).to(gl.float32) * gl.expand_dims(scales, 2)
    tile.store(gl.reshape(values.to(gl.bfloat16), [TILE_N, MAIN]))


@gluon.jit
def by_half(scores):
    """[TILE_M, TILE_N] of SCORES as [TILE_M, 2, TILE_N / 2]: reductions of the last axis stay inside a warp."""
    return gl.reshape(scores, [TILE_M, 2, TILE_N // 2])


@gluon.jit
def across_halves(part, shared):
    """[TILE_M, 2] in registers of the warpgroup that made it -> HALVES, through shared memory."""
    shared.store(part)
    thread_barrier()
    return shared.load(HALVES)


@gluon.jit
def sparse_wgmma_kernel(
    q_ptr,
    index_ptr,
    length_ptr,
    codes_ptr,
    rope_ptr,
    scale_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    max_ptr,
    partial_ptr,
    softmax_scale,
    tokens,
    Hq,
    stride_qb,
    stride_qs,
    stride_qh,
    topk,
    rows,
    stride_ib,
    stride_is,
    codes_row,
    rope_row,
    scale_row,
    S_Q: gl.constexpr,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    SPLITS: gl.constexpr,
):
    # rows are a multiple of 16 bytes apart, which a BF16 stride of 328 (656 bytes) does not show
    stride_qb, stride_qs, stride_qh = stride_qb // 8 * 8, stride_qs // 8 * 8, stride_qh // 8 * 8
    codes_row, rope_row = codes_row // 8 * 8, rope_row // 8 * 8
    head_tiles = (Hq + TILE_M - 1) // TILE_M
    token = gl.program_id(0) // head_tiles
    first_head = gl.program_id(0) % head_tiles * TILE_M
    split = gl.program_id(1)
    b = (token // S_Q).to(gl.int64)
    i = token % S_Q

    # load q
    q_base = q_ptr + b * stride_qb + i * stride_qs
    sQ = gl.allocate_shared_memory(gl.bfloat16, [TILE_M, MAIN], SHARED)
    heads = first_head + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, MAIN_ROWS))
    copy_rows(sQ, q_base, stride_qh, gl.where(heads < Hq, heads, -1), 0, MAIN, MAIN_ROWS)
    if D > MAIN:
        sQ_rest = gl.allocate_shared_memory(gl.bfloat16, [TILE_M, REST], SHARED)
        heads = first_head + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, REST_ROWS))
        copy_rows(sQ_rest, q_base, stride_qh, gl.where(heads < Hq, heads, -1), MAIN, REST, REST_ROWS)

    # this split's share of the key tiles
    count = topk
    if length_ptr is not None:
        count = gl.maximum(gl.minimum(gl.load(length_ptr + b), topk), 0).to(gl.int32)
    total = (count + TILE_N - 1) // TILE_N
    each = (total + SPLITS - 1) // SPLITS
    first = split * each
    last = gl.minimum(first + each, total)
    index_row = index_ptr + b * stride_ib + i * stride_is

    sK = gl.allocate_shared_memory(gl.bfloat16, [2, TILE_N, MAIN], SHARED)
    sP = gl.allocate_shared_memory(gl.bfloat16, [TILE_M, TILE_N], SHARED)
    s_half = gl.allocate_shared_memory(gl.float32, [TILE_M, 2], FLAT)
    MAIN_INDEX: gl.constexpr = gl.SliceLayout(1, MAIN_ROWS if GROUP == 0 else gl.SliceLayout(2, CODE_ROWS))
    REST_INDEX: gl.constexpr = gl.SliceLayout(1, REST_ROWS)

    # the first tile's rows
    index = load_index(index_row, first, count, rows, MAIN_INDEX)
    index_rest = load_index(index_row, first, count, rows, REST_INDEX)
    if D > MAIN:
        sK_rest = gl.allocate_shared_memory(gl.bfloat16, [2, TILE_N, REST], SHARED)
        copy_rows(sK_rest.index(0), rope_ptr, rope_row, index_rest, MAIN if GROUP == 0 else 0, REST, REST_ROWS)
    if GROUP == 0:
        copy_rows(sK.index(0), codes_ptr, codes_row, index, 0, MAIN, MAIN_ROWS)
    else:
        codes, scales = load_codes(codes_ptr, codes_row, scale_ptr, scale_row, index, GROUP)
        store_codes(sK.index(0), codes, scales)
    async_copy.commit_group()
    index = load_index(index_row, first + 1, count, rows, MAIN_INDEX)
    index_rest = load_index(index_row, first + 1, count, rows, REST_INDEX)

    acc = gl.zeros([TILE_M, MAIN], gl.float32, layout=ACC)
    row_max = gl.full([TILE_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    half_sum = gl.sum(by_half(gl.zeros([TILE_M, TILE_N], gl.float32, layout=SCORES)), 2)  # [TILE_M, 2]
    scale = softmax_scale * LOG2E
    for tile in range(first, last):
        now = (tile - first) % 2
        # wait for the tile's rows
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()

        # scores = q k^T
        scores = gl.zeros([TILE_M, TILE_N], gl.float32, layout=SCORES)
        scores = warpgroup_mma(sQ, sK.index(now).permute((1, 0)), scores, use_acc=False, is_async=True)
        if D > MAIN:
            scores = warpgroup_mma(sQ_rest, sK_rest.index(now).permute((1, 0)), scores, is_async=True)

        # issue the next tile's, and read the indices of the one after it
        if D > MAIN:
            rest = sK_rest.index(1 - now)
            copy_rows(rest, rope_ptr, rope_row, index_rest, MAIN if GROUP == 0 else 0, REST, REST_ROWS)
        if GROUP == 0:
            copy_rows(sK.index(1 - now), codes_ptr, codes_row, index, 0, MAIN, MAIN_ROWS)
        else:
            codes, scales = load_codes(codes_ptr, codes_row, scale_ptr, scale_row, index, GROUP)
        async_copy.commit_group()
        index = load_index(index_row, tile + 2, count, rows, MAIN_INDEX)
        index_rest = load_index(index_row, tile + 2, count, rows, REST_INDEX)
        live = load_index(index_row, tile, count, rows, gl.SliceLayout(0, SCORES)) >= 0

        # wait for the scores
        scores = warpgroup_mma_wait(0, deps=(scores,))
        scores = gl.where(gl.expand_dims(live, 0), scores * scale, float("-inf"))

        # online softmax
        tile_max = gl.max(across_halves(gl.max(by_half(scores), 2), s_half), 1)
        row_max_new = gl.maximum(row_max, gl.convert_layout(tile_max, gl.SliceLayout(1, SCORES)))
        # a row without a key yet: subtract 0, so that exp2(-inf) is 0 and not exp2(-inf + inf)
        shift = gl.where(row_max_new == float("-inf"), 0.0, row_max_new)
        p = gl.exp2(scores - gl.expand_dims(shift, 1))
        rescale = gl.exp2(row_max - shift)
        half_rescale = gl.convert_layout(rescale, gl.SliceLayout(1, half_sum.type.layout))
        half_sum = half_sum * gl.expand_dims(half_rescale, 1) + gl.sum(by_half(p), 2)
        row_max = row_max_new
        sP.store(p.to(gl.bfloat16))
        acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, ACC)), 1)
        fence_async_shared()
        thread_barrier()

        # acc += p v
        acc = warpgroup_mma(sP, sK.index(now), acc, is_async=True)
        if GROUP > 0:
            store_codes(sK.index(1 - now), codes, scales)
        acc = warpgroup_mma_wait(0, deps=(acc,))

    async_copy.wait_group(0)
    # the end of the online softmax
    thread_barrier()
    row_sum = gl.convert_layout(gl.sum(across_halves(half_sum, s_half), 1), gl.SliceLayout(1, SCORES))
    empty = row_sum == 0.0
    inverse = 1.0 / gl.where(empty, 1.0, row_sum)
    lse2 = gl.where(empty, float("-inf"), row_max + gl.log2(gl.where(empty, 1.0, row_sum)))
    heads = first_head + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, SCORES))
    head_live = heads < Hq
    row = token.to(gl.int64) * Hq + heads
    if SPLITS > 1:
        row += gl.cast(tokens, gl.int64) * split * Hq
        gl.store(partial_ptr + gl.cast(tokens, gl.int64) * (SPLITS * Hq * MAIN) + row, lse2, mask=head_live)
    else:
        if sink_ptr is not None:
            sink = gl.load(sink_ptr + heads, mask=head_live, other=0.0)
            inverse *= gl.where(empty, 0.0, 1.0 / (1.0 + gl.exp2(sink * LOG2E - lse2)))
        gl.store(lse_ptr + row, lse2 * LN2, mask=head_live)
        if max_ptr is not None:
            gl.store(max_ptr + row, row_max * LN2, mask=head_live)
    out = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, ACC)), 1)
    if SPLITS > 1:
        heads = first_head + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, ACC))
        row = gl.cast(tokens, gl.int64) * split * Hq + token.to(gl.int64) * Hq + heads
        cols = gl.arange(0, MAIN, layout=gl.SliceLayout(0, ACC))
        pointers = partial_ptr + gl.expand_dims(row * MAIN, 1) + gl.expand_dims(cols, 0)
        gl.store(pointers, out, mask=gl.expand_dims(heads < Hq, 1))
    else:
        # through q's shared memory, so that stores are of whole rows
        thread_barrier()
        sQ.store(out.to(gl.bfloat16))
        thread_barrier()
        heads = first_head + gl.arange(0, TILE_M, layout=gl.SliceLayout(1, MAIN_ROWS))
        cols = gl.arange(0, MAIN, layout=gl.SliceLayout(0, MAIN_ROWS))
        pointers = out_ptr + gl.expand_dims((token.to(gl.int64) * Hq + heads) * MAIN, 1) + gl.expand_dims(cols, 0)
        gl.store(pointers, sQ.load(MAIN_ROWS), mask=gl.expand_dims(heads < Hq, 1))
