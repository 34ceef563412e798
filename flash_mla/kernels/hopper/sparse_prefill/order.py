"""Order the row ids of sparse attention by where their rows lie, and drop those that name none.

Attention does not care in which order a token's keys come, the L2 does: CTAs that start together and all sweep the rows
from one end to the other read any part of them at about the same time, and DRAM gives it once for all. At random, rows
of more bytes than the L2 holds come again and again. Every second wave of tokens sweeps backwards: what the L2 still
holds of the last sweep is where the next one starts.

Grid: a CTA a token. A coarse, stable counting sort by BINS ranges of rows: its result depends on the ids alone, so
attention stays the same bit for bit. Each warp takes a run of ids, 32 at a time; the lanes whose ids fall into one bin
are found by five ballots, one for each bit of the bin, for the own bin (the rank) and for the bin that is the lane's
number (the count). Ids are placed in shared memory and leave in whole lines.
Bound: it reads and writes 4 bytes an id, 67 MB and 16 us for 4096 tokens of 2048.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.gather import count_keys, row_named
from flash_mla.kernels.hopper.sparse_prefill.config import BINS, ORDER_WARPS
from flash_mla.kernels.hopper.work import warp_scan, warp_sum


@cute.jit
def alike(bin, seen, wanted):
    """Lanes, as bits, whose id is `seen` and in bin `wanted` of this lane."""
    lanes = Int32(cute.arch.vote_ballot_sync(seen))
    for bit in cutlass.range_constexpr(5):
        ones = Int32(cute.arch.vote_ballot_sync(((bin >> bit) & 1) != 0))
        lanes = lanes & (ones if ((wanted >> bit) & 1) != 0 else ~ones)
    return lanes


@cute.kernel
def order_kernel(
    ids: cute.Tensor,  # [tokens, topk] int32
    lengths: cute.Tensor,  # [tokens] int32; anything if not has_lengths
    has_lengths: Int32,
    num_rows: Int32,
    shift: Int32,
    wave: Int32,  # tokens that start together
    ordered: cute.Tensor,  # [tokens, topk] int32
    counts: cute.Tensor,  # [tokens] int32
):
    token, _, _ = cute.arch.block_idx()
    tid, _, _ = cute.arch.thread_idx()
    warp, lane = tid // 32, tid % 32
    memory = cute.arch.get_dyn_smem(Int32)
    sCount = cute.make_tensor(memory, cute.make_layout((ORDER_WARPS, BINS), stride=(BINS, 1)))
    sIds = cute.make_tensor(memory + ORDER_WARPS * BINS, cute.make_layout(ids.shape[1]))

    keys = count_keys(ids, lengths, has_lengths, token)
    backwards = Int32(BINS - 1) if (token // wave) % 2 == 1 else Int32(0)
    rounds = (keys + (32 * ORDER_WARPS - 1)) // (32 * ORDER_WARPS)
    first = warp * rounds * 32 + lane

    # how many ids of this warp fall into the bin of this lane
    count = Int32(0)
    for i in cutlass.range(rounds, unroll=1):
        bin, seen, _ = id_at(ids, token, first + 32 * i, keys, num_rows, shift, backwards)
        count = count + cute.arch.popc(alike(bin, seen, lane))
    sCount[warp, lane] = count
    cute.arch.sync_threads()

    # where they go: behind all ids of smaller bins, and those that earlier warps have of this bin
    total, place = Int32(0), Int32(0)
    for other in cutlass.range_constexpr(ORDER_WARPS):
        count = sCount[other, lane]
        place = place + (count if other < warp else Int32(0))
        total = total + count
    place = place + warp_scan(total) - total
    kept = warp_sum(total)
    below = (Int32(1) << lane) - 1
    for i in cutlass.range(rounds, unroll=1):
        bin, seen, row = id_at(ids, token, first + 32 * i, keys, num_rows, shift, backwards)
        mine, counted = alike(bin, seen, bin), alike(bin, seen, lane)
        target = cute.arch.shuffle_sync(place, bin) + cute.arch.popc(mine & below)
        if seen:
            sIds[target] = row
        place = place + cute.arch.popc(counted)
    cute.arch.sync_threads()

    for key in cutlass.range(tid, kept, 32 * ORDER_WARPS, unroll=1):
        ordered[token, key] = sIds[key]
    if tid == 0:
        counts[token] = kept


@cute.jit
def id_at(ids: cute.Tensor, token, key, keys, num_rows, shift, backwards):
    """(bin, whether it names a row, the row) of a key."""
    row = row_named(ids, token, key, keys, num_rows)
    seen = row >= 0
    bin = (row >> shift) ^ backwards if seen else Int32(0)
    return bin, seen, row


@cute.jit
def order(
    indices: cute.Tensor,  # [tokens, 1, topk] int32
    lengths: cute.Tensor,
    has_lengths: Int32,
    num_rows: Int32,
    shift: Int32,
    wave: Int32,
    ordered: cute.Tensor,  # [tokens, 1, topk] int32
    counts: cute.Tensor,
    stream,
):
    tokens, topk = indices.shape[0], indices.shape[2]
    shape = (tokens, topk)
    order_kernel(
        cute.make_tensor(indices.iterator, cute.make_layout(shape, stride=(indices.stride[0], 1))),
        lengths,
        has_lengths,
        num_rows,
        shift,
        wave,
        cute.make_tensor(ordered.iterator, cute.make_layout(shape, stride=(ordered.stride[0], 1))),
        counts,
    ).launch(grid=(tokens, 1, 1), block=(32 * ORDER_WARPS, 1, 1), smem=4 * (ORDER_WARPS * BINS + topk), stream=stream)


def build(config: None, options: str = ""):
    """Compile the kernel; it has one variant."""

    def ids() -> cute.Tensor:
        return symbolic.tensor(Int32, (None, None, None))

    def counts() -> cute.Tensor:
        return symbolic.tensor(Int32, (None,))

    scalars = Int32(0), Int32(1), Int32(0), Int32(1)
    return symbolic.compiled(order, (ids(), counts(), *scalars, ids(), counts()), options)
