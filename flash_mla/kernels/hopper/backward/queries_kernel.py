"""The backward of prefill on Hopper, second kernel: dQ = scale * dS K, of the dS that `keys_kernel.py` left.

Grid: one CTA a tile of 128 queries of a head, the last queries, which see most keys, first (`walk`). Bound: the bytes
of dS, which are read once; the products take half of that time.

Roles:
    consumer warpgroups 0, 1     64 queries each: dQ += dS K
    warp 0 of the last           TMA of tiles of 128 keys, bulk copies of dS

Channel, producer -> consumers (full arrivals / empty arrivals): K and dS, 3 stages (two of 192 columns), 1 + bytes /
consumer warps. A warpgroup computes with the key tiles that its own queries see and releases the others: what the first
kernel did not write is never an operand.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.backward.config import CONSUMERS, THREADS, TILE, TILE_N, TILE_Q, WARPS, Bar, Config
from flash_mla.kernels.hopper.backward.keys_kernel import rows_first, rows_of, shared_arguments
from flash_mla.kernels.hopper.backward.shared import Scalars, Tensors, key_tiles, live_of, place_of, span_of, walk
from flash_mla.kernels.hopper.barriers import sync
from flash_mla.kernels.hopper.boxes import Tma, load_of, row_layout, tma_boxes, zero_rows
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import CHUNK, STAGED, TILE_M, WARPGROUP
from flash_mla.kernels.hopper.memory import allocate
from flash_mla.kernels.hopper.staging import store_rows


class Shared(NamedTuple):
    """A CTA's shared memory: sK [TILE_N, D, stages]; dS: TILE elements for each warpgroup and stage; staged: STAGED
    elements of dQ for each consumer warp; the channel of K and dS."""

    sK: cute.Tensor
    dS: cute.Pointer
    staged: cute.Pointer
    channel: Channel


class QueryTile(NamedTuple):
    """A CTA's tile: its number in its head; the head counted from the launch's first, in its request, and its KV head;
    the request and its keys; key tiles that any of its queries sees."""

    number: Int32
    local: Int32
    head: Int32
    kv_head: Int32
    request: Int32
    keys: Int32
    most: Int32


class Queries(Kernel[Config]):
    """dq of the dS in the workspace, a CTA a tile of queries."""

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
        kernel = self.kernel(load_of(rows_first(k), TILE_N, CHUNK), dq, tensors, scalars)
        launch_ctas(kernel, ctas, THREADS, self.config.queries_bytes(), stream)

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

        storage = allocate(Storage, config, config.queries_bytes())
        layout = row_layout(dtype, TILE_N, config.D, stages)
        channel = Channel.over("K, dS", storage.barriers.data_ptr(), stages, readers=WARPS)
        sK = storage.sK.get_tensor(layout.outer, swizzle=layout.inner)
        shared = Shared(sK, storage.dS.data_ptr(), storage.staged.data_ptr(), channel)
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels((channel,), (tma.atom,))
        cute.arch.sync_threads()

        index, _, _ = cute.arch.block_idx()
        ratio = scalars.Hq // scalars.Hk
        tiles = (scalars.P + (CONSUMERS * TILE_Q - 1)) // (CONSUMERS * TILE_Q)
        turn, local = walk(index, tiles, scalars.heads * ratio, scalars.group * ratio)
        number = tiles - 1 - turn
        line = local // ratio + scalars.first
        request = line // scalars.Hk
        kv_head = line - request * scalars.Hk
        head = kv_head * ratio + local % ratio
        span = span_of(tensors, scalars, request)
        live = live_of(tensors, scalars, request * scalars.Hq + head)
        upper, lower = (key_tiles(scalars, span, live, number * CONSUMERS + wg) for wg in range(CONSUMERS))
        tile = QueryTile(number, local, head, kv_head, request, span.keys, cutlass.max(upper, lower))
        if warp_id >= WARPS:
            if warp_id == WARPS:
                self.load(shared, tma, tensors, scalars, tile)
        else:
            tid, _, _ = cute.arch.thread_idx()
            wg = warp_id // 4
            self.consume(shared, dq, scalars, tile, upper if wg == 0 else lower, wg, tid)
        channel.check()

    @cute.jit
    def load(self, shared: Shared, tma: Tma, tensors: Tensors, scalars: Scalars, tile: QueryTile) -> None:
        """Tiles of K, and of dS, which lie in the workspace as they are read."""
        config, channel = self.config, shared.channel
        channel.written_by("producer")
        stages = config.sizes.key_stages
        many = cute.make_layout((config.D // CHUNK, stages), stride=(TILE_N * CHUNK, TILE_N * config.D))
        sK, gK = tma_boxes(tma.atom, shared.sK.iterator, many, tma.tensor, (TILE_N, CHUNK), (None, None, None, None))
        words, piece = cute.recast_ptr(shared.dS, dtype=Int32), cute.make_layout(TILE // 2)
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=16 * TILE)
        last = (scalars.P + (TILE_Q - 1)) // TILE_Q - 1
        for n in cutlass.range(tile.most, unroll=1):
            stage = n % stages
            channel.acquire(stage, n // stages)
            bar = channel.bar(stage)
            with cute.arch.elect_one():
                channel.expect(stage, 2 * (TILE_N * config.D + CONSUMERS * TILE))
                for wg in cutlass.range_constexpr(CONSUMERS):
                    # NOTE: past the last tile of queries that one again, so that as many bytes come
                    query_tile = cutlass.min(tile.number * CONSUMERS + wg, last)
                    place = place_of(scalars, tile.local, n, query_tile)
                    source = cute.make_tensor(tensors.ds.iterator + place * (TILE // 2), piece)
                    target = cute.make_tensor(words + (stage * CONSUMERS + wg) * (TILE // 2), piece)
                    cute.copy(bulk, source, target, mbar_ptr=bar)
            for chunk in cutlass.range_constexpr(config.D // CHUNK):
                source = gK[None, n, chunk, tile.kv_head, tile.request]
                cute.copy(tma.atom, source, sK[None, (chunk, stage)], tma_bar_ptr=bar)

    @cute.jit
    def consume(self, shared: Shared, dq: cute.Tensor, scalars: Scalars, tile: QueryTile, own, wg, tid) -> None:
        """dQ of a warpgroup's 64 queries, of the first `own` key tiles."""
        config, channel = self.config, shared.channel
        channel.read_by("consumers", WARPS)
        dtype, stages = DTYPES[config.dtype], config.sizes.key_stages
        MN = OperandMajorMode.MN
        mma = sm90.make_trivial_tiled_mma(dtype, dtype, MN, MN, Float32, (1, 1, 1), (TILE_M, config.D))
        part = mma.get_slice(0)
        # 8 x 8 blocks without a swizzle, those of the queries first
        blocks = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_INTER, dtype)
        layout = cute.tile_to_shape(blocks, (TILE_Q, TILE_N, stages * CONSUMERS), order=(0, 1, 2))
        sS = cute.make_tensor(shared.dS, layout.outer)
        sKt = cute.make_tensor(shared.sK.iterator, cute.select(shared.sK.layout, mode=[1, 0, 2]))
        rS, rK = mma.make_fragment_A(part.partition_A(sS)), mma.make_fragment_B(part.partition_B(sKt))
        dQ = cute.make_rmem_tensor(mma.partition_shape_C((TILE_Q, config.D)), Float32)
        dQ.fill(0.0)
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        for n in cutlass.range(tile.most, unroll=1):
            stage = n % stages
            channel.wait(stage, n // stages)
            if n < own:
                if (n + 1) * TILE_N > tile.keys:
                    # NOTE: dS is 0 there, but 0 * NaN is NaN
                    memory = shared.sK.iterator + stage * (TILE_N * config.D)
                    zero_rows(memory, TILE_N, config.D // CHUNK, tile.keys - n * TILE_N, tid)
                    sync(Bar.WARPGROUP + wg, WARPGROUP)
                warpgroup.fence()
                for k in cutlass.range_constexpr(TILE_N // 16):
                    cute.gemm(atom, dQ, rS[None, None, k, stage * CONSUMERS + wg], rK[None, None, k, stage], dQ)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
            channel.release(stage)
        factor = cute.make_rmem_tensor(2, Float32)
        factor.fill(scalars.scale)
        target, row0 = dq[tile.request, tile.head, None, None], tile.number * CONSUMERS * TILE_Q
        store_rows(dQ, factor, shared.staged + tid // 32 * STAGED, target, row0, 0, tid)


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `Queries.__call__`."""
    return rows_of(config, config.D), rows_of(config, config.D), *shared_arguments(), Int32(1)


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(Queries(config), arguments(config), options)
