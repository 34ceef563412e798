"""Prefill on Hopper: out = softmax(scale * Q K^T) V for P query tokens a request, dense or over cache pages.

Grid: one CTA an SM, persistent. A tile is TILE_M query rows of one head; tiles are handed out heaviest first by a
counter in global memory (`schedule.py`). Clusters of two take two neighbouring tiles of a head: each CTA loads half of
every block of K and V for both (TMA multicast), which halves what they read of L2.

Bound. A block of N keys costs a tile of M rows 2 * M * N * (D + Dv) FLOP, at 4096 a cycle and SM: 2048 cycles for
128 x 128 x (128 + 128), in which the softmax takes 1024 of exp2 (16 a cycle) and about 870 of a scheduler's 2048 issue
slots, TMA writes 64 KB, and wgmma reads 64 bytes a cycle for P V and, with Q in registers, for Q K^T (else 96), of the
128 that shared memory gives. So the tensor cores bound it, if the softmax of one warpgroup runs under the products of
the others. With D 64 exp2 takes as long as they do. 64 KB in 2048 cycles from each SM are 7 TB/s of L2 reads at 1.75
GHz.

Roles (entry registers: 65536 / threads, rounded down to 8):
    consumer warpgroups, 1 to 3   64 rows each: S = Q K^T, softmax, O += P V, lse     `consumer.py`
                                  (D 128 in 16 bits: Q is read to registers once a tile)
    warp 0 of the last warpgroup  takes tiles; TMA of Q, K, V                         `producer.py`
    warp 1 of the last warpgroup  TMA of out, where two Q stages fit, not in FP8      `store`, below
    its warps 2 and 3             in FP8: V transposed                                `transposer.py`

Channels, producer -> consumer (full arrivals / empty arrivals):
    numbers, of a cluster: producer of the first CTA -> of the other   4 stages   1 + 4 bytes / none
    tasks  producer -> all        2 stages   1 / consumer warps and the storing or the two transposing ones
    Q      producer -> consumers  q_stages   1 + bytes / 1, by the storing warp: out lies in place of the dead Q;
                                             one stage, and FP8: consumer warps
    K, V   producer -> consumers  stages     1 + bytes / consumer warps
           in FP8: V -> transposing warps    2 stages, 1 + bytes / 2
    turned transposing warps -> consumers    stages, 2 / consumer warps: V in FP8
    out    consumers -> storing warp         consumer warps; refilling Q empties it

Steady state of a consumer warpgroup, block n of a tile:
    (D 64, 192: wait for its turn) | issue S' = Q K[n+1]^T | issue O += P V[n] | (pass the turn on) | softmax of S'
    under P V[n] and under the products of the other warpgroups
With two Q stages this runs on across tiles: beside P V of a tile's last block goes Q K^T of the next tile's first, and
out is written under the products of the others. With one (192/128 and 256/256, whose Q is too large), the next tile's Q
is on its way under the last P V, and out is written under the scores that it gives; in FP8 too, from two stages. The
running max moves only when a block exceeds it by 2^8 (`LAZY`), so rescaling O is rare. Exact after normalisation.

FP8: both products are of e4m3, twice as fast, so that exp2 takes as long as they do at D 128. wgmma takes e4m3 with the
keys of a column of V side by side, so two warps transpose V on its way, 32 KB more traffic of shared memory for a block
of 128 keys. P is packed from a thread's own scores, whose keys are the order of the transposed V. P = 2^(S -
reference), which moves where P would leave e4m3's range (`e4m3.py`): small weights survive. out is divided by the sums
before rounding.

Where a mask or a layout says which blocks count, another kernel runs: `listed.py`.

Supports BF16, FP16 and FP8 (out BF16); D/Dv 64/64, 128/128, 192/128, 256/256; any row and key counts; any
strides that TMA takes; GQA; ragged lengths, 0 included; causal from any start; pages of 64 tokens behind a table;
factors of the scores and of V for each request and KV head. Unused slots may hold NaN: scores past the
end are masked and V rows zeroed. Block ids are forced inside the cache, lengths inside the table.

Measured: docs/design/prefill.md.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import Tma, load_of, store_of, tma_boxes
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.prefill.config import TASK, TASK_STAGES, TRANSPOSERS, ZEROS, Config
from flash_mla.kernels.hopper.prefill.consumer import Consumer
from flash_mla.kernels.hopper.prefill.producer import Producer
from flash_mla.kernels.hopper.prefill.shared import Scalars, Shared, Tensors, receive
from flash_mla.kernels.hopper.prefill.steps import consume
from flash_mla.kernels.hopper.prefill.transposer import Transposer

# ---------------------------------------------------------------------------------------------------------- Kernel


class Tmas(NamedTuple):
    """TMA of Q, K, V and out."""

    q: Tma
    k: Tma
    v: Tma
    out: Tma


def rows_first(x: cute.Tensor, paged: bool) -> cute.Tensor:
    """x as TMA takes it: rows and columns of a box first, of pages before their number."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[3, 4, 2, 1, 0] if paged else [2, 3, 1, 0]))


