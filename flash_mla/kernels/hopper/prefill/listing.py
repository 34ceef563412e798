"""A prefill over listed blocks: the ring of a team, and the warp that takes tiles, lists their blocks and fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_mla.kernels.hopper.boxes import row_layout, tma_boxes
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK
from flash_mla.kernels.hopper.prefill import schedule
from flash_mla.kernels.hopper.prefill.config import BITS, LAST, LISTED_TILE, NOWHERE, ROW_LIMITS, Listed
from flash_mla.kernels.hopper.prefill.producer import key_blocks, pick, span, take
from flash_mla.kernels.hopper.prefill.shared import Scalars, Tensors
from flash_mla.kernels.hopper.table import block_of


class Tile(NamedTuple):
    """A tile: its first row (-1: there is none, the end), head (request * Hq + head), request and KV head; the
    request's keys, and the position of its first query."""

    row0: Int32
    head: Int32
    request: Int32
    kv_head: Int32
    length: Int32
    start: Int32


class Place(NamedTuple):
    """Where an item lies: the slot of a channel, in a round of it."""

    channel: Channel
    slot: Int32
    round: Int32

    @cute.jit
    def wait(self) -> None:
        """Wait until the item is there."""
        # NOTE: of `mbarrier_wait` ptxas puts the retries in line, in front of the products: 3 to 4 % of a call
        while cute.arch.mbarrier_try_wait(self.channel.bar(self.slot), self.round & 1) == 0:
            pass


