"""Sparse prefill on Hopper: out = softmax(scale * q K^T) V over the rows of kv that each token names, V = K[:, :512].

To be described.
"""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.mla_decode import DTYPES
from flash_mla.kernels.hopper.sparse_prefill.config import (
    BLOCK,
    CHUNK,
    CONSUMER_REGISTERS,
    CONSUMERS,
    DV,
    K_CHUNKS,
    PRODUCER_REGISTERS,
    PRODUCERS,
    STAGED,
    STAGES,
    THREADS,
    TILE_M,
    Config,
)
from flash_mla.kernels.hopper.sparse_prefill.consumer import Consumer, consume
from flash_mla.kernels.hopper.sparse_prefill.producer import Producer
from flash_mla.kernels.hopper.sparse_prefill.shared import CHUNK_ELEMENTS, Scalars, Shared, Tensors


class SparsePrefill:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def row_layout(self, chunks: int):
        """[64, 64 * chunks] in shared memory: chunks of 8 KiB one after another, each 64 rows of 128 swizzled bytes."""
        kind = warpgroup.SmemLayoutAtomKind.K_SW128
        atom = warpgroup.make_smem_layout_atom(kind, DTYPES[self.config.dtype])
        return cute.tile_to_shape(atom, (BLOCK, CHUNK * chunks), order=(0, 1))

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, S_q, Hq, D]
        kv: cute.Tensor,  # [pages, page, D], rows evenly spaced
        indices: cute.Tensor,  # [B, S_q, topk] int32
        lengths: cute.Tensor,  # [B] int32; anything if not has_lengths
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        out: cute.Tensor,  # [B, S_q, Hq, 512], contiguous
        lse: cute.Tensor,  # [B, S_q, Hq] FP32, contiguous
        max_logits: cute.Tensor,  # [B, S_q, Hq] FP32, contiguous
        scale_log2: Float32,
        q_token: Int64,  # elements between tokens of q
        index_token: Int64,  # and of indices
        has_lengths: Int32,
        has_sink: Int32,
        ctas: Int32,
        stream,
    ):
        config = self.config
        B, S_q, Hq = q.shape[0], q.shape[1], q.shape[2]
        tokens, head_tiles = B * S_q, (Hq + (TILE_M - 1)) // TILE_M
        q_strides = (q.stride[2], 1, cute.assume(q_token, divby=8))
        gQ = cute.make_tensor(q.iterator, cute.make_layout((Hq, config.D, tokens), stride=q_strides))
        tma_q, tQ = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), gQ, self.row_layout(1), (TILE_M, CHUNK)
        )
        per_head = cute.make_layout((tokens, Hq), stride=(Hq, 1))
        tensors = Tensors(
            rows=kv.iterator,
            indices=cute.make_tensor(
                indices.iterator, cute.make_layout((tokens, indices.shape[2]), stride=(index_token, 1))
            ),
            lengths=lengths,
            sink=sink,
            out=cute.make_tensor(out.iterator, cute.make_layout((tokens, Hq, DV), stride=(Hq * DV, DV, 1))),
            lse=cute.make_tensor(lse.iterator, per_head),
            max_logits=cute.make_tensor(max_logits.iterator, per_head),
        )
        scalars = Scalars(
            scale_log2=scale_log2,
            row_bytes=2 * Int64(kv.stride[1]),
            num_rows=kv.shape[0] * kv.shape[1],
            tiles=tokens * head_tiles,
            head_tiles=head_tiles,
            S_q=S_q,
            has_lengths=has_lengths,
            has_sink=has_sink,
        )
        self.kernel(tma_q, tQ, tensors, scalars).launch(
            grid=(ctas, 1, 1),
            block=(THREADS, 1, 1),
            smem=config.smem_bytes(),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tma_q: cute.CopyAtom, tQ: cute.Tensor, tensors: Tensors, scalars: Scalars):
        config = self.config
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, TILE_M * config.D], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, 2 * K_CHUNKS * CHUNK_ELEMENTS], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[dtype, CONSUMERS // 32 * STAGED], 128]
            sMax: cute.struct.MemRange[Float32, 2 * TILE_M]
            sSum: cute.struct.MemRange[Float32, 2 * TILE_M]
            sTop: cute.struct.MemRange[Float32, 2 * TILE_M]
            sSeen: cute.struct.Align[cute.struct.MemRange[cutlass.Uint16, 8], 16]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(STAGES)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(1)]

        allocated = -(-Storage.size_in_bytes() // 1024) * 1024
        assert allocated == config.smem_bytes(), (
            f"{config} allocates {allocated} bytes, its ledger says {config.smem_bytes()}"
        )
        storage = utils.SmemAllocator().allocate(Storage)
        shared = Shared.over(config, storage, self.row_layout)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        tidx, _, _ = cute.arch.thread_idx()

        if warp_id == 0:
            cpasync.prefetch_descriptor(tma_q)
            with cute.arch.elect_one():
                shared.q.init()
                for stage in cutlass.range_constexpr(STAGES):
                    # every producer thread when its copies have landed, and a lane of each warp
                    cute.arch.mbarrier_init(shared.k.full + stage, PRODUCERS + PRODUCERS // 32)
                    cute.arch.mbarrier_init(shared.k.empty + stage, shared.k.readers)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp_id >= CONSUMERS // 32:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            warp = warp_id - CONSUMERS // 32
            Producer.over(config, shared, tensors, scalars, tma_q, tQ, warp).run(cta, ctas)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            if warp_id < 4:
                consume(Consumer.over(config, shared, 0, tidx, scalars.scale_log2), tensors, scalars, cta, ctas)
            else:
                consume(Consumer.over(config, shared, 1, tidx - 128, scalars.scale_log2), tensors, scalars, cta, ctas)


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparsePrefill.__call__`, for compiling without a GPU."""
    dtype = DTYPES[config.dtype]
    size, some = cute.sym_int32, cute.sym_int64
    wide = functools.partial(cute.sym_int64, divisibility=8)  # a stride in elements, of 16 bytes
    fp32 = functools.partial(make_fake_tensor, cutlass.Float32, assumed_align=4)
    ints = functools.partial(make_fake_tensor, Int32, assumed_align=4)
    return (
        make_fake_tensor(dtype, (size(), size(), size(), config.D), (some(), some(), wide(), 1), assumed_align=16),
        make_fake_tensor(dtype, (size(), size(), config.D), (some(), wide(), 1), assumed_align=16),
        ints((size(), size(), size()), (some(), some(), 1)),
        ints((size(),), (1,)),
        fp32((size(),), (1,)),
        make_fake_tensor(dtype, (size(), size(), size(), DV), (some(), some(), some(), 1), assumed_align=16),
        fp32((size(), size(), size()), (some(), some(), 1)),
        fp32((size(), size(), size()), (some(), some(), 1)),
        Float32(1.0),
        Int64(8),
        Int64(8),
        Int32(0),
        Int32(0),
        Int32(1),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel for sm_90a; takes seconds."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(SparsePrefill(config), *arguments(config), stream, options=f"--enable-tvm-ffi {options}")