class Prefill(Kernel[Config]):
    """out and lse of a tile of queries at a time."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, P, D]
        k: cute.Tensor,  # [B, Hk, S_kv, D], or pages [B or 1, Hk, Nblk, 64, D]
        v: cute.Tensor,  # [B, Hk, S_kv, Dv], or pages [B or 1, Hk, Nblk, 64, Dv]
        out: cute.Tensor,  # [B, Hq, P, Dv]
        tensors: Tensors,
        scalars: Scalars,
        ctas: Int32,
        stream,
    ):
        config = self.config
        shares = config.cluster > 1
        tmas = Tmas(
            q=load_of(rows_first(q, False), config.tile_m, config.chunk(config.D)),
            k=load_of(rows_first(k, config.paged), config.box_rows(config.D), config.chunk(config.D), shares),
            v=load_of(rows_first(v, config.paged), config.box_rows(config.Dv), config.chunk(config.Dv), shares),
            out=store_of(rows_first(out, False), config.tile_m, CHUNK),
        )
        kernel, smem = self.kernel(tmas, out, tensors, scalars), config.smem_bytes()
        launch_ctas(kernel, ctas, config.threads, smem, stream, config.cluster)

    @cute.kernel
    def kernel(self, tmas: Tmas, out: cute.Tensor, tensors: Tensors, scalars: Scalars):
        config = self.config
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, config.q_stages * config.tile_m * config.D], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, config.stages * config.tile_n * config.D], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[dtype, config.v_stages * config.tile_n * config.Dv], 1024]
            sVt: cute.struct.Align[cute.struct.MemRange[dtype, config.turned_stages * config.tile_n * config.Dv], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[DTYPES[config.out], config.staged_elements], 128]
            zeros: cute.struct.Align[cute.struct.MemRange[Int32, ZEROS // 4 * config.fp8], 16]
            sTask: cute.struct.MemRange[Int32, TASK_STAGES * TASK]
            sNumbers: cute.struct.MemRange[Int32, config.number_stages]
            number_barriers: cute.struct.MemRange[Int64, Channel.words(config.number_stages)]
            task_barriers: cute.struct.MemRange[Int64, Channel.words(TASK_STAGES)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(config.q_stages)]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(config.stages)]
            v_barriers: cute.struct.MemRange[Int64, Channel.words(config.v_stages)]
            turned_barriers: cute.struct.MemRange[Int64, Channel.words(config.turned_stages)]
            out_barriers: cute.struct.MemRange[Int64, Channel.words(config.q_stages)]

        shared = Shared.over(config, allocate(Storage, config))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())

        if warp_id == 0:
            open_channels(shared.channels, tuple(tma.atom for tma in tmas))
        if const_expr(config.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        registers, few_registers = config.registers
        producer_warp = 4 * config.consumers
        if warp_id >= producer_warp:
            cute.arch.setmaxregister_decrease(few_registers)
            if warp_id == producer_warp:
                Producer.over(shared, *tmas.q, *tmas.k, *tmas.v).run(tensors, scalars, tmas.q.tensor)
            elif const_expr(not config.staged):
                if warp_id == producer_warp + 1:
                    self.store(shared, *tmas.out, scalars)
            elif const_expr(config.fp8):  # noqa: SIM102
                if warp_id > 4 * config.consumers + 3 - TRANSPOSERS:
                    Transposer.over(shared, warp_id - (4 * config.consumers + 4 - TRANSPOSERS)).run()
        else:
            cute.arch.setmaxregister_increase(registers)
            tidx, _, _ = cute.arch.thread_idx()
            consumer = Consumer.over(shared, warp_id // 4, tidx)
            consume(consumer, out, tensors, scalars)
        for channel in shared.channels:
            channel.check()

    @cute.jit
    def store(self, shared: Shared, tma_o: cute.CopyAtom, tO: cute.Tensor, scalars: Scalars) -> None:
        """Store each tile's out when all warps have written it, then free its Q stage."""
        config = self.config
        counts = (config.Dv // CHUNK, config.q_stages)
        many = cute.make_layout(counts, stride=(config.tile_m * CHUNK, config.tile_m * config.D))
        sO, gO = tma_boxes(tma_o, shared.sQ.iterator, many, tO, (config.tile_m, CHUNK), (None, None, None, None))
        for channel in (shared.tasks, shared.q):
            channel.read_by("storing warp", 1)
        done = Int32(0)
        row0, head, request, _kv_head, _length, _start, blocks, *_ = receive(shared, done)
        while blocks != 0:
            stage = done % config.q_stages
            shared.out.wait(stage, done // config.q_stages)
            for chunk in cutlass.range_constexpr(config.Dv // CHUNK):
                target = gO[None, row0 // config.tile_m, chunk, head - request * scalars.Hq, request]
                cute.copy(tma_o, sO[None, (chunk, stage)], target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            shared.q.release(stage)
            done = done + 1
            row0, head, request, _kv_head, _length, _start, blocks, *_ = receive(shared, done)


# ---------------------------------------------------------------------------------------------------------- Launch


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `Prefill.__call__`."""

    def tensor(*tail: int, dtype: str = config.dtype) -> cute.Tensor:
        return symbolic.tensor(DTYPES[dtype], (None, None, None, *tail), tma=range(2 + len(tail)))

    def keys(columns: int) -> cute.Tensor:
        return tensor(BLOCK, columns) if config.paged else tensor(columns)

    def vector(kind, length: int | None = None) -> cute.Tensor:
        return symbolic.tensor(kind, (length,))

    tensors = Tensors(
        table=symbolic.tensor(Int32, (None, None)),
        seq_lens=vector(Int32),
        start_pos=vector(Int32),
        sink=vector(Float32),
        score_scale=symbolic.tensor(Float32, (None, None), strided=True),
        value_scale=symbolic.tensor(Float32, (None, None), strided=True),
        lse=symbolic.tensor(Float32, (None, None)),
        counter=vector(Int32, 1),
        block_map=symbolic.tensor(Uint8, [None] * 4),
        mask_bits=symbolic.tensor(Int32, [None] * 4),
    )
    scalars = Scalars(*symbolic.numbers(Float32, *[Int32] * len(Scalars._fields[1:])))
    out = tensor(config.Dv, dtype=config.out)
    return tensor(config.D), keys(config.D), keys(config.Dv), out, tensors, scalars, Int32(1)


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(Prefill(config), arguments(config), options)
