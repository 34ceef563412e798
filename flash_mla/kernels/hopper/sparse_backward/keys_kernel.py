"""The sparse backward on Hopper, third kernel: a partial row of dkv for every slot of a token.

    dkv[slot] = sum over heads of dS q + f P dout

of the P (times f) and dS that `weights_kernel.py` left. Triton's `sum_kernel` adds the partial rows that name a row.

Grid: one CTA for a token and half of the columns, 256 of V's and, in the second, those of the rope part: Q and dout of
up to 128 heads then stay in shared memory while all keys go by. Bound: memory. Of each slot 4 bytes a head are read and
2 D written, 14 GB for 4096 tokens of 2048 keys and 128 heads where the L2 gives P and dS to the second CTA, 3.4 ms; the
products take 2.5 ms.

Roles:
    consumer warpgroups 0, 1     every second tile of 64 keys: dkv = dS^T Q, += P^T dO; dkv to the workspace
    warp 0 of the last           TMA of Q, dO; bulk copies of dS and P

Channels, producer -> consumers (full arrivals / empty arrivals):
    Q, dO    1 stage                                      1 + bytes / never freed
    dS, P    4 stages: dS, P of a tile, of the next one   1 + bytes / the warps of the tile's warpgroup

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
from flash_mla.kernels.hopper.lanes import row_of
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    HALF,
    KEYS_STAGES,
    PARTS,
    REGISTERS,
    THREADS,
    Config,
)
from flash_mla.kernels.hopper.sparse_backward.weights_kernel import load_heads
from flash_mla.kernels.hopper.sparse_backward.weights_shared import item_of

ORDER = (4, 4, 2)
"""Of 32 columns (a, b, c) of a row of kv, where a partial row has (b, a, c): column 8 a + 2 b + c at 8 b + 2 a + c."""


class Shared(NamedTuple):
    """A CTA's shared memory: sQ [heads, its columns of q]; sO [heads, 256]: dout; items: stages of dS or P of 64 keys.
    Channels: queries, once; weights."""

    sQ: cute.Tensor
    sO: cute.Tensor
    items: cute.Pointer
    queries: Channel
    weights: Channel


class Work(NamedTuple):
    """A CTA's: the token and its topk, the part of the columns, tiles of 64 keys."""

    token: Int32
    topk: Int32
    part: Int32
    tiles: Int32


