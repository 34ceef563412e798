"""What the roles of an FP8 MLA decode CTA share: views of shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.limits import BLOCK, TILE_M
from flash_mla.kernels.hopper.mla_decode_fp8.config import DV, P_STAGES, ROPE, WARPS, WARPS_A_GROUP, Config
from flash_mla.kernels.hopper.partials import Partials
from flash_mla.kernels.hopper.split import scan_words
from flash_mla.kernels.hopper.team import result_words, results_at


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it).

    sQ [64, 512, Q tile] and sQ_rope [64, 64, Q tile]; sK [64, 512, stage] and sK_rope [64, 64, stage]; the latter if
    there is a rope part. sP [tile_n, 64, parts * P stage + part]: keys in the order of `values.py`. Beside each P:
    sFactor [64, P stage], what O is to be multiplied by first, and sMoved [warp, P stage], whether a warp has a factor
    that is not 1. sUnit [64]: what scores of 16-bit queries are to be multiplied by. sScale [64]: what turns O into
    out.
    """

    config: Config
    sQ: cute.Tensor
    sQ_rope: cute.Tensor | None
    sK: cute.Tensor
    sK_rope: cute.Tensor | None
    sP: cute.Tensor
    sFactor: cute.Tensor
    sMoved: cute.Tensor
    sUnit: cute.Tensor
    sScale: cute.Tensor
    sScan: cute.Tensor
    k: Channel
    q: Channel
    p: Channel
    scale: Channel

    def results(self, partials: Partials) -> Partials:
        """In place of the workspace's, a CTA's own partial result: over Q and K, when nobody reads them any more."""
        config = self.config
        assert (config.q_tiles * TILE_M + config.stages * BLOCK) * config.D >= 4 * result_words(config.tile_n, DV)
        words = cute.recast_ptr(self.sQ.iterator, swizzle_=cute.make_swizzle(0, 4, 3), dtype=Float32)
        # NOTE: the scores leave the lse while the values still read K
        lse = cute.make_tensor(self.sUnit.iterator, cute.make_layout((1, config.tile_n), stride=(0, 1)))
        return results_at(partials, words, config.tile_n, DV)._replace(lse=lse)

    @property
    def channels(self) -> tuple[Channel, ...]:
        return (self.k, self.q, self.p, self.scale)

    @staticmethod
    def over(config: Config, storage) -> Shared:
        def view(field, rows: int, columns: int, stages: int, row_bytes: int = 128) -> cute.Tensor | None:
            if columns == 0:
                return None
            layout = row_layout(Float8E4M3FN, rows, columns, stages, row_bytes)
            return field.get_tensor(layout.outer, swizzle=layout.inner)

        barriers = storage.barriers.data_ptr()
        at_q, at_p = Channel.words(config.stages), Channel.words(config.stages) + Channel.words(1)
        at_scale, values_warps = at_p + Channel.words(P_STAGES), 2 * WARPS_A_GROUP
        return Shared(
            config=config,
            sQ=view(storage.sQ, TILE_M, DV, config.q_tiles),
            sQ_rope=view(storage.sQ_rope, TILE_M, config.rope, config.q_tiles, row_bytes=ROPE),
            sK=view(storage.sK, BLOCK, DV, config.stages),
            sK_rope=view(storage.sK_rope, BLOCK, config.rope, config.stages, row_bytes=ROPE),
            sP=view(storage.sP, config.tile_n, BLOCK, P_STAGES * config.p_parts, row_bytes=BLOCK),
            sFactor=storage.sFactor.get_tensor(cute.make_layout((TILE_M, P_STAGES))),
            sMoved=storage.sMoved.get_tensor(cute.make_layout((WARPS_A_GROUP, P_STAGES))),
            sUnit=storage.sUnit.get_tensor(cute.make_layout(TILE_M)),
            sScale=storage.sScale.get_tensor(cute.make_layout(TILE_M)),
            sScan=storage.sScan.get_tensor(cute.make_layout(scan_words(WARPS))),
            k=Channel.over("K", barriers, config.stages, readers=values_warps * config.sharers, cluster=config.sharers),
            q=Channel.over(
                "Q", barriers + at_q, 1, readers=WARPS_A_GROUP, writers=1 if config.q == "fp8" else values_warps
            ),
            p=Channel.over("P", barriers + at_p, P_STAGES, readers=values_warps, writers=WARPS_A_GROUP),
            scale=Channel.over("scale", barriers + at_scale, 1, readers=values_warps, writers=WARPS_A_GROUP),
        )
