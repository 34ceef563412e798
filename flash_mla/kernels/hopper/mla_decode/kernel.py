"""MLA decode on Hopper: out = softmax(scale * Q K^T) V with V = K[:, :512], over a paged cache of one KV head.

Grid: one CTA an SM, persistent, in clusters of 1 or 2. The S_q * Hq query rows of a request are packed (`packing.py`)
and cut into tiles of 64; a CTA computes one row tile against a range of the request's keys. A cluster of
two takes two row tiles of one request against the same keys and loads each block of K once for both (TMA multicast).
Every CTA finds its range from `seq_lens` on the device (`split.py`); `combine.py` adds the pieces of requests that
were split.

Bound. A block of 64 keys costs a CTA 2 * 64 * 64 * (576 + 512) = 8.9 MFLOP, 2176 cycles of an SM's tensor cores, and
64 * 576 * 2 = 73.7 KB of K. One row tile: 121 FLOP a byte, so bytes bound it (the chip's balance is 165 to 200). Two
tiles: 242, tensor cores. Beside them shared memory: Q K^T reads 147 KB, P V 74 KB and TMA writes 74 KB a block, 2300
cycles at 128 bytes a cycle, so the tensor cores are never far ahead of it.

Roles (384 threads; entry 168 registers):
    warpgroup 0   232 registers   S0 = Q K_even^T, softmax, O[:, 0:256]
    warpgroup 1   232 registers   S1 = Q K_odd^T, softmax, O[:, 256:512]
    warp 8         40 registers   TMA of Q and K; L2 prefetch one pair ahead             `producer.py`
    warp 9         40 registers   asks L2 for the table; notes the split item for combine
Both consumers need both P: each keeps its own in registers and finds the other's in shared memory, in the rope chunk
of the K buffer that the scores came from, which is dead by then. So Q and two K buffers fill shared memory.

Channels, producer -> consumer (full arrivals / empty arrivals):
    K   warp 8 -> warpgroups 0, 1   4 stages = left, right half of the even, the odd block   1 + bytes / 4 warps a CTA
        Stages 0 and 2 are freed by warpgroup 0, stages 1 and 3 by warpgroup 1, each after its P V; the rope chunk of
        the even block travels with stage 1, of the odd block with stage 2: with the half whose reader reads that P.
    Q   warp 8 -> warpgroups 0, 1   1 stage                                                  1 + bytes / 8 warps
    P0  warpgroup 0 -> 1, P1  warpgroup 1 -> 0   named barriers, with the running max beside P

Steady state, a pair of blocks:
    warpgroup 0   softmax S0 | P0 -> smem | P0 V0 left  | wait P1 | P1 V1 left | S0 of the next pair
    warpgroup 1   S1         | wait P0    | P0 V0 right, softmax S1 under it | P1 -> smem | P1 V1 right
    (cluster 1: P0 V0 right goes before S1)
Where tables are short and rows are few, the CTAs of a cluster are a team instead (`kernels/hopper/team.py`): each takes
a few pairs of one row tile, and they merge what they have in place. Time is latency there: warp 9 asks for Q, and a CTA
of one pair leaves an odd block past the end alone (`team.py`).
The running max is shared by the two and moves only when a block exceeds it by 2^8 (`LAZY`): P0 is then final when it is
written, and rescaling O is rare. Exact after normalisation.

Supports BF16 and FP16; D 576 or 512; any row count; any strides that TMA takes (multiples of 16 bytes), a shared pool
too; ragged lengths, 0 included; causal among the S_q tokens. Unused slots may hold NaN: the scores past the end are
masked and the V rows zeroed. Block ids are forced inside the cache, lengths inside the table.

Measured: docs/design/mla-decode.md.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from flash_mla.kernels.hopper import decode
from flash_mla.kernels.hopper.boxes import Tma, load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, place_of_cta
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.mla_decode.config import (
    CHUNK_ELEMENTS,
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    CONSUMERS,
    DV,
    K_CHUNKS,
    MOST_PARTS,
    PRODUCER_REGISTERS,
    STAGES,
    START,
    WARPS,
    Bar,
    Config,
)
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer
from flash_mla.kernels.hopper.mla_decode.producer import Producer
from flash_mla.kernels.hopper.mla_decode.result import Segments
from flash_mla.kernels.hopper.mla_decode.shared import Scalars, Shared
from flash_mla.kernels.hopper.mla_decode.team import TeamSegments
from flash_mla.kernels.hopper.partials import note_split
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.table import prefetch_table
from flash_mla.kernels.hopper.team import find_share, merge, results_at, stand_by
from flash_mla.kernels.hopper.walk import Done, walk
from flash_mla.kernels.hopper.work import find_work

# ---------------------------------------------------------------------------------------------------------- Kernel


class MlaDecode(Kernel[Config]):
    """The kernel for one Config; `decode.Decode` launches it."""

    def loads(self, q: cute.Tensor, k: cute.Tensor, _v: None) -> tuple[Tma, Tma, cute.Tensor]:
        """TMA of Q and K; K itself, [64, D, Nblk, requests]."""
        k = k[None, None, 0, None, None]
        return (
            load_of(q[None, None, 0, None], self.config.tile_m, CHUNK),
            load_of(k, BLOCK, CHUNK, self.config.sharers > 1),
            k,
        )

    def scalars(self, scale_log2, packing, has_sink, empty_lse, _rows, tiles, _heads) -> Scalars:
        return Scalars(scale_log2, packing, has_sink, empty_lse, tiles)

    @cute.kernel
    def kernel(self, load_q: Tma, load_k: Tma, pages: cute.Tensor, tensors: Tensors, scalars: Scalars):
        config = self.config
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, TILE_M * config.D], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[dtype, 2 * K_CHUNKS * CHUNK_ELEMENTS], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[dtype, CONSUMER_WARPS * STAGED], 128]
            sMax: cute.struct.MemRange[Float32, 2 * TILE_M]
            sSum: cute.struct.MemRange[Float32, 2 * TILE_M]
            sScan: cute.struct.MemRange[Int32, scan_words(WARPS)]
            k_barriers: cute.struct.MemRange[Int64, Channel.words(STAGES)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(1)]

        shared = Shared.over(config, allocate(Storage, config))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank, cluster_id, clusters = place_of_cta(config.cluster)

        # barriers, and the work of this cluster
        if warp_id == 0:
            open_channels(shared.channels, (load_q.atom, load_k.atom))
        if const_expr(config.sharers > 1):
            cute.arch.cluster_arrive_relaxed()
        if warp_id == CONSUMER_WARPS + 1:
            prefetch_table(tensors.table, cluster_id, clusters)
        table, seq_lens, groups = tensors.table, tensors.seq_lens, scalars.groups
        piece = config.piece
        if const_expr(config.team):
            share = find_share(table, seq_lens, groups, cluster_id, rank, config.cluster, config.team)
        else:
            most_parts = MOST_PARTS // config.cluster
            work = find_work(
                table, seq_lens, groups, cluster_id, clusters, WARPS, shared.sScan, START, piece=piece,
                most_parts=most_parts,
            )  # fmt: skip
        if const_expr(config.sharers > 1):
            cute.arch.cluster_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if const_expr(config.team):
            self.run_team(shared, load_q, load_k, pages, tensors, scalars, share, rank, cluster_id, warp_id)
        else:
            self.run(shared, load_q, load_k, pages, tensors, scalars, work, rank, cluster_id, warp_id)
        for channel in shared.channels:
            channel.check()

    @cute.jit
    def run(self, shared, load_q, load_k, pages, tensors, scalars, work, rank, cluster_id, warp_id) -> None:
        """The roles of a CTA that takes what its cluster's range holds."""
        config, table, seq_lens, groups = self.config, tensors.table, tensors.seq_lens, scalars.groups
        piece = config.piece
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMER_WARPS:
                producer = Producer.over(shared, table, rank, *load_q, *load_k, pages)
                done = walk(work, table, seq_lens, groups, producer.load_segment, Done.nothing(), piece)
                producer.outlive_peers(done)
            elif warp_id == CONSUMER_WARPS + 1:  # noqa: SIM102
                if rank == 0 and const_expr(piece == 0):
                    note_split(tensors.partials, work, table, seq_lens, groups, cluster_id)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            tidx, _, _ = cute.arch.thread_idx()
            if warp_id < CONSUMER_WARPS // 2:
                left = Segments(Consumer.over(shared, 0, tidx, scalars.scale_log2), tensors, scalars, rank, cluster_id)
                walk(work, table, seq_lens, groups, left.compute, Done.nothing(), piece)
            else:
                tid = tidx - WARPGROUP
                right = Segments(Consumer.over(shared, 1, tid, scalars.scale_log2), tensors, scalars, rank, cluster_id)
                walk(work, table, seq_lens, groups, right.compute, Done.nothing(), piece)

    @cute.jit
    def run_team(self, shared, load_q, load_k, pages, tensors, scalars, share, member, cluster_id, warp_id) -> None:
        """The roles of a CTA that takes a pair of its team's item."""
        config, table, zero, nothing = self.config, tensors.table, Int32(0), Done.nothing()
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMER_WARPS:
                producer = Producer.over(shared, table, zero, *load_q, *load_k, pages)
                if const_expr(config.short):
                    producer.load_pair(share)
                else:
                    producer.load_segment(share.place, share.length, share.part, nothing)
            elif warp_id == CONSUMER_WARPS + 1:
                # NOTE: before the length is there
                producer = Producer.over(shared, table, zero, *load_q, *load_k, pages)
                producer.load_q(share.place.group, share.place.request, zero)
                if share.part.last == share.part.first:
                    # a CTA must outlive what it asked for
                    shared.q.wait(0, zero)
            if const_expr(config.cluster > 1):
                stand_by(share)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            tidx, _, _ = cute.arch.thread_idx()
            results = results_at(tensors.partials, shared.free_words, TILE_M, DV)
            own = tensors._replace(partials=results)
            if share.busy:
                if warp_id < CONSUMER_WARPS // 2:
                    left = TeamSegments(Consumer.over(shared, 0, tidx, scalars.scale_log2), own, scalars, zero, zero)
                    left.compute(share.place, share.length, share.part, nothing)
                else:
                    tid = tidx - WARPGROUP
                    right = TeamSegments(Consumer.over(shared, 1, tid, scalars.scale_log2), own, scalars, zero, zero)
                    right.compute(share.place, share.length, share.part, nothing)
            if const_expr(config.cluster > 1):
                merge(
                    results, tensors, scalars, Int32(1), config.tile_m, share, cluster_id, member, config.cluster,
                    tidx, CONSUMERS, Bar.SUMS,
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- Launch


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine."""
    return decode.build(MlaDecode(config), config.dtype, config.dtype, config.dtype, options)
