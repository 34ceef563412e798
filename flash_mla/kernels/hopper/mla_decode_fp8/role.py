"""What the scores and the values warpgroups of an FP8 MLA decode have in common: their way through the work."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from flash_mla.kernels.hopper.decode import Tensors
from flash_mla.kernels.hopper.mla_decode.shared import Scalars
from flash_mla.kernels.hopper.mla_decode_fp8.config import Config
from flash_mla.kernels.hopper.mla_decode_fp8.shared import Shared
from flash_mla.kernels.hopper.walk import Done, Place, walk
from flash_mla.kernels.hopper.work import Work


@dataclass(frozen=True)
class Role:
    """A warpgroup of CTA number `rank` of a cluster; a kind of it computes `segment`s. tid: of the thread in it."""

    shared: Shared
    tensors: Tensors
    scalars: Scalars
    rank: Int32
    cluster_id: Int32
    tid: Int32

    @property
    def config(self) -> Config:
        return self.shared.config

    def row0(self, place: Place):
        """The first row, of the request, of this CTA's tile."""
        return (place.group * self.config.sharers + self.rank) * self.config.tile_n

    @cute.jit
    def run(self, work: Work) -> None:
        """Compute the cluster's segments."""
        tensors = self.tensors
        walk(work, tensors.table, tensors.seq_lens, self.scalars.groups, self.segment, Done.nothing())
