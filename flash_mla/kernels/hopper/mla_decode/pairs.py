"""The steps of both consumer warpgroups over the pairs of blocks of a segment, whatever its keys are.

keys: which keys of a block a row may see. `hide` makes the scores of the others -inf; `clear` zeroes their rows of V,
where it is not done already (P is 0 there, but 0 * NaN is NaN); `make_room` waits until P may be written.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.masks import Mask, needs_mask, sees
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, Bar
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer


@dataclass(frozen=True)
class Keys:
    """What is the same whatever the keys are."""

    @cute.jit
    def make_room(self, consumer: Consumer, stage: cutlass.Constexpr, turn) -> None:
        """Wait for the place of P: the rope chunk, which comes with this stage, and with it is free of the last P."""
        if const_expr(consumer.config.chunks < K_CHUNKS):
            consumer.shared.k.acquire(stage, turn)


@dataclass(frozen=True)
class Causal(Keys):
    """The keys of a request of `length` keys, causal among its S_q tokens."""

    length: Int32
    S_q: Int32

    @cute.jit
    def hide(self, consumer: Consumer, pair) -> None:
        """The consumer's own block of a pair."""
        key0 = own_block(consumer, pair)
        if key0 + BLOCK > self.length - self.S_q + 1:
            consumer.rows.mask(consumer.S, key0)

    @cute.jit
    def clear(self, consumer: Consumer, block: cutlass.Constexpr, pair, turn) -> None:
        """The even (0) or odd (1) block of a pair."""
        valid = self.length - own_block(consumer, pair) + BLOCK * (consumer.side - block)
        consumer.clear_values(block, valid, turn)


