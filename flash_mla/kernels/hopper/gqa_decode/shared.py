"""What the roles of a GQA decode CTA share: the scalars of a call, the item at hand, and views of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.gqa_decode.config import CONSUMER_WARPS, QUERY_WARPS, WARPS, Config
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.team import result_words
from flash_mla.kernels.hopper.walk import Place


class Scalars(NamedTuple):
    """scale * log2(e); the order of rows; whether `sink` counts; lse of a row without keys; rows and row tiles of a KV
    head; KV heads."""

    scale_log2: Float32
    packing: Packing
    has_sink: Int32
    empty_lse: Float32
    rows: Int32
    tiles: Int32
    heads: Int32

    @property
    def groups(self):
        """Items of a request: its row tiles, KV head by KV head."""
        return self.heads * self.tiles


class Item(NamedTuple):
    """What a segment belongs to: request, KV head, its row tile."""

    request: Int32
    head: Int32
    tile: Int32

    @staticmethod
    def at(place: Place, scalars: Scalars) -> Item:
        return Item(place.request, place.group // scalars.tiles, place.group % scalars.tiles)


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it).

    sQ [q_rows, D, q stage], with sUnit [tile_n, q stage], what the scores of two-term queries are to be multiplied by;
    sK [64, D, stage], sV [64, Dv, stage], sP [tile_n, 64, buffer] with buffer = 2 * warpgroup
    + parity; sSum [tile_n, warp], sMax [tile_n, warpgroup]; exchange: sP's memory, where O is merged,
    so many pairs of tiles at a time.
    """

    config: Config
    sQ: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sP: cute.Tensor
    exchange: cute.Tensor
    sSum: cute.Tensor
    sMax: cute.Tensor
    sScan: cute.Tensor
    sUnit: cute.Tensor | None
    q: Channel
    k: Channel
    v: Channel

    @staticmethod
    def over(config: Config, storage) -> Shared:
        def view(field, rows: int, columns: int, count: int, dtype) -> cute.Tensor:
            one = row_layout(dtype, rows, columns)
            stacked = cute.append(one.outer, cute.make_layout(count, stride=rows * columns))
            return field.get_tensor(stacked, swizzle=one.inner)

        dtype, stages, width = DTYPES[config.dtype], config.stages, config.tile_n // 2
        q, k, v = (x.data_ptr() for x in (storage.q_barriers, storage.k_barriers, storage.v_barriers))
        return Shared(
            config=config,
            sQ=view(storage.sQ, config.q_rows, config.chunk * config.k_chunks, config.q_stages, dtype),
            sK=view(storage.sK, BLOCK, config.chunk * config.k_chunks, stages, dtype),
            sV=view(storage.sV, BLOCK, config.chunk * config.v_chunks, stages, dtype),
            sP=view(storage.sP, config.tile_n, BLOCK, 4, DTYPES[config.product]),
            exchange=cute.make_tensor(
                cute.recast_ptr(storage.sP.data_ptr(), dtype=Float32),
                cute.make_layout((128, width, 2, 1), stride=(1, 128, 128 * width, 0)),
            ),
            sSum=storage.sSum.get_tensor(cute.make_layout((config.tile_n, CONSUMER_WARPS))),
            sMax=storage.sMax.get_tensor(cute.make_layout((config.tile_n, 2))),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            sUnit=None
            if config.q_terms == 1
            else storage.sUnit.get_tensor(cute.make_layout((config.tile_n, config.q_stages))),
            q=Channel.over(
                "Q", q, config.q_stages, readers=CONSUMER_WARPS, writers=1 if config.q_terms == 1 else QUERY_WARPS
            ),
            k=Channel.over("K", k, stages, readers=CONSUMER_WARPS // 2),
            v=Channel.over("V", v, stages, readers=CONSUMER_WARPS // 2),
        )

    @property
    def free_words(self) -> cute.Pointer:
        """The stages of K, and of V behind them, as FP32 words, for when nobody reads them any more."""
        config = self.config
        assert config.stages * config.stage_bytes >= 4 * result_words(config.tile_n, config.Dv)
        return cute.recast_ptr(self.sK.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Float32)

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self.q, self.k, self.v
