"""Shared memory of a CTA of the keys' kernel."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute

from flash_mla.kernels.hopper.backward.config import TILE_N, TILE_Q, WARPS, Config
from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES


@dataclass(frozen=True)
class KeysShared:
    """Views of it.

    sK [TILE_N, D]; sV [TILE_N, Dv]; sQ [TILE_Q, D, stages]; sO [TILE_Q, Dv, stages]: dout; rows: TILE_Q numbers of each
    kind (lse2, shift, left) a stage; staged: STAGED elements of a result for each consumer warp. Channels: kv, once;
    q with the rows' numbers; d_out.
    """

    config: Config
    sK: cute.Tensor
    sV: cute.Tensor
    sQ: cute.Tensor
    sO: cute.Tensor
    rows: cute.Pointer
    staged: cute.Pointer
    kv: Channel
    q: Channel
    d_out: Channel

    @staticmethod
    def over(config: Config, storage) -> KeysShared:
        dtype, stages = DTYPES[config.dtype], config.sizes.query_stages

        def tile(memory, *shape: int) -> cute.Tensor:
            layout = row_layout(dtype, *shape)
            return memory.get_tensor(layout.outer, swizzle=layout.inner)

        def channel(name: str, barriers, stages: int, **counts: int) -> Channel:
            return Channel.over(name, barriers.data_ptr(), stages, **counts)

        return KeysShared(
            config=config,
            sK=tile(storage.sK, TILE_N, config.D),
            sV=tile(storage.sV, TILE_N, config.Dv),
            sQ=tile(storage.sQ, TILE_Q, config.D, stages),
            sO=tile(storage.sO, TILE_Q, config.Dv, stages),
            rows=storage.rows.data_ptr(),
            staged=storage.staged.data_ptr(),
            kv=channel("K, V", storage.kv_barriers, 1, readers=0),
            q=channel("Q", storage.q_barriers, stages, writers=2, readers=WARPS),
            d_out=channel("dout", storage.o_barriers, stages, readers=WARPS),
        )

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self.kv, self.q, self.d_out

    def row_values(self, kind: int, stage) -> cute.Pointer:
        """The numbers of a kind of a stage's rows."""
        return self.rows + (stage * self.config.row_values + kind) * TILE_Q
