"""The sparse backward on Hopper, second kernel: dq = dS K, of the dS that `weights_kernel.py` left.

Grid: one CTA for all heads of a token and half of the columns. Bound: half of a token's rows are gathered once more, 36
KB a step of 64 keys beside 16 KB of dS, for 1152 cycles of the tensor cores: 14 GB of the L2 for 4096 tokens of 2048
keys and 128 heads, 2 ms.

Roles (384 threads; entry 168 registers):
    warpgroups 0, 1   232 registers   64 heads each: dq += dS K
    warps 8-11         40 registers   gather of K by cp.async; warp 8: bulk copies of dS

Channels, producer -> consumers (full arrivals / empty arrivals):
    K    3 stages, half of 64 rows           4 * 33 / 8 warps
    dS   3 stages, of 64 keys and all heads  1 + bytes / 8 warps
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gather import CHUNK_BYTES, NO_ROW, ROWS, Gather
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import BLOCK, CHUNK, STAGED, TILE_M, WARP, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.sparse_backward.config import (
    CONSUMER_WARPS,
    HALF,
    PARTS,
    PRODUCER_WARPS,
    QUERIES_STAGES,
    REGISTERS,
    THREADS,
    Config,
)
from flash_mla.kernels.hopper.sparse_backward.weights_kernel import without_middle
from flash_mla.kernels.hopper.sparse_backward.weights_shared import item_of
from flash_mla.kernels.hopper.staging import store_rows


class Tensors(NamedTuple):
    """Global memory. kv: its first row; indices [tokens, topk]; weights, as `item_of` says; dq [tokens, Hq, D]."""

    kv: cute.Pointer
    indices: cute.Tensor
    weights: cute.Tensor
    dq: cute.Tensor


class Shared(NamedTuple):
    """A CTA's shared memory: k, of stages [64, half of the columns], and its address; items: stages of dS; staged:
    STAGED elements for each consumer warp. Channels: rows of K; dS."""

    k: cute.Pointer
    address: Int32
    items: cute.Pointer
    staged: cute.Pointer
    rows: Channel
    slopes: Channel


class Work(NamedTuple):
    """A CTA's: the token, how many of its ids count, steps of 64 keys; bytes from row to row of kv, and its rows."""

    token: Int32
    keys: Int32
    steps: Int32
    row_bytes: Int64
    num_rows: Int32


