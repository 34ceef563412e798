"""The sparse backward on Hopper, first kernel: f P and dS for the second, `gradients_kernel.py`.

    P = exp2(scale * log2(e) * q k - lse2)      dS = scale P (f dout v - g)

with the heads' lse2, g (`shift`) and f (`left`, with a sink) from the Triton backward's `prepare_kernel`.

Grid: persistent CTAs; a tile is a token and 64 of its heads, and those of a token run side by side, so that the L2
gives its rows to both. Q and dO are operands in registers: a product of 64 x 64 then reads 2 KB of shared memory in 32
cycles, half of what it gives. Bound: 2176 cycles of the tensor cores a step of 64 keys at D 576, 2.7 ms for 4096 tokens
of 2048 keys and 128 heads at 1.6 GHz; the L2 gives 19 GB of rows.

Roles (384 threads; entry 168 registers):
    warpgroup 0   232 registers   S = Q K^T, P                                   `weights_consumer.py`
    warpgroup 1   232 registers   dP = dO V^T, dS
    warps 8-11     40 registers   gather of K by cp.async; warp 8: TMA of Q, dO  `weights_producer.py`

The two warpgroups hold the same elements of P and of the slopes, scale (f dP - g), a thread of the one what the same
thread of the other: P is handed over through shared memory, rounded. A slope is rounded after g is taken off and P
multiplied: nothing is lost where the two cancel. They issue their products in turn, so that one's are in the tensor
cores while the other computes.

Channel, producer -> consumers (full arrivals / empty arrivals):
    Q, dO, K    3 stages: Q and dO of a tile, then 64 rows a step    4 * 33 / 8 warps

A key whose id is negative, past the last row, or not among the first `lengths` has P = 0 by a bit of `sSeen`, and a row
of zeros in K.

Supports BF16 and FP16; D 576 or 512, Dv 512; any number of heads, ids and rows; sinks.
"""

from __future__ import annotations

import cutlass
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
    ROW_STAGES,
    THREADS,
    Config,
)
from flash_mla.kernels.hopper.sparse_backward.weights_consumer import Consumer
from flash_mla.kernels.hopper.sparse_backward.weights_producer import Producer
from flash_mla.kernels.hopper.sparse_backward.weights_shared import Scalars, Shared, Tensors, tile_of


def load_heads(x: cute.Tensor) -> Tma:
    """Loads of 64 heads and 64 columns of [tokens, 1, Hq, columns]: tiles of heads, chunks, tokens."""
    layout = cute.make_layout((x.shape[2], x.shape[3], x.shape[0]), stride=(x.stride[2], 1, x.stride[0]))
    return load_of(cute.make_tensor(x.iterator, layout), TILE_M, CHUNK)


def without_middle(x: cute.Tensor) -> cute.Tensor:
    """[tokens, 1, ...] as [tokens, ...]."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[0, *range(2, cute.rank(x))]))


class SparseWeights(Kernel[Config]):
    """f P and dS, in the workspace."""

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
        weights: cute.Tensor,  # [items, item / 2] int32
        scale_log2: Float32,
        scale: Float32,
        has_lengths: Int32,
        ctas: Int32,
        stream,
    ):
        tensors = Tensors(
            kv=kv.iterator,
            indices=without_middle(indices),
            lengths=lengths,
            lse2=lse2,
            shift=shift,
            left=left,
            weights=weights,
        )
        scalars = Scalars(scale_log2, scale, 2 * Int64(kv.stride[1]), kv.shape[1], has_lengths)
        kernel = self.kernel(load_heads(q), load_heads(d_out), tensors, scalars)
        launch_ctas(kernel, ctas, THREADS, self.config.weights_bytes(), stream)

    @cute.kernel
    def kernel(self, load_q: Tma, load_d_out: Tma, tensors: Tensors, scalars: Scalars):
        config, align, array = self.config, cute.struct.Align, cute.struct.MemRange
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            ring: align[array[dtype, ROW_STAGES * BLOCK * config.D], 1024]
            exchange: align[array[dtype, EXCHANGED], 128]
            sSeen: align[array[Uint16, ROW_STAGES * PRODUCER_WARPS], 8]
            barriers: array[Int64, Channel.words(ROW_STAGES)]

        shared = Shared.over(config, allocate(Storage, config, config.weights_bytes()))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels((shared.rows,), (load_q.atom, load_d_out.atom))
        cute.arch.sync_threads()

        index, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        tiles = tensors.indices.shape[0] * config.head_tiles
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(REGISTERS[1])
            producer, item = Producer.over(shared, tensors, scalars, warp_id - CONSUMER_WARPS), Int32(0)
            for i in cutlass.range(index, tiles, ctas, unroll=1):
                tile = tile_of(tensors, scalars, config.head_tiles, i)
                producer.run(load_q, load_d_out, tile, item)
                item = item + 2 + tile.steps
        else:
            cute.arch.setmaxregister_increase(REGISTERS[0])
            tid, _, _ = cute.arch.thread_idx()
            if warp_id < CONSUMER_WARPS // 2:
                self.consume(Consumer.over(shared, 0, tid), tensors, scalars, index, tiles, ctas)
            else:
                self.consume(Consumer.over(shared, 1, tid - WARPGROUP), tensors, scalars, index, tiles, ctas)
        shared.rows.check()

    @cute.jit
    def consume(self, side: Consumer, tensors: Tensors, scalars: Scalars, index, tiles, ctas) -> None:
        """A warpgroup's share of the CTA's tiles."""
        item = Int32(0)
        side.open()
        for i in cutlass.range(index, tiles, ctas, unroll=1):
            tile = tile_of(tensors, scalars, self.config.head_tiles, i)
            side.run(tensors, scalars, tile, item)
            item = item + 2 + tile.steps
        side.close()


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparseWeights.__call__`."""
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
        symbolic.tensor(Int32, (None, config.item // 2), tma=(0,)),
        *symbolic.numbers(Float32, Float32, Int32, Int32),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(SparseWeights(config), arguments(config), options)
