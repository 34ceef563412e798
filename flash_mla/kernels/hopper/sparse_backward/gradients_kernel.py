"""The sparse backward on Hopper, second kernel: dq, and a partial row of dkv for every slot of a token.

    dq = sum over slots of dS k      dkv[slot] = sum over heads of dS q + f P dout

of the P (times f) and dS that `weights_kernel.py` left. Triton's `sum_kernel` adds the partial rows that name a row.

Grid: one CTA for a token and a third of the columns: Q and dout of up to 128 heads then stay in shared memory while all
keys go by, and dq in registers. Bound: 2304 cycles of the tensor cores a step of 64 keys, 4.3 ms for 4096 tokens of
2048 keys and 128 heads at 1.6 GHz; memory takes 3.4 ms beside them.

Roles (384 threads; entry 168 registers):
    warpgroups 0, 1   232 registers   dq += dS K of 64 heads each; of every second tile of 64 keys dkv = dS^T Q + P^T dO
    warps 8-11         40 registers   gather of K by cp.async; warp 8: TMA of Q, dO; bulk copies of dS and P

Channels, producer -> consumers (full arrivals / empty arrivals):
    Q, dO    1 stage                             1 + bytes / never freed
    K        2 stages, a third of 64 rows        4 * 33 / 8 warps
    dS       2 stages, of 64 keys and all heads  1 + bytes / 8 warps
    P        2 stages                            1 + bytes / the warps of the tile's warpgroup

The columns of a partial row lie as a thread of an accumulator has them, 8 of each 32 (`ORDER`): 16 bytes a store,
straight from registers. Staged through shared memory, half of the time was spent waiting for it, beside the products.

A slot that names no row may hold anything in its partial row: nobody reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import Tma, row_layout, tma_boxes
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gather import ROWS, Gather, count_keys, row_named
from flash_mla.kernels.hopper.lanes import row_of
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    PARTS,
    PRODUCER_WARPS,
    REGISTERS,
    STAGES,
    THIRD,
    THREADS,
    Config,
)
from flash_mla.kernels.hopper.sparse_backward.weights_kernel import load_heads, without_middle
from flash_mla.kernels.hopper.sparse_backward.weights_shared import item_of
from flash_mla.kernels.hopper.staging import late, store_rows

ORDER = (4, 4, 2)
"""Of 32 columns (a, b, c) of a row of kv, where a partial row has (b, a, c): column 8 a + 2 b + c at 8 b + 2 a + c."""


class Tensors(NamedTuple):
    """Global memory that TMA does not touch. kv: its first row; indices [tokens, topk]; weights, as `item_of` says; dq
    [tokens, Hq, D]; partial [tokens, slots, D]."""

    kv: cute.Tensor
    indices: cute.Tensor
    weights: cute.Tensor
    dq: cute.Tensor
    partial: cute.Tensor


class Shared(NamedTuple):
    """A CTA's shared memory: sQ, sO [heads, 192]: columns of q and dout; k: stages [64, 192]; items: stages of dS, then
    of P; staged: STAGED elements for each consumer warp. Channels: queries, once; keys; slopes; weights."""

    sQ: cute.Tensor
    sO: cute.Tensor
    k: cute.Pointer
    address: Int32
    items: cute.Pointer
    staged: cute.Pointer
    queries: Channel
    keys: Channel
    slopes: Channel
    weights: Channel


class Work(NamedTuple):
    """A CTA's: the token, which third of the columns, how many of its ids count, tiles of 64 keys."""

    token: Int32
    part: Int32
    keys: Int32
    tiles: Int32


