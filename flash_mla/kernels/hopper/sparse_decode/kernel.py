"""Sparse decode on Hopper: out = softmax(scale * Q K^T) V, V = K[:, :512], K the rows that a token's indices name.

The rows lie in one paged cache or in two, in a row format (FP8) or in BF16; all heads of a token share them. A token is
what a request is in dense decode: its keys are its indices, in blocks of 64, those of the second cache behind.

Grid: one CTA an SM, persistent. A CTA takes a tile of a token's heads: all of up to 16 (`few.py`; `raw.py` over rows of
one FP32 scale for 128 columns), or 64 (`many.py`; `halves.py` over such rows); two CTAs with 64 heads each of one token
form a cluster. Every CTA finds its range of keys from the counts on the device (`split.py`); `combine.py` adds the
pieces of tokens that were split. In a short call a cluster is a team (`kernels/hopper/team.py`): each CTA takes some
pairs of blocks of one token beside up to 16 heads, and they merge in place. Nothing comes from the host: a captured
graph stays right when indices and counts change.

Bound. 64 heads against a block are 8.9 MFLOP, 2176 cycles of an SM's tensor cores. Its 64 rows are 42 KB in
fp8_ds_mla: 2300 cycles at an SM's share of 4.3 TB/s. To make them BF16 takes 16384 pairs of values through two
conversions: 1024 to 4096 cycles of an SM, and a cluster shares them. With 16 heads or fewer the bound is the bytes.

Roles (producers behind the two consumer warpgroups):
    many   warpgroups 0, 1   208 registers   as in MLA decode: scores of the even, of the odd block; half of O each
    few    warpgroups 0, 1   128 to 208    as in GQA decode: the even, the odd blocks; merged in the end
    raw    warpgroups 0, 1   200 or 208    the same, and they convert rows on the way to their products
    halves warpgroups 0, 1   232           64 heads over raw rows: scores of the even, of the odd block; half of O each
    producer warps: 4 at 88 registers beside many and over BF16 rows, 8 at 128 (112) beside few, 4 at 104 (88) beside
    raw, at 40 beside halves; the first loads Q (TMA), notes split items

Channels, producer -> consumer (full arrivals / empty arrivals):
    K   producer warps -> warpgroups 0, 1   4 stages = left, right half of the even, the odd block
            many: one a warp (in a cluster also the peer's bytes) / 4 warps of each CTA that fills the stage
            few: one a warp / the 4 warps that take the block
            BF16 rows: each lane besides, when its copies have landed; each CTA of a cluster fills its own stages
            raw: 4 stages = two pairs of whole blocks; one a warp and its rows' bytes / the 4 warps that take the block
            halves: 3 stages = whole blocks; the same / all 8 warps
        The mask of live keys travels with the left half of its block.
    Q   producer warp 0 -> warpgroups 0, 1   1 stage   1 + bytes / 8 warps
    rope, in a cluster over FP8 rows of 576 columns   2 stages = even, odd block   none / 4 warps a CTA, when scores
        are there: its chunk has landed in both CTAs, and P may be written over it

Steady state of a producer warp beside few: `ring.py`, `raw.py`; over BF16 rows: `copies.py`. Else, beside many, a batch
(up to 4 or 6 loads of 16 bytes a thread): start the loads of the next batch | wait for the stage | convert the batch,
e4m3 -> FP16 -> FP32 * scale -> BF16, one rounding | store it swizzled. Then, at the end of a half block: proxy fence,
arrive; in a cluster copy the rows to the peer (bulk copy, 1 KB a chunk a warp).

Supports any number of heads and of tokens, any topk, pages of any length at any pitch (multiples of 16 bytes), rows of
`config.ROWS`. Rows that no index names are never read, indices outside a cache name none; keys that are not there have
their scores masked and their rows zeroed, so that no NaN comes from them.

Measured: docs/design/sparse.md.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, const_expr

from flash_mla.kernels.hopper import split, symbolic
from flash_mla.kernels.hopper.boxes import Tma, load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.combine import combine
from flash_mla.kernels.hopper.decode import tensor_at
from flash_mla.kernels.hopper.gqa_decode import result
from flash_mla.kernels.hopper.gqa_decode.config import CONSUMERS, Bar
from flash_mla.kernels.hopper.gqa_decode.shared import Item
from flash_mla.kernels.hopper.launch import Kernel, launch_persistent, place_of_cta
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.mla_decode.config import STAGES, START
from flash_mla.kernels.hopper.mla_decode.consumer import Consumer as ManyConsumer
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.partials import Partials, note_split
from flash_mla.kernels.hopper.sparse_decode import few, halves, many, raw, raw_consumer
from flash_mla.kernels.hopper.sparse_decode.config import (
    CONSUMER_WARPS,
    DV,
    SPLIT_COST,
    Config,
)
from flash_mla.kernels.hopper.sparse_decode.copies import CopyProducer
from flash_mla.kernels.hopper.sparse_decode.producer import Producer
from flash_mla.kernels.hopper.sparse_decode.ring import RingProducer
from flash_mla.kernels.hopper.sparse_decode.rows import Cache, Lengths
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.team import find_post, merge, results_at, share_of, stand_by
from flash_mla.kernels.hopper.walk import Done, walk
from flash_mla.kernels.hopper.work import Work, find_equal_work, find_work


class Results(NamedTuple):
    """Global memory that is written, and the sink.

    sink [Hq] FP32; out [tokens, Hq, 512]; lse [tokens, Hq] FP32, natural log; partials: see `Partials`; counters: of
    teams.
    """

    sink: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    partials: Partials
    counters: cute.Tensor


class Tensors(NamedTuple):
    """The same beside the lengths, as the consumers of dense decode take them."""

    table: Lengths
    seq_lens: Lengths
    sink: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    partials: Partials
    counters: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); whether `sink` counts; groups of heads a token; heads; the order of rows, one a head; lse of a
    row without keys; of a call in teams, the teams of a token's tile of heads, and the pairs of blocks that a CTA takes
    at most.
    """

    scale_log2: Float32
    has_sink: Int32
    groups: Int32
    rows: Int32
    packing: Packing
    empty_lse: Float32
    teams: Int32
    each: Int32


