"""The two consumers of a sparse prefill: the products and the softmax of MLA decode, over keys that a mask names."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import mla_decode
from flash_mla.kernels.hopper.mla_decode import BAR_P0, BAR_P1, BAR_SUM, store_out
from flash_mla.kernels.hopper.softmax import LOW
from flash_mla.kernels.hopper.sparse_prefill.config import CONSUMERS, K_CHUNKS, PAIR, TILE_M, Config
from flash_mla.kernels.hopper.sparse_prefill.shared import Scalars, Shared, Tensors, keys_of


@dataclass(frozen=True)
class Consumer(mla_decode.Consumer):
    """A consumer warpgroup. top: the greatest score of each row so far, base 2."""

    top: cute.Tensor

    @staticmethod
    def over(config: Config, shared: Shared, side: int, tid, scale_log2: Float32) -> Consumer:
        base = mla_decode.Consumer.over(config, shared, side, tid, scale_log2)
        top = cute.make_rmem_tensor(2, Float32)
        return Consumer(*(getattr(base, field.name) for field in fields(base)), top)

    @cute.jit
    def start(self) -> None:
        """Begin a tile."""
        self.O.fill(0.0)
        self.rows.max.fill(LOW)
        self.rows.sum.fill(0.0)
        self.top.fill(-Float32.inf)

    @cute.jit
    def mask_unseen(self) -> None:
        """S = -inf at keys that name no row."""
        words = cute.recast_tensor(self.shared.sSeen[self.side, None], Int32)
        low, high = words[0], words[1]
        if (low & high) != -1:
            self.mask(low >> self.rows.column, high >> self.rows.column)

    @cute.jit
    def mask(self, low, high) -> None:
        """S = -inf where a key's bit is 0; low, high: keys 0 and 32 on, shifted to this thread's first column."""
        for j in cutlass.range_constexpr(8):
            word = low if const_expr(j < 4) else high
            for e in cutlass.range_constexpr(2):
                seen = word & (1 << (8 * (j % 4) + e))
                for r in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + e
                    self.S[i] = self.S[i] if seen != 0 else -Float32.inf

    @cute.jit
    def find_peaks(self) -> None:
        """The largest scores of this block, and so far."""
        for r in cutlass.range_constexpr(2):
            self.find_peak(r)
            self.top[r] = cute.arch.fmax(self.top[r], self.peak[r])


@cute.jit
def consume_left(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 0: scores of the even blocks, left half of the output."""
    k = consumer.shared.k
    k.wait(0, count)
    consumer.scores(range(4), True)
    k.wait(1, count)
    consumer.scores(range(4, consumer.config.chunks), False)
    warpgroup.wait_group(0)
    for pair in cutlass.range(pairs - 1, unroll=1):
        step_left(consumer, count + pair, True)
    consumer.shared.q.release(0)
    step_left(consumer, count + pairs - 1, False)


@cute.jit
def step_left(consumer: Consumer, turn, follow: cutlass.Constexpr) -> None:
    """One pair, whose even block's scores are there; `follow`: then the scores of the next pair's even block."""
    k = consumer.shared.k
    # softmax of the even block
    consumer.mask_unseen()
    consumer.find_peaks()
    for r in cutlass.range_constexpr(2):
        consumer.raise_max(r)
    consumer.exponentials()
    if const_expr(consumer.config.chunks < K_CHUNKS):
        k.acquire(1, turn)
    consumer.publish(BAR_P0)

    # P V of the even block
    consumer.rows.rescale(consumer.O)
    consumer.values(0)
    warpgroup.wait_group(0)
    k.release(0)

    # P V of the odd block, and the next scores
    consumer.receive(BAR_P1)
    consumer.rows.rescale(consumer.O)
    consumer.values(1)
    warpgroup.wait_group(0)
    k.release(2)
    if const_expr(follow):
        k.wait(0, turn + 1)
        consumer.scores(range(4), True)
        k.wait(1, turn + 1)
        consumer.scores(range(4, consumer.config.chunks), False)
        warpgroup.wait_group(0)