@dataclass(frozen=True)
class Masked(Causal):
    """The keys that a mask shows to the rows from `row0` of a request on."""

    mask: Mask
    request: Int32
    row0: Int32

    @cute.jit
    def hide(self, consumer: Consumer, pair) -> None:
        """The consumer's own block of a pair."""
        key0, first, rows, S = own_block(consumer, pair), self.mask.first(self.length), consumer.rows, consumer.S
        if needs_mask(key0, first):
            for r in cutlass.range_constexpr(2):
                line = self.mask.line(self.request, self.row0 + rows.first + 8 * r, consumer.config.token_major)
                for j in cutlass.range_constexpr(cute.size(S) // 4):
                    for e in cutlass.range_constexpr(2):
                        i, key = 4 * j + 2 * r + e, key0 + rows.column + 8 * j + e
                        S[i] = S[i] if sees(line, key, first, self.length) else -Float32.inf


def own_block(consumer: Consumer, pair):
    """The first key of the block of a pair that the consumer scores."""
    return pair * split.PAIR + BLOCK * consumer.side


@dataclass(frozen=True)
class Gathered(Keys):
    """Keys that the producers gathered, with zeros for those that are not there."""

    def clear(self, consumer: Consumer, block: cutlass.Constexpr, pair, turn) -> None:
        """Nothing is left to clear."""


@cute.jit
def consume_left(consumer: Consumer, keys, first, last, count) -> None:
    """Warpgroup 0: scores of the even blocks, left half of the output; `count` pairs were computed before."""
    score_even(consumer, count)
    for pair in cutlass.range(first, last - 1, unroll=1):
        step_left(consumer, keys, pair, count + pair - first, True)
    consumer.shared.q.release(0)
    step_left(consumer, keys, last - 1, count + last - 1 - first, False)


@cute.jit
def score_even(consumer: Consumer, turn) -> None:
    """Scores of a pair's even block."""
    k = consumer.shared.k
    k.wait(0, turn)
    consumer.scores(range(4), True)
    k.wait(1, turn)
    consumer.scores(range(4, consumer.config.chunks), False)
    warpgroup.wait_group(0)


@cute.jit
def step_left(consumer: Consumer, keys, pair, turn, follow: cutlass.Constexpr) -> None:
    """One pair, whose even block's scores are there; `follow`: then the scores of the next pair's even block."""
    step_even(consumer, keys, pair, turn, follow)
    step_odd(consumer, keys, pair, turn, follow)
    if const_expr(follow):
        score_even(consumer, turn + 1)


@cute.jit
def step_even(
    consumer: Consumer, keys, pair, turn, follow: cutlass.Constexpr, first: cutlass.Constexpr = False
) -> None:
    """Softmax and P V of a pair's even block; first: O begins with it."""
    k = consumer.shared.k
    # softmax of the even block
    keys.hide(consumer, pair)
    for r in cutlass.range_constexpr(2):
        consumer.find_peak(r)
        consumer.raise_max(r)
    consumer.exponentials()
    keys.make_room(consumer, 1, turn)
    consumer.publish(Bar.P_EVEN)

    # P V of the even block
    if const_expr(not first):
        consumer.rows.rescale(consumer.O)
    if const_expr(not follow):
        keys.clear(consumer, 0, pair, turn)
    consumer.values(0, first)
    warpgroup.wait_group(0)
    k.release(0)


@cute.jit
def step_odd(consumer: Consumer, keys, pair, turn, follow: cutlass.Constexpr) -> None:
    """Warpgroup 0 takes over P and the running max of the odd block: its P V."""
    consumer.receive(Bar.P_ODD)
    consumer.rows.rescale(consumer.O)
    if const_expr(not follow):
        keys.clear(consumer, 1, pair, turn)
    consumer.values(1)
    # NOTE: freed before the next scores are issued: their wait for K would hold the odd block back (5 % at S 8192)
    warpgroup.wait_group(0)
    consumer.shared.k.release(2)


@cute.jit
def consume_right(consumer: Consumer, keys, first, last, count, short: cutlass.Constexpr = False) -> None:
    """Warpgroup 1: scores of the odd blocks, right half of the output.

    The P V of the even block hides the softmax of the odd one where the tensor cores bound (clusters). Where memory
    does, it goes first and frees the even block one load earlier. short: there is one pair, with which O begins, and
    nothing to free.
    """
    k, early = consumer.shared.k, const_expr(consumer.early and not short)
    for pair in cutlass.range(first, last, unroll=1):
        turn = count + pair - first
        if const_expr(early):
            multiply_even(consumer, keys, pair, turn, short)
            warpgroup.wait_group(0)
            k.release(1)

        # scores of the odd block
        k.wait(2, turn)
        consumer.scores((0, 1, 2, 3, *range(8, consumer.config.chunks)), True)
        k.wait(3, turn)
        consumer.scores(range(4, 8), False)
        warpgroup.wait_group(0)
        if pair == last - 1:
            consumer.shared.q.release(0)
        keys.hide(consumer, pair)
        for r in cutlass.range_constexpr(2):
            consumer.find_peak(r)
        if const_expr(not early):
            multiply_even(consumer, keys, pair, turn, short)

        # softmax of the odd block
        for r in cutlass.range_constexpr(2):
            consumer.raise_max(r)
        consumer.exponentials()
        keys.make_room(consumer, 2, turn)
        consumer.publish(Bar.P_ODD)
        if const_expr(not early):
            warpgroup.wait_group(0)
            k.release(1)

        # P V of the odd block
        consumer.rows.rescale(consumer.O)
        keys.clear(consumer, 1, pair, turn)
        consumer.values(1)
        warpgroup.wait_group(0)
        k.release(3)


@cute.jit
def multiply_even(consumer: Consumer, keys, pair, turn, first: cutlass.Constexpr = False) -> None:
    """Warpgroup 1 takes over P and the running max of the even block and starts its P V; first: O begins with it."""
    consumer.receive(Bar.P_EVEN)
    if const_expr(not first):
        consumer.rows.rescale(consumer.O)
    keys.clear(consumer, 0, pair, turn)
    consumer.values(0, first)
