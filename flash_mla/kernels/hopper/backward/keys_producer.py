"""The loading warp of the keys' kernel: K and V of its tile once, then query tile after query tile."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_mla.kernels.hopper.backward.config import TILE_N, TILE_Q, Config
from flash_mla.kernels.hopper.backward.keys_shared import KeysShared
from flash_mla.kernels.hopper.backward.shared import Scalars, Tensors, key_tile_of, live_of, query_tiles, span_of
from flash_mla.kernels.hopper.boxes import Tma, tma_boxes
from flash_mla.kernels.hopper.limits import CHUNK, WARP


@dataclass(frozen=True)
class Producer:
    """The warp that fills K, V, Q and dout by TMA, and the rows' numbers itself.

    sK, sV [box, chunk], sQ, sO [box, chunk, stage]; gK, gV, gQ, gO [box, tile, chunk, head, request].
    """

    config: Config
    shared: KeysShared
    tmas: tuple
    sK: cute.Tensor
    gK: cute.Tensor
    sV: cute.Tensor
    gV: cute.Tensor
    sQ: cute.Tensor
    gQ: cute.Tensor
    sO: cute.Tensor
    gO: cute.Tensor

    @staticmethod
    def over(shared: KeysShared, q: Tma, k: Tma, v: Tma, d_out: Tma) -> Producer:
        config = shared.config

        def boxes(tma: Tma, sX, rows: int, columns: int, stages: int):
            many = cute.make_layout((columns // CHUNK, stages), stride=(rows * CHUNK, rows * columns))
            return tma_boxes(tma.atom, sX.iterator, many, tma.tensor, (rows, CHUNK), (None, None, None, None))

        stages = config.sizes.query_stages
        sK, gK = boxes(k, shared.sK, TILE_N, config.D, 1)
        sV, gV = boxes(v, shared.sV, TILE_N, config.Dv, 1)
        sQ, gQ = boxes(q, shared.sQ, TILE_Q, config.D, stages)
        sO, gO = boxes(d_out, shared.sO, TILE_Q, config.Dv, stages)
        shared.kv.written_by("producer")
        shared.q.written_by("producer", 2)
        shared.d_out.written_by("producer")
        return Producer(config, shared, (q.atom, k.atom, v.atom, d_out.atom), sK, gK, sV, gV, sQ, gQ, sO, gO)

    @cute.jit
    def load_keys(self, key_tile, head, request) -> None:
        """K and V of the CTA's tile; keys past the last arrive as zeros."""
        config, kv = self.config, self.shared.kv
        with cute.arch.elect_one():
            kv.expect(0, 2 * TILE_N * (config.D + config.Dv))
        for chunk in cutlass.range_constexpr(config.D // CHUNK):
            source = self.gK[None, key_tile, chunk, head, request]
            cute.copy(self.tmas[1], source, self.sK[None, (chunk, 0)], tma_bar_ptr=kv.bar(0))
        for chunk in cutlass.range_constexpr(config.Dv // CHUNK):
            source = self.gV[None, key_tile, chunk, head, request]
            cute.copy(self.tmas[2], source, self.sV[None, (chunk, 0)], tma_bar_ptr=kv.bar(0))

    @cute.jit
    def load_queries(self, tensors: Tensors, query_tile, line, head, request, live, count) -> None:
        """Query tile number `count` of the CTA, and its rows' numbers; line: request * Hq + head."""
        config, q, d_out = self.config, self.shared.q, self.shared.d_out
        stages = config.sizes.query_stages
        stage, round = count % stages, count // stages
        # read the numbers; rows without a gradient get lse2 = inf, so that their weights are 0
        kinds = (tensors.lse2, tensors.shift, tensors.left)[: config.row_values]
        values = cute.make_rmem_tensor((TILE_Q // WARP, config.row_values), Float32)
        for i in cutlass.range_constexpr(TILE_Q // WARP):
            row = query_tile * TILE_Q + i * WARP + cute.arch.lane_idx()
            for kind in cutlass.range_constexpr(config.row_values):
                values[i, kind] = Float32.inf if const_expr(kind == 0) else Float32(0.0)
            if row < live:
                for kind in cutlass.range_constexpr(config.row_values):
                    values[i, kind] = kinds[kind][line, row]
        q.acquire(stage, round)
        with cute.arch.elect_one():
            q.expect(stage, 2 * TILE_Q * config.D)
        for chunk in cutlass.range_constexpr(config.D // CHUNK):
            source = self.gQ[None, query_tile, chunk, head, request]
            cute.copy(self.tmas[0], source, self.sQ[None, (chunk, stage)], tma_bar_ptr=q.bar(stage))
        for kind in cutlass.range_constexpr(config.row_values):
            target = cute.make_tensor(self.shared.row_values(kind, stage), cute.make_layout(TILE_Q))
            for i in cutlass.range_constexpr(TILE_Q // WARP):
                target[i * WARP + cute.arch.lane_idx()] = values[i, kind]
        q.arrive_warp(stage)
        d_out.acquire(stage, round)
        with cute.arch.elect_one():
            d_out.expect(stage, 2 * TILE_Q * config.Dv)
        for chunk in cutlass.range_constexpr(config.Dv // CHUNK):
            source = self.gO[None, query_tile, chunk, head, request]
            cute.copy(self.tmas[3], source, self.sO[None, (chunk, stage)], tma_bar_ptr=d_out.bar(stage))

    @cute.jit
    def run(self, tensors: Tensors, scalars: Scalars) -> None:
        """Load all that the tile needs."""
        index, _, _ = cute.arch.block_idx()
        key_tile, kv_head, request = key_tile_of(scalars, index)
        span = span_of(tensors, scalars, request)
        self.load_keys(key_tile, kv_head, request)
        ratio, count = scalars.Hq // scalars.Hk, Int32(0)
        for i in cutlass.range(ratio, unroll=1):
            head = kv_head * ratio + i
            line = request * scalars.Hq + head
            live = live_of(tensors, scalars, line)
            begin, _whole, end = query_tiles(scalars, span, live, key_tile * TILE_N)
            for tile in cutlass.range(begin, end, unroll=1):
                self.load_queries(tensors, tile, line, head, request, live, count + tile - begin)
            count = count + cutlass.max(0, end - begin)
