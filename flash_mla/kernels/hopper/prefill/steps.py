"""How a consumer warpgroup of a prefill goes through its tiles: P V of a block beside the scores of the next."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.prefill.config import Config
from flash_mla.kernels.hopper.prefill.consumer import Consumer
from flash_mla.kernels.hopper.prefill.shared import Scalars, Task, Tensors, receive


@cute.jit
def next_block(
    consumer: Consumer,
    count,
    q_stage,
    key0,
    masked: cutlass.Constexpr,
    crossing: cutlass.Constexpr,
    skipped=0,
) -> None:
    """P V of block number `count` beside the scores and softmax of the next.

    key0: the next block's first key, where it is masked. crossing: it is the first of the next tile, whose factor is
    none of this tile's O. skipped: blocks between the two.
    """
    k, v, following, stages = consumer.shared.k, consumer.shared.values, count + 1 + skipped, consumer.config.stages
    k.wait(following % stages, following // stages)
    consumer.take_turn()
    consumer.scores(q_stage, following % stages)
    v.wait(count % stages, count // stages)
    consumer.values(count % stages, True)
    warpgroup.wait_group(1)
    k.release(following % stages)
    if const_expr(masked):
        consumer.rows.mask(consumer.S, key0)
    consumer.softmax()
    warpgroup.wait_group(0)
    v.release(count % stages)
    consumer.round()
    if const_expr(not crossing):
        consumer.rows.rescale(consumer.O)


@cute.jit
def first_block(consumer: Consumer, count, q_stage) -> None:
    """Scores and softmax of a tile's first block, with nothing beside them."""
    k, stages = consumer.shared.k, consumer.config.stages
    k.wait(count % stages, count // stages)
    consumer.take_turn()
    consumer.scores(q_stage, count % stages)
    consumer.pass_turn()
    warpgroup.wait_group(0)
    k.release(count % stages)
    consumer.rows.mask(consumer.S, 0)
    consumer.softmax()
    consumer.round()


@cute.jit
def last_block(consumer: Consumer, count) -> None:
    """P V of a tile's last block, with nothing beside it."""
    v, stages = consumer.shared.values, consumer.config.stages
    v.wait(count % stages, count // stages)
    consumer.take_turn()
    consumer.values(count % stages, True)
    warpgroup.wait_group(0)
    v.release(count % stages)


def skipped_behind(config: Config, tile: Task) -> Int32 | int:
    """Blocks behind the tile's that are another tile's."""
    # NOTE: a constant where there are none: read from the description, it cost 2 to 5 % at S 1024
    return tile.more if config.uneven else 0


@cute.jit
def leave(channel: Channel, config: Config, count, skipped) -> None:
    """Give back the blocks behind number `count` that are another tile's."""
    if const_expr(config.uneven):
        for i in cutlass.range(skipped, unroll=1):
            block = count + 1 + i
            channel.wait(block % config.stages, block // config.stages)
            channel.release(block % config.stages)


@cute.jit
def cross(
    consumer: Consumer, out: cute.Tensor, tensors: Tensors, scalars: Scalars, tile: Task, following: Task, count, done
) -> None:
    """P V of the last block of a tile, then its result under the scores of the next tile's first block, which is
    `following`. For one Q stage, whose next Q is on its way meanwhile; `done` tiles were computed.
    """
    k, v, stages = consumer.shared.k, consumer.shared.values, consumer.config.stages
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    v.wait(count % stages, count // stages)
    consumer.take_turn()
    consumer.values(count % stages)
    q_stages = consumer.config.q_stages
    consumer.shared.q.wait(done % q_stages, done // q_stages)
    first = count + 1 + skipped_behind(consumer.config, tile)
    k.wait(first % stages, first // stages)
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
    consumer.rows.mask(consumer.S, 0)
    consumer.softmax()
    consumer.round()


@cute.jit
def consume(consumer: Consumer, out: cute.Tensor, tensors: Tensors, scalars: Scalars) -> None:
    """Compute tile after tile."""
    config, shared = consumer.config, consumer.shared
    q_stages, tile_n = config.q_stages, config.tile_n
    role, warps = "consumers", 4 * config.consumers
    for channel in (shared.tasks, shared.k, shared.values, *([shared.q] if config.staged else [])):
        channel.read_by(role, warps)
    shared.out.written_by(role, warps)
    if const_expr(config.turns):  # noqa: SIM102
        if consumer.wg == config.consumers - 1:
            consumer.pass_turn()
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    count, done = Int32(0), Int32(0)
    row0, head, request, kv_head, length, start, blocks, whole, more = receive(shared, done)
    if blocks != 0:
        tile = Task(row0, head, request, kv_head, length, start, blocks, whole, more)
        consumer.O.fill(0.0)
        consumer.begin(tensors, scalars, tile)
        shared.q.wait(0, 0)
        consumer.hold_q(0)
        first_block(consumer, count, 0)
    while blocks != 0:
        # all blocks of the tile but the last
        tile = Task(row0, head, request, kv_head, length, start, blocks, whole, more)
        q_stage, end = done % q_stages, blocks - 1
        clear = cutlass.max(whole - 1, 0)
        for n in cutlass.range(clear, unroll=1):
            next_block(consumer, count + n, q_stage, 0, False, False)
        for n in cutlass.range(clear, end, unroll=1):
            next_block(consumer, count + n, q_stage, (n + 1) * tile_n, True, False)
        count, done = count + end, done + 1
        if const_expr(config.staged):
            shared.q.release(q_stage)  # all scores of the tile are made

        # the last, beside the first of the next tile where that tile's Q is there
        row0, head, request, kv_head, length, start, blocks, whole, more = receive(shared, done)
        following = Task(row0, head, request, kv_head, length, start, blocks, whole, more)
        for r in cutlass.range_constexpr(2):
            row_max[r], row_sum[r] = consumer.rows.max[r], consumer.rows.sum[r]
        skipped = skipped_behind(config, tile)
        leave(shared.k, config, count, skipped)
        consumer.clear_values(tile.length - end * tile_n, count)
        if const_expr(config.staged):
            if blocks != 0:
                cross(consumer, out, tensors, scalars, tile, following, count, done)
            else:
                last_block(consumer, count)
                consumer.write(out, tensors, scalars, tile, q_stage, row_max, row_sum)
        else:
            if blocks != 0:
                shared.q.wait(done % q_stages, done // q_stages)
                consumer.hold_q(done % q_stages)
                consumer.begin(tensors, scalars, following)
                next_block(consumer, count, done % q_stages, 0, True, True, skipped)
            else:
                last_block(consumer, count)
            consumer.write(out, tensors, scalars, tile, q_stage, row_max, row_sum)
            consumer.O.fill(0.0)
        leave(shared.values, config, count, skipped)
        count = count + 1 + skipped
