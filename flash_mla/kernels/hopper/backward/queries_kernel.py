"""dQ on Hopper: dQ = scale * dS K, of the tiles of dS that `keys_kernel.py` left in the workspace."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.backward.config import (
    CONSUMERS,
    THREADS,
    TILE,
    TILE_N,
    TILE_Q,
    WARPS,
    Bar,
    Config,
)
from flash_mla.kernels.hopper.backward.keys_kernel import rows_first, rows_of, shared_arguments
from flash_mla.kernels.hopper.backward.shared import Scalars, Span, Tensors, key_tiles, place_of, span_of
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.boxes import Tma, load_of, row_layout, tma_boxes, zero_rows
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.limits import CHUNK, STAGED, TILE_M, WARPGROUP, smem_bytes
from flash_mla.kernels.hopper.staging import store_rows


class Queries:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        k: cute.Tensor,  # [B, Hk, S_kv, D]
        dq: cute.Tensor,  # [B, Hq, P, D]
        tensors: Tensors,
        scalars: Scalars,
        ctas: Int32,
        stream,
    ):
        self.kernel(load_of(rows_first(k), TILE_N, CHUNK), dq, tensors, scalars).launch(
            grid=(ctas, 1, 1),
            block=(THREADS, 1, 1),
            smem=self.config.queries_bytes(),
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tma: Tma, dq: cute.Tensor, tensors: Tensors, scalars: Scalars):
        config = self.config
        dtype, stages = DTYPES[config.dtype], config.sizes.key_stages

        @cute.struct
        class Storage:
            sK: cute.struct.Align[cute.struct.MemRange[dtype, stages * TILE_N * config.D], 1024]
            dS: cute.struct.Align[cute.struct.MemRange[dtype, stages * CONSUMERS * TILE], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[dtype, WARPS * STAGED], 128]
            barriers: cute.struct.MemRange[Int64, Channel.words(stages)]

        assert smem_bytes(Storage.size_in_bytes()) == config.queries_bytes()
        storage = utils.SmemAllocator().allocate(Storage)
        layout = row_layout(dtype, TILE_N, config.D, stages)
        sK = storage.sK.get_tensor(layout.outer, swizzle=layout.inner)
        channel = Channel.over("K, dS", storage.barriers.data_ptr(), stages, readers=WARPS)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels((channel,), (tma.atom,))
        cute.arch.sync_threads()

        index, _, _ = cute.arch.block_idx()
        ratio = scalars.Hq // scalars.Hk
        tiles = (scalars.P + (CONSUMERS * TILE_Q - 1)) // (CONSUMERS * TILE_Q)
        # the last queries, which see the most keys, come first
        tile, local = tiles - 1 - index % tiles, index // tiles
        line = local // ratio + scalars.first
        request = line // scalars.Hk
        kv_head = line - request * scalars.Hk
        head = kv_head * ratio + local % ratio
        span = span_of(tensors, scalars, request)
        live = tensors.live[request * scalars.Hq + head]
        first = tile * CONSUMERS
        most = cutlass.max(key_tiles(scalars, span, live, first), key_tiles(scalars, span, live, first + 1))
        if warp_id >= WARPS:
            if warp_id == WARPS:
                channel.written_by("producer")
                self.load(tma, channel, sK, storage.dS.data_ptr(), tensors, scalars, local, first, most, kv_head, request)
        else:
            channel.read_by("consumers", WARPS)
            tid, _, _ = cute.arch.thread_idx()
            wg = warp_id // 4
            own = key_tiles(scalars, span, live, first + wg)
            self.consume(channel, sK, storage.dS.data_ptr(), storage.staged.data_ptr(), dq, scalars, span, own, most, tile, head, request, wg, tid)
        channel.check()

    @cute.jit
    def load(self, tma: Tma, channel: Channel, sK, memory, tensors, scalars, local, first, most, kv_head, request) -> None:
        """Tiles of K by TMA, and of dS, which lie in the workspace as they are read, by bulk copies."""
        config = self.config
        stages = config.sizes.key_stages
        many = cute.make_layout((config.D // CHUNK, stages), stride=(TILE_N * CHUNK, TILE_N * config.D))
        sX, gX = tma_boxes(tma.atom, sK.iterator, many, tma.tensor, (TILE_N, CHUNK), (None, None, None, None))
        words = cute.recast_ptr(memory, dtype=Int32)
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=TILE * 16)
        last = (scalars.P + (TILE_Q - 1)) // TILE_Q - 1
        for n in cutlass.range(most, unroll=1):
            stage = n % stages
            channel.acquire(stage, n // stages)
            bar = channel.bar(stage)
            with cute.arch.elect_one():
                channel.expect(stage, 2 * (TILE_N * config.D + CONSUMERS * TILE))
                for wg in cutlass.range_constexpr(CONSUMERS):
                    # NOTE: past the last tile of queries that one again, so that as many bytes come
                    place = place_of(scalars, local, n, cutlass.min(first + wg, last))
                    source = cute.make_tensor(tensors.ds.iterator + place * (TILE // 2), cute.make_layout(TILE // 2))
                    target = cute.make_tensor(words + (stage * CONSUMERS + wg) * (TILE // 2), cute.make_layout(TILE // 2))
                    cute.copy(bulk, source, target, mbar_ptr=bar)
            for chunk in cutlass.range_constexpr(config.D // CHUNK):
                cute.copy(tma.atom, gX[None, n, chunk, kv_head, request], sX[None, (chunk, stage)], tma_bar_ptr=bar)

    @cute.jit
    def consume(self, channel: Channel, sK, memory, staged, dq, scalars, span, own, most, tile, head, request, wg, tid) -> None:
        """dQ of a warpgroup's 64 queries, of its first `own` key tiles."""
        config = self.config
        dtype, stages = DTYPES[config.dtype], config.sizes.key_stages
        MN = OperandMajorMode.MN
        mma = sm90.make_trivial_tiled_mma(dtype, dtype, MN, MN, Float32, (1, 1, 1), (TILE_M, config.D))
        part = mma.get_slice(0)
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_INTER, dtype)
        layout = cute.tile_to_shape(atom, (TILE_Q, TILE_N, stages * CONSUMERS), order=(0, 1, 2))
        dS = cute.make_tensor(memory, layout.outer)
        view = cute.make_tensor(sK.iterator, cute.select(sK.layout, mode=[1, 0, 2]))
        rS, rK = mma.make_fragment_A(part.partition_A(dS)), mma.make_fragment_B(part.partition_B(view))
        dQ = cute.make_rmem_tensor(mma.partition_shape_C((TILE_Q, config.D)), Float32)
        dQ.fill(0.0)
        product = cute.make_mma_atom(mma.op)
        product.set(warpgroup.Field.ACCUMULATE, True)
        for n in cutlass.range(most, unroll=1):
            stage = n % stages
            channel.wait(stage, n // stages)
            if n < own:
                if (n + 1) * TILE_N > span.keys:
                    # NOTE: dS is 0 there, but 0 * NaN is NaN
                    zero_rows(sK.iterator + stage * (TILE_N * config.D), TILE_N, config.D // CHUNK, span.keys - n * TILE_N, tid)
                    sync(Bar.WARPGROUP + wg, WARPGROUP)
                warpgroup.fence()
                for k in cutlass.range_constexpr(TILE_N // 16):
                    cute.gemm(product, dQ, rS[None, None, k, stage * CONSUMERS + wg], rK[None, None, k, stage], dQ)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
            channel.release(stage)
        factor = cute.make_rmem_tensor(2, Float32)
        factor.fill(scalars.scale)
        store_rows(dQ, factor, staged + tid // 32 * STAGED, dq[request, head, None, None], tile * CONSUMERS * TILE_Q, 0, tid)


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `Queries.__call__`."""
    return rows_of(config, config.D), rows_of(config, config.D), *shared_arguments(), Int32(1)


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(Queries(config), arguments(config), options)
