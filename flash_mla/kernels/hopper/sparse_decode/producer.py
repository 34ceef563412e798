"""The producer warps of sparse decode: a token's rows from their pages to BF16 in shared memory, as wgmma reads them.

A block is 64 keys. A warp fills 8 rows at a time: lane l the 16 columns l % 4 of a chunk of row l / 4, 16 e4m3 or 32
bytes of BF16. The 16-byte pieces of a row lie swizzled, piece c at c ^ (row % 8), so that 8 lanes write 128 different
bytes of the banks. In a cluster each CTA makes half of the rows and copies them to the other one.

A lane also looks after one key of each pair of blocks: it reads its index two pairs ahead, asks L2 for its row one pair
ahead, and tells the consumers whether the key is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.boxes import tma_boxes
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, ROW_BYTES
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, STAGES
from flash_mla.kernels.hopper.sparse_decode.config import CHUNK_BYTES, Config
from flash_mla.kernels.hopper.sparse_decode.rows import (
    Keys,
    Lengths,
    e8m0_value,
    four_values,
    fp32_of,
    load_vector,
    load_word,
    store_vector,
)
from flash_mla.kernels.hopper.table import prefetch_line
from flash_mla.kernels.hopper.walk import Done, Place, walk
from flash_mla.kernels.hopper.work import Work


@dataclass(frozen=True)
class Producer:
    """One of the warps that fill the K stages; the first also loads Q by TMA.

    Registers of a thread: the index of the lane's key of the pair after next; where its keys of this pair and of the
    next lie; two batches of loads with their scales, one in flight and one that is converted.
    """

    config: Config
    shared: object
    lengths: Lengths
    rank: Int32
    warp: Int32
    lane: Int32
    tma_q: cute.CopyAtom
    sQ: cute.Tensor
    gQ: cute.Tensor
    index: cute.Tensor
    row: cute.Tensor
    apart: cute.Tensor
    words: cute.Tensor
    scales: cute.Tensor

    @classmethod
    def over(cls, shared, lengths: Lengths, rank, warp, tma_q, tQ) -> Self:
        config = shared.config
        many = cute.make_layout(config.chunks, stride=CHUNK * config.tile_heads)
        box, tiles = (config.tile_heads, CHUNK), (None, None, None, None)
        sQ, gQ = tma_boxes(tma_q, shared.sQ.iterator, many, tQ, box, tiles)
        shared.q.written_by("producer warp 0")
        shared.k.written_by("producer warps", config.k_writers)
        return cls(
            config=config,
            shared=shared,
            lengths=lengths,
            rank=rank,
            warp=warp,
            lane=cute.arch.lane_idx(),
            tma_q=tma_q,
            sQ=sQ,
            gQ=gQ,
            index=cute.make_rmem_tensor(1, Int32),
            row=cute.make_rmem_tensor(2, Int64),
            apart=cute.make_rmem_tensor(2, Int32),
            **cls.rows_at_hand(config),
        )

    @staticmethod
    def rows_at_hand(config: Config) -> dict[str, cute.Tensor]:
        """Registers for what is read and not yet stored."""
        return {
            "words": cute.make_rmem_tensor((4, config.batch_vectors, 2), Int32),
            "scales": cute.make_rmem_tensor((config.thread_rows, 2, 2), Int32),
        }

    # the lane's key

    @property
    def side(self):
        """The block of a pair, 0 or 1, in which the lane's key lies."""
        return self.lane // 8 // self.config.thread_rows % 2

    @property
    def octet(self):
        """Its 8 keys there: one of the warp's.

        Lanes 16 to 31 have none where a warp fills 8 rows of a block only; in a cluster they look after the other
        CTA's, for the mask.
        """
        if self.config.thread_rows == 2:
            return 2 * self.warp + self.lane // 8 % 2
        if self.config.sharing == 1:
            return self.warp
        return 4 * (self.rank ^ (self.lane // 16)) + self.warp

    @cute.jit
    def read_index(self, keys: Keys, pair, last) -> None:
        """Start to read the index of the lane's key, -1 from pair `last` on."""
        index = Int32(-1)
        if pair < last:
            index = self.lengths.index(keys, 2 * pair + self.side, 8 * self.octet + self.lane % 8)
        self.index[0] = index

    @cute.jit
    def find_row(self, keys: Keys, pair, slot: cutlass.Constexpr) -> None:
        """Where the row of the index that was read lies."""
        place = self.lengths.place(self.config.layout, keys, 2 * pair + self.side, self.index[0])
        self.row[slot], self.apart[slot] = place.row, place.scales

    def find_first(self, keys: Keys, first, last) -> None:
        """The row of the lane's key of a segment's first pair; start to read the index of the next."""
        self.read_index(keys, first, last)
        self.find_row(keys, first, 0)
        self.read_index(keys, first + 1, last)

    @cute.jit
    def prefetch(self) -> None:
        """Ask L2 for the lane's row of the next pair, line by line."""
        if self.lane < 16 * self.config.thread_rows and self.row[1] != 0:
            # NOTE: cp.async.bulk.prefetch takes one address a warp at a time: 7 to 8 % slower at 64 heads
            last = self.config.layout.row_bytes - 1
            for first in (*range(0, last, 128), last):
                prefetch_line(self.row[1] + first)

    @cute.jit
    def tell_live(self, stage: cutlass.Constexpr) -> None:
        """Which keys of a block are there: a byte for every 8."""
        votes = cute.arch.vote_ballot_sync(self.row[0] != 0)
        if self.lane % 8 == 0 and self.side == stage // 2:
            sLive = self.shared.sLive
            sLive[8 * (stage // 2) + self.octet] = Uint8((votes >> self.lane) & 255)

    # the thread's rows

    @cute.jit
    def load(self, batch: cutlass.Constexpr, buffer: cutlass.Constexpr, slot: cutlass.Constexpr) -> None:
        """Start to read a batch of the pair whose places lie in `slot`."""
        layout, rows = self.config.layout, self.config.thread_rows
        at = 0
        for r in cutlass.range_constexpr(rows):
            # the lane that looks after the row knows where it lies
            lane = 8 * (batch.stage // 2 * rows + r) + self.lane // 4
            row = cute.arch.shuffle_sync(self.row[slot], offset=lane)
            live = Int32(row != 0)
            if const_expr(layout.scale is not None):
                scales = row + layout.scale_at
                if const_expr(layout.apart):
                    scales = row + cute.arch.shuffle_sync(self.apart[slot], offset=lane)
                for word in sorted({layout.scale_word(chunk) for chunk in batch.chunks if chunk < layout.codes}):
                    self.load_scales(r, word, buffer, scales, live)
            for chunk in batch.chunks:
                if const_expr(chunk < layout.codes):
                    self.load_one(at, buffer, row + 16 * (self.lane % 4), CHUNK * chunk, live)
                    at = at + 1
                else:
                    first = layout.wide_at + 2 * CHUNK * (chunk - layout.codes)
                    for piece in cutlass.range_constexpr(2):
                        self.load_one(at, buffer, row + 32 * (self.lane % 4), first + 16 * piece, live)
                        at = at + 1

    @cute.jit
    def load_scales(
        self, r: cutlass.Constexpr, word: cutlass.Constexpr, buffer: cutlass.Constexpr, address, live
    ) -> None:
        """Start to read a word of a row's scales."""
        self.scales[r, word % 2, buffer] = load_word(address, 4 * word, live)

    @cute.jit
    def load_one(self, at: cutlass.Constexpr, buffer: cutlass.Constexpr, address, offset, live) -> None:
        """Start to read 16 bytes."""
        words = load_vector(address, offset, live)
        for i in cutlass.range_constexpr(4):
            self.words[i, at, buffer] = words[i]

    @cute.jit
    def scale_of(self, row: cutlass.Constexpr, chunk: cutlass.Constexpr, buffer: cutlass.Constexpr):
        """The scale of the thread's columns of a chunk; None: there is none."""
        layout = self.config.layout
        if const_expr(layout.scale is None):
            return None
        word = self.scales[row, layout.scale_word(chunk) % 2, buffer]
        if const_expr(layout.scale == "fp32"):
            return fp32_of(word)
        if const_expr(layout.group == CHUNK):
            return e8m0_value(word, Int32(chunk % 4))
        # two scales a chunk: of the lanes 0, 1 and of 2, 3
        return e8m0_value(word, 2 * (chunk % 2) + self.lane % 4 // 2)

    @cute.jit
    def store(self, batch: cutlass.Constexpr, buffer: cutlass.Constexpr) -> None:
        """A batch, as BF16, to the K buffer."""
        at = 0
        for r in cutlass.range_constexpr(self.config.thread_rows):
            for chunk in batch.chunks:
                offset = CHUNK_BYTES * (batch.stage // 2 * K_CHUNKS + chunk) + 8 * ROW_BYTES * r
                if const_expr(chunk < self.config.layout.codes):
                    scale = self.scale_of(r, chunk, buffer)
                    for piece in cutlass.range_constexpr(2):
                        a, b = four_values(self.words[2 * piece, at, buffer], scale)
                        c, d = four_values(self.words[2 * piece + 1, at, buffer], scale)
                        store_vector(self.piece_address(piece), offset, (a, b, c, d))
                    at = at + 1
                else:
                    for piece in cutlass.range_constexpr(2):
                        words = tuple(self.words[i, at, buffer] for i in range(4))
                        store_vector(self.piece_address(piece), offset, words)
                        at = at + 1

    @property
    def first_row(self):
        """The first of the warp's rows of a block."""
        return 8 * self.config.thread_rows * self.warp + BLOCK // 2 * self.rank * (self.config.sharing - 1)

    def piece_address(self, piece: int):
        """Where the thread's first or second 8 columns lie, in the first chunk of the K buffers."""
        in_eight = self.lane // 4
        place = (2 * (self.lane % 4) + piece) ^ in_eight
        return self.shared.k_buffers.toint() + (self.first_row + in_eight) * ROW_BYTES + 16 * place

    @cute.jit
    def finish(self, stage: cutlass.Constexpr) -> None:
        """Hand a stage over; in a cluster, copy the warp's 8 rows of its chunks to the other CTA first."""
        config, k = self.config, self.shared.k
        cute.arch.fence_view_async_shared()
        if const_expr(config.sharing == 1):
            k.arrive_warp(stage)
        else:
            cute.arch.sync_warp()
            chunks = config.stage_chunks(stage)
            with cute.arch.elect_one():
                k.expect(stage, 8 * ROW_BYTES * len(chunks))
                first = self.shared.k_buffers.toint() + self.first_row * ROW_BYTES
                for chunk in chunks:
                    source = first + CHUNK_BYTES * (stage // 2 * K_CHUNKS + chunk)
                    copy_to_peer(source, 8 * ROW_BYTES, k.bar(stage).toint(), self.rank ^ 1)

    # segments

    @cute.jit
    def run(self, groups, work: Work) -> None:
        """Fill the stages for the cluster's segments."""
        done = walk(work, self.lengths, self.lengths, groups, self.load_segment, Done.nothing())
        # a CTA must outlive its peer's arrivals on its barriers
        for stage in cutlass.range_constexpr(STAGES):
            self.shared.k.acquire(stage, done.items)

    def row_tile(self, place: Place):
        """Number of the CTA's tile of heads."""
        return place.group * self.config.sharers + self.rank

    @cute.jit
    def load_q(self, keys: Keys, row_tile, count) -> None:
        """The CTA's query heads; heads past the last arrive as zeros."""
        q = self.shared.q
        q.acquire(0, count)
        with cute.arch.elect_one():
            q.expect(0, 2 * self.config.tile_heads * self.config.D)
        for chunk in cutlass.range_constexpr(self.config.chunks):
            gQ = self.gQ[None, row_tile, chunk, keys.query, keys.request]
            cute.copy(self.tma_q, gQ, self.sQ[None, chunk], tma_bar_ptr=q.bar(0))

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and every pair of a segment, half block by half block in the order in which the consumers free them."""
        token, first, last = place.request, part.first, part.last
        batches = self.config.batches()
        # a pair's batches leave the registers as they found them: both buffers have had their turn
        assert len(batches) % 2 == 0
        if last > first:
            keys = self.lengths.keys(token)
            self.find_first(keys, first, last)
            if self.warp == 0:
                self.load_q(keys, self.row_tile(place), done.segments)
            self.load(batches[0], 0, 0)
            for pair in cutlass.range(first, last, unroll=1):
                self.find_row(keys, pair + 1, 1)
                self.prefetch()
                self.read_index(keys, pair + 2, last)
                self.fill_pair(done.items + pair - first)
                self.go_on()
            done = done.plus(last - first)
        return done

    @cute.jit
    def go_on(self) -> None:
        """The next pair becomes this one."""
        self.row[0], self.apart[0] = self.row[1], self.apart[1]

    @cute.jit
    def fill_pair(self, turn) -> None:
        """Tma, convert and store a pair of blocks; its first batch is under way, and in the end the next pair's is."""
        batches = self.config.batches()
        for i in cutlass.range_constexpr(len(batches)):
            batch, following = batches[i], batches[(i + 1) % len(batches)]
            # the next batch is loaded while this one is converted
            self.load(following, (i + 1) % 2, (i + 1) // len(batches))
            if const_expr(i == 0 or batches[i - 1].stage != batch.stage):
                self.shared.k.acquire(batch.stage, turn)
                if const_expr(batch.stage % 2 == 0):
                    self.tell_live(batch.stage)
            self.store(batch, i % 2)
            if const_expr(following.stage != batch.stage):
                self.finish(batch.stage)


@dataclass(frozen=True)
class Copying(Producer):
    """A warp that only starts copies, those of a pair of blocks in `fill_pair`: nothing waits in its registers."""

    @staticmethod
    def rows_at_hand(config: Config) -> dict[str, cute.Tensor]:
        """Registers for what is read and not yet stored: none."""
        return {"words": None, "scales": None}

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and every block of a segment."""
        token, first, last = place.request, part.first, part.last
        if last > first:
            keys = self.lengths.keys(token)
            self.read_index(keys, first, last)
            if done.segments == 0 and self.warp == 0:
                # NOTE: under the wait for the index; behind the rows of a pair calls took 0.4 to 1.3 us more
                self.load_q(keys, self.row_tile(place), done.segments)
            self.find_row(keys, first, 0)
            self.read_index(keys, first + 1, last)
            for pair in cutlass.range(first, last, unroll=1):
                self.find_row(keys, pair + 1, 1)
                self.read_index(keys, pair + 2, last)
                self.fill_pair(done.items + pair - first)
                if pair == first and done.segments > 0 and self.warp == 0:
                    # the segment before may still read Q
                    self.load_q(keys, self.row_tile(place), done.segments)
                self.go_on()
            done = done.plus(last - first)
        return done


@cute.jit
def copy_to_peer(source, num_bytes: cutlass.Constexpr, bar, peer) -> None:
    """Copy bytes of shared memory to the same place in another CTA, whose barrier counts them."""
    cute.arch.inline_ptx(
        "{ .reg .b32 d, m; mapa.shared::cluster.u32 d, {$r0}, {$r2}; mapa.shared::cluster.u32 m, {$r1}, {$r2}; "
        f"cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [d], [{{$r0}}], {num_bytes}, [m]; }}",
        read_only_args=[source, bar, peer],
    )
