"""What the prefill kernel takes, and what one compiled variant of it is. Imports no DSL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from flash_mla.kernels.hopper.limits import BLOCK, ROW_BYTES, STAGED, TILE_M, WARPGROUP, barrier_bytes, smem_bytes

TASK, TASK_STAGES = 9, 2
"""Words of a tile's description; descriptions in flight."""
NUMBER_STAGES = 4
"""Numbers of tiles in flight from the first CTA of a cluster to the other. It is three ahead at most, since each waits
for the other's share of a block two blocks later; so no place is taken before it was read."""

REGISTERS = {2: (240, 24), 3: (160, 32)}
"""A consumer's and the last warpgroup's, by consumer warpgroups."""
REGISTERS_FP8 = {2: (216, 72), 3: (144, 80)}
"""The same where warps of the last warpgroup transpose V."""
TRANSPOSERS = 2
"""Warps that transpose V."""
V_STAGES = 2
"""Blocks of V in flight before they are transposed."""
ZEROS = 16
"""Bytes of zeros that stand for V past a request's keys."""


class Bar(IntEnum):
    """Named barriers of up to three consumer warpgroups each: its turn to issue products (TURN + number), its own."""

    TURN = 1
    WARPGROUP = 4


class Sizes(NamedTuple):
    """TILE_M, TILE_N; tiles whose Q is in shared memory at a time; blocks of K and of V in flight."""

    m: int
    n: int
    q_stages: int
    stages: int


TILES = {
    (64, 64): Sizes(192, 128, 2, 3),
    (128, 128): Sizes(128, 128, 2, 2),
    (192, 128): Sizes(128, 128, 1, 2),
    (256, 256): Sizes(128, 64, 1, 2),
}
"""By (D, Dv), where all keys count."""
WIDTHS = tuple(TILES)
TILES_FP8 = {
    (64, 64): Sizes(192, 128, 2, 3),
    (128, 128): Sizes(128, 192, 2, 2),
    (192, 128): Sizes(128, 192, 2, 2),
    (256, 256): Sizes(128, 64, 2, 3),
}
"""By (D, Dv), where q, k and v are e4m3."""


@dataclass(frozen=True)
class Config:
    """What is compiled: everything else is an argument of the kernel.

    dtype of q, k, v and out (of FP8: BF16); D and Dv, their widths; paged: k and v are cache pages behind a table.
    cluster: CTAs that compute neighbouring row tiles of a head against the same K and V, which each loads a share of
    for all (not with pages or FP8); in_turn: clusters take tiles in turn, not by the counter (all tiles must see the
    same keys).
    """

    dtype: Literal["bf16", "fp16", "fp8"]
    D: int
    Dv: int
    paged: bool
    cluster: int = 1
    in_turn: bool = False

    @property
    def fp8(self) -> bool:
        """Whether products are of e4m3: then V is transposed on its way, since wgmma takes such operands K-major."""
        return self.dtype == "fp8"

    @property
    def out(self) -> Literal["bf16", "fp16"]:
        """The dtype of out."""
        return "bf16" if self.dtype == "fp8" else self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element of q, k and v."""
        return 1 if self.fp8 else 2

    @property
    def step(self) -> int:
        """Elements that one wgmma sums over."""
        return 32 // self.itemsize

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row in a chunk of shared memory."""
        return ROW_BYTES if columns * self.itemsize % ROW_BYTES == 0 else ROW_BYTES // 2

    def chunk(self, columns: int) -> int:
        """Columns of a chunk of rows of so many."""
        return self.row_bytes(columns) // self.itemsize

    @property
    def sizes(self) -> Sizes:
        return (TILES_FP8 if self.fp8 else TILES)[self.D, self.Dv]

    @property
    def tile_m(self) -> int:
        """Query rows of a CTA: 64 a consumer warpgroup."""
        return self.sizes.m

    @property
    def rows(self) -> int:
        """Query rows of a cluster."""
        return self.tile_m * self.cluster

    @property
    def tile_n(self) -> int:
        """Keys of a block: whole pages."""
        return self.sizes.n

    @property
    def q_stages(self) -> int:
        return self.sizes.q_stages

    @property
    def stages(self) -> int:
        """Blocks of K and of V in flight."""
        return self.sizes.stages

    @property
    def v_stages(self) -> int:
        """Blocks of V in flight that TMA brings."""
        return V_STAGES if self.fp8 else self.stages

    @property
    def turned_stages(self) -> int:
        """Blocks of transposed V in flight."""
        return self.stages if self.fp8 else 0

    @property
    def number_stages(self) -> int:
        """Numbers of tiles in flight between the CTAs of a cluster."""
        return NUMBER_STAGES if self.uneven else 0

    @property
    def uneven(self) -> bool:
        """Whether the tiles of a cluster may see more keys one than the other."""
        return self.cluster > 1 and not self.in_turn

    @property
    def transposers(self) -> int:
        """Warps that transpose V."""
        return TRANSPOSERS if self.fp8 else 0

    @property
    def helpers(self) -> int:
        """Warps beside the consumers' that are told of tiles: those that transpose, or the one that stores."""
        return self.transposers + (not self.staged)

    @property
    def staged(self) -> bool:
        """Whether consumers write out through a staging of their warps: where it has no place in Q of its own."""
        return self.q_stages == 1 or self.fp8

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.tile_m // TILE_M

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.consumers + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread: a consumer's, the last warpgroup's."""
        return (REGISTERS_FP8 if self.fp8 else REGISTERS)[self.consumers]

    def box_rows(self, columns: int) -> int:
        """Keys that one TMA box of rows of so many columns brings: in a cluster a share of a block's, unless the CTAs
        share out its chunks evenly."""
        if self.paged:
            return BLOCK
        return self.tile_n if columns // self.chunk(columns) % self.cluster == 0 else self.tile_n // self.cluster

    @property
    def q_held(self) -> bool:
        """Whether a consumer holds its rows of Q in registers, D / 4 more: Q K^T then reads a third less shared memory,
        half where blocks are listed."""
        return self.D == 128 and not self.fp8

    @property
    def turns(self) -> bool:
        """Whether the warpgroups take turns to issue products: where three of them are bound by exp2 (5 % at D 64), and
        at 192/128 (2 %)."""
        return self.consumers == 3 or (self.D == 192 and not self.fp8)

    @property
    def early(self) -> int:
        """Products of P V that are still to be issued when the turn is passed on, so that the next follow at once."""
        return 2 if self.consumers == 2 else 0

    @property
    def staged_elements(self) -> int:
        """Elements of out that the consumer warps stage."""
        return 4 * self.consumers * STAGED if self.staged else 0

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: Q, K, V as it comes and transposed, zeros, staged out, descriptions, barriers."""
        q = self.itemsize * self.q_stages * self.tile_m * self.D
        k = self.itemsize * self.stages * self.tile_n * self.D
        v = self.itemsize * (self.v_stages + self.turned_stages) * self.tile_n * self.Dv
        zeros, staged = ZEROS * self.fp8, 2 * self.staged_elements
        descriptions = 4 * (TASK_STAGES * TASK + self.number_stages)
        barriers = barrier_bytes(
            self.number_stages,
            TASK_STAGES,
            self.q_stages,
            self.stages,
            self.v_stages,
            self.turned_stages,
            self.q_stages,
        )
        return smem_bytes(q, k, v, zeros, staged, descriptions, barriers)


