"""GQA, MQA and MHA decode on Hopper: out = softmax(scale * Q K^T) V over paged caches of K and V.

Grid: one CTA an SM, persistent. The query rows of one KV head (`packing.py`) are cut into
tiles of `tile_n`; a CTA computes one tile of one KV head against a range of the request's keys, which it finds from
`seq_lens` on the device (`split.py`); `combine.py` adds the pieces of items that were split.

Bound: bytes. A block of 64 keys of one head is 64 * (D + Dv) * 2 = 32.8 KB at D 128 in BF16; at 4.5 TB/s an SM gets 34
bytes a ns, so a block every 960 ns = 1600 cycles (FP8: 800). Its products are 64 * tile_n * (D + Dv) * 2 FLOP, a few
per cent of that. So keys and output columns are the M of the products, and the few query rows their N:
    S^T [64, tile_n] = K Q^T        O^T [Dv, tile_n] += V^T P^T
Softmax is then 64 * tile_n / 128 elements a thread and a block: 4 at tile_n 8.

Roles (384 threads; up to 168 registers; where O is large the consumers take 232 and leave 40):
    warpgroups 0, 1   alternate blocks of the range, each with its own max, sum and O; merged at the end of the segment
    warp 8            TMA of Q, K and V
    warp 9            notes the split item for combine
    warps 10, 11      16-bit queries over FP8

Channels, producer -> consumers (full arrivals / empty arrivals):
    K, V   warp 8 -> warpgroup 0 or 1   `stages` stages of one block    1 + bytes / 4 warps
    Q      warp 8 -> warpgroups 0, 1    `q_stages` stages of one tile   1 + bytes / 8 warps
           warps 10, 11 -> the same                                     2 / 8 warps

Steady state of a warpgroup, a block: S^T | P against the max so far -> shared memory | one barrier, which also tells
whether any score exceeds that max by 2^8 (`LAZY`) | O^T. Only when one does, the max is found (shuffles and an exchange
of the four warps) and P made anew. P has two buffers, so that one barrier a block is enough.

FP8: K q^T as it is; V is converted to FP16 on its way to registers, as the A operand, and P is FP16. A transposing
ldmatrix of 16-bit pairs gives a thread two neighbouring columns of V for two neighbouring keys; a byte permutation
separates them. So row r of 16 rows of O^T is column 2 r, or 2 (r - 8) + 1, undone where O is stored.

16-bit queries over FP8 are two e4m3 rows each (`queries.py`), made by warps 10 and 11 and added up in the scores: K q^T
has 2 tile_n columns then, and is read once as ever.

Where tables are short and rows few, the CTAs of a cluster are a team (`kernels/hopper/team.py`): each takes a pair of
blocks of one tile, one a warpgroup, and they merge what they have in place.

Supports BF16, FP16, FP8 (e4m3), BF16 and FP16 queries over FP8; D and Dv up to 256; any Hq / Hk and S_q; any strides
that TMA takes (multiples of 16 bytes), a shared pool too; ragged lengths, 0 included; causal among the S_q tokens;
descales and sinks. Unused slots may hold NaN: the scores past the end are masked and the V rows zeroed. Block ids are
forced inside the cache, lengths inside the table.

Measured: docs/design/gqa-decode.md.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from flash_mla.kernels.hopper import decode
from flash_mla.kernels.hopper.boxes import Tma, load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gqa_decode.config import (
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    CONSUMERS,
    MAX_Q_STAGES,
    MAX_STAGES,
    PRODUCER_REGISTERS,
    QUERY_WARPS,
    THREADS,
    WARPS,
    Bar,
    Config,
)
from flash_mla.kernels.hopper.gqa_decode.consumer import Consumer
from flash_mla.kernels.hopper.gqa_decode.producer import Producer, prefetch_table
from flash_mla.kernels.hopper.gqa_decode.queries import Consumer as TwoTermConsumer
from flash_mla.kernels.hopper.gqa_decode.queries import Queries
from flash_mla.kernels.hopper.gqa_decode.result import Segments
from flash_mla.kernels.hopper.gqa_decode.shared import Scalars, Shared
from flash_mla.kernels.hopper.launch import Kernel, place_of_cta
from flash_mla.kernels.hopper.limits import BLOCK, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.partials import note_split
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.team import find_share, merge, results_at, stand_by
from flash_mla.kernels.hopper.walk import Done, walk
from flash_mla.kernels.hopper.work import find_work

# ---------------------------------------------------------------------------------------------------------- Kernel


class GqaDecode(Kernel[Config]):
    """The kernel for one Config; `decode.Decode` launches it."""

    def loads(self, q: cute.Tensor, k: cute.Tensor, v: cute.Tensor) -> tuple[cute.Tensor, Tma | None, Tma, Tma]:
        """Q for warps that make two rows of each, and TMA of Q, if it is not for them, K and V."""
        columns = self.config.chunk
        load_q = load_of(q, self.config.tile_n, columns) if self.config.q_terms == 1 else None
        return q, load_q, load_of(k, BLOCK, columns), load_of(v, BLOCK, columns)

    def scalars(self, scale_log2, packing, has_sink, empty_lse, rows, tiles, heads) -> Scalars:
        return Scalars(scale_log2, packing, has_sink, empty_lse, rows, tiles, heads)

    @cute.kernel
    def kernel(self, q: cute.Tensor, load_q: Tma | None, load_k: Tma, load_v: Tma, tensors: Tensors, scalars: Scalars):
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
            open_channels(shared.channels, tuple(load.atom for load in (load_q, load_k, load_v) if load is not None))
        table, seq_lens, groups = tensors.table, tensors.seq_lens, scalars.groups
        loads = load_q, load_k, load_v
        if const_expr(config.team):
            rank, cluster_id, _ = place_of_cta(config.cluster)
            share = find_share(table, seq_lens, groups, cluster_id, rank, config.cluster)
            cute.arch.griddepcontrol_launch_dependents()
            self.run_team(shared, q, loads, tensors, scalars, share, rank, cluster_id, warp_id)
        else:
            work = find_work(table, seq_lens, groups, cta, ctas, WARPS, shared.sScan, piece=config.piece)
            cute.arch.griddepcontrol_launch_dependents()
            self.run(shared, q, loads, tensors, scalars, work, cta, warp_id)
        for channel in shared.channels:
            channel.check()

    @cute.jit
    def run(self, shared, q, loads, tensors, scalars, work, cta, warp_id) -> None:
        """The roles of a CTA that takes what its range holds."""
        config, table, seq_lens, groups = self.config, tensors.table, tensors.seq_lens, scalars.groups
        piece = config.piece
        if warp_id >= CONSUMER_WARPS:
            if const_expr(config.wide):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMER_WARPS:
                producer = Producer.over(shared, table, scalars, *loads)
                walk(work, table, seq_lens, groups, producer.load_segment, Done.nothing(), piece)
            elif warp_id == CONSUMER_WARPS + 1:
                if const_expr(piece == 0):
                    note_split(tensors.partials, work, table, seq_lens, groups, cta)
            elif const_expr(config.q_terms == 2):
                queries = Queries.over(shared, scalars, q, warp_id - (WARPS - QUERY_WARPS))
                walk(work, table, seq_lens, groups, queries.load_segment, Done.nothing(), piece)
        else:
            if const_expr(config.wide):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            tidx, _, _ = cute.arch.thread_idx()
            kind = Consumer if const_expr(config.q_terms == 1) else TwoTermConsumer
            segments = Segments(kind.over(shared, warp_id // 4, tidx % WARPGROUP), tensors, scalars, cta)
            walk(work, table, seq_lens, groups, segments.compute, Done.nothing(), piece)

    @cute.jit
    def run_team(self, shared, q, loads, tensors, scalars, share, member, cluster_id, warp_id) -> None:
        """The roles of a CTA that takes a pair of its team's item."""
        config, nothing = self.config, Done.nothing()
        if warp_id >= CONSUMER_WARPS:
            if const_expr(config.wide):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_id == CONSUMER_WARPS:
                Producer.over(shared, tensors.table, scalars, *loads).load_pair(share)
            elif const_expr(config.q_terms == 2):  # noqa: SIM102
                if warp_id >= WARPS - QUERY_WARPS:
                    queries = Queries.over(shared, scalars, q, warp_id - (WARPS - QUERY_WARPS))
                    queries.load_segment(share.place, share.length, share.part, nothing)
            if const_expr(config.cluster > 1):
                stand_by(share)
        else:
            if const_expr(config.wide):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            tidx, _, _ = cute.arch.thread_idx()
            kind = Consumer if const_expr(config.q_terms == 1) else TwoTermConsumer
            consumer = kind.over(shared, warp_id // 4, tidx % WARPGROUP)
            if const_expr(config.cluster == 1):
                if share.busy:
                    segments = Segments(consumer, tensors, scalars, Int32(0))
                    segments.compute(share.place, share.length, share.part._replace(whole=True), nothing)
            else:
                results = results_at(tensors.partials, shared.free_words, config.tile_n, config.Dv)
                if share.busy:
                    segments = Segments(consumer, tensors._replace(partials=results), scalars, Int32(0))
                    segments.compute(share.place, share.length, share.part, nothing)
                merge(
                    results, tensors, scalars, scalars.heads, config.tile_n, share, cluster_id, member, config.cluster,
                    tidx, CONSUMERS, Bar.MERGE,
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- Launch


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine."""
    return decode.build(GqaDecode(config), config.q, config.dtype, config.out, options)