@cute.jit
def consume_right(consumer: Consumer, pairs, count) -> None:
    """Warpgroup 1: scores of the odd blocks, right half of the output; P V of the even block under their softmax."""
    k = consumer.shared.k
    for pair in cutlass.range(pairs, unroll=1):
        turn = count + pair
        # scores of the odd block
        k.wait(2, turn)
        consumer.scores((0, 1, 2, 3, *range(8, consumer.config.chunks)), True)
        k.wait(3, turn)
        consumer.scores(range(4, 8), False)
        warpgroup.wait_group(0)
        if pair == pairs - 1:
            consumer.shared.q.release(0)
        consumer.mask_unseen()
        consumer.find_peaks()

        # P V of the even block
        consumer.receive(BAR_P0)
        consumer.rows.rescale(consumer.O)
        consumer.values(0)

        # softmax of the odd block
        for r in cutlass.range_constexpr(2):
            consumer.raise_max(r)
        consumer.exponentials()
        if const_expr(consumer.config.chunks < K_CHUNKS):
            k.acquire(2, turn)
        consumer.publish(BAR_P1)
        warpgroup.wait_group(0)
        k.release(1)

        # P V of the odd block
        consumer.rows.rescale(consumer.O)
        consumer.values(1)
        warpgroup.wait_group(0)
        k.release(3)


@cute.jit
def write_result(consumer: Consumer, tensors: Tensors, scalars: Scalars, token, head0) -> None:
    """Normalise O and write it, lse and the greatest logits."""
    side, sSum, sTop = consumer.side, consumer.shared.sSum, consumer.shared.sTop
    lse, max_logits, top = tensors.lse, tensors.max_logits, consumer.top
    heads = tensors.out.shape[1]
    # add the sums of the four threads of a row, and of the two warpgroups
    for r in cutlass.range_constexpr(2):
        total = consumer.rows.sum[r]
        total = total + cute.arch.shuffle_sync_bfly(total, offset=1)
        total = total + cute.arch.shuffle_sync_bfly(total, offset=2)
        if consumer.tid % 4 == 0:
            sSum[consumer.rows.first + 8 * r, side] = total
            sTop[consumer.rows.first + 8 * r, side] = top[r]
    cute.arch.barrier(barrier_id=BAR_SUM, number_of_threads=CONSUMERS)
    scales = cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        row = consumer.rows.first + 8 * r
        head = head0 + row
        total = sSum[row, 0] + sSum[row, 1]
        if head < heads:
            if side == 0 and consumer.tid % 4 == 0:
                log_sum = consumer.rows.max[r] + cute.math.log2(total, fastmath=True)
                lse[token, head] = log_sum * math.log(2.0) if total > 0.0 else -Float32.inf
                max_logits[token, head] = cute.arch.fmax(sTop[row, 0], sTop[row, 1]) * math.log(2.0)
            if scalars.has_sink != 0:
                sink = tensors.sink[head] * math.log2(math.e)
                total = total + cute.math.exp2(sink - consumer.rows.max[r], fastmath=True)
        # NOTE: a row without keys has O = 0 and, with a sink, a total above 0; without, 0 * inf would be NaN
        scales[r] = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
    store_out(consumer, tensors.out, token, head0, heads, scales)
    # NOTE: the sums may be overwritten by the next tile only when both warpgroups have read them
    cute.arch.barrier(barrier_id=BAR_SUM, number_of_threads=CONSUMERS)


@cute.jit
def write_nothing(consumer: Consumer, tensors: Tensors, token, head0) -> None:
    """A token without indices: out 0, lse and the greatest logits -inf."""
    zeros = cute.make_rmem_tensor(8, tensors.out.element_type)
    zeros.fill(0.0)
    lse, max_logits = tensors.lse, tensors.max_logits
    for i in cutlass.range(TILE_M // 2, unroll=1):
        head = head0 + 2 * i + consumer.tid // 64
        if head < tensors.out.shape[1]:
            cute.autovec_copy(zeros, cute.local_tile(tensors.out[token, head, None], (8,), (consumer.tid % 64,)))
            if consumer.tid % 64 == 0:
                lse[token, head] = -Float32.inf
                max_logits[token, head] = -Float32.inf


@cute.jit
def consume(consumer: Consumer, tensors: Tensors, scalars: Scalars, first_tile, ctas) -> None:
    """Walk the CTA's tiles, compute and write them."""
    tiles_done, pairs_done = Int32(0), Int32(0)
    tile = first_tile
    while tile < scalars.tiles:
        token = tile // scalars.head_tiles
        head0 = (tile - token * scalars.head_tiles) * TILE_M
        pairs = (keys_of(tensors, scalars, token) + (PAIR - 1)) // PAIR
        if pairs > 0:
            consumer.start()
            consumer.shared.q.wait(0, tiles_done)
            if const_expr(consumer.side == 0):
                consume_left(consumer, pairs, pairs_done)
            else:
                consume_right(consumer, pairs, pairs_done)
            tiles_done, pairs_done = tiles_done + 1, pairs_done + pairs
            write_result(consumer, tensors, scalars, token, head0)
        elif const_expr(consumer.side == 0):
            write_nothing(consumer, tensors, token, head0)
        tile = tile + ctas