MOST_TEAMS = {64: 3, 128: 3, 192: 2, 256: 2}
"""Teams that an SM holds, by D, where blocks are listed."""
SLOTS = {64: 8, 128: 4, 192: 4, 256: 2}
"""Blocks of K or of V, or tiles of Q where a consumer holds it, in flight to each team, by D."""
REGISTERS_LISTED = {2: (224, 56), 3: (160, 32)}
"""A consumer's and the last warpgroup's, by teams."""
ROW_LIMITS, BITS, LAST = 1, 2, 4
"""Flags of a listed block, in the low bits of its first key: mask the keys past each row's last; apply mask bits; it is
the tile's last."""
NOWHERE = 1 << 30
"""First key of the block that stands in for an empty list: past every row's last key."""
LISTED_TILE = 6
"""Words of a tile's description, beside its Q."""


@dataclass(frozen=True)
class Listed(Config):
    """A variant for which a map says which 64 x 64 blocks count; not in FP8, nor in clusters.

    teams: of a loading warp and a consumer warpgroup each, with tiles and lists of their own.
    """

    teams: int = 2

    @property
    def sizes(self) -> Sizes:
        return Sizes(TILE_M, BLOCK, 1, 2)

    @property
    def slots(self) -> int:
        """Items in flight to each team."""
        return SLOTS[self.D]

    @property
    def beside(self) -> bool:
        """Whether P has registers beside S, so that P V of a block runs under the softmax of the next: where two teams
        cannot hide each other's waits, and the next V has a place meanwhile."""
        return self.teams == 2 and self.slots > 2

    @property
    def all_slots(self) -> int:
        return self.teams * self.slots

    @property
    def slot_elements(self) -> int:
        """Elements of an item's place, which fits K, V and Q."""
        return BLOCK * max(self.D, self.Dv)

    @property
    def q_held(self) -> bool:
        """Whether a consumer holds its rows of Q in registers. Then Q comes in the ring; else it has a place apart."""
        return self.D < 256

    @property
    def q_apart(self) -> int:
        """Tiles of Q that lie outside of the ring."""
        return 0 if self.q_held else self.teams

    @property
    def q_places(self) -> int:
        """Places in which Q may lie."""
        return self.q_apart or self.all_slots

    @property
    def turns(self) -> bool:
        return False

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.teams + 1)

    @property
    def registers(self) -> tuple[int, int]:
        return REGISTERS_LISTED[self.teams]

    def smem_bytes(self) -> int:
        """Shared memory of a CTA: the rings, Q apart from them, words beside K and Q, barriers."""
        ring, q = 2 * self.all_slots * self.slot_elements, 2 * self.q_apart * self.tile_m * self.D
        words = 4 * (self.all_slots + LISTED_TILE * self.q_places)
        return smem_bytes(ring, q, words, barrier_bytes(self.all_slots, self.q_apart))