class SparseGradients(Kernel[Config]):
    """dq, and partial rows of dkv."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [tokens, 1, Hq, D]
        d_out: cute.Tensor,  # [tokens, 1, Hq, 512]
        kv: cute.Tensor,  # [1, num_rows, D]
        indices: cute.Tensor,  # [tokens, 1, topk] int32
        lengths: cute.Tensor,  # [tokens] int32; anything if not has_lengths
        weights: cute.Tensor,  # [items, item / 2] int32
        dq: cute.Tensor,  # [tokens, 1, Hq, D]
        partial: cute.Tensor,  # [tokens, slots, D], BF16, or FP32 if wide
        has_lengths: Int32,
        stream,
    ):
        tensors = Tensors(kv, without_middle(indices), weights, without_middle(dq), partial)
        kernel = self.kernel(load_heads(q), load_heads(d_out), tensors, lengths, has_lengths)
        launch_ctas(kernel, q.shape[0] * PARTS, THREADS, self.config.gradients_bytes(), stream)

    @cute.kernel
    def kernel(self, load_q: Tma, load_d_out: Tma, tensors: Tensors, lengths: cute.Tensor, has_lengths: Int32):
        config, align, array = self.config, cute.struct.Align, cute.struct.MemRange
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: align[array[dtype, config.heads * THIRD], 1024]
            sO: align[array[dtype, config.heads * THIRD], 1024]
            k: align[array[dtype, STAGES * BLOCK * THIRD], 1024]
            items: align[array[dtype, 2 * STAGES * config.item], 1024]
            staged: align[array[dtype, CONSUMER_WARPS * STAGED], 128]
            q_barriers: array[Int64, Channel.words(1)]
            k_barriers: array[Int64, Channel.words(STAGES)]
            s_barriers: array[Int64, Channel.words(STAGES)]
            w_barriers: array[Int64, Channel.words(STAGES)]

        storage = allocate(Storage, config, config.gradients_bytes())
        layout = row_layout(dtype, config.heads, THIRD)
        k_layout = row_layout(dtype, BLOCK, THIRD)
        writers = PRODUCER_WARPS * (WARP + 1)
        shared = Shared(
            sQ=storage.sQ.get_tensor(layout.outer, swizzle=layout.inner),
            sO=storage.sO.get_tensor(layout.outer, swizzle=layout.inner),
            k=storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner).iterator,
            address=storage.k.data_ptr().toint(),
            items=storage.items.data_ptr(),
            staged=storage.staged.data_ptr(),
            queries=Channel.over("Q, dout", storage.q_barriers.data_ptr(), 1, readers=0),
            keys=Channel.over("K", storage.k_barriers.data_ptr(), STAGES, readers=CONSUMER_WARPS, writers=writers),
            slopes=Channel.over("dS", storage.s_barriers.data_ptr(), STAGES, readers=CONSUMER_WARPS),
            weights=Channel.over("P", storage.w_barriers.data_ptr(), STAGES, readers=CONSUMER_WARPS // 2),
        )
        channels = (shared.queries, shared.keys, shared.slopes, shared.weights)
        for channel in channels:
            channel.written_by("producer", channel.writers)
        shared.keys.read_by("consumers", CONSUMER_WARPS)
        shared.slopes.read_by("consumers", CONSUMER_WARPS)
        shared.weights.read_by("consumers", CONSUMER_WARPS // 2)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels(channels, (load_q.atom, load_d_out.atom))
        cute.arch.sync_threads()

        index, _, _ = cute.arch.block_idx()
        token = index // PARTS
        keys = count_keys(tensors.indices, lengths, has_lengths, token)
        work = Work(token, index % PARTS, keys, (keys + (BLOCK - 1)) // BLOCK)
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(REGISTERS[1])
            if warp_id == CONSUMER_WARPS:
                self.load_queries(shared, load_q, load_d_out, work)
            if work.part == PARTS - 1:
                self.load(shared, tensors, work, True, warp_id - CONSUMER_WARPS)
            else:
                self.load(shared, tensors, work, False, warp_id - CONSUMER_WARPS)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[0])
            tid, _, _ = cute.arch.thread_idx()
            if work.part == PARTS - 1:
                self.consume(shared, tensors, work, True, warp_id // 4, tid % WARPGROUP)
            else:
                self.consume(shared, tensors, work, False, warp_id // 4, tid % WARPGROUP)
        for channel in channels:
            channel.check()

    @cute.jit
    def load_queries(self, shared: Shared, load_q: Tma, load_d_out: Tma, work: Work) -> None:
        """Q and dout of the part's columns; those past the last arrive as zeros."""
        heads, tiles, queries = self.config.heads, self.config.head_tiles, shared.queries
        with cute.arch.elect_one():
            queries.expect(0, 2 * heads * 2 * THIRD)
        for tma, sX in ((load_q, shared.sQ), (load_d_out, shared.sO)):
            many = cute.make_layout((tiles, THIRD // CHUNK), stride=(TILE_M * CHUNK, heads * CHUNK))
            boxes, source = tma_boxes(tma.atom, sX.iterator, many, tma.tensor, (TILE_M, CHUNK), (None, None, None))
            for chunk in cutlass.range_constexpr(THIRD // CHUNK):
                for group in cutlass.range_constexpr(tiles):
                    box = source[None, group, work.part * (THIRD // CHUNK) + chunk, work.token]
                    cute.copy(tma.atom, box, boxes[None, (group, chunk)], tma_bar_ptr=queries.bar(0))

    @cute.jit
    def id_at(self, tensors: Tensors, work: Work, tile, warp):
        """This lane's id in a tile of keys, negative where it names no row."""
        key = BLOCK * tile + ROWS * warp + cute.arch.lane_idx() % ROWS
        return row_named(tensors.indices, work.token, key, work.keys, tensors.kv.shape[1])

    @cute.jit
    def load(self, shared: Shared, tensors: Tensors, work: Work, last: cutlass.Constexpr, warp) -> None:
        """K of the part's columns, dS and P, tile after tile."""
        config, keys = self.config, shared.keys
        chunks = config.chunks - (PARTS - 1) * (THIRD // CHUNK) if last else THIRD // CHUNK
        rows = tensors.kv.iterator + work.part * THIRD
        gather = Gather.over(rows, 2 * Int64(tensors.kv.stride[1]), warp, cute.arch.lane_idx())
        words, whole = cute.recast_ptr(shared.items, dtype=Int32), cute.make_layout(config.item // 2)
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=16 * config.item)
        address, kinds = shared.address, (shared.slopes, shared.weights)
        row = self.id_at(tensors, work, 0, warp)
        for tile in cutlass.range(work.tiles, unroll=1):
            following = self.id_at(tensors, work, tile + 1, warp)
            stage, round = tile % STAGES, tile // STAGES
            sources = gather.sources(row, 0)
            keys.acquire(stage, round)
            gather.copy(address + stage * (2 * BLOCK * THIRD), sources, tuple(range(chunks)))
            keys.arrive_copied(stage)
            with cute.arch.elect_one():
                keys.arrive(stage)
            if warp == 0:
                for kind in cutlass.range_constexpr(2):
                    channel = kinds[kind]
                    channel.acquire(stage, round)
                    with cute.arch.elect_one():
                        channel.expect(stage, 2 * config.item)
                        item = tensors.weights[item_of(work.token, tensors.indices.shape[1], tile, kind), None]
                        target = cute.make_tensor(words + (STAGES * kind + stage) * (config.item // 2), whole)
                        cute.copy(bulk, cute.make_tensor(item.iterator, whole), target, mbar_ptr=channel.bar(stage))
            row = following

    @cute.jit
    def consume(self, shared: Shared, tensors: Tensors, work: Work, last: cutlass.Constexpr, wg, tid) -> None:
        """dq of this warpgroup's heads, and dkv of every second tile of keys, from tile `wg` on."""
        config, keys, slopes, weights = self.config, shared.keys, shared.slopes, shared.weights
        dtype, heads, K, MN = DTYPES[config.dtype], config.heads, OperandMajorMode.K, OperandMajorMode.MN
        before = (PARTS - 1) * THIRD
        columns, v_columns = (config.D - before, config.Dv - before) if last else (THIRD, THIRD)
        # 8 x 8 blocks without a swizzle, those of the keys first
        blocks = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_INTER, dtype)
        layout = cute.tile_to_shape(blocks, (heads, BLOCK, 2 * STAGES), order=(1, 0, 2))
        items = cute.make_tensor(shared.items, layout.outer)
        # NOTE: of a single tile of heads the second warpgroup repeats what the first does, and writes nothing
        group = wg if const_expr(config.head_tiles > 1) else 0
        sS = cute.local_tile(items, (TILE_M, BLOCK, 2 * STAGES), (group, 0, 0))
        blocks = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_INTER, dtype)
        turned = cute.tile_to_shape(blocks, (BLOCK, heads, 2 * STAGES), order=(0, 1, 2))
        sW = cute.make_tensor(shared.items, turned.outer)

        def product(major, columns: int) -> cute.TiledMma:
            return sm90.make_trivial_tiled_mma(dtype, dtype, major, MN, Float32, (1, 1, 1), (TILE_M, columns))

        def of_heads(mma: cute.TiledMma, sX: cute.Tensor, columns: int) -> cute.Tensor:
            view = cute.make_layout((columns, heads), stride=(heads, 1))
            view = cute.composition(row_layout(dtype, heads, columns).outer, view)
            return mma.make_fragment_B(mma.get_slice(0).partition_B(cute.make_tensor(sX.iterator, view)))

        mma, mma_q, mma_o = product(K, columns), product(MN, columns), product(MN, v_columns)
        view = cute.make_layout((columns, BLOCK, STAGES), stride=(BLOCK, 1, BLOCK * THIRD))
        view = cute.composition(row_layout(dtype, BLOCK, STAGES * THIRD).outer, view)
        rS = mma.make_fragment_A(mma.get_slice(0).partition_A(sS))
        rK = mma.make_fragment_B(mma.get_slice(0).partition_B(cute.make_tensor(shared.k, view)))
        rW = mma_q.make_fragment_A(mma_q.get_slice(0).partition_A(sW))
        rQ, rO = of_heads(mma_q, shared.sQ, columns), of_heads(mma_o, shared.sO, v_columns)
        dQ = cute.make_rmem_tensor(mma.partition_shape_C((TILE_M, columns)), Float32)
        sums = cute.make_rmem_tensor(mma_q.partition_shape_C((TILE_M, columns)), Float32)
        v_sums = cute.make_tensor(sums.iterator, cute.make_layout(mma_o.partition_shape_C((TILE_M, v_columns))))
        dQ.fill(0.0)
        shared.queries.wait(0, 0)
        for tile in cutlass.range(wg, work.tiles + 1, 2, unroll=1):
            if tile > 0:
                stage, round = (tile - 1) % STAGES, (tile - 1) // STAGES
                keys.wait(stage, round)
                slopes.wait(stage, round)
                warpgroup.fence()
                self.product(mma, dQ, rS[None, None, None, stage], rK[None, None, None, stage], True)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                keys.release(stage)
                slopes.release(stage)
            if tile < work.tiles:
                stage, round = tile % STAGES, tile // STAGES
                keys.wait(stage, round)
                slopes.wait(stage, round)
                weights.wait(stage, round)
                warpgroup.fence()
                self.product(mma, dQ, rS[None, None, None, stage], rK[None, None, None, stage], True)
                warpgroup.commit_group()
                self.product(mma_q, sums, rW[None, None, None, stage], rQ, False)
                warpgroup.commit_group()
                self.product(mma_o, v_sums, rW[None, None, None, STAGES + stage], rO, True)
                warpgroup.commit_group()
                warpgroup.wait_group(2)
                keys.release(stage)
                warpgroup.wait_group(1)
                slopes.release(stage)
                warpgroup.wait_group(0)
                weights.release(stage)
                # NOTE: made again from the CTA's index: kept, they spill where partial rows are FP32
                cta, _, _ = cute.arch.block_idx()
                index = late(cta)
                target = tensors.partial[index // PARTS, None, None]
                self.write(sums, target, tile * BLOCK, index % PARTS * THIRD, tid)
        if wg < config.head_tiles:
            factor = cute.make_rmem_tensor(2, Float32)
            factor.fill(1.0)
            staged = shared.staged + (wg * (CONSUMER_WARPS // 2) + tid // WARP) * STAGED
            dq = tensors.dq[work.token, None, None]
            dq = cute.make_tensor((dq.iterator + work.part * THIRD).align(16), dq.layout)
            store_rows(dQ, factor, staged, dq, wg * TILE_M, 0, tid)

    @cute.jit
    def product(
        self, mma: cutlass.Constexpr, C: cute.Tensor, A: cute.Tensor, B: cute.Tensor, accumulate: cutlass.Constexpr
    ) -> None:
        """Issue C (+)= A B^T."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, accumulate)
        for k in cutlass.range_constexpr(cute.size(A, mode=[2])):
            cute.gemm(atom, C, A[None, None, k], B[None, None, k], C)
            atom.set(warpgroup.Field.ACCUMULATE, True)

    @cute.jit
    def write(self, sums: cute.Tensor, target: cute.Tensor, row0, column0, tid) -> None:
        """Partial rows, from `row0` on, in the order of `ORDER`."""
        piece = cute.make_rmem_tensor(8, target.element_type)
        values = cute.make_rmem_tensor(8, Float32)
        for r in cutlass.range_constexpr(2):
            row = row0 + row_of(tid) + 8 * r
            if row < target.shape[0]:
                for group in cutlass.range_constexpr(cute.size(sums) // 16):
                    for i in cutlass.range_constexpr(8):
                        values[i] = sums[16 * group + 4 * (i // 2) + 2 * r + i % 2]
                    piece.store(values.load().to(target.element_type))
                    columns = column0 // 8 + 4 * group + tid % 4
                    cute.autovec_copy(piece, cute.local_tile(target[row, None], (8,), (columns,)))


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparseGradients.__call__`."""
    dtype, anything = DTYPES[config.dtype], (None, None, None)
    return (
        symbolic.tensor(dtype, (*anything, config.D), tma=(0, 2)),
        symbolic.tensor(dtype, (*anything, config.Dv), tma=(0, 2)),
        symbolic.tensor(dtype, (None, None, config.D), tma=(1,)),
        symbolic.tensor(Int32, anything),
        symbolic.tensor(Int32, (None,)),
        symbolic.tensor(Int32, (None, config.item // 2), tma=(0,)),
        symbolic.tensor(dtype, (*anything, config.D), tma=(0, 2)),
        symbolic.tensor(Float32 if config.wide else dtype, (None, None, config.D), tma=(0, 1)),
        *symbolic.numbers(Int32),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(SparseGradients(config), arguments(config), options)
