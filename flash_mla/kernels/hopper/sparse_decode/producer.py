"""The producer warps of sparse decode: a token's rows from their pages to BF16 in shared memory, as wgmma reads them.

A block is 64 keys. A warp fills 8 rows at a time: lane l the 16 columns l % 4 of a chunk of row l / 4, 16 e4m3 or 32
bytes of BF16. The 16-byte pieces of a row lie swizzled, piece c at c ^ (row % 8), so that 8 lanes write 128 different
bytes of the banks. In a cluster each CTA makes half of the rows and copies them to the other one.

A lane also looks after one key of each pair of blocks: it reads its index two pairs ahead, asks L2 for its row one pair
ahead, and tells the consumers whether the key is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.boxes import tma_boxes
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS, STAGES
from flash_mla.kernels.hopper.sparse_decode.config import CHUNK_BYTES, PRODUCER_WARPS, VECTORS, Config
from flash_mla.kernels.hopper.sparse_decode.rows import (
    Lengths,
    e8m0_value,
    four_values,
    load_vector,
    load_words,
    prefetch_row,
    store_vector,
)
from flash_mla.kernels.hopper.walk import Done, Place, walk
from flash_mla.kernels.hopper.work import Work


@dataclass(frozen=True)
class Producer:
    """One of the warps that fill the K stages; the first also loads Q by TMA.

    Registers: the index of the lane's key of the pair after next; the places of its keys of this pair and the next;
    the rows that the thread fills of the block at hand; two batches of loads, and the scales of two stages.
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
    own_row: cute.Tensor
    own_apart: cute.Tensor
    live: cute.Tensor
    words: cute.Tensor
    scales: cute.Tensor

    @staticmethod
    def over(shared, lengths: Lengths, rank, warp, tma_q, tQ) -> Producer:
        config = shared.config
        many = cute.make_layout(config.chunks, stride=CHUNK * config.tile_heads)
        box, tiles = (config.tile_heads, CHUNK), (None, None, None, None)
        sQ, gQ = tma_boxes(tma_q, shared.sQ.iterator, many, tQ, box, tiles)
        shared.q.written_by("producer warp 0")
        shared.k.written_by("producer warps", PRODUCER_WARPS)
        rows = config.thread_rows
        return Producer(
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
            own_row=cute.make_rmem_tensor(rows, Int64),
            own_apart=cute.make_rmem_tensor(rows, Int32),
            live=cute.make_rmem_tensor(rows, Int32),
            words=cute.make_rmem_tensor((4, VECTORS, 2), Int32),
            scales=cute.make_rmem_tensor((2, rows, 2), Int32),
        )

    # the lane's key

    @property
    def side(self):
        """The block of a pair, 0 or 1, in which the lane's key lies."""
        group = self.lane // 8
        return group // 2 if self.config.cluster == 1 else group % 2

    @property
    def octet(self):
        """Its 8 keys there; in a cluster lanes 16 to 31 look after keys of the other CTA, for the mask only."""
        group = self.lane // 8
        if self.config.cluster == 1:
            return 2 * self.warp + group % 2
        return 4 * (self.rank ^ (group // 2)) + self.warp

    @cute.jit
    def read_index(self, token, pair, last) -> None:
        """Start to read the index of the lane's key, -1 from pair `last` on."""
        index = Int32(-1)
        if pair < last:
            index = self.lengths.index(token, 2 * pair + self.side, 8 * self.octet + self.lane % 8)
        self.index[0] = index

    @cute.jit
    def find_row(self, token, pair, slot: cutlass.Constexpr) -> None:
        """Where the row of the index that was read lies."""
        place = self.lengths.place(self.config.layout, token, 2 * pair + self.side, self.index[0])
        self.row[slot], self.apart[slot] = place.row, place.scales

    @cute.jit
    def prefetch(self) -> None:
        """Ask L2 for the lane's row of the next pair."""
        mine = self.lane < 32 // self.config.cluster
        if mine and self.row[1] != 0:
            prefetch_row(self.row[1], self.config.layout.row_bytes)

    @cute.jit
    def tell_live(self, stage: cutlass.Constexpr, votes) -> None:
        """Which keys of a block are there: a byte for every 8."""
        if self.lane % 8 == 0 and self.side == stage // 2:
            sLive = self.shared.sLive
            sLive[8 * (stage // 2) + self.octet] = Uint8((votes >> self.lane) & 255)

    # the thread's rows

    @cute.jit
    def turn_to(self, block: cutlass.Constexpr, slot: cutlass.Constexpr) -> None:
        """Learn from the lanes where the rows lie that this thread fills of a block."""
        rows = self.config.thread_rows
        for r in cutlass.range_constexpr(rows):
            lane = 8 * (block * rows + r) + self.lane // 4
            row = cute.arch.shuffle_sync(self.row[slot], offset=lane)
            self.live[r] = Int32(row != 0)
            self.own_row[r] = row + 16 * (self.lane % 4)
            if const_expr(self.config.layout.split):
                self.own_apart[r] = cute.arch.shuffle_sync(self.apart[slot], offset=lane) - 16 * (self.lane % 4)

    @cute.jit
    def load_scales(self, stage: cutlass.Constexpr) -> None:
        """Start to read the scales of a stage's columns, two words a row."""
        layout, half = self.config.layout, stage % 2
        if const_expr(layout.scale is not None):
            size = 4 if const_expr(layout.scale == "fp32") else 1
            num_bytes = 256 // layout.group * size
            for r in cutlass.range_constexpr(self.config.thread_rows):
                # NOTE: own_row is 16 bytes a lane further
                address = self.own_row[r] - 16 * (self.lane % 4)
                if const_expr(layout.split):
                    address = self.own_row[r] + self.own_apart[r]
                read = load_words(address, layout.scale_at + num_bytes * half, self.live[r], num_bytes // 4)
                for i in cutlass.range_constexpr(num_bytes // 4):
                    self.scales[i, r, stage % 2] = read[i]

    @cute.jit
    def load(self, chunks: cutlass.Constexpr, buffer: cutlass.Constexpr) -> None:
        """Start to read a batch."""
        layout = self.config.layout
        at = 0
        for chunk in chunks:
            for r in cutlass.range_constexpr(self.config.thread_rows):
                if const_expr(chunk < layout.codes):
                    self.load_one(at, buffer, self.own_row[r], CHUNK * chunk, self.live[r])
                    at = at + 1
                else:
                    for piece in cutlass.range_constexpr(2):
                        first = layout.wide_at + 2 * CHUNK * (chunk - layout.codes) + 16 * piece
                        self.load_one(at, buffer, self.own_row[r] + 16 * (self.lane % 4), first, self.live[r])
                        at = at + 1

    @cute.jit
    def load_one(self, at: cutlass.Constexpr, buffer: cutlass.Constexpr, address, offset, live) -> None:
        words = load_vector(address, offset, live)
        for i in cutlass.range_constexpr(4):
            self.words[i, at, buffer] = words[i]

    @cute.jit
    def scale_of(self, chunk: cutlass.Constexpr, r: cutlass.Constexpr, stage: cutlass.Constexpr):
        """The scale of the thread's columns of a chunk."""
        layout, side = self.config.layout, stage % 2
        scale = Float32(1.0)
        if const_expr(layout.scale == "fp32"):
            word = self.scales[CHUNK * (chunk % 4) // layout.group, r, side]
            scale = cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[word])
        elif const_expr(layout.scale == "e8m0"):
            if const_expr(layout.group == CHUNK):
                scale = e8m0_value(self.scales[0, r, side], Int32(chunk % 4))
            else:
                # two scales a chunk: of the lanes 0, 1 and of 2, 3
                place = 2 * (chunk % 2) + self.lane % 4 // 2
                scale = e8m0_value(self.scales[chunk % 4 // 2, r, side], place)
        return scale

    @cute.jit
    def store(self, stage: cutlass.Constexpr, chunks: cutlass.Constexpr, buffer: cutlass.Constexpr) -> None:
        """A batch, as BF16, to the K buffer."""
        layout = self.config.layout
        at = 0
        for chunk in chunks:
            for r in cutlass.range_constexpr(self.config.thread_rows):
                offset = CHUNK_BYTES * (stage // 2 * K_CHUNKS + chunk) + 8 * 128 * r
                if const_expr(chunk < layout.codes):
                    scale = self.scale_of(chunk, r, stage)
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

    def piece_address(self, piece: int):
        """Where the thread's 8 columns lie, of its first row, in the first chunk of the K buffers."""
        first = 8 * self.config.thread_rows * self.warp + BLOCK // 2 * self.rank * (self.config.cluster - 1)
        in_eight = self.lane // 4
        place = (2 * (self.lane % 4) + piece) ^ in_eight
        return self.shared.k_buffers.toint() + (first + in_eight) * 128 + 16 * place

    @cute.jit
    def finish(self, stage: cutlass.Constexpr) -> None:
        """Hand a stage over; in a cluster, copy the warp's 8 rows of its chunks to the other CTA first."""
        config, k = self.config, self.shared.k
        cute.arch.fence_view_async_shared()
        if const_expr(config.cluster == 1):
            k.arrive_warp(stage)
        else:
            cute.arch.sync_warp()
            chunks = config.stage_chunks(stage)
            with cute.arch.elect_one():
                k.expect(stage, 8 * 128 * len(chunks))
                first = self.shared.k_buffers.toint() + (8 * self.warp + BLOCK // 2 * self.rank) * 128
                for chunk in chunks:
                    source = first + CHUNK_BYTES * (stage // 2 * K_CHUNKS + chunk)
                    copy_to_peer(source, 8 * 128, k.bar(stage).toint(), self.rank ^ 1)

    # segments

    @cute.jit
    def run(self, groups, work: Work) -> None:
        """Fill the stages for the cluster's segments."""
        done = walk(work, self.lengths, self.lengths, groups, self.load_segment, Done.nothing())
        # a CTA must outlive its peer's arrivals on its barriers
        for stage in cutlass.range_constexpr(STAGES):
            self.shared.k.acquire(stage, done.items)

    @cute.jit
    def load_q(self, token, row_tile, count) -> None:
        """The CTA's query heads; heads past the last arrive as zeros."""
        q = self.shared.q
        q.acquire(0, count)
        with cute.arch.elect_one():
            q.expect(0, 2 * self.config.tile_heads * self.config.D)
        S_q = self.lengths.S_q
        for chunk in cutlass.range_constexpr(self.config.chunks):
            gQ = self.gQ[None, row_tile, chunk, token % S_q, token // S_q]
            cute.copy(self.tma_q, gQ, self.sQ[None, chunk], tma_bar_ptr=q.bar(0))

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and every pair of a segment, half block by half block in the order in which the consumers free them."""
        token, first, last = place.request, part.first, part.last
        batches = self.config.batches()
        # a pair's batches leave the registers as they found them: both buffers have had their turn
        assert len(batches) % 2 == 0
        if last > first:
            self.read_index(token, first, last)
            self.find_row(token, first, 0)
            self.read_index(token, first + 1, last)
            if self.warp == 0:
                self.load_q(token, place.group * self.config.cluster + self.rank, done.segments)
            self.turn_to(0, 0)
            self.load_scales(0)
            self.load(batches[0][1], 0)
            for pair in cutlass.range(first, last, unroll=1):
                self.find_row(token, pair + 1, 1)
                self.prefetch()
                self.read_index(token, pair + 2, last)
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
        """Load, convert and store a pair of blocks; its first batch is under way, and in the end the next pair's is."""
        batches = self.config.batches()
        votes = cute.arch.vote_ballot_sync(self.row[0] != 0)
        for i in cutlass.range_constexpr(len(batches)):
            stage, chunks = batches[i]
            following, next_chunks = batches[(i + 1) % len(batches)]
            # the next batch is loaded while this one is converted
            if const_expr(following != stage):
                if const_expr(following % 2 == 0):
                    self.turn_to(following // 2, 1 if const_expr(following == 0) else 0)
                self.load_scales(following)
            self.load(next_chunks, (i + 1) % 2)
            if const_expr(i == 0 or batches[i - 1][0] != stage):
                self.shared.k.acquire(stage, turn)
                if const_expr(stage % 2 == 0):
                    self.tell_live(stage, votes)
            self.store(stage, chunks, i % 2)
            if const_expr(following != stage):
                self.finish(stage)


@cute.jit
def copy_to_peer(source, num_bytes: cutlass.Constexpr, bar, peer) -> None:
    """Copy bytes of shared memory to the same place in another CTA, whose barrier counts them."""
    cute.arch.inline_ptx(
        "{ .reg .b32 d, m; mapa.shared::cluster.u32 d, {$r0}, {$r2}; mapa.shared::cluster.u32 m, {$r1}, {$r2}; "
        f"cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [d], [{{$r0}}], {num_bytes}, [m]; }}",
        read_only_args=[source, bar, peer],
    )
