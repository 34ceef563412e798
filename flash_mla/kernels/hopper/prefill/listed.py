"""Prefill over listed blocks on Hopper: out = softmax(scale * Q K^T) V where a map says which 64 x 64 blocks count.

Grid: one CTA an SM, persistent, of two or three teams. A team is a loading warp and a consumer warpgroup, with tiles of
64 query rows, lists and channels of its own. Tiles are handed out as the dense kernel hands out its own
(`schedule.py`), one on each SM before the second.

Bound. A block of 128/128 is 2.1 MFLOP: 512 cycles of the tensor cores, 256 of exp2. Its K and V are 32 KB from L2,
twice the bytes a FLOP of a dense tile. Shared memory takes 32 KB from TMA and gives 32 KB to wgmma with Q in registers,
512 cycles (48 KB and 640 with Q read there). One warpgroup alone takes some 1400 cycles a block, one step after the
other; three hide each other's waits.

Roles (entry registers: 65536 / threads, rounded down to 8):
    consumer warpgroups, one a team   S = Q K^T, softmax, O += P V, lse               `consume`, below
    a warp a team of the last one     takes tiles, lists their blocks, TMA of Q, K, V `listing.py`

Channels, loading warp -> consumer warpgroup (full arrivals / empty arrivals), of each team:
    ring   slots   1 + bytes / 4 warps     Q of a tile, then K and V of each of its blocks, as they are used
    Q      1       1 + bytes / 4 warps     D 256, whose Q is read from shared memory: in a place of its own
Beside Q lies the tile's description, beside K a word: the block's first key and how to mask it.

Steady state of a consumer warpgroup, block n:
    S = Q K[n]^T | softmax | O += P V[n], under whose way the next K is waited for
P lies in the registers of S, so that nothing is issued beside P V: the other teams' products are. Of two teams, which
have the registers, O += P V[n] goes beside Q K[n+1]^T and under its softmax. The ring runs on from tile to tile, a
block and a half ahead: the search for the next tile and its list is hidden, and so is its first load. A tile's result
is written under the first scores of the next, by TMA from the place of its last V.

A bool mask is packed to bits beforehand (`pack_mask.py`), which gives a map, too: blocks where no key counts are
skipped, and the bits are read only where some keys do.

Supports BF16 and FP16, and else what the dense kernel does (`kernel.py`).

Measured: docs/design/prefill.md.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.boxes import load_of, store_of, tma_boxes, zero_rows
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.prefill.config import BITS, LAST, LISTED_TILE, ROW_LIMITS, Bar, Listed
from flash_mla.kernels.hopper.prefill.consumer import Consumer
from flash_mla.kernels.hopper.prefill.kernel import Tmas, arguments, rows_first
from flash_mla.kernels.hopper.prefill.listing import ListedShared, Loader, Tile
from flash_mla.kernels.hopper.prefill.shared import Scalars, Tensors

# ---------------------------------------------------------------------------------------------------------- Steps


@cute.jit
def receive(shared: ListedShared, item, done) -> Tile:
    """Wait for Q and the description of the team's tile number `done`."""
    rows = shared.q_place(item, done)
    rows.wait()
    return Tile(*(shared.tiles[i, rows.slot] for i in range(LISTED_TILE)))


