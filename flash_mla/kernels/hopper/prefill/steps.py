"""How a consumer warpgroup of a prefill goes through its tiles: P V of a block beside the scores of the next."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.prefill.config import Config
from flash_mla.kernels.hopper.prefill.consumer import Consumer
from flash_mla.kernels.hopper.prefill.shared import Scalars, Task, Tensors, receive


@cute.jit
def next_block(
    consumer: Consumer,
    tensors: Tensors,
    Hq,
    tile: Task,
    count,
    q_stage,
    word,
    masked: cutlass.Constexpr,
    crossing: cutlass.Constexpr,
    skipped=0,
) -> Int32:
    """P V of block number `count` beside the scores and softmax of the next, a block of `tile`.

    word: the next block's first key; where blocks are listed, the list says it, with its flags. Returned. crossing: the
    block is the first of the next tile, whose factor is none of this tile's O. skipped: blocks between the two.
    """
    k, v, following, stages = consumer.shared.k, consumer.shared.values, count + 1 + skipped, consumer.config.stages
    k.wait(following % stages, following // stages)
    if const_expr(consumer.config.sparse):
        word = consumer.shared.sKeys[following % stages]
    consumer.take_turn()
    consumer.scores(q_stage, following % stages)
    v.wait(count % stages, count // stages)
    consumer.values(count % stages, True)
    warpgroup.wait_group(1)
    k.release(following % stages)
    if const_expr(consumer.config.sparse):
        consumer.mask_listed(tensors, Hq, tile, word)
    elif const_expr(masked):
        consumer.rows.mask(consumer.S, word)
    consumer.softmax()
    warpgroup.wait_group(0)
    v.release(count % stages)
    consumer.round()
    if const_expr(not crossing):
        consumer.rows.rescale(consumer.O)
    return word


@cute.jit
def first_block(consumer: Consumer, tensors: Tensors, Hq, tile: Task, count, q_stage) -> Int32:
    """Scores and softmax of a tile's first block, with nothing beside them. Returns its word as `next_block` does."""
    k, stages, word = consumer.shared.k, consumer.config.stages, Int32(0)
    k.wait(count % stages, count // stages)
    if const_expr(consumer.config.sparse):
        word = consumer.shared.sKeys[count % stages]
    consumer.take_turn()
    consumer.scores(q_stage, count % stages)
    consumer.pass_turn()
    warpgroup.wait_group(0)
    k.release(count % stages)
    if const_expr(consumer.config.sparse):
        consumer.mask_listed(tensors, Hq, tile, word)
    else:
        consumer.rows.mask(consumer.S, word)
    consumer.softmax()
    consumer.round()
    return word


@cute.jit
def last_block(consumer: Consumer, count) -> None:
    """P V of a tile's last block, with nothing beside it."""
    v, stages = consumer.shared.values, consumer.config.stages
    v.wait(count % stages, count // stages)
    consumer.take_turn()
    consumer.values(count % stages, True)
    warpgroup.wait_group(0)
    v.release(count % stages)


@cute.jit
def leave(channel: Channel, config: Config, count, more) -> None:
    """Give back the blocks behind number `count` that are another tile's."""
    if const_expr(config.cluster > 1):
        for i in cutlass.range(more, unroll=1):
            block = count + 1 + i
            channel.wait(block % config.stages, block // config.stages)
            channel.release(block % config.stages)


@cute.jit
def cross(
    consumer: Consumer, out: cute.Tensor, tensors: Tensors, scalars: Scalars, tile: Task, following: Task, count, done
) -> Int32:
    """P V of the last block of a tile, then its result under the scores of the next tile's first block, which is
    `following`. For one Q stage, whose next Q is on its way meanwhile; `done` tiles were computed. Returns a word as
    `next_block` does.
    """
    k, v, stages, word = consumer.shared.k, consumer.shared.values, consumer.config.stages, Int32(0)
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    v.wait(count % stages, count // stages)
    consumer.take_turn()
    consumer.values(count % stages)
    q_stages = consumer.config.q_stages
    consumer.shared.q.wait(done % q_stages, done // q_stages)
    first = count + 1 + tile.more
    k.wait(first % stages, first // stages)
    if const_expr(consumer.config.sparse):
        word = consumer.shared.sKeys[first % stages]
    consumer.scores(done % q_stages, first % stages)
    consumer.pass_turn()
    warpgroup.wait_group(1)
    v.release(count % stages)
    for r in cutlass.range_constexpr(2):
        row_max[r], row_sum[r] = consumer.rows.max[r], consumer.rows.sum[r]
    consumer.write(out, tensors, scalars, tile, 0, row_max, row_sum)
    consumer.O.fill(0.0)
    consumer.begin(tensors, scalars, following)
    warpgroup.wait_group(0)
    k.release(first % stages)
    if const_expr(consumer.config.sparse):
        consumer.mask_listed(tensors, scalars.Hq, following, word)
    else:
        consumer.rows.mask(consumer.S, word)
    consumer.softmax()
    consumer.round()
    return word


@cute.jit
def consume(consumer: Consumer, out: cute.Tensor, tensors: Tensors, scalars: Scalars) -> None:
    """Compute tile after tile."""
    config, shared = consumer.config, consumer.shared
    q_stages, tile_n, Hq = config.q_stages, config.tile_n, scalars.Hq
    if const_expr(config.turns):  # noqa: SIM102
        if consumer.wg == config.consumers - 1:
            consumer.pass_turn()
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    count, done, word = Int32(0), Int32(0), Int32(0)
    row0, head, request, kv_head, length, start, blocks, whole, more = receive(shared, done)
    if blocks != 0:
        tile = Task(row0, head, request, kv_head, length, start, blocks, whole, more)
        consumer.O.fill(0.0)
        consumer.begin(tensors, scalars, tile)
        shared.q.wait(0, 0)
        consumer.hold_q(0)
        word = first_block(consumer, tensors, Hq, tile, count, 0)
    while blocks != 0:
        # all blocks of the tile but the last
        tile = Task(row0, head, request, kv_head, length, start, blocks, whole, more)
        q_stage, end = done % q_stages, blocks - 1
        if const_expr(config.sparse):
            for n in cutlass.range(end, unroll=1):
                word = next_block(consumer, tensors, Hq, tile, count + n, q_stage, word, True, False)
        else:
            clear = cutlass.max(whole - 1, 0)
            for n in cutlass.range(clear, unroll=1):
                next_block(consumer, tensors, Hq, tile, count + n, q_stage, Int32(0), False, False)
            for n in cutlass.range(clear, end, unroll=1):
                next_block(consumer, tensors, Hq, tile, count + n, q_stage, (n + 1) * tile_n, True, False)
            word = end * tile_n
        count, done = count + end, done + 1
        if const_expr(config.staged):
            shared.q.release(q_stage)  # all scores of the tile are made

        # the last, beside the first of the next tile where that tile's Q is there
        row0, head, request, kv_head, length, start, blocks, whole, more = receive(shared, done)
        following = Task(row0, head, request, kv_head, length, start, blocks, whole, more)
        for r in cutlass.range_constexpr(2):
            row_max[r], row_sum[r] = consumer.rows.max[r], consumer.rows.sum[r]
        leave(shared.k, config, count, tile.more)
        consumer.clear_values(tile.length - word // BLOCK * BLOCK, count)
        if const_expr(config.staged):
            if blocks != 0:
                word = cross(consumer, out, tensors, scalars, tile, following, count, done)
            else:
                last_block(consumer, count)
                consumer.write(out, tensors, scalars, tile, q_stage, row_max, row_sum)
        else:
            if blocks != 0:
                shared.q.wait(done % q_stages, done // q_stages)
                consumer.hold_q(done % q_stages)
                consumer.begin(tensors, scalars, following)
                first, skipped = Int32(0), tile.more
                word = next_block(consumer, tensors, Hq, following, count, done % q_stages, first, True, True, skipped)
            else:
                last_block(consumer, count)
            consumer.write(out, tensors, scalars, tile, q_stage, row_max, row_sum)
            consumer.O.fill(0.0)
        leave(shared.values, config, count, tile.more)
        count = count + 1 + tile.more