@dataclass(frozen=True)
class ListedShared:
    """Views of a CTA's shared memory, as one of its teams takes them.

    sK [64, D, slots], sV [64, Dv, slots]: the rings of all teams, the same memory; sQ [64, D, places]: it, too, or
    apart. tiles [LISTED_TILE, places of Q] and words [1, slots]: what lies beside Q and K.
    """

    config: Listed
    team: Int32
    sQ: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    tiles: cute.Tensor
    words: cute.Tensor
    ring: Channel
    q: Channel

    @staticmethod
    def over(config: Listed, storage, team) -> ListedShared:
        def rows(memory, columns: int, many: int, elements: int) -> cute.Tensor:
            layout = row_layout(DTYPES[config.dtype], BLOCK, columns)
            pointer = memory.get_tensor(layout.outer, swizzle=layout.inner).iterator
            return cute.make_tensor(pointer, cute.append(layout.outer, cute.make_layout(many, stride=elements)))

        def channel(name: str, barriers, stages: int) -> Channel:
            return Channel.over(name, barriers.data_ptr(), stages, readers=4)

        sK = rows(storage.ring, config.D, config.all_slots, config.slot_elements)
        return ListedShared(
            config=config,
            team=team,
            sQ=sK if config.q_held else rows(storage.sQ, config.D, config.teams, BLOCK * config.D),
            sK=sK,
            sV=rows(storage.ring, config.Dv, config.all_slots, config.slot_elements),
            tiles=storage.tiles.get_tensor(cute.make_layout((LISTED_TILE, config.q_places))),
            words=storage.words.get_tensor(cute.make_layout((1, config.all_slots))),
            ring=channel("ring", storage.ring_barriers, config.all_slots),
            q=channel("Q", storage.q_barriers, config.q_apart),
        )

    def place(self, item) -> Place:
        """Of item number `item` of the team's ring."""
        slots = self.config.slots
        return Place(self.ring, self.team * slots + item % slots, item // slots)

    def q_place(self, item, done) -> Place:
        """Of Q of the team's tile number `done`, which is the ring's item number `item` if it comes there."""
        return self.place(item) if self.config.q_held else Place(self.q, self.team, done)


@dataclass(frozen=True)
class Loader:
    """The warp that lists the blocks of a team's tiles, and fills their Q, K and V by TMA.

    sQ, sK, sV [box, (chunk, slot)]; gQ [box, row tile, chunk, head, request]; gK, gV [box, block, chunk, KV head,
    request], or of pages [box, chunk, page, KV head, request].
    """

    config: Listed
    shared: ListedShared
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
    def over(shared: ListedShared, tma_q, tQ, tma_k, tK, tma_v, tV) -> Loader:
        config = shared.config

        def boxes(tma, sX: cute.Tensor, columns: int, places: int, elements: int, tensor, coordinate):
            many = cute.make_layout((columns // CHUNK, places), stride=(BLOCK * CHUNK, elements))
            return tma_boxes(tma, sX.iterator, many, tensor, (BLOCK, CHUNK), coordinate)

        free = (None, None, None, None)
        key, ring = (0, *free) if config.paged else free, (config.all_slots, config.slot_elements)
        q_places = ring if config.q_held else (config.teams, BLOCK * config.D)
        sQ, gQ = boxes(tma_q, shared.sQ, config.D, *q_places, tQ, free)
        sK, gK = boxes(tma_k, shared.sK, config.D, *ring, tK, key)
        sV, gV = boxes(tma_v, shared.sV, config.Dv, *ring, tV, key)
        for channel in (shared.ring, shared.q):
            channel.written_by("loading warp")
        return Loader(config, shared, tma_q, tma_k, tma_v, sQ, gQ, sK, gK, sV, gV)

    @cute.jit
    def load(self, tma, gX: cute.Tensor, sX: cute.Tensor, place, beside: cute.Tensor, words) -> None:
        """gX, sX [box, chunk]: an item to its place, when that is free, and words beside it."""
        channel, slot, round = place
        chunks = cute.size(gX, mode=[1])
        channel.acquire(slot, round)
        with cute.arch.elect_one():
            for i, word in enumerate(words):
                beside[i, slot] = word
            channel.expect(slot, 2 * BLOCK * CHUNK * chunks)
        for chunk in cutlass.range_constexpr(chunks):
            cute.copy(tma, gX[None, chunk], sX[None, (chunk, slot)], tma_bar_ptr=channel.bar(slot))

    @cute.jit
    def load_block(self, tensors: Tensors, tile, block, word, item) -> None:
        """K and V of a block, as items number `item` and the next; keys past the last arrive as zeros, or as a page
        holds them. word: what is said of the block."""
        shared, at = self.shared, block
        if const_expr(self.config.paged):
            last = cutlass.max(0, (tile.length + BLOCK - 1) // BLOCK - 1)
            at = block_of(tensors.table, tile.request, cutlass.min(block, last), cute.size(self.gK, mode=[2]))
        parts = ((self.tma_k, self.gK, self.sK, (word,)), (self.tma_v, self.gV, self.sV, ()))
        for i, (tma, gX, sX, words) in enumerate(parts):
            # NOTE: a broadcast dim has one element
            head = cutlass.min(tile.kv_head, cute.size(gX, mode=[3]) - 1)
            request = cutlass.min(tile.request, cute.size(gX, mode=[4]) - 1)
            box = (None, None, at, head, request) if self.config.paged else (None, at, None, head, request)
            self.load(tma, gX[box], sX, shared.place(item + i), shared.words, words)

    @cute.jit
    def listed(self, row: cute.Tensor, base, blocks):
        """32 blocks of a row of the map: the flags of this lane's block, and which blocks count."""
        block, kind = base + cute.arch.lane_idx(), Int32(0)
        if block < cutlass.min(blocks, row.shape[0]):
            kind = Int32(row[block])
        return BITS if kind == 2 else 0, Int32(cute.arch.vote_ballot_sync(kind != 0))

    @cute.jit
    def load_listed(self, tensors: Tensors, tile, row: cute.Tensor, flags, bits, blocks, limit, item) -> Int32:
        """Those of the first `blocks` blocks that the tile's row of the map names, or one nowhere, from item number
        `item` on. flags, bits: of the first 32. limit: keys that all rows see. Returns the number of the next item."""
        base, one = Int32(0), Int32(1)
        while (bits == 0) & (base + 32 < blocks):
            base = base + 32
            flags, bits = self.listed(row, base, blocks)
        while (bits != 0) | (one != 0):
            block, word = Int32(0), Int32(NOWHERE | ROW_LIMITS)
            if bits != 0:
                lane = cute.arch.popc(~bits & (bits - 1))
                block = base + lane
                word = block * BLOCK | cute.arch.shuffle_sync(flags, lane)
                if block * BLOCK + BLOCK > limit:
                    word = word | ROW_LIMITS
                bits = bits & (bits - 1)
            while (bits == 0) & (base + 32 < blocks):
                base = base + 32
                flags, bits = self.listed(row, base, blocks)
            if bits == 0:
                word = word | LAST
            self.load_block(tensors, tile, block, word, item)
            item, one = item + 2, Int32(0)
        return item

    @cute.jit
    def run(self, tensors: Tensors, scalars: Scalars, tQ: cute.Tensor) -> None:
        """Take tiles, describe them to the consumers, and load what they list."""
        config, shared, block_map = self.config, self.shared, tensors.block_map
        P, heads = cute.size(tQ, mode=[0]), cute.size(tQ, mode=[2]) * cute.size(tQ, mode=[3])
        row_tiles = (P + config.tile_m - 1) // config.tile_m
        tiles = row_tiles * heads
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        # NOTE: one tile on every SM before the second
        index, item, done = shared.team * ctas + cta, Int32(0), Int32(0)
        order = schedule.Order(scalars.section, scalars.late, scalars.tail)
        while index < tiles:
            row_tile, head = schedule.tile(index, row_tiles, heads, order, cutlass.min, pick)
            request = head // scalars.Hq
            q_head, row0 = head - request * scalars.Hq, row_tile * config.tile_m
            start, length = span(config, tensors, scalars, request, P)
            total, whole = key_blocks(config, scalars, row0, length, start)
            tile = Tile(row0, head, request, q_head // (scalars.Hq // scalars.Hk), length, start)
            map_request = cutlass.min(request, block_map.shape[0] - 1)
            map_row = block_map[map_request, cutlass.min(q_head, block_map.shape[1] - 1), row_tile, None]
            # NOTE: before the wait for Q's place, so that the first K is asked for behind Q at once
            flags, bits = self.listed(map_row, 0, total)
            rows = self.gQ[None, row_tile, None, q_head, request]
            self.load(self.tma_q, rows, self.sQ, shared.q_place(item, done), shared.tiles, tile)
            item, done = item + config.q_held, done + 1
            item = self.load_listed(tensors, tile, map_row, flags, bits, total, whole * config.tile_n, item)
            # NOTE: not before the tile's loads: a team that has a heavy tile would take another too early
            following = tiles
            if tiles > ctas * config.teams:
                number = take(tensors.counter)
                if number == tiles - 1:  # the last that any team takes, past the last tile: 0 again for the next launch
                    with cute.arch.elect_one():
                        tensors.counter[0] = Int32(0)
                following = number + ctas * config.teams
            index = following
        # the end: a tile that is none, and the place of its first K, whose scores are issued all the same
        rows, keys = shared.q_place(item, done), shared.place(item + config.q_held)
        for channel, slot, round in (rows, keys):
            channel.acquire(slot, round)
        with cute.arch.elect_one():
            for i, word in enumerate(Tile(-1, 0, 0, 0, 0, 0)):
                shared.tiles[i, rows.slot] = Int32(word)
            for channel, slot, _ in (rows, keys):
                channel.arrive(slot)
