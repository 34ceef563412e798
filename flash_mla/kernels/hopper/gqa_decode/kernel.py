"""GQA, MQA and MHA decode on Hopper: out = softmax(scale * Q K^T) V over paged caches of K and V.

Grid: one CTA an SM, persistent. The query rows of one KV head (row = head of the group * S_q + token) are cut into
tiles of `tile_n`; a CTA computes one tile of one KV head against a range of the request's keys, which it finds from
`seq_lens` on the device (`split.py`); `combine.py` adds the pieces of items that were split.

Bound: bytes. A block of 64 keys of one head is 64 * (D + Dv) * 2 = 32.8 KB at D 128 in BF16; at 4.5 TB/s an SM gets 34
bytes a ns, so a block every 960 ns = 1600 cycles (FP8: 800). Its products are 64 * tile_n * (D + Dv) * 2 FLOP, a few
per cent of that. So keys and output columns are the M of the products, and the few query rows their N:
    S^T [64, tile_n] = K Q^T        O^T [Dv, tile_n] += V^T P^T
Softmax is then 64 * tile_n / 128 elements a thread and a block: 4 at tile_n 8.

Roles (384 threads; up to 168 registers; where O is large the consumers take 232 and leave 40):
    warpgroups 0, 1   alternate blocks of the range, each with its own max, sum and O; merged at the end of the segment
    warp 8            TMA of Q, K and V; then notes the split item for combine

Channels, producer -> consumers (full arrivals / empty arrivals):
    K, V   warp 8 -> warpgroup 0 or 1   `stages` stages of one block    1 + bytes / 4 warps
    Q      warp 8 -> warpgroups 0, 1    `q_stages` stages of one tile   1 + bytes / 8 warps

Steady state of a warpgroup, a block: S^T | P against the max so far -> shared memory | one barrier, which also tells
whether any score exceeds that max by 2^8 (`LAZY`) | O^T. Only when one does, the max is found (shuffles and an exchange
of the four warps) and P made anew. P has two buffers, so that one barrier a block is enough.

FP8: K q^T as it is; V is converted to FP16 on its way to registers, as the A operand, and P is FP16. A transposing
ldmatrix of 16-bit pairs gives a thread two neighbouring columns of V for two neighbouring keys; a byte permutation
separates them. So row r of 16 rows of O^T is column 2 r, or 2 (r - 8) + 1, undone where O is stored.

Supports BF16, FP16, FP8 (e4m3); D and Dv up to 256; any Hq / Hk and S_q; any strides that TMA takes (multiples of 16
bytes), a shared pool too; ragged lengths, 0 included; causal among the S_q tokens; descales and sinks. Unused slots
may hold NaN: the scores past the end are masked and the V rows zeroed. Block ids are forced inside the cache, lengths
inside the table.

Measured: docs/design/gqa-decode.md.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.combine import combine
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gqa_decode.config import (
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    MAX_Q_STAGES,
    MAX_STAGES,
    PRODUCER_REGISTERS,
    QUERY_WARPS,
    THREADS,
    WARPS,
    Config,
)
from flash_mla.kernels.hopper.gqa_decode.consumer import Consumer
from flash_mla.kernels.hopper.gqa_decode.producer import Producer, prefetch_table
from flash_mla.kernels.hopper.gqa_decode.queries import Consumer as TwoTermConsumer
from flash_mla.kernels.hopper.gqa_decode.queries import Queries
from flash_mla.kernels.hopper.gqa_decode.result import Segments
from flash_mla.kernels.hopper.gqa_decode.shared import Scalars, Shared, Tensors
from flash_mla.kernels.hopper.limits import BLOCK, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.partials import Partials, note_split, packed_rows
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.walk import Done, walk
from flash_mla.kernels.hopper.work import find_work

# ---------------------------------------------------------------------------------------------------------- Kernel


class GqaDecode:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, S_q, D]
        k: cute.Tensor,  # [B, Hk, Nblk, 64, D]
        v: cute.Tensor,  # [B, Hk, Nblk, 64, Dv]
        table: cute.Tensor,  # [B, table_blocks] int32
        seq_lens: cute.Tensor,  # [B] int32
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        q_descale: cute.Tensor,  # [B, Hk] FP32; anything if not config.descale
        k_descale: cute.Tensor,
        v_descale: cute.Tensor,
        out: cute.Tensor,  # [B, Hq, S_q, Dv], contiguous
        lse: cute.Tensor,  # [B, Hq, S_q] FP32, contiguous
        workspace: cute.Tensor,  # [workspace_words(ctas)] FP32
        scale_log2: Float32,
        has_sink: Int32,
        q_row: Int64,  # elements between the packed query rows of a KV head
        k_requests: Int32,  # with pages of their own: B, or 1 where they share them
        v_requests: Int32,
        ctas: Int32,
        stream,
    ):
        config = self.config
        dtype = DTYPES[config.dtype]
        B, heads, S_q = q.shape[0], k.shape[1], q.shape[2]
        ratio = q.shape[1] // heads
        rows, q_row = ratio * S_q, cute.assume(q_row, divby=config.stride_unit)
        q_head = cute.assume(ratio * q.stride[1], divby=config.stride_unit)
        # [rows, D, Hk, B] and [64, D, Hk, Nblk, requests]
        gQ = cute.make_tensor(
            q.iterator, cute.make_layout((rows, config.D, heads, B), stride=(q_row, 1, q_head, q.stride[0]))
        )
        gK, gV = self.pages(k, k_requests), self.pages(v, v_requests)
        packed_out, packed_lse = packed_rows(out, lse)
        tensors = Tensors(
            gQ,
            table,
            seq_lens,
            sink,
            q_descale,
            k_descale,
            v_descale,
            packed_out,
            packed_lse,
            Partials.over(workspace, ctas, config.tile_n, config.Dv),
        )
        load, N, chunk = cpasync.CopyBulkTensorTileG2SOp(), config.tile_n, config.chunk
        tma_q = tQ = None
        if const_expr(config.q_terms == 1):
            tma_q, tQ = cpasync.make_tiled_tma_atom(load, gQ, row_layout(dtype, N, chunk), (N, chunk))
        tma_k, tK = cpasync.make_tiled_tma_atom(load, gK, row_layout(dtype, BLOCK, chunk), (BLOCK, chunk))
        tma_v, tV = cpasync.make_tiled_tma_atom(load, gV, row_layout(dtype, BLOCK, chunk), (BLOCK, chunk))
        scalars = Scalars(scale_log2, S_q, has_sink, rows, (rows + (N - 1)) // N, heads)
        self.kernel(tma_q, tQ, tma_k, tK, tma_v, tV, tensors, scalars).launch(
            grid=(ctas, 1, 1),
            block=(THREADS, 1, 1),
            smem=config.smem_bytes(),
            min_blocks_per_mp=1,
            stream=stream,
        )
        combine(packed_out, packed_lse, *tensors.partials, sink, has_sink, S_q, heads, stream)

    def pages(self, cache: cute.Tensor, requests) -> cute.Tensor:
        """A cache as [64, width, Hk, Nblk, requests]."""
        request, head, block, row, _ = cache.stride
        shape = (BLOCK, cache.shape[4], cache.shape[1], cache.shape[2], requests)
        return cute.make_tensor(cache.iterator, cute.make_layout(shape, stride=(row, 1, head, block, request)))

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom | None,
        tQ: cute.Tensor | None,
        tma_k: cute.CopyAtom,
        tK: cute.Tensor,
        tma_v: cute.CopyAtom,
        tV: cute.Tensor,
        tensors: Tensors,
        scalars: Scalars,
    ):
        config = self.config
        dtype = DTYPES[config.dtype]
        chunk_elements = BLOCK * config.chunk

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[
                cute.struct.MemRange[dtype, config.q_stages * config.k_chunks * config.q_rows * config.chunk], 1024
            ]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * config.k_chunks * chunk_elements], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * config.v_chunks * chunk_elements], 1024]
            sP: cute.struct.Align[cute.struct.MemRange[DTYPES[config.product], 4 * config.tile_n * BLOCK], 1024]
            sSum: cute.struct.MemRange[Float32, CONSUMER_WARPS * config.tile_n]
            sMax: cute.struct.MemRange[Float32, 2 * config.tile_n]
            sScan: cute.struct.MemRange[Int32, scan_words(WARPS)]
            sUnit: cute.struct.MemRange[Float32, config.q_stages * config.tile_n * (config.q_terms - 1)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(MAX_Q_STAGES)]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(MAX_STAGES)]
            v_barriers: cute.struct.MemRange[Int64, Channel.words(MAX_STAGES)]

        shared = Shared.over(config, allocate(Storage, config))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        tidx, _, _ = cute.arch.thread_idx()

        # barriers, and the work of this CTA
        prefetch_table(tensors.table, cta * THREADS + tidx)
        if warp_id == 0:
            open_channels(shared.channels, tuple(tma for tma in (tma_q, tma_k, tma_v) if tma is not None))
        table, seq_lens, groups = tensors.table, tensors.seq_lens, scalars.groups
        work = find_work(table, seq_lens, groups, cta, ctas, WARPS, shared.sScan)
        cute.arch.griddepcontrol_launch_dependents()

        if warp_id >= CONSUMER_WARPS:
            if const_expr(config.wide):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMER_WARPS:
                producer = Producer.over(shared, table, scalars, (tma_q, tma_k, tma_v), tQ, tK, tV)
                walk(work, table, seq_lens, groups, producer.load_segment, Done.nothing())
            elif warp_id == CONSUMER_WARPS + 1:
                note_split(tensors.partials, work, table, seq_lens, groups, cta)
            elif const_expr(config.q_terms == 2):
                queries = Queries.over(shared, scalars, tensors.q, warp_id - (WARPS - QUERY_WARPS))
                walk(work, table, seq_lens, groups, queries.load_segment, Done.nothing())
        else:
            if const_expr(config.wide):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            kind = Consumer if const_expr(config.q_terms == 1) else TwoTermConsumer
            segments = Segments(kind.over(shared, warp_id // 4, tidx % WARPGROUP), tensors, scalars, cta)
            walk(work, table, seq_lens, groups, segments.compute, Done.nothing())
        for channel in shared.channels:
            channel.check()


# ---------------------------------------------------------------------------------------------------------- Launch


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `GqaDecode.__call__`."""
    dtype = DTYPES[config.dtype]
    B, Hq, Hk, S_q, blocks = (symbolic.size() for _ in range(5))

    def pages(width: int) -> cute.Tensor:
        return symbolic.tensor(dtype, (B, Hk, blocks, BLOCK, width), tma=range(4))

    def descale() -> cute.Tensor:
        return symbolic.tensor(Float32, (B, Hk) if config.descale else (None,), strided=config.descale)

    return (
        symbolic.tensor(DTYPES[config.q], (B, Hq, S_q, config.D), tma=(0,)),
        pages(config.D),
        pages(config.Dv),
        symbolic.tensor(Int32, (B, None)),
        symbolic.tensor(Int32, (B,)),
        symbolic.tensor(Float32, (None,)),
        descale(),
        descale(),
        descale(),
        symbolic.tensor(DTYPES[config.out], (B, Hq, S_q, config.Dv), align=16),
        symbolic.tensor(Float32, (B, Hq, S_q), strided=True),
        symbolic.tensor(Float32, (None,), align=16),
        Float32(1.0),
        Int32(0),
        Int64(config.stride_unit),
        Int32(1),
        Int32(1),
        Int32(1),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine."""
    return symbolic.compiled(GqaDecode(config), arguments(config), options)