@cute.jit
def mask_bits(consumer: Consumer, tensors: Tensors, Hq, tile: Tile, key0) -> None:
    """S = -inf where the tile's mask says so."""
    S, bits = consumer.S, tensors.mask_bits
    request = cutlass.min(tile.request, bits.shape[0] - 1)
    head = cutlass.min(tile.head - tile.request * Hq, bits.shape[1] - 1)
    for r in cutlass.range_constexpr(2):
        row = cutlass.min(tile.row0 + consumer.rows.first + 8 * r, bits.shape[2] - 1)
        for half in cutlass.range_constexpr(2):
            keep = bits[request, head, row, key0 // 32 + half] >> consumer.rows.column
            for j in cutlass.range_constexpr(4):
                for e in cutlass.range_constexpr(2):
                    i = 16 * half + 4 * j + 2 * r + e
                    S[i] = S[i] if (keep >> (8 * j + e)) & 1 != 0 else -Float32.inf


@cute.jit
def begin(consumer: Consumer, item, done) -> Int32:
    """Issue the scores of the first block of tile number `done`, whose Q has come; item number `item` is the first of
    the tile's. Returns the block's word."""
    shared, config = consumer.shared, consumer.config
    rows, keys = shared.q_place(item, done), shared.place(item + config.q_held)
    keys.wait()
    warpgroup.wait_group(0)
    word = shared.words[0, keys.slot]
    consumer.scores(rows.slot, keys.slot)
    if const_expr(config.q_held):
        # NOTE: not before, when its loads to registers may still be on their way: 1 tile in 700 was wrong
        rows.channel.release(rows.slot)
    return word


@cute.jit
def weigh(consumer: Consumer, tensors: Tensors, Hq, tile: Tile, word) -> None:
    """Softmax of the scores of the block with this word."""
    key0 = word // BLOCK * BLOCK
    if word & ROW_LIMITS != 0:
        consumer.rows.mask(consumer.S, key0)
    if word & BITS != 0:
        mask_bits(consumer, tensors, Hq, tile, key0)
    consumer.softmax()


@cute.jit
def next_block(consumer: Consumer, tensors: Tensors, Hq, tile: Tile, item, done) -> Int32:
    """P V of the block whose K was item number `item`, and P of the next, whose word is returned; O is rescaled."""
    shared, beside = consumer.shared, consumer.config.beside
    values, keys, next_values = (shared.place(item + i) for i in (1, 2, 3))
    if const_expr(not beside):
        consumer.values(values.slot)
    keys.wait()
    word = shared.words[0, keys.slot]
    if const_expr(not beside):
        warpgroup.wait_group(0)
        shared.ring.release(values.slot)
    consumer.scores(shared.q_place(item, done).slot, keys.slot)
    if const_expr(beside):
        values.wait()
        consumer.values(values.slot)
        warpgroup.wait_group(1)
    else:
        next_values.wait()
        warpgroup.wait_group(0)
    shared.ring.release(keys.slot)
    weigh(consumer, tensors, Hq, tile, word)
    if const_expr(beside):
        warpgroup.wait_group(0)
        shared.ring.release(values.slot)
    consumer.round()
    consumer.rows.rescale(consumer.O)
    return word


@cute.jit
def clear_values(shared: ListedShared, valid, slot, tid) -> None:
    """Zero the V rows of a slot from row `valid` on: P is 0 there, but 0 * NaN is NaN."""
    if valid < BLOCK:
        zero_rows(shared.sV.iterator + slot * shared.config.slot_elements, BLOCK, shared.config.Dv // CHUNK, valid, tid)
        sync(Bar.WARPGROUP + shared.team, WARPGROUP)


@cute.jit
def store(consumer: Consumer, tma_o: cute.CopyAtom, tO: cute.Tensor, scale, tile: Tile, slot, Hq) -> None:
    """Begin to store O, scaled, from a slot, where nobody reads any more: each warp its rows."""
    shared, chunks = consumer.shared, consumer.config.Dv // CHUNK
    consumer.put(scale, shared.sV[None, None, slot], Bar.WARPGROUP + shared.team)
    many = cute.make_layout(
        (chunks, 4, shared.config.all_slots), stride=(BLOCK * CHUNK, 16 * CHUNK, shared.config.slot_elements)
    )
    sO, gO = tma_boxes(tma_o, shared.sV.iterator, many, tO, (16, CHUNK), (None, None, None, None))
    # NOTE: told to be uniform, or TMA gets its address in a loop over the lanes
    warp = cute.arch.make_warp_uniform(consumer.tid // 32)
    cute.arch.sync_warp()
    for chunk in cutlass.range_constexpr(chunks):
        target = gO[None, tile.row0 // 16 + warp, chunk, tile.head - tile.request * Hq, tile.request]
        cute.copy(tma_o, sO[None, (chunk, warp, slot)], target)
    cute.arch.cp_async_bulk_commit_group()


@cute.jit
def consume(consumer: Consumer, tma_o: cute.CopyAtom, tO: cute.Tensor, tensors: Tensors, scalars: Scalars) -> None:
    """Compute tile after tile."""
    config, shared, Hq = consumer.config, consumer.shared, scalars.Hq
    for channel in (shared.ring, shared.q):
        channel.read_by("consumers", 4)
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    item, done = Int32(0), Int32(0)
    row0, head, request, kv_head, length, start = receive(shared, item, done)
    consumer.hold_q(shared.q_place(item, done).slot)
    word = begin(consumer, item, done)
    item = item + config.q_held
    consumer.O.fill(0.0)
    consumer.begin(tensors, scalars, Tile(row0, head, request, kv_head, length, start))
    while row0 >= 0:
        tile = Tile(row0, head, request, kv_head, length, start)
        warpgroup.wait_group(0)
        shared.ring.release(shared.place(item).slot)
        if done != 0:  # the result of the tile before has left the place of its last V
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            shared.ring.release(shared.place(item - 1 - config.q_held).slot)
        weigh(consumer, tensors, Hq, tile, word)
        consumer.round()
        if const_expr(not config.beside):
            shared.place(item + 1).wait()
        while word & LAST == 0:
            word = next_block(consumer, tensors, Hq, tile, item, done)
            item = item + 2
        if const_expr(not config.q_held):
            shared.q.release(shared.team)

        # P V of the last block beside Q of the next tile, then the result under that tile's first scores
        last = shared.place(item + 1)
        last.wait()
        clear_values(shared, tile.length - word // BLOCK * BLOCK, last.slot, consumer.tid)
        consumer.values(last.slot)
        for r in cutlass.range_constexpr(2):
            row_max[r], row_sum[r] = consumer.rows.max[r], consumer.rows.sum[r]
        item, done = item + 2, done + 1
        row0, head, request, kv_head, length, start = receive(shared, item, done)
        consumer.hold_q(shared.q_place(item, done).slot)
        word = begin(consumer, item, done)
        item = item + config.q_held
        store(consumer, tma_o, tO, consumer.close(tensors, scalars, tile, row_max, row_sum), tile, last.slot, Hq)
        consumer.O.fill(0.0)
        consumer.begin(tensors, scalars, Tile(row0, head, request, kv_head, length, start))
    warpgroup.wait_group(0)
    cute.arch.cp_async_bulk_wait_group(0, read=True)


# ---------------------------------------------------------------------------------------------------------- Kernel


class ListedPrefill(Kernel[Listed]):
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
        tmas = Tmas(
            q=load_of(rows_first(q, False), BLOCK, CHUNK),
            k=load_of(rows_first(k, config.paged), BLOCK, CHUNK),
            v=load_of(rows_first(v, config.paged), BLOCK, CHUNK),
            out=store_of(rows_first(out, False), 16, CHUNK),
        )
        kernel = self.kernel(tmas, tensors, scalars)
        launch_ctas(kernel, ctas, config.threads, config.smem_bytes(), stream)

    @cute.kernel
    def kernel(self, tmas: Tmas, tensors: Tensors, scalars: Scalars):
        config = self.config
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            ring: cute.struct.Align[cute.struct.MemRange[dtype, config.all_slots * config.slot_elements], 1024]
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, config.q_apart * BLOCK * config.D], 1024]
            tiles: cute.struct.MemRange[Int32, LISTED_TILE * config.q_places]
            words: cute.struct.MemRange[Int32, config.all_slots]
            ring_barriers: cute.struct.MemRange[Int64, Channel.words(config.all_slots)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(config.q_apart)]

        storage = allocate(Storage, config)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first_loader = 4 * config.teams
        team = warp_id // 4 if warp_id < first_loader else warp_id - first_loader
        shared = ListedShared.over(config, storage, team)
        if warp_id == 0:
            open_channels((shared.ring, shared.q), tuple(tma.atom for tma in tmas))
        cute.arch.sync_threads()

        registers, few_registers = config.registers
        if warp_id >= first_loader:
            cute.arch.setmaxregister_decrease(few_registers)
            if team < config.teams:
                Loader.over(shared, *tmas.q, *tmas.k, *tmas.v).run(tensors, scalars, tmas.q.tensor)
        else:
            cute.arch.setmaxregister_increase(registers)
            tidx, _, _ = cute.arch.thread_idx()
            consume(Consumer.over(shared, 0, tidx % WARPGROUP), *tmas.out, tensors, scalars)
        for channel in (shared.ring, shared.q):
            channel.check()


def build(config: Listed, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(ListedPrefill(config), arguments(config), options)