class SparseQueries(Kernel[Config]):
    """dq."""

    @cute.jit
    def __call__(
        self,
        kv: cute.Tensor,  # [1, num_rows, D]
        indices: cute.Tensor,  # [tokens, 1, topk] int32
        lengths: cute.Tensor,  # [tokens] int32; anything if not has_lengths
        weights: cute.Tensor,  # [items, item / 2] int32
        dq: cute.Tensor,  # [tokens, 1, Hq, D]
        has_lengths: Int32,
        stream,
    ):
        tensors = Tensors(kv.iterator, without_middle(indices), weights, without_middle(dq))
        kernel = self.kernel(tensors, lengths, 2 * Int64(kv.stride[1]), kv.shape[1], has_lengths)
        launch_ctas(kernel, dq.shape[0] * PARTS, THREADS, self.config.queries_bytes(), stream)

    @cute.kernel
    def kernel(self, tensors: Tensors, lengths: cute.Tensor, row_bytes: Int64, num_rows: Int32, has_lengths: Int32):
        config, align, array = self.config, cute.struct.Align, cute.struct.MemRange
        dtype = DTYPES[config.dtype]

        @cute.struct
        class Storage:
            k: align[array[dtype, QUERIES_STAGES * BLOCK * config.columns], 1024]
            items: align[array[dtype, QUERIES_STAGES * config.item], 1024]
            staged: align[array[dtype, CONSUMER_WARPS * STAGED], 128]
            k_barriers: array[Int64, Channel.words(QUERIES_STAGES)]
            w_barriers: array[Int64, Channel.words(QUERIES_STAGES)]

        storage = allocate(Storage, config, config.queries_bytes())
        layout = row_layout(dtype, BLOCK, config.columns)
        shared = Shared(
            k=storage.k.get_tensor(layout.outer, swizzle=layout.inner).iterator,
            address=storage.k.data_ptr().toint(),
            items=storage.items.data_ptr(),
            staged=storage.staged.data_ptr(),
            rows=Channel.over(
                "K",
                storage.k_barriers.data_ptr(),
                QUERIES_STAGES,
                readers=CONSUMER_WARPS,
                writers=PRODUCER_WARPS * (WARP + 1),
            ),
            slopes=Channel.over("dS", storage.w_barriers.data_ptr(), QUERIES_STAGES, readers=CONSUMER_WARPS),
        )
        shared.rows.written_by("gather", shared.rows.writers)
        shared.slopes.written_by("producer")
        for channel in (shared.rows, shared.slopes):
            channel.read_by("consumers", CONSUMER_WARPS)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels((shared.rows, shared.slopes), ())
        cute.arch.sync_threads()

        index, _, _ = cute.arch.block_idx()
        token, part, keys = index // PARTS, index % PARTS, Int32(tensors.indices.shape[1])
        if has_lengths != 0:
            keys = cutlass.max(0, cutlass.min(lengths[token], keys))
        work = Work(token, keys, (keys + (BLOCK - 1)) // BLOCK, row_bytes, num_rows)
        if warp_id >= CONSUMER_WARPS:
            cute.arch.setmaxregister_decrease(REGISTERS[1])
            if part == 0:
                self.load(shared, tensors, work, 0, warp_id - CONSUMER_WARPS)
            else:
                self.load(shared, tensors, work, 1, warp_id - CONSUMER_WARPS)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[0])
            tid, _, _ = cute.arch.thread_idx()
            if part == 0:
                self.consume(shared, tensors, work, 0, warp_id // 4, tid % WARPGROUP)
            else:
                self.consume(shared, tensors, work, 1, warp_id // 4, tid % WARPGROUP)
        shared.rows.check()
        shared.slopes.check()

    def chunks_of(self, part: int) -> tuple[int, ...]:
        """The chunks of a row that a part has."""
        half = HALF // CHUNK
        return tuple(range(half)) if part == 0 else tuple(range(half, self.config.chunks))

    @cute.jit
    def id_at(self, tensors: Tensors, work: Work, step, warp):
        """This lane's id in a step, NO_ROW where it names no row."""
        row = Int32(NO_ROW)
        key = BLOCK * step + ROWS * warp + cute.arch.lane_idx() % ROWS
        if key < work.keys:
            row = tensors.indices[work.token, key]
        return row if row < work.num_rows else Int32(NO_ROW)

    @cute.jit
    def load(self, shared: Shared, tensors: Tensors, work: Work, part: cutlass.Constexpr, warp) -> None:
        """K of the part's columns, and dS, step after step."""
        config, rows, slopes, own = self.config, shared.rows, shared.slopes, self.chunks_of(part)
        gather = Gather.over(tensors.kv, work.row_bytes, warp, cute.arch.lane_idx())
        words, whole = cute.recast_ptr(shared.items, dtype=Int32), cute.make_layout(config.item // 2)
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=16 * config.item)
        row = self.id_at(tensors, work, 0, warp)
        for step in cutlass.range(work.steps, unroll=1):
            following = self.id_at(tensors, work, step + 1, warp)
            stage, round = step % QUERIES_STAGES, step // QUERIES_STAGES
            if warp == 0:
                slopes.acquire(stage, round)
                with cute.arch.elect_one():
                    slopes.expect(stage, 2 * config.item)
                    item = tensors.weights[item_of(work.token, tensors.indices.shape[1], step, 0), None]
                    target = cute.make_tensor(words + stage * (config.item // 2), whole)
                    cute.copy(bulk, cute.make_tensor(item.iterator, whole), target, mbar_ptr=slopes.bar(stage))
            sources = gather.sources(row, 0)
            rows.acquire(stage, round)
            block = shared.address + stage * (2 * BLOCK * config.columns) - CHUNK_BYTES * own[0]
            gather.copy(block, sources, own)
            rows.arrive_copied(stage)
            with cute.arch.elect_one():
                rows.arrive(stage)
            row = following

    @cute.jit
    def consume(self, shared: Shared, tensors: Tensors, work: Work, part: cutlass.Constexpr, wg, tid) -> None:
        """dq of this warpgroup's heads."""
        config, keys, slopes = self.config, shared.rows, shared.slopes
        dtype, K, MN = DTYPES[config.dtype], OperandMajorMode.K, OperandMajorMode.MN
        has_rope = const_expr(part == 1 and config.rope)
        # NOTE: of a single tile of heads the second warpgroup repeats what the first does, and writes nothing
        tile = wg if const_expr(config.head_tiles > 1) else 0
        blocks = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_INTER, dtype)
        layout = cute.tile_to_shape(blocks, (config.heads, BLOCK, QUERIES_STAGES), order=(1, 0, 2))
        items = cute.make_tensor(shared.items, layout.outer)
        sW = cute.local_tile(items, (TILE_M, BLOCK, QUERIES_STAGES), (tile, 0, 0))

        def product(columns: int) -> cute.TiledMma:
            return sm90.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, (1, 1, 1), (TILE_M, columns))

        def turned(mma: cute.TiledMma, first: int, columns: int) -> cute.Tensor:
            rows = row_layout(dtype, BLOCK, config.columns * QUERIES_STAGES).outer
            view = cute.make_layout((columns, BLOCK, QUERIES_STAGES), stride=(BLOCK, 1, BLOCK * config.columns))
            tensor = cute.make_tensor(shared.k + first * BLOCK, cute.composition(rows, view))
            return mma.make_fragment_B(mma.get_slice(0).partition_B(tensor))

        main, small = product(HALF), product(CHUNK)
        rW = main.make_fragment_A(main.get_slice(0).partition_A(sW))
        rK, rRope = turned(main, 0, HALF), turned(small, HALF if config.rope else 0, CHUNK)
        dQ = cute.make_rmem_tensor(main.partition_shape_C((TILE_M, HALF)), Float32)
        dRope = cute.make_rmem_tensor(small.partition_shape_C((TILE_M, CHUNK)), Float32)
        dQ.fill(0.0)
        dRope.fill(0.0)
        for step in cutlass.range(work.steps, unroll=1):
            stage, round = step % QUERIES_STAGES, step // QUERIES_STAGES
            keys.wait(stage, round)
            slopes.wait(stage, round)
            warpgroup.fence()
            self.product(main, dQ, rW, rK, stage)
            if const_expr(has_rope):
                self.product(small, dRope, rW, rRope, stage)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if step > 0:
                before = (step - 1) % QUERIES_STAGES
                keys.release(before)
                slopes.release(before)
        warpgroup.wait_group(0)
        if wg < config.head_tiles:
            factor = cute.make_rmem_tensor(2, Float32)
            factor.fill(1.0)
            staged = shared.staged + (wg * 4 + tid // WARP) * STAGED
            target = tensors.dq[work.token, None, None]
            store_rows(dQ, factor, staged, target, wg * TILE_M, part * HALF, tid)
            if const_expr(has_rope):
                store_rows(dRope, factor, staged, target, wg * TILE_M, config.Dv, tid)

    @cute.jit
    def product(self, mma: cutlass.Constexpr, C: cute.Tensor, A: cute.Tensor, B: cute.Tensor, stage) -> None:
        """Issue C += A B^T of a stage."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        for k in cutlass.range_constexpr(BLOCK // 16):
            cute.gemm(atom, C, A[None, None, k, stage], B[None, None, k, stage], C)


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `SparseQueries.__call__`."""
    dtype, anything = DTYPES[config.dtype], (None, None, None)
    return (
        symbolic.tensor(dtype, (None, None, config.D), tma=(1,)),
        symbolic.tensor(Int32, anything),
        symbolic.tensor(Int32, (None,)),
        symbolic.tensor(Int32, (None, config.item // 2), tma=(0,)),
        symbolic.tensor(dtype, (*anything, config.D), tma=(0, 2)),
        *symbolic.numbers(Int32),
    )


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(SparseQueries(config), arguments(config), options)