class SparseKeys(Kernel[Config]):
    """Partial rows of dkv."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [tokens, 1, Hq, D]
        d_out: cute.Tensor,  # [tokens, 1, Hq, 512]
        lengths: cute.Tensor,  # [tokens] int32; anything if not has_lengths
        weights: cute.Tensor,  # [items, item / 2] int32
        partial: cute.Tensor,  # [tokens, slots, D], BF16, or FP32 if wide
        topk: Int32,
        has_lengths: Int32,
        stream,
    ):
        kernel = self.kernel(load_heads(q), load_heads(d_out), lengths, weights, partial, topk, has_lengths)
        launch_ctas(kernel, q.shape[0] * PARTS, THREADS, self.config.keys_bytes(), stream)

    @cute.kernel
    def kernel(
        self,
        load_q: Tma,
        load_d_out: Tma,
        lengths: cute.Tensor,
        weights: cute.Tensor,
        partial: cute.Tensor,
        topk: Int32,
        has_lengths: Int32,
    ):
        config, align, array = self.config, cute.struct.Align, cute.struct.MemRange
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            sQ: align[array[dtype, config.heads * config.columns], 1024]
            sO: align[array[dtype, config.heads * HALF], 1024]
            items: align[array[dtype, KEYS_STAGES * config.item], 1024]
            q_barriers: array[Int64, Channel.words(1)]
            w_barriers: array[Int64, Channel.words(KEYS_STAGES)]

        storage = allocate(Storage, config, config.keys_bytes())
        q_layout, o_layout = row_layout(dtype, config.heads, config.columns), row_layout(dtype, config.heads, HALF)
        shared = Shared(
            sQ=storage.sQ.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            sO=storage.sO.get_tensor(o_layout.outer, swizzle=o_layout.inner),
            items=storage.items.data_ptr(),
            queries=Channel.over("Q, dout", storage.q_barriers.data_ptr(), 1, readers=0),
            weights=Channel.over("dS, P", storage.w_barriers.data_ptr(), KEYS_STAGES, readers=CONSUMER_WARPS // 2),
        )
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels((shared.queries, shared.weights), (load_q.atom, load_d_out.atom))
        cute.arch.sync_threads()

        index, _, _ = cute.arch.block_idx()
        token, keys = index // PARTS, topk
        if has_lengths != 0:
            keys = cutlass.max(0, cutlass.min(lengths[token], keys))
        work = Work(token, topk, index % PARTS, (keys + (BLOCK - 1)) // BLOCK)
        shared.weights.read_by("consumers", CONSUMER_WARPS // 2)
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(REGISTERS[1])
            if warp_id == CONSUMER_WARPS:
                self.load(shared, load_q, load_d_out, weights, work)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[0])
            tid, _, _ = cute.arch.thread_idx()
            if work.part == 0:
                self.consume(shared, partial, work, 0, warp_id // 4, tid % WARPGROUP)
            else:
                self.consume(shared, partial, work, 1, warp_id // 4, tid % WARPGROUP)
        shared.queries.check()
        shared.weights.check()

    @cute.jit
    def load(self, shared: Shared, load_q: Tma, load_d_out: Tma, weights: cute.Tensor, work: Work) -> None:
        """Q and dout of the part's columns, then dS and P, which lie in the workspace as they are read."""
        config, queries, channel = self.config, shared.queries, shared.weights
        queries.written_by("producer")
        channel.written_by("producer")
        with cute.arch.elect_one():
            queries.expect(0, 2 * config.heads * (config.columns + HALF))
        for tma, sX, columns in ((load_q, shared.sQ, config.columns), (load_d_out, shared.sO, HALF)):
            many = cute.make_layout(
                (config.head_tiles, columns // CHUNK), stride=(TILE_M * CHUNK, config.heads * CHUNK)
            )
            boxes, source = tma_boxes(tma.atom, sX.iterator, many, tma.tensor, (TILE_M, CHUNK), (None, None, None))
            # NOTE: the left part loads the first chunk of the right one beside its own: it has no rope part
            for chunk in cutlass.range_constexpr(columns // CHUNK):
                for group in cutlass.range_constexpr(config.head_tiles):
                    box = source[None, group, work.part * (HALF // CHUNK) + chunk, work.token]
                    cute.copy(tma.atom, box, boxes[None, (group, chunk)], tma_bar_ptr=queries.bar(0))
        words, whole = cute.recast_ptr(shared.items, dtype=Int32), cute.make_layout(config.item // 2)
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=16 * config.item)
        for tile in cutlass.range(work.tiles, unroll=1):
            for kind in cutlass.range_constexpr(2):
                stage = tile % (KEYS_STAGES // 2) * 2 + kind
                channel.acquire(stage, tile // (KEYS_STAGES // 2))
                with cute.arch.elect_one():
                    channel.expect(stage, 2 * config.item)
                    item = weights[item_of(work.token, work.topk, tile, kind), None]
                    target = cute.make_tensor(words + stage * (config.item // 2), whole)
                    cute.copy(bulk, cute.make_tensor(item.iterator, whole), target, mbar_ptr=channel.bar(stage))

    @cute.jit
    def consume(self, shared: Shared, partial: cute.Tensor, work: Work, part: cutlass.Constexpr, wg, tid) -> None:
        """Every second tile of keys, from tile `wg` on."""
        config, channel = self.config, shared.weights
        dtype, MN = DTYPES[config.dtype], OperandMajorMode.MN
        has_rope = const_expr(part == 1 and config.rope)
        # 8 x 8 blocks without a swizzle, those of the keys first
        blocks = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_INTER, dtype)
        layout = cute.tile_to_shape(blocks, (BLOCK, config.heads, KEYS_STAGES), order=(0, 1, 2))
        sW = cute.make_tensor(shared.items, layout.outer)

        def product(columns: int) -> cute.TiledMma:
            return sm90.make_trivial_tiled_mma(dtype, dtype, MN, MN, Float32, (1, 1, 1), (TILE_M, columns))

        def turned(mma: cute.TiledMma, sX: cute.Tensor, first: int, columns: int) -> cute.Tensor:
            view = cute.make_layout((columns, config.heads), stride=(config.heads, 1))
            view = cute.composition(row_layout(dtype, config.heads, columns).outer, view)
            tensor = cute.make_tensor(sX.iterator + first * config.heads, view)
            return mma.make_fragment_B(mma.get_slice(0).partition_B(tensor))

        main, small = product(HALF), product(CHUNK)
        rW = main.make_fragment_A(main.get_slice(0).partition_A(sW))
        rQ, rO = turned(main, shared.sQ, 0, HALF), turned(main, shared.sO, 0, HALF)
        rRope = turned(small, shared.sQ, HALF if config.rope else 0, CHUNK)
        sums = cute.make_rmem_tensor(main.partition_shape_C((TILE_M, HALF)), Float32)
        rope_sums = cute.make_rmem_tensor(small.partition_shape_C((TILE_M, CHUNK)), Float32)
        shared.queries.wait(0, 0)
        for tile in cutlass.range(wg, work.tiles, KEYS_STAGES // 2, unroll=1):
            stage, round = 2 * wg, tile // (KEYS_STAGES // 2)
            channel.wait(stage, round)
            warpgroup.fence()
            self.product(main, sums, rW, rQ, stage, False)
            if const_expr(has_rope):
                self.product(small, rope_sums, rW, rRope, stage, False)
            warpgroup.commit_group()
            channel.wait(stage + 1, round)
            self.product(main, sums, rW, rO, stage + 1, True)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            channel.release(stage)
            warpgroup.wait_group(0)
            channel.release(stage + 1)
            target, row0 = partial[work.token, None, None], tile * BLOCK
            self.write(sums, target, row0, part * HALF, tid)
            if const_expr(has_rope):
                self.write(rope_sums, target, row0, config.Dv, tid)

    @cute.jit
    def product(
        self,
        mma: cutlass.Constexpr,
        C: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        stage,
        accumulate: cutlass.Constexpr,
    ) -> None:
        """Issue C (+)= A B^T of a stage."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, accumulate)
        for k in cutlass.range_constexpr(self.config.heads // 16):
            cute.gemm(atom, C, A[None, None, k, stage], B[None, None, k], C)
            atom.set(warpgroup.Field.ACCUMULATE, True)

    @cute.jit
    def write(self, sums: cute.Tensor, target: cute.Tensor, row0, column0: cutlass.Constexpr, tid) -> None:
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
    """Symbolic arguments of `SparseKeys.__call__`."""
    dtype, anything = DTYPES[config.dtype], (None, None, None)
    return (
        symbolic.tensor(dtype, (*anything, config.D), tma=(0, 2)),
        symbolic.tensor(dtype, (*anything, config.Dv), tma=(0, 2)),
        symbolic.tensor(Int32, (None,)),
        symbolic.tensor(Int32, (None, config.item // 2), tma=(0,)),
        symbolic.tensor(Float32 if config.wide else dtype, (None, None, config.D), tma=(0, 1)),
        *symbolic.numbers(Int32, Int32),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(SparseKeys(config), arguments(config), options)
