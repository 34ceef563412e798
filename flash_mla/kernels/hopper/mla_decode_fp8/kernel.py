"""MLA decode over an FP8 cache on Hopper."""

from __future__ import annotations

import functools

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.combine import combine
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.mla_decode_fp8.config import (
    CHUNK,
    DV,
    MAX_STAGES,
    P_STAGES,
    PRODUCER_REGISTERS,
    ROPE,
    SCORES_REGISTERS,
    START,
    THREADS,
    VALUES_REGISTERS,
    WARPS,
    WARPS_A_GROUP,
    Config,
)
from flash_mla.kernels.hopper.mla_decode_fp8.producer import Producer, Tmas
from flash_mla.kernels.hopper.mla_decode_fp8.scores import Scores
from flash_mla.kernels.hopper.mla_decode_fp8.shared import Scalars, Shared, Tensors
from flash_mla.kernels.hopper.mla_decode_fp8.values import Values
from flash_mla.kernels.hopper.partials import Partials, note_split
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.table import prefetch_table
from flash_mla.kernels.hopper.work import find_work


class MlaDecodeFp8:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, S_q, D]
        k: cute.Tensor,  # [B, 1, Nblk, 64, D]
        table: cute.Tensor,  # [B, table_blocks] int32
        seq_lens: cute.Tensor,  # [B] int32
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        q_descale: cute.Tensor,  # [B, 1] FP32; anything if not config.descale
        k_descale: cute.Tensor,
        v_descale: cute.Tensor,
        out: cute.Tensor,  # [B, Hq, S_q, 512], contiguous
        lse: cute.Tensor,  # [B, Hq, S_q] FP32, contiguous
        workspace: cute.Tensor,  # [workspace_words(clusters)] FP32
        scale_log2: Float32,
        has_sink: Int32,
        q_row: Int64,  # elements between packed query rows
        requests: Int32,  # with a cache of their own: B, or 1 where they share it
        clusters: Int32,
        stream,
    ):
        config = self.config
        B, Hq, S_q = q.shape[0], q.shape[1], q.shape[2]
        rows, D, q_row = Hq * S_q, config.D, cute.assume(q_row, divby=config.q_unit)
        # [rows, D, B] and [64, D, Nblk, requests]
        gQ = cute.make_tensor(q.iterator, cute.make_layout((rows, D, B), stride=(q_row, 1, q.stride[0])))
        k_strides = (k.stride[3], 1, k.stride[2], k.stride[0])
        gK = cute.make_tensor(k.iterator, cute.make_layout((BLOCK, D, k.shape[2], requests), stride=k_strides))
        tensors = Tensors(
            q=cute.make_tensor(q.iterator, cute.make_layout((B, rows, D), stride=(q.stride[0], q_row, 1))),
            table=table,
            seq_lens=seq_lens,
            sink=sink,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            out=cute.make_tensor(out.iterator, cute.make_layout((B, rows, DV), stride=(rows * DV, DV, 1))),
            lse=cute.make_tensor(lse.iterator, cute.make_layout((B, rows), stride=(rows, 1))),
            partials=Partials.over(workspace, clusters, config.rows, DV),
        )
        load = load_k = cpasync.CopyBulkTensorTileG2SOp()
        if const_expr(config.cluster > 1):
            load_k = cpasync.CopyBulkTensorTileG2SMulticastOp()

        def tma(kind, tensor: cute.Tensor, box_rows: int, columns: int):
            box = row_layout(Float8E4M3FN, box_rows, columns, row_bytes=columns)
            return cpasync.make_tiled_tma_atom(kind, tensor, box, (box_rows, columns))

        share, has_rope, loads_q = BLOCK // config.cluster, config.rope > 0, config.q == "fp8"
        tmas = Tmas(
            q=tma(load, gQ, config.q_box, CHUNK) if loads_q else None,
            q_rope=tma(load, gQ, config.q_box, ROPE) if loads_q and has_rope else None,
            k=tma(load_k, gK, share, CHUNK),
            k_rope=tma(load_k, gK, share, ROPE) if has_rope else None,
        )
        groups = (rows + (config.rows - 1)) // config.rows
        self.kernel(tmas, gK, tensors, Scalars(scale_log2, S_q, has_sink, groups)).launch(
            grid=(clusters * config.cluster, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(config.cluster, 1, 1) if const_expr(config.cluster > 1) else None,
            smem=config.smem_bytes(),
            min_blocks_per_mp=1,
            stream=stream,
        )
        combine(
            tensors.out,
            tensors.lse,
            tensors.partials.out,
            tensors.partials.lse,
            tensors.partials.split_of,
            tensors.sink,
            has_sink,
            S_q,
            Int32(1),
            stream,
        )

    @cute.kernel
    def kernel(self, tmas: Tmas, pages: cute.Tensor, tensors: Tensors, scalars: Scalars):
        config, dtype = self.config, Float8E4M3FN

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, config.q_tiles * TILE_M * DV], 1024]
            sQ_rope: cute.struct.Align[cute.struct.MemRange[dtype, config.q_tiles * TILE_M * config.rope], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * BLOCK * DV], 1024]
            sK_rope: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * BLOCK * config.rope], 1024]
            sP: cute.struct.Align[cute.struct.MemRange[dtype, P_STAGES * config.p_parts * config.tile_n * BLOCK], 1024]
            sFactor: cute.struct.Align[cute.struct.MemRange[Float32, P_STAGES * TILE_M], 16]
            sMoved: cute.struct.Align[cute.struct.MemRange[Int32, P_STAGES * WARPS_A_GROUP], 16]
            sUnit: cute.struct.MemRange[Float32, TILE_M]
            sScale: cute.struct.MemRange[Float32, TILE_M]
            sScan: cute.struct.MemRange[Int32, scan_words(WARPS)]
            barriers: cute.struct.MemRange[Int64, Channel.words(MAX_STAGES + P_STAGES + 2)]

        shared = Shared.over(config, allocate(Storage, config))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        bidx, _, _ = cute.arch.block_idx()
        gdim, _, _ = cute.arch.grid_dim()
        rank, cluster_id, clusters = bidx % config.cluster, bidx // config.cluster, gdim // config.cluster

        # barriers, and the work of this cluster
        if warp_id == 0:
            for tma in tmas:
                if const_expr(tma is not None):
                    cpasync.prefetch_descriptor(tma[0])
            with cute.arch.elect_one():
                for channel in shared.channels:
                    channel.init()
            cute.arch.mbarrier_init_fence()
        if const_expr(config.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        if warp_id == 3 * WARPS_A_GROUP + 1:
            prefetch_table(tensors.table, cluster_id, clusters)
        table, seq_lens, sScan = tensors.table, tensors.seq_lens, shared.sScan
        work = find_work(table, seq_lens, scalars.groups, cluster_id, clusters, WARPS, sScan, START)
        if const_expr(config.cluster > 1):
            cute.arch.cluster_wait()
        cute.arch.griddepcontrol_launch_dependents()

        tidx, _, _ = cute.arch.thread_idx()
        if warp_id >= 3 * WARPS_A_GROUP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == 3 * WARPS_A_GROUP:
                Producer.over(shared, tensors, rank, tmas, pages).run(scalars, work)
            elif warp_id == 3 * WARPS_A_GROUP + 1:  # noqa: SIM102
                if rank == 0:
                    note_split(tensors.partials, work, table, seq_lens, scalars.groups, cluster_id)
        elif warp_id < WARPS_A_GROUP:
            cute.arch.setmaxregister_decrease(SCORES_REGISTERS)
            Scores.over(shared, tensors, scalars, rank, cluster_id, tidx).run(work)
        else:
            cute.arch.setmaxregister_increase(VALUES_REGISTERS)
            side = warp_id // WARPS_A_GROUP - 1
            Values.over(shared, tensors, scalars, rank, cluster_id, side, tidx % WARPGROUP).run(work)
        for channel in shared.channels:
            channel.check()


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `MlaDecodeFp8.__call__`, for compiling without a GPU."""
    dtype, q_dtype = Float8E4M3FN, DTYPES[config.q]

    def wide(divisibility: int = 16):
        return cute.sym_int64(divisibility=divisibility)  # a stride in elements, of 16 bytes

    def some():
        return cute.sym_int64()

    B, Hq, S_q = cute.sym_int32(), cute.sym_int32(), cute.sym_int32()
    blocks = cute.sym_int32()
    fp32 = functools.partial(make_fake_tensor, Float32)

    def descale():
        if config.descale:
            return fp32((B, 1), (some(), some()), assumed_align=4)
        return fp32((cute.sym_int32(),), (1,), assumed_align=4)

    return (
        make_fake_tensor(q_dtype, (B, Hq, S_q, config.D), (wide(config.q_unit), some(), some(), 1), assumed_align=16),
        make_fake_tensor(dtype, (B, 1, blocks, BLOCK, config.D), (wide(), some(), wide(), wide(), 1), assumed_align=16),
        make_fake_tensor(Int32, (B, cute.sym_int32()), (some(), 1), assumed_align=4),
        make_fake_tensor(Int32, (B,), (1,), assumed_align=4),
        fp32((cute.sym_int32(),), (1,), assumed_align=4),
        descale(),
        descale(),
        descale(),
        make_fake_tensor(DTYPES[config.out], (B, Hq, S_q, DV), (some(), some(), some(), 1), assumed_align=16),
        fp32((B, Hq, S_q), (some(), some(), some()), assumed_align=4),
        fp32((cute.sym_int32(),), (1,), assumed_align=16),
        Float32(1.0),
        Int32(0),
        Int64(config.q_unit),
        Int32(1),
        Int32(1),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine for sm_90a; takes seconds."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(MlaDecodeFp8(config), *arguments(config), stream, options=f"--enable-tvm-ffi {options}")