class SparseDecode(Kernel[Config]):
    """out and lse of tokens over the rows that they name."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, S_q, Hq, D]
        rows: cute.Tensor,  # [pages, page, 1, D] BF16, or [pages, page, 1, row bytes]
        indices: cute.Tensor,  # [B, S_q, topk] int32
        lengths: cute.Tensor,  # [B] int32; anything if not has_lengths & 1
        extra_rows: cute.Tensor,  # the second cache, as the first; anything if there is none
        extra_indices: cute.Tensor,
        extra_lengths: cute.Tensor,  # anything if not has_lengths & 2
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        out: cute.Tensor,  # [B, S_q, Hq, 512], contiguous
        lse: cute.Tensor,  # [B, Hq, S_q] FP32, its memory [B, S_q, Hq]
        workspace: cute.Tensor,  # [Partials.words(clusters, tile_rows, 512)] FP32
        counters: Int64,  # of [CTAs] int32, 0, and 0 again behind the call; anything if not config.team
        scale_log2: Float32,
        empty_lse: Float32,  # lse of a row without keys
        has_lengths: Int32,
        has_sink: Int32,
        splits: Int32,  # whether a token may be split at all
        clusters: Int32,
        teams: Int32,  # of a token's tile of heads; anything if not config.team
        each: Int32,  # pairs of blocks of a CTA of a team, at most
        stream,
    ):
        config = self.config
        B, S_q, Hq = q.shape[0], q.shape[1], q.shape[2]
        tokens = B * S_q
        # [Hq, D, S_q, B]
        strides = (q.stride[2], 1, q.stride[1], q.stride[0])
        gQ = cute.make_tensor(q.iterator, cute.make_layout((Hq, config.D, S_q, B), stride=strides))
        caches = (Cache.over(config.layout, rows, indices, lengths, has_lengths & 1),)
        if const_expr(config.caches == 2):
            caches = (
                *caches,
                Cache.over(config.layout, extra_rows, extra_indices, extra_lengths, has_lengths >> 1),
            )
        results = Results(
            sink=sink,
            out=cute.make_tensor(
                out.iterator, cute.make_layout((tokens, Hq, DV), stride=(cute.assume(Int64(Hq) * DV, divby=DV), DV, 1))
            ),
            lse=cute.make_tensor(lse.iterator, cute.make_layout((tokens, Hq), stride=(Hq, 1))),
            partials=Partials.over(workspace.iterator, clusters, config.tile_rows, DV),
            counters=tensor_at(counters, Int32, (clusters * config.cluster,), (1,), 4),
        )
        groups = (Hq + (config.tile_rows - 1)) // config.tile_rows
        packing = Packing(Int32(1))
        scalars = Scalars(scale_log2, has_sink, groups, Hq, packing, empty_lse, teams, each)
        load_q = load_of(gQ, config.tile_heads, CHUNK)
        launch_persistent(self.kernel(load_q, caches, tokens, S_q, results, scalars, splits), config, clusters, stream)
        if splits != 0:
            combine(results.out, results.lse, *results.partials, sink, has_sink, packing, Int32(1), empty_lse, stream)

    @cute.kernel
    def kernel(
        self,
        load_q: Tma,
        caches: tuple[Cache, ...],
        tokens: Int32,
        S_q: Int32,
        results: Results,
        scalars: Scalars,
        splits: Int32,
    ):
        config = self.config
        align, array = cute.struct.Align, cute.struct.MemRange
        fields = {
            "sQ": align[array[BFloat16, config.tile_heads * config.D], 1024],
            "sK": align[array[BFloat16, config.k_bytes // 2], 1024],
            **shared_of(config).fields(config),
            "sScan": array[Int32, scan_words(config.warps)],
            "sLive": align[array[Uint8, config.blocks * BLOCK // 8], 8],
            "k_barriers": array[Int64, Channel.words(STAGES)],
            "q_barriers": array[Int64, Channel.words(1)],
        }
        storage = cute.struct(type("Storage", (), {"__annotations__": fields}))
        memory = allocate(storage, config)
        shared, words = shared_of(config).over(config, memory), cute.recast_ptr(memory.sK.data_ptr(), dtype=Float32)
        lengths = Lengths(caches, tokens, S_q)
        tensors = Tensors(lengths, lengths, *results)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank, cluster_id, clusters = place_of_cta(config.cluster)

        # barriers, and the work of this cluster
        if warp_id == CONSUMER_WARPS and const_expr(not config.team):
            lengths.prefetch_first(scalars.groups, cluster_id, clusters)
        if warp_id == 0:
            open_channels(shared.channels, (load_q.atom,))
        if const_expr(config.team):
            self.run_team(shared, words, load_q, lengths, tensors, scalars, rank, cluster_id, warp_id)
        else:
            self.run(shared, load_q, lengths, tensors, scalars, splits, rank, cluster_id, clusters, warp_id)
        for channel in shared.channels:
            channel.check()

    @cute.jit
    def run(self, shared, load_q, lengths, tensors, scalars, splits, rank, cluster_id, clusters, warp_id) -> None:
        """The roles of a CTA that takes what its cluster's range holds."""
        config = self.config
        if const_expr(config.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        find = partial(find_work, lengths, lengths, scalars.groups, cluster_id, clusters, config.warps, shared.sScan)
        work = Work.nothing()
        if const_expr(config.halves):
            # NOTE: two ways to find it spill
            work = find(START, SPLIT_COST)
        elif splits == 0:
            # NOTE: the host knows that all tokens have as many keys: 0.6 us less
            pairs = cutlass.max(1, split.pairs(lengths[0]))
            work = find_equal_work(lengths, scalars.groups, cluster_id, clusters, pairs)
        else:
            work = find(START, SPLIT_COST)
        if const_expr(config.cluster > 1):
            cute.arch.cluster_wait()
        cute.arch.griddepcontrol_launch_dependents()

        if warp_id >= CONSUMER_WARPS:
            lower_registers(config)
            warp = warp_id - CONSUMER_WARPS
            if warp == 0 and rank == 0:
                note_split(tensors.partials, work, lengths, lengths, scalars.groups, cluster_id)
            producer_of(config).over(shared, lengths, rank, warp, *load_q).run(scalars.groups, work)
        else:
            raise_registers(config)
            tidx, _, _ = cute.arch.thread_idx()
            if const_expr(config.few):
                segments = few_segments(shared, tensors, scalars, cluster_id, warp_id, tidx)
                walk(work, lengths, lengths, scalars.groups, segments.compute, Done.nothing())
            elif warp_id < CONSUMER_WARPS // 2:
                consumer = ManyConsumer.over(shared, 0, tidx, scalars.scale_log2)
                left = many.Segments(consumer, tensors, scalars, rank, cluster_id)
                walk(work, lengths, lengths, scalars.groups, left.compute, Done.nothing())
            else:
                consumer = ManyConsumer.over(shared, 1, tidx - WARPGROUP, scalars.scale_log2)
                right = many.Segments(consumer, tensors, scalars, rank, cluster_id)
                walk(work, lengths, lengths, scalars.groups, right.compute, Done.nothing())

    @cute.jit
    def run_team(self, shared, words, load_q, lengths, tensors, scalars, member, cluster_id, warp_id) -> None:
        """The roles of a CTA that takes a few pairs of its team's token, beside few heads."""
        config, members, nothing = self.config, self.config.cluster, Done.nothing()
        post = find_post(cluster_id, scalars.groups, scalars.teams)
        if warp_id == CONSUMER_WARPS:
            lengths.prefetch(post.request, (post.team * members + member) * scalars.each * split.PAIR)
        share = share_of(post, lengths[post.request], (Int32(0), Int32(0)), cluster_id, member, members, 2)
        place, part = share.place, share.part
        if warp_id >= CONSUMER_WARPS:
            lower_registers(config)
            producer = producer_of(config).over(shared, lengths, Int32(0), warp_id - CONSUMER_WARPS, *load_q)
            producer.load_segment(place, share.length, part, nothing)
            if const_expr(members > 1):
                stand_by(share)
        else:
            raise_registers(config)
            tidx, _, _ = cute.arch.thread_idx()
            # NOTE: over the rows: behind a barrier of both warpgroups nobody reads them
            results = results_at(tensors.partials, words, config.tile_heads, DV)
            own = tensors._replace(partials=results) if const_expr(members > 1) else tensors
            segments = few_segments(shared, own, scalars, Int32(0), warp_id, tidx)
            if part.last > part.first:
                segments.compute(place, share.length, part._replace(whole=members == 1), nothing)
            elif share.busy:
                segments.write_nothing(Item(place.request, Int32(0), place.group))
            if const_expr(members > 1):
                merge(
                    results, tensors, scalars, Int32(1), config.tile_heads, share, cluster_id, member, members, tidx,
                    CONSUMERS, Bar.MERGE,
                )  # fmt: skip


def lower_registers(config: Config) -> None:
    """Of a producer's thread, to what its role has."""
    if config.registers[1] < config.entry_registers:
        cute.arch.setmaxregister_decrease(config.registers[1])


def raise_registers(config: Config) -> None:
    """Of a consumer's thread, to what its role has."""
    if config.registers[0] > config.entry_registers:
        cute.arch.setmaxregister_increase(config.registers[0])


def few_segments(shared, tensors: Tensors, scalars: Scalars, cta, warp_id, tidx) -> result.Segments:
    """What a consumer warpgroup does with its CTA's segments where heads are the N of the products."""
    config = shared.config
    roles = halves if config.halves else raw_consumer if config.raw else few
    return roles.Segments(roles.Consumer.over(shared, warp_id // 4, tidx % WARPGROUP), tensors, scalars, cta)


def shared_of(config: Config) -> type:
    """The views of shared memory of this kind of CTA."""
    return raw.Shared if config.raw else few.Shared if config.few else many.Shared


def producer_of(config: Config) -> type[Producer]:
    """A producer warp of this kind of CTA."""
    if config.raw:
        return raw.RawProducer
    if config.copied:
        return CopyProducer
    return RingProducer if config.ringed else Producer


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparseDecode.__call__`."""
    B, S_q, Hq = symbolic.size(), symbolic.size(), symbolic.size()
    element = BFloat16 if config.layout.codes == 0 else Uint8

    def keys() -> tuple[cute.Tensor, ...]:
        return (
            symbolic.tensor(element, (None, None, 1, None), align=16),
            symbolic.tensor(Int32, (B, S_q, None)),
            symbolic.tensor(Int32, (None,)),
        )

    return (
        symbolic.tensor(BFloat16, (B, S_q, Hq, config.D), tma=(0, 1, 2)),
        *keys(),
        *keys(),
        symbolic.tensor(Float32, (None,)),
        symbolic.tensor(BFloat16, (B, S_q, Hq, DV), align=16),
        symbolic.tensor(Float32, (B, Hq, S_q), strided=True),
        symbolic.tensor(Float32, (None,), align=16),
        *symbolic.numbers(Int64, Float32, Float32, *[Int32] * 6),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel and its combine."""
    return symbolic.compiled(SparseDecode(config), arguments(config), options)
