"""The sparse backward on Hopper, first kernel: dq, and f P and dS for the second, `keys_kernel.py`.

    P = exp2(scale * log2(e) * q k - lse2)      dS = scale P (f dout v - g)      dq = dS k

with the heads' lse2, g (`shift`) and f (`left`, with a sink) from the Triton backward's `prepare_kernel`.

Grid: one CTA for a token and 64 of its heads; the CTAs of a token run side by side, so that the L2 gives its rows to
both. Bound: a step of 64 keys is 3328 cycles of the tensor cores at D 576, and 3600 of shared memory; 4.1 ms for 4096
tokens of 2048 keys and 128 heads.

Roles (384 threads; entry 168 registers):
    warpgroup 0   232 registers   S = Q K^T, P; dq[:, 0:256]                     `queries_consumer.py`
    warpgroup 1   232 registers   dP = dO V^T; dq[:, 256:512] and the rope part
    warps 8-11     40 registers   gather of K by cp.async; warp 8: TMA of Q, dO  `queries_producer.py`

The two warpgroups hold the same elements of P and of the slopes, scale (f dP - g), a thread of the one what the same
thread of the other: they swap them through shared memory, in the operands' dtype, and both compute dS, an operand in
registers of their half of dq. A slope is rounded after g is taken off: nothing is lost where the two cancel.

Channels, producer -> consumers (full arrivals / empty arrivals):
    K       a stage a chunk of 64 columns   4 * 33 / 8 warps     products start with the first chunk that is there
    Q, dO   1 stage                         1 + bytes / never freed

Shared memory: 213 KB of Q, dO and K, and 16 KB that are swapped. There is one K buffer: with two of 32 keys, S and dP
had 32 columns, for which a product reads 3 KB of shared memory in 16 cycles.

A key whose id is negative, past the last row, or not among the first `lengths` has P = 0 by a bit of `sSeen`, and a row
of zeros in K.

Supports BF16 and FP16; D 576 or 512, Dv 512; any number of heads, ids and rows; sinks.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint16

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import Tma, load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    EXCHANGED,
    PRODUCER_WARPS,
    REGISTERS,
    THREADS,
    Config,
)
from flash_mla.kernels.hopper.sparse_backward.queries_consumer import Consumer
from flash_mla.kernels.hopper.sparse_backward.queries_producer import Producer
from flash_mla.kernels.hopper.sparse_backward.queries_shared import Scalars, Shared, Tensors, tile_of


def load_heads(x: cute.Tensor) -> Tma:
    """Loads of 64 heads and 64 columns of [tokens, 1, Hq, columns]: tiles of heads, chunks, tokens."""
    layout = cute.make_layout((x.shape[2], x.shape[3], x.shape[0]), stride=(x.stride[2], 1, x.stride[0]))
    return load_of(cute.make_tensor(x.iterator, layout), TILE_M, CHUNK)


class SparseQueries(Kernel[Config]):
    """dq of a token's heads; leaves f P and dS in the workspace."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [tokens, 1, Hq, D]
        d_out: cute.Tensor,  # [tokens, 1, Hq, 512]
        kv: cute.Tensor,  # [1, num_rows, D]
        indices: cute.Tensor,  # [tokens, 1, topk] int32
        lengths: cute.Tensor,  # [tokens] int32; anything if not has_lengths
        lse2: cute.Tensor,  # [Hq, tokens] FP32
        shift: cute.Tensor,  # [Hq, tokens] FP32
        left: cute.Tensor,  # [Hq, tokens] FP32; anything without a sink
        dq: cute.Tensor,  # [tokens, 1, Hq, D]
        weights: cute.Tensor,  # [items, item / 2] int32
        scale_log2: Float32,
        scale: Float32,
        has_lengths: Int32,
        stream,
    ):
        def without_middle(x: cute.Tensor) -> cute.Tensor:
            return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[0, *range(2, cute.rank(x))]))

        tensors = Tensors(
            kv=kv.iterator,
            indices=without_middle(indices),
            lengths=lengths,
            lse2=lse2,
            shift=shift,
            left=left,
            dq=without_middle(dq),
            weights=weights,
        )
        scalars = Scalars(scale_log2, scale, 2 * Int64(kv.stride[1]), kv.shape[1], has_lengths)
        kernel = self.kernel(load_heads(q), load_heads(d_out), tensors, scalars)
        ctas = q.shape[0] * self.config.head_tiles
        launch_ctas(kernel, ctas, THREADS, self.config.queries_bytes(), stream)

    @cute.kernel
    def kernel(self, load_q: Tma, load_d_out: Tma, tensors: Tensors, scalars: Scalars):
        config, align, array = self.config, cute.struct.Align, cute.struct.MemRange
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: align[array[dtype, TILE_M * config.D], 1024]
            sO: align[array[dtype, TILE_M * config.Dv], 1024]
            sK: align[array[dtype, BLOCK * config.D], 1024]
            exchange: align[array[dtype, 2 * EXCHANGED], 128]
            sSeen: align[array[Uint16, PRODUCER_WARPS], 16]
            k_barriers: array[Int64, Channel.words(config.chunks)]
            q_barriers: array[Int64, Channel.words(1)]

        shared = Shared.over(config, allocate(Storage, config, config.queries_bytes()))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        index, _, _ = cute.arch.block_idx()
        if warp_id == 0:
            open_channels(shared.channels, (load_q.atom, load_d_out.atom))
        cute.arch.sync_threads()

        tile = tile_of(tensors, scalars, config.head_tiles, index)
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(REGISTERS[1])
            producer = Producer.over(shared, tensors, scalars, warp_id - CONSUMER_WARPS)
            if warp_id == CONSUMER_WARPS:
                producer.load_queries(load_q, load_d_out, tile)
            producer.run(tile)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[0])
            tid, _, _ = cute.arch.thread_idx()
            if warp_id < CONSUMER_WARPS // 2:
                scores = Consumer.over(shared, 0, tid)
                scores.run(tensors, scalars, tile)
                scores.write(tensors, tile)
            else:
                slopes = Consumer.over(shared, 1, tid - WARPGROUP)
                slopes.run(tensors, scalars, tile)
                slopes.write(tensors, tile)
        for channel in shared.channels:
            channel.check()


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparseQueries.__call__`."""
    dtype, anything = DTYPES[config.dtype], (None, None, None)

    def numbers() -> cute.Tensor:
        return symbolic.tensor(Float32, (None, None))

    return (
        symbolic.tensor(dtype, (*anything, config.D), tma=(0, 2)),
        symbolic.tensor(dtype, (*anything, config.Dv), tma=(0, 2)),
        symbolic.tensor(dtype, (None, None, config.D), tma=(1,)),
        symbolic.tensor(Int32, anything),
        symbolic.tensor(Int32, (None,)),
        numbers(),
        numbers(),
        numbers(),
        symbolic.tensor(dtype, (*anything, config.D), tma=(0, 2)),
        symbolic.tensor(Int32, (None, config.item // 2), tma=(0,)),
        *symbolic.numbers(Float32, Float32, Int32),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(SparseQueries(config), arguments(config), options)
