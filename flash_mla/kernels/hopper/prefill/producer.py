"""The loading warp of a prefill: it takes tiles, describes them to the other roles, and fills Q, K and V by TMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_mla.kernels.hopper.boxes import tma_boxes
from flash_mla.kernels.hopper.launch import place_of_cta
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.prefill import schedule
from flash_mla.kernels.hopper.prefill.config import NUMBER_STAGES, TASK_STAGES, Config
from flash_mla.kernels.hopper.prefill.shared import Scalars, Shared, Task, Tensors
from flash_mla.kernels.hopper.table import block_of


class Source(NamedTuple):
    """Where a tile's K and V are: the table, the request, its KV head and its keys."""

    table: cute.Tensor
    request: Int32
    kv_head: Int32
    length: Int32


@cute.jit
def pick(condition, a, b):
    """a if the condition holds, else b."""
    return a if condition else b


@cute.jit
def span(config: Config, tensors: Tensors, scalars: Scalars, request, P):
    """The position of a request's first query, and its keys."""
    start, length = Int32(0), scalars.S_kv
    if scalars.has_start != 0:
        start = tensors.start_pos[request]
    if const_expr(config.paged):
        length = cutlass.min(length, start + P)
    if scalars.has_lens != 0:
        length = cutlass.min(length, tensors.seq_lens[request])
    return start, cutlass.max(0, length)


@cute.jit
def key_blocks(config: Config, scalars: Scalars, row0, length, start) -> schedule.Blocks:
    """The key blocks of a tile."""
    least, most = cutlass.min, cutlass.max
    total, whole = schedule.blocks(length, start + row0, config.tile_m, False, config.tile_n, least, most)
    if scalars.causal != 0:
        total, whole = schedule.blocks(length, start + row0, config.tile_m, True, config.tile_n, least, most)
    return schedule.Blocks(total, whole)


@cute.jit
def take(counter: cute.Tensor):
    """The next number of the counter, for the whole warp."""
    number = Int32(0)
    if cute.arch.lane_idx() == 0:
        number = cute.arch.atomic_add(counter.iterator, Int32(1))
    return cute.arch.shuffle_sync(number, offset=0)


@cute.jit
def send_to_peer(place, value, bar, peer) -> None:
    """Store 4 bytes in the same place of another CTA of the cluster, whose barrier counts them."""
    cute.arch.inline_ptx(
        "{ .reg .b32 d, m; mapa.shared::cluster.u32 d, {$r0}, {$r3}; mapa.shared::cluster.u32 m, {$r2}, {$r3}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [d], {$r1}, [m]; }",
        read_only_args=[place, value, bar, peer],
    )


