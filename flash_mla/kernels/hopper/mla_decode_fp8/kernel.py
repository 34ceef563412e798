"""MLA decode over an FP8 cache on Hopper: out = softmax(scale * Q K^T) V with V = K[:, :512], K in e4m3.

Grid: one CTA an SM, persistent, in clusters of 1 or 2. The S_q * Hq query rows of a request are packed (`packing.py`)
and cut into tiles of `tile_n`: 16, 32 or 64. A CTA computes one row tile against a range of the request's
keys; a cluster of two takes two tiles against the same keys, and each CTA loads half of a block's rows for both (TMA
multicast). Every CTA finds its range from `seq_lens` on the device (`split.py`); `combine.py` adds the pieces of
requests that were split. In a short call a cluster is a team, which merges in place (`kernels/hopper/team.py`).

Bound. A block of 64 keys is 36.9 KB: 1000 ns of an SM's share of 4.8 TB/s, 1700 cycles. Its products are 8.9 MFLOP,
1088 cycles of the FP8 tensor cores. Shared memory: TMA writes 37 KB, Q K^T reads 74 KB, ldmatrix 33 KB of V, V^T P^T
33 KB of P at 64 rows: 177 KB, 1380 cycles at 128 bytes a cycle. So bytes bound one row tile, and shared memory two.

Roles (512 threads; entry 128 registers):
    warpgroup 0      120 registers   S = Q K^T [64, 64] of every block, softmax, P in e4m3                `scores.py`
    warpgroups 1, 2  184 registers   O^T[256 columns each, tile_n] += V^T P^T; 16-bit queries   `values.py`, `query.py`
    warp 12           24 registers   TMA of Q and K                                                     `producer.py`
        (112, 184 and 32 registers in teams)
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

from flash_mla.kernels.hopper import decode
from flash_mla.kernels.hopper.boxes import load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.launch import Kernel, place_of_cta
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
    TEAM_PRODUCER_REGISTERS,
    TEAM_SCORES_REGISTERS,
    VALUES_REGISTERS,
    WARPS,
    WARPS_A_GROUP,
    Bar,
    Config,
)
from flash_mla.kernels.hopper.mla_decode_fp8.producer import Loads, Producer
from flash_mla.kernels.hopper.mla_decode_fp8.role import Role
from flash_mla.kernels.hopper.mla_decode_fp8.scores import Scores
from flash_mla.kernels.hopper.mla_decode_fp8.shared import Shared
from flash_mla.kernels.hopper.mla_decode_fp8.values import Values
from flash_mla.kernels.hopper.partials import note_split
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.table import prefetch_table
from flash_mla.kernels.hopper.team import find_share, merge, stand_by
from flash_mla.kernels.hopper.walk import Done
from flash_mla.kernels.hopper.work import find_work


class MlaDecodeFp8(Kernel[Config]):
    """The kernel for one Config; `decode.Decode` launches it."""

    def loads(self, q: cute.Tensor, k: cute.Tensor, _v: None) -> tuple[Loads, cute.Tensor, cute.Tensor]:
        """TMA of Q and K; K itself, [64, D, Nblk, requests], and q [B, rows, D]."""
        config, share = self.config, BLOCK // self.config.sharers
        q, k = q[None, None, 0, None], k[None, None, 0, None, None]
        loads_q, several = config.q == "fp8", config.sharers > 1
        loads = Loads(
            q=load_of(q, config.q_box, CHUNK) if loads_q else None,
            q_rope=load_of(q, config.q_box, ROPE) if loads_q and config.rope else None,
            k=load_of(k, share, CHUNK, several),
            k_rope=load_of(k, share, ROPE, several) if config.rope else None,
        )
        return loads, k, cute.make_tensor(q.iterator, cute.select(q.layout, mode=[2, 0, 1]))

    def scalars(self, scale_log2, packing, has_sink, empty_lse, _rows, tiles, _heads) -> Scalars:
        return Scalars(scale_log2, packing, has_sink, empty_lse, tiles)

    @cute.kernel
    def kernel(self, loads: Loads, pages: cute.Tensor, q: cute.Tensor, tensors: Tensors, scalars: Scalars):
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
        rank, cluster_id, clusters = place_of_cta(config.cluster)

        # barriers, and the work of this cluster
        if warp_id == 0:
            open_channels(shared.channels, tuple(load.atom for load in loads if load is not None))
        if const_expr(config.sharers > 1):
            cute.arch.cluster_arrive_relaxed()
        if warp_id == 3 * WARPS_A_GROUP + 1:
            prefetch_table(tensors.table, cluster_id, clusters)
        table, seq_lens, groups, sScan = tensors.table, tensors.seq_lens, scalars.groups, shared.sScan
        if const_expr(config.team):
            share = find_share(table, seq_lens, groups, cluster_id, rank, config.cluster, config.team)
        else:
            work = find_work(table, seq_lens, groups, cluster_id, clusters, WARPS, sScan, START)
        if const_expr(config.sharers > 1):
            cute.arch.cluster_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if const_expr(config.team):
            self.run_team(shared, loads, pages, q, tensors, scalars, share, rank, cluster_id, warp_id)
        else:
            self.run(shared, loads, pages, q, tensors, scalars, work, rank, cluster_id, warp_id)
        for channel in shared.channels:
            channel.check()

    @cute.jit
    def run(self, shared, loads, pages, q, tensors, scalars, work, rank, cluster_id, warp_id) -> None:
        """The roles of a CTA that takes what its cluster's range holds."""
        tidx, _, _ = cute.arch.thread_idx()
        if warp_id >= 3 * WARPS_A_GROUP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == 3 * WARPS_A_GROUP:
                Producer.over(shared, tensors, rank, loads, pages).run(scalars, work)
            elif warp_id == 3 * WARPS_A_GROUP + 1:  # noqa: SIM102
                if rank == 0:
                    table, seq_lens = tensors.table, tensors.seq_lens
                    note_split(tensors.partials, work, table, seq_lens, scalars.groups, cluster_id)
        elif warp_id < WARPS_A_GROUP:
            cute.arch.setmaxregister_decrease(SCORES_REGISTERS)
            Scores.over(Role(shared, tensors, scalars, rank, cluster_id, tidx)).run(work)
        else:
            cute.arch.setmaxregister_increase(VALUES_REGISTERS)
            side = warp_id // WARPS_A_GROUP - 1
            Values.over(Role(shared, tensors, scalars, rank, cluster_id, tidx % WARPGROUP), q, side).run(work)

    @cute.jit
    def run_team(self, shared, loads, pages, q, tensors, scalars, share, member, cluster_id, warp_id) -> None:
        """The roles of a CTA that takes a few pairs of its team's item."""
        config, members, zero, nothing = self.config, self.config.cluster, Int32(0), Done.nothing()
        tidx, _, _ = cute.arch.thread_idx()
        place, length, part = share.place, share.length, share.part._replace(whole=members == 1)
        results = shared.results(tensors.partials)
        own = tensors._replace(partials=results) if const_expr(members > 1) else tensors
        if warp_id >= 3 * WARPS_A_GROUP:
            cute.arch.setmaxregister_decrease(TEAM_PRODUCER_REGISTERS)
            if warp_id == 3 * WARPS_A_GROUP:
                producer = Producer.over(shared, tensors, zero, loads, pages)
                if const_expr(config.team == 1):
                    producer.load_pair(share)
                else:
                    producer.load_segment(place, length, part, nothing)
            if const_expr(members > 1):
                stand_by(share)
        elif warp_id < WARPS_A_GROUP:
            cute.arch.setmaxregister_decrease(TEAM_SCORES_REGISTERS)
            scores = Scores.over(Role(shared, own, scalars, zero, zero, tidx))
            if part.last > part.first:
                scores.segment(place, length, part, nothing)
            elif share.busy:
                scores.write_nothing(place.request, scores.row0(place))
            if const_expr(members > 1):
                stand_by(share)
        else:
            cute.arch.setmaxregister_increase(VALUES_REGISTERS)
            side = warp_id // WARPS_A_GROUP - 1
            Values.over(Role(shared, own, scalars, zero, zero, tidx % WARPGROUP), q, side).segment(
                place, length, part, nothing
            )
            if const_expr(members > 1):
                merge(
                    results, tensors, scalars, Int32(1), config.tile_n, share, cluster_id, member, members,
                    tidx - WARPGROUP, 2 * WARPGROUP, Bar.MERGE,
                )  # fmt: skip


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine."""
    return decode.build(MlaDecodeFp8(config), config.q, "fp8", config.out, options)
