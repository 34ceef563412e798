"""Sparse prefill on Hopper: out = softmax(scale * q K^T) V over the rows of kv that a token names, V = K[:, :512].

Grid: one CTA an SM, persistent. A tile is one token with 64 of its heads; CTA c takes tiles c, c + CTAs, and so on, so
that the two tiles of a token with 128 heads run side by side and the L2 gives its rows to both.

Bound. A block of 64 keys costs 2 * 64 * 64 * (576 + 512) = 8.9 MFLOP, 2176 cycles of an SM's tensor cores, and 64 *
1152 = 73.7 KB out of the L2: 121 FLOP a byte. At 650 TFLOP/s the SMs together draw 5.4 TB/s; the gather alone reaches
7.3 TB/s from the L2 and 5.9 TB/s at random from 75 MB (H200). With few heads the same bytes serve fewer FLOP: they
bound.

Roles (384 threads; entry 168 registers):
    warpgroup 0   232 registers   S0 = Q K_even^T, softmax, O[:, 0:256]       `consumer.py`: MLA decode's, with a mask
    warpgroup 1   232 registers   S1 = Q K_odd^T, softmax, O[:, 256:512]
    warps 8-11     40 registers   gather of K by cp.async, 16 rows of a block each (`gather.py`); warp 8: TMA of Q
With at most 16 heads (`few.py`; 216 and 72 registers) warpgroup 0 takes the even blocks, warpgroup 1 the odd ones.
Shared memory is that of MLA decode: Q, two K buffers, P in the rope chunk of the buffer that its scores came from.

Channels, producer -> consumer (full arrivals / empty arrivals):
    K   warps 8-11 -> warpgroups 0, 1   4 stages = left, right half of the even, the odd block   4 * 33 / 4 warps
        Every thread arrives when its copies have landed, and a lane of each warp when it has stored `sSeen`. Stages
        are freed as in MLA decode: 0 and 2 by warpgroup 0, 1 and 3 by warpgroup 1, each after its P V.
    Q   warp 8 -> warpgroups 0, 1       1 stage                                                  1 + bytes / 8 warps
    P0  warpgroup 0 -> 1, P1  warpgroup 1 -> 0   named barriers, with the running max beside P

Steady state, a pair of blocks:
    warps 8-11    ids of the next pair | wait for stage 0, copy, arrive | 1 | 2 | 3
    warpgroup 0   softmax S0 | P0 -> smem | P0 V0 left  | wait P1 | P1 V1 left | S0 of the next pair
    warpgroup 1   S1         | wait P0    | P0 V0 right, softmax S1 under it | P1 -> smem | P1 V1 right
The gather runs on into the next tile while the consumers write a result.

A key whose id is negative, past the last row, or not among the first `lengths` has S = -inf by a bit of `sSeen`, and a
row of zeros in K: memory is not read for it, and no NaN of a row that no id names can come through V.

Supports BF16 and FP16; D 576 or 512; any number of heads, ids and rows; strides of q and kv in multiples of 16 bytes.
Where the rows do not fit into the L2, `order.py` puts the ids in the order of their rows first.

Measured and rejected: docs/design/sparse-prefill.md.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint16, const_expr

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import Tma, load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, launch_persistent
from flash_mla.kernels.hopper.limits import CHUNK, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.mla_decode.config import (
    CHUNK_ELEMENTS,
    CONSUMER_WARPS,
    DV,
    K_CHUNKS,
    STAGES,
)
from flash_mla.kernels.hopper.sparse_prefill.config import PRODUCER_WARPS, Config
from flash_mla.kernels.hopper.sparse_prefill.consumer import Consumer
from flash_mla.kernels.hopper.sparse_prefill.few import Shared as FewShared
from flash_mla.kernels.hopper.sparse_prefill.few import Tiles as FewTiles
from flash_mla.kernels.hopper.sparse_prefill.producer import Producer
from flash_mla.kernels.hopper.sparse_prefill.result import Tiles
from flash_mla.kernels.hopper.sparse_prefill.shared import Scalars, Shared, Tensors


class SparsePrefill(Kernel[Config]):
    """out, lse and max_logits of a token's heads."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [tokens, Hq, D]
        kv: cute.Tensor,  # [num_rows, 1, D]
        indices: cute.Tensor,  # [tokens, 1, topk] int32
        lengths: cute.Tensor,  # [tokens] int32; anything if not has_lengths
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        out: cute.Tensor,  # [tokens, Hq, 512], contiguous
        lse: cute.Tensor,  # [tokens, Hq] FP32, contiguous
        max_logits: cute.Tensor,  # [tokens, Hq] FP32, contiguous
        scale_log2: Float32,
        empty_lse: Float32,  # lse of a token without keys
        has_lengths: Int32,
        has_sink: Int32,
        ctas: Int32,
        stream,
    ):
        config = self.config
        tokens, Hq, topk = q.shape[0], q.shape[1], indices.shape[2]
        heads = config.tile_heads
        head_tiles = (Hq + (heads - 1)) // heads
        q_layout = cute.make_layout((Hq, config.D, tokens), stride=(q.stride[1], 1, q.stride[0]))
        load_q = load_of(cute.make_tensor(q.iterator, q_layout), heads, CHUNK)
        per_head = cute.make_layout((tokens, Hq), stride=(Hq, 1))
        id_layout = cute.make_layout((tokens, topk), stride=(indices.stride[0], 1))
        tensors = Tensors(
            kv=kv.iterator,
            indices=cute.make_tensor(indices.iterator, id_layout),
            lengths=lengths,
            sink=sink,
            out=cute.make_tensor(
                out.iterator, cute.make_layout((tokens, Hq, DV), stride=(cute.assume(Int64(Hq) * DV, divby=DV), DV, 1))
            ),
            lse=cute.make_tensor(lse.iterator, per_head),
            max_logits=cute.make_tensor(max_logits.iterator, per_head),
        )
        scalars = Scalars(
            scale_log2=scale_log2,
            empty_lse=empty_lse,
            row_bytes=2 * Int64(kv.stride[0]),
            num_rows=kv.shape[0],
            tiles=tokens * head_tiles,
            head_tiles=head_tiles,
            has_lengths=has_lengths,
            has_sink=has_sink,
        )
        launch_persistent(self.kernel(load_q, tensors, scalars), config, ctas, stream)

    @cute.kernel
    def kernel(self, load_q: Tma, tensors: Tensors, scalars: Scalars):
        config, align, array = self.config, cute.struct.Align, cute.struct.MemRange
        dtype, kind = DTYPES[config.dtype], FewShared if config.few else Shared
        fields = {
            "sQ": align[array[dtype, config.tile_heads * config.D], 1024],
            "sK": align[array[dtype, 2 * K_CHUNKS * CHUNK_ELEMENTS], 1024],
            **kind.fields(config),
            "sSeen": align[array[Uint16, 2 * PRODUCER_WARPS], 16],
            "k_barriers": array[Int64, Channel.words(STAGES)],
            "q_barriers": array[Int64, Channel.words(1)],
        }
        storage = cute.struct(type("Storage", (), {"__annotations__": fields}))
        shared = kind.over(config, allocate(storage, config))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        if warp_id == 0:
            open_channels((shared.k, shared.q), (load_q.atom,))
        cute.arch.sync_threads()

        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(config.registers[1])
            Producer.over(shared, tensors, scalars, *load_q, warp_id - CONSUMER_WARPS).run(cta, ctas)
        else:
            cute.arch.setmaxregister_increase(config.registers[0])
            tidx, _, _ = cute.arch.thread_idx()
            if const_expr(config.few):
                FewTiles.over(shared, warp_id // 4, tidx % WARPGROUP, tensors, scalars).run(cta, ctas)
            elif warp_id < CONSUMER_WARPS // 2:
                left = Consumer.over(shared, 0, tidx, scalars.scale_log2)
                Tiles(left, tensors, scalars).run(cta, ctas)
            else:
                right = Consumer.over(shared, 1, tidx - WARPGROUP, scalars.scale_log2)
                Tiles(right, tensors, scalars).run(cta, ctas)
        shared.k.check()
        shared.q.check()


# ---------------------------------------------------------------------------------------------------------- Launch


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparsePrefill.__call__`."""
    dtype, rows = DTYPES[config.dtype], (symbolic.size(), symbolic.size())
    return (
        symbolic.tensor(dtype, (*rows, config.D), tma=(0, 1)),
        symbolic.tensor(dtype, (None, 1, config.D), tma=(0,)),
        symbolic.tensor(Int32, (None, 1, None)),
        symbolic.tensor(Int32, (None,)),
        symbolic.tensor(Float32, (None,)),
        symbolic.tensor(dtype, (*rows, DV), align=16),
        symbolic.tensor(Float32, rows),
        symbolic.tensor(Float32, rows),
        *symbolic.numbers(Float32, Float32, Int32, Int32, Int32),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(SparsePrefill(config), arguments(config), options)
