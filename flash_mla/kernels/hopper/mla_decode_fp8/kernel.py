"""MLA decode over an FP8 cache on Hopper: out = softmax(scale * Q K^T) V with V = K[:, :512], K in e4m3.

Grid: one CTA an SM, persistent, in clusters of 1 or 2. The S_q * Hq query rows of a request are packed (row = head *
S_q + token) and cut into tiles of `tile_n`: 16, 32 or 64. A CTA computes one row tile against a range of the request's
keys; a cluster of two takes two tiles against the same keys, and each CTA loads half of a block's rows for both (TMA
multicast). Every CTA finds its range from `seq_lens` on the device (`split.py`); `combine.py` adds the pieces of
requests that were split.

Bound. A block of 64 keys is 36.9 KB: 1000 ns of an SM's share of 4.8 TB/s, 1700 cycles. Its products are 8.9 MFLOP,
1088 cycles of the FP8 tensor cores. Shared memory: TMA writes 37 KB, Q K^T reads 74 KB, ldmatrix 33 KB of V, V^T P^T
33 KB of P at 64 rows: 177 KB, 1380 cycles at 128 bytes a cycle. So bytes bound one row tile, and shared memory two.

Roles (512 threads; entry 128 registers):
    warpgroup 0      120 registers   S = Q K^T [64, 64] of every block, softmax, P in e4m3                `scores.py`
    warpgroups 1, 2  184 registers   O^T[256 columns each, tile_n] += V^T P^T; 16-bit queries   `values.py`, `query.py`
    warp 12           24 registers   TMA of Q and K                                                     `producer.py`
    warp 13           24 registers   asks L2 for the table; notes the split item for combine
V^T is the A operand, from registers: a transposing ldmatrix of 16-bit pairs gives a thread two neighbouring columns of
two neighbouring keys, and a byte permutation separates the columns. So V needs no transposed copy in shared memory,
and the rows of an O^T tile are pairs of columns, which is how they are stored. The order of the keys in P is the order
in which the accumulator of S has them: four bytes of a thread, so that P leaves by stmatrix without a shuffle.

Channels, producer -> consumer (full arrivals / empty arrivals):
    K      warp 12 -> all            5 stages of a block (4 beside 64 rows of 16-bit queries)   1 + bytes / 8 a CTA
        Freed by the values alone: P of a block is there only when its Q K^T is done.
    Q      warp 12 -> warpgroup 0    1 stage                                                    1 + bytes / 4 warps
        16-bit: warpgroups 1, 2 -> 0                                                            8 warps / 4 warps
    P      warpgroup 0 -> 1, 2       2 stages of a block, with the factors of O                 4 warps / 8 warps
    scale  warpgroup 0 -> 1, 2       1 stage: what turns O into out                             4 warps / 8 warps

Steady state, a block:
    warpgroup 0      wait S | S to other registers, scaled | start the next block's S | softmax | P -> smem
    warpgroups 1, 2  V of two tiles -> registers | wait P | four tiles, V of the third and fourth under the products

P = 2^(S - reference) in e4m3. The reference of a row stays whole powers of two away from its largest score so far, puts
that at 2^6, and moves down where a block's largest P would lie below 1, so that many small weights survive; O is
rescaled then (half of all blocks of 16 rows at S 4096, a third at S 8192: 2 columns x 8 of a thread). The largest
score is exact so: errors are 4 % smaller than with a reference that moves rarely. out is divided by the sum of the
rounded P, lse takes the sum before rounding.
At tile_n 16 and 32 bytes bound, and P has two terms, e4m3 of what the first leaves, and V^T P^T of each block is added
to O in FP32: errors are those of 16-bit products (1.7e-3 against 1.1e-2).

Queries in BF16 or FP16 are two e4m3 rows each (`query.py`): in the tile's free rows below 64, in a second tile at 64,
where Q K^T then takes twice the products.

Supports e4m3, BF16 and FP16 queries; D 576 or 512; any row count; any strides that TMA takes (multiples of 16 bytes), a
shared pool too; ragged lengths, 0 included; causal among the S_q tokens; descales and sinks. Unused slots may hold NaN:
the scores past the end are masked and the V rows zeroed. Block ids are forced inside the cache, lengths inside the
table.

Limit: the tensor cores keep some 14 bits of a sum of e4m3 products. A score is off by up to 5e-3 of the sum of the
magnitudes of its products, so scores of hundreds (q and k of magnitude 20) choose between near ties wrongly.

Measured: docs/design/mla-decode-fp8.md.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.combine import combine
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.mla_decode.shared import Scalars
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
from flash_mla.kernels.hopper.mla_decode_fp8.shared import Shared, Tensors
from flash_mla.kernels.hopper.mla_decode_fp8.values import Values
from flash_mla.kernels.hopper.partials import Partials, note_split, packed_rows
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
        packed_out, packed_lse = packed_rows(out, lse)
        tensors = Tensors(
            q=cute.make_tensor(q.iterator, cute.make_layout((B, rows, D), stride=(q.stride[0], q_row, 1))),
            table=table,
            seq_lens=seq_lens,
            sink=sink,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            out=packed_out,
            lse=packed_lse,
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
        combine(packed_out, packed_lse, *tensors.partials, sink, has_sink, S_q, Int32(1), stream)

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
            open_channels(shared.channels, tuple(tma[0] for tma in tmas if tma is not None))
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
    """Symbolic arguments of `MlaDecodeFp8.__call__`."""
    B, Hq, S_q = symbolic.size(), symbolic.size(), symbolic.size()

    def descale() -> cute.Tensor:
        return symbolic.tensor(Float32, (B, 1) if config.descale else (None,), strided=config.descale)

    return (
        symbolic.tensor(DTYPES[config.q], (B, Hq, S_q, config.D), tma=(0,)),
        symbolic.tensor(Float8E4M3FN, (B, 1, None, BLOCK, config.D), tma=(0, 2, 3)),
        symbolic.tensor(Int32, (B, None)),
        symbolic.tensor(Int32, (B,)),
        symbolic.tensor(Float32, (None,)),
        descale(),
        descale(),
        descale(),
        symbolic.tensor(DTYPES[config.out], (B, Hq, S_q, DV), align=16),
        symbolic.tensor(Float32, (B, Hq, S_q), strided=True),
        symbolic.tensor(Float32, (None,), align=16),
        Float32(1.0),
        Int32(0),
        Int64(config.q_unit),
        Int32(1),
        Int32(1),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine."""
    return symbolic.compiled(MlaDecodeFp8(config), arguments(config), options)
