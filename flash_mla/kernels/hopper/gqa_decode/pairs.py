"""The steps of a consumer warpgroup over pairs of gathered blocks: GQA decode's for the sparse kernels of few heads.

Keys and output columns are the M of the products and heads their N, so that no product is paid for 64 heads:
    S^T [64, heads] = K Q^T        O^T [512, heads] += V^T P^T
Warpgroup 0 takes the even blocks, warpgroup 1 the odd ones, each with its own max, sum and O; they merge in the end.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from flash_mla.kernels.hopper.gqa_decode.consumer import Consumer


@cute.jit
def consume_pairs(consumer: Consumer, scale_log2, pairs, count) -> None:
    """The warpgroup's block of each pair; `count` pairs were computed before. The consumer says which keys to hide."""
    k, side = consumer.shared.k, consumer.side
    for pair in cutlass.range(pairs, unroll=1):
        turn, buffer = count + pair, 2 * side + (count + pair) % 2
        # scores
        k.wait(2 * side, turn)
        k.wait(2 * side + 1, turn)
        consumer.scores(side, 0, scale_log2)
        consumer.hide_absent()
        consumer.weigh(buffer)

        # output
        consumer.values(side, buffer)
        k.release(2 * side)
        k.release(2 * side + 1)
    consumer.shared.q.release(0)