@dataclass(frozen=True)
class Producer:
    """The warp that takes tiles and fills Q, K and V by TMA.

    sQ [box, chunk, q_stage]; gQ [box, row tile, chunk, head, request]; sK, sV [box, box of the block, chunk, stage];
    gK, gV [box, block, chunk, KV head, request], or of pages [box, chunk, page, KV head, request].
    """

    config: Config
    shared: Shared
    rank: Int32
    tma_q: cute.CopyAtom
    tma_k: cute.CopyAtom
    tma_v: cute.CopyAtom
    sQ: cute.Tensor
    gQ: cute.Tensor
    sK: cute.Tensor
    gK: cute.Tensor
    sV: cute.Tensor
    gV: cute.Tensor

    @staticmethod
    def over(shared: Shared, tma_q, tQ, tma_k, tK, tma_v, tV) -> Producer:
        config = shared.config

        def boxes(tma, sX, rows: int, box_rows: int, columns: int, stages: int, tensor, coordinate):
            chunk = config.chunk(columns)
            counts = (rows // box_rows, columns // chunk, stages)
            many = cute.make_layout(counts, stride=(box_rows * chunk, rows * chunk, rows * columns))
            return tma_boxes(tma, sX.iterator, many, tensor, (box_rows, chunk), coordinate)

        free = (None, None, None, None)
        key = (0, *free) if config.paged else free
        m, n = config.tile_m, config.tile_n
        sQ, gQ = boxes(tma_q, shared.sQ, m, m, config.D, config.q_stages, tQ, free)
        sK, gK = boxes(tma_k, shared.sK, n, config.box_rows(config.D), config.D, config.stages, tK, key)
        sV, gV = boxes(tma_v, shared.sV, n, config.box_rows(config.Dv), config.Dv, config.v_stages, tV, key)
        for channel in (shared.numbers, shared.tasks, shared.q, shared.k, shared.v):
            channel.written_by("producer")
        rank, _, _ = place_of_cta(config.cluster)
        return Producer(config, shared, rank, tma_q, tma_k, tma_v, sQ, gQ, sK, gK, sV, gV)

    @cute.jit
    def load_q(self, row_tile, head, request, count) -> None:
        """The tile's query rows; rows past the last arrive as zeros."""
        q, stages = self.shared.q, self.config.q_stages
        stage = count % stages
        q.acquire(stage, count // stages)
        with cute.arch.elect_one():
            q.expect(stage, self.config.itemsize * self.config.tile_m * self.config.D)
        for chunk in cutlass.range_constexpr(self.config.D // self.config.chunk(self.config.D)):
            source = self.gQ[None, row_tile, chunk, head, request]
            cute.copy(self.tma_q, source, self.sQ[None, (0, chunk, stage)], tma_bar_ptr=q.bar(stage))

    @cute.jit
    def load_block(self, values: cutlass.Constexpr, source: Source, pages: cute.Tensor, block, count) -> None:
        """Block number `count` of the CTA: of K, or V; keys past the last arrive as zeros, or as a page holds them."""
        config, shared = self.config, self.shared
        channel = shared.v if const_expr(values) else shared.k
        tma, sX, gX = (self.tma_v, self.sV, self.gV) if const_expr(values) else (self.tma_k, self.sK, self.gK)
        columns = config.Dv if const_expr(values) else config.D
        stages = config.v_stages if const_expr(values) else config.stages
        # NOTE: a broadcast dim has one element
        head = cutlass.min(source.kv_head, cute.size(gX, mode=[3]) - 1)
        request = cutlass.min(source.request, cute.size(gX, mode=[4]) - 1)
        stage = count % stages
        channel.acquire(stage, count // stages)
        with cute.arch.elect_one():
            channel.expect(stage, config.itemsize * config.tile_n * columns)
        bar, chunks = channel.bar(stage), columns // config.chunk(columns)
        if const_expr(config.cluster > 1):
            self.load_share(tma, gX[None, None, None, head, request], sX[None, (None, None, stage)], block, chunks, bar)
        else:
            for chunk in cutlass.range_constexpr(chunks):
                if const_expr(config.paged):
                    for i in cutlass.range_constexpr(config.tile_n // BLOCK):
                        target = sX[None, (i, chunk, stage)]
                        cute.copy(tma, gX[None, chunk, pages[i], head, request], target, tma_bar_ptr=bar)
                else:
                    cute.copy(tma, gX[None, block, chunk, head, request], sX[None, (0, chunk, stage)], tma_bar_ptr=bar)

    @cute.jit
    def load_share(self, tma, gX: cute.Tensor, sX: cute.Tensor, block, chunks: cutlass.Constexpr, bar) -> None:
        """This CTA's share of a block, to every CTA of the cluster: of its chunks, or of the rows of each."""
        cluster, rank = self.config.cluster, self.rank
        everyone = cutlass.Int16((1 << cluster) - 1)
        if const_expr(chunks % cluster == 0):
            for i in cutlass.range_constexpr(0, chunks, cluster):
                source, target = gX[None, block, i + rank], sX[None, 0, i + rank]
                cute.copy(tma, source, target, tma_bar_ptr=bar, mcast_mask=everyone)
        else:
            for chunk in cutlass.range_constexpr(chunks):
                source, target = gX[None, cluster * block + rank, chunk], sX[None, rank, chunk]
                cute.copy(tma, source, target, tma_bar_ptr=bar, mcast_mask=everyone)

    @cute.jit
    def find_pages(self, source: Source, block, pages: cute.Tensor) -> None:
        """The physical pages of a block, forced inside the cache; past the request's last page, that page again."""
        if const_expr(self.config.paged):
            table, many = source.table, self.config.tile_n // BLOCK
            last = cutlass.max(0, (source.length + BLOCK - 1) // BLOCK - 1)
            for i in cutlass.range_constexpr(many):
                logical = cutlass.min(block * many + i, last)
                pages[i] = block_of(table, source.request, logical, cute.size(self.gK, mode=[2]))

    @cute.jit
    def load_all(self, source: Source, blocks, count, row_tile, head, done) -> None:
        """The first `blocks` blocks, K one ahead of V, and Q, whose place may be freed later than K's."""
        pages, before = self.page_ids(), self.page_ids()
        self.find_pages(source, 0, before)
        self.load_block(False, source, before, 0, count)
        self.load_q(row_tile, head, source.request, done)
        for n in cutlass.range(1, blocks, unroll=1):
            self.find_pages(source, n, pages)
            self.load_block(False, source, pages, n, count + n)
            self.load_block(True, source, before, n - 1, count + n - 1)
            before.store(pages.load())
        self.load_block(True, source, before, blocks - 1, count + blocks - 1)

    def page_ids(self) -> cute.Tensor:
        """Room for the page numbers of a block."""
        return cute.make_rmem_tensor(self.config.tile_n // BLOCK, Int32)

    @cute.jit
    def run(self, tensors: Tensors, scalars: Scalars, tQ: cute.Tensor) -> None:
        """Take tiles, describe them to the others, and load them."""
        config, sTask, tasks = self.config, self.shared.sTask, self.shared.tasks
        P, heads = cute.size(tQ, mode=[0]), cute.size(tQ, mode=[2]) * cute.size(tQ, mode=[3])
        row_tiles = (P + config.rows - 1) // config.rows
        tiles = row_tiles * heads
        _, index, clusters = place_of_cta(config.cluster)
        count, done = Int32(0), Int32(0)
        order = schedule.Order(scalars.section, scalars.late, scalars.tail)
        while index < tiles:
            row_tile, head = schedule.tile(index, row_tiles, heads, order, cutlass.min, pick)
            last_tile = row_tile * config.cluster + config.cluster - 1
            # NOTE: the upper of two causal tiles has a block more; the CTAs take it in turn
            place = (self.rank + done) % config.cluster if const_expr(config.uneven) else self.rank
            row_tile = row_tile * config.cluster + place
            request = head // scalars.Hq
            q_head, row0 = head - request * scalars.Hq, row_tile * config.tile_m
            start, length = span(config, tensors, scalars, request, P)
            total, whole = key_blocks(config, scalars, row0, length, start)
            blocks, more = total, Int32(0)
            if const_expr(config.uneven):
                more = key_blocks(config, scalars, last_tile * config.tile_m, length, start).total - total
            kv_head = q_head // (scalars.Hq // scalars.Hk)
            source = Source(tensors.table, request, kv_head, length)

            stage = done % TASK_STAGES
            tasks.acquire(stage, done // TASK_STAGES)
            with cute.arch.elect_one():
                for i, word in enumerate(Task(row0, head, request, kv_head, length, start, blocks, whole, more)):
                    sTask[i, stage] = word
                tasks.arrive(stage)
            self.load_all(source, blocks + more, count, row_tile, q_head, done)
            # NOTE: not before the tile's loads: a CTA that has a heavy tile would take another too early
            following = tiles
            if tiles > clusters:
                following = self.take_next(tensors.counter, index, clusters, done)
            count, done, index = count + blocks + more, done + 1, following
        stage = done % TASK_STAGES
        tasks.acquire(stage, done // TASK_STAGES)
        with cute.arch.elect_one():
            sTask[Task._fields.index("blocks"), stage] = Int32(0)
            tasks.arrive(stage)
        if const_expr(config.cluster > 1):
            # a CTA must outlive its peer's arrivals on its barriers; for the bytes that it gets its consumers wait
            for i in cutlass.range_constexpr(config.stages):
                for channel in (self.shared.k, self.shared.v):
                    channel.acquire((count + i) % config.stages, (count + i) // config.stages)

    @cute.jit
    def take_next(self, counter: cute.Tensor, index, clusters, done):
        """The number of the tile after number `index`."""
        if const_expr(self.config.in_turn):
            return index + clusters
        elif const_expr(self.config.cluster > 1):
            return self.take_together(counter, clusters, done)
        else:
            return take(counter) + clusters

    @cute.jit
    def take_together(self, counter: cute.Tensor, clusters, done):
        """The next tile of the cluster: its first CTA takes it, and tells the other."""
        numbers, slot = self.shared.numbers, done % NUMBER_STAGES
        number = Int32(0)
        if self.rank == 0:
            number = take(counter) + clusters
            with cute.arch.elect_one():
                send_to_peer(self.shared.sNumbers + slot, number, numbers.bar(slot), Int32(1))
        else:
            with cute.arch.elect_one():
                numbers.expect(slot, 4)
            numbers.wait(slot, done // NUMBER_STAGES)
            number = cute.make_tensor(self.shared.sNumbers, cute.make_layout(NUMBER_STAGES))[slot]
        return number
