"""What a kernel is compiled for: its shape and element types, its register tile, its memory, and the processor.

**Register tiles.** *Few* rows (decode): scores are computed for tile_m rows x tile_n keys at a time, one accumulator of
W lanes each, and values for tile_m rows x 2 W columns. AVX2 has 16 registers: 4 x 3 scores leave four for a vector of
K and the rows' loads, and reach 76 to 87 % of the FMA peak of a Zen 3 core; 4 x 2 reach 73 to 85 %, 2 x 4 half of it,
4 x 4 spill. *Many* rows (prefill): 3 W rows, in lanes, x 4 keys (2 W x 6), and 6 rows x 2 W columns for values: 12
accumulators each, of which the latency of an FMA needs 8 (4 cycles, two a cycle), and no sums across lanes.
AVX-512 and NEON have 32 registers.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from flash_mla.kernels.cpu.formats import ROWS, SIZE

BLOCK = 64
"""Keys of a block: one online softmax step."""
TILE_BLOCKS = 4
"""Blocks of a softmax step on AMX."""

X86 = ("avx2", "fma", "f16c")
"""What an x86 processor must have: FMA on 8 lanes, and FP16 to FP32 in one instruction."""


@dataclass(frozen=True)
class Target:
    """A processor to compile for: LLVM's names of the platform, of the processor and of its features."""

    triple: str
    cpu: str
    features: str = ""

    @property
    def lanes(self) -> int:
        """FP32 lanes of a vector."""
        if not self.triple.startswith("x86"):
            return 4
        return 16 if "+avx512bw" in self.features and "+avx512vl" in self.features else 8

    @property
    def registers(self) -> int:
        return 16 if self.lanes == 8 else 32

    @property
    def units(self) -> tuple[str, ...]:
        """What multiplies BF16 where there are many rows, the best first: FMAs of FP32 are last."""
        needs = {
            "amx": (16, {"+amx-bf16", "+amx-tile"}),
            "avx512bf16": (16, {"+avx512bf16"}),
            "neon": (4, {"+bf16"}),
            "fma": (self.lanes, set()),
        }
        has = set(self.features.split(","))
        # NOTE: a core of an Intel Xeon (Emerald Rapids) makes 82 GFLOP/s of vdpbf16ps and 166 of FMAs
        if not self.cpu.startswith("znver"):
            has.discard("+avx512bf16")
        return tuple(unit for unit, (lanes, names) in needs.items() if lanes == self.lanes and names <= has)


@cache
def host() -> Target:
    """The processor at hand, as far as its system lets us use it."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    if "+amx-tile" in features and not tiles_permitted():
        features = features.replace("+amx-", "-amx-")
    return Target(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)


ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18
"""Linux on x86-64: the system call, its ARCH_REQ_XCOMP_PERM, and the state component of AMX's tiles."""


def tiles_permitted() -> bool:
    """Ask Linux for AMX's tiles, for all threads of the process: without leave the first that is touched kills it."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST, TILE_DATA) == 0


def lacks(target: Target) -> str | None:
    """Why the kernels cannot run on a processor, or None."""
    if target.triple.startswith(("aarch64", "arm64")):
        return None
    if not target.triple.startswith("x86_64"):
        return f"the kernels are written for x86-64 and ARM64, not for {target.triple}"
    missing = [name for name in X86 if f"+{name}" not in target.features.split(",")]
    return f"the processor {target.cpu} has no {', '.join(missing)}" if missing else None


class Part(NamedTuple):
    """A piece of a thread's memory: where it starts and its bytes."""

    at: int
    bytes: int


@dataclass(frozen=True)
class Spec:
    """A kernel. D, Dv: columns of a row of K and of V; q, kv, out: element types (kv also a row format); alias: V is
    the first Dv columns of K; mask: the mask's element type; source: "table" (pages through a block table), "rows"
    (keys one after another), "sparse" (each query names its rows, in `sets` caches); layout: blocks that a flag drops
    are skipped. rows: of a work item, a multiple of tile_m; span: how many of them are used (0: all). page: keys of a
    page. rope: the last columns of a row of K that lie in a cache of their own (a split latent). unit: what multiplies:
    FMAs of FP32, or an instruction of BF16 pairs (`Target.units`).
    """

    D: int
    Dv: int
    q: str
    kv: str
    out: str
    rows: int
    tile_m: int
    tile_n: int
    lanes: int
    alias: bool = False
    mask: str | None = None
    source: str = "table"
    sets: int = 1
    layout: bool = False
    page: int = BLOCK
    rope: int = 0
    span: int = 0
    unit: str = "fma"

    @property
    def many(self) -> bool:
        """Whether rows lie in lanes (`many.py`), not columns (`few.py`)."""
        return self.tile_m > self.lanes or self.pairs

    @property
    def pairs(self) -> bool:
        """Whether products are of pairs of BF16 (`pairs.py`), not of FP32."""
        return self.unit != "fma"

    @property
    def depth(self) -> int:
        """Elements of 4 bytes of a row of q and K, as products read them."""
        return self.D // 2 if self.pairs else self.D

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of values, where there are many."""
        if self.unit == "amx":
            return self.tile_m
        return 6 if self.lanes == 8 else 12

    @property
    def staged(self) -> bool:
        """Whether rows are copied to the thread's memory first: decoded there, or gathered."""
        return self.source == "sparse" or self.rope > 0 or (self.kv == "fp8" and (self.many or self.tiles > 1))

    @property
    def block(self) -> int:
        """Keys of a step: of a block, or of a page where pages are smaller."""
        return min(self.page, BLOCK)

    @property
    def keys(self) -> int:
        """Keys of a softmax step: a block's; on AMX those of several blocks (`tiles.py`)."""
        return TILE_BLOCKS * BLOCK if self.unit == "amx" else BLOCK

    @property
    def stored(self) -> int:
        """Bytes of a row of K as the cache stores it."""
        return ROWS[self.kv].width if self.kv in ROWS else self.D * SIZE[self.kv]

    @property
    def held(self) -> str:
        """The element type that products read."""
        if self.kv == "fp8":
            return "f32" if self.staged else "code"
        return "f32" if self.kv in ROWS else self.kv

    @property
    def chunk(self) -> int:
        """Columns of a chunk: two vectors."""
        return 2 * self.lanes

    @property
    def tiles(self) -> int:
        return self.rows // self.tile_m

    @property
    def deep(self) -> int:
        """Rows of a vector of the state (max, sum): one a lane, or a tile's rows again and again."""
        return min(self.tile_m, self.lanes)

    @property
    def vectors(self) -> int:
        """Vectors of the state."""
        return self.rows // self.deep

    def padded(self, columns: int) -> int:
        """Columns in whole chunks."""
        return -(-columns // self.chunk) * self.chunk

    @property
    def width(self) -> int:
        """Keys of scores: of a block, and what a tile of keys or a vector may go past them."""
        return max(-(-self.keys // self.tile_n) * self.tile_n, self.keys + self.lanes)

    @property
    def paired(self) -> int:
        """Bytes of a chunk of V in pairs of keys; on AMX with those that keep chunks out of one set of L1."""
        return 2 * self.keys * self.chunk + (128 if self.unit == "amx" else 0)

    @property
    def state(self) -> int:
        """Bytes of the vectors of max or sum, in whole lines."""
        return -(-self.vectors * self.lanes * 4 // 64) * 64

    @property
    def partial(self) -> int:
        """Bytes that a split leaves: max, sum, O."""
        return 2 * self.state + 4 * self.rows * self.padded(self.Dv)

    def memory(self) -> tuple[dict[str, Part], int]:
        """The one ledger of a thread's memory, by name, and its bytes; `own` is a partial result."""
        staged = BLOCK * SIZE[self.held] if self.staged else 0
        sizes = {
            "own": self.partial,
            "q": 4 * self.rows * self.padded(self.depth),
            "scores": 4 * self.rows * self.width,
            "bias": 4 * self.tile_m * self.width if self.mask else 0,
            "factor": self.state,
            "peak": self.state,
            "limit": self.state,
            "low": 8 * self.vectors,
            "high": 8 * self.vectors,
            "mask_rows": 8 * self.rows if self.mask else 0,
            "k": staged * self.D,
            "v": 0 if self.alias else staged * self.Dv,
            "wide": 4 * BLOCK * self.padded(self.D) if self.many and not self.pairs else 0,
            "pairs": self.padded(self.Dv) // self.chunk * self.paired if self.pairs else 0,
            "copy": 2 * BLOCK * self.D if self.unit == "amx" and self.source == "rows" else 0,
            "weights": 2 * self.keys * self.rows if self.unit == "amx" else 0,
            "reach": 8 * self.tiles if self.unit == "amx" else 0,
            "tiles": 64 if self.unit == "amx" else 0,
            "addresses": 2 * 8 * (BLOCK + 8) if self.source == "sparse" else 0,
        }
        parts, at = {}, 0
        for name, size in sizes.items():
            parts[name] = Part(at, size)
            at += -(-size // 64) * 64
        return parts, -(-at // 4096) * 4096 + 64  # NOTE: threads' memories a page and a line apart


def tile(rows: int, target: Target, kv: str) -> tuple[int, int]:
    """(tile_m, tile_n) for so many query rows of a KV head, few of them."""
    tile_m = 4 if rows > 2 else rows
    if tile_m == 4:
        # NOTE: e4m3 is decoded with three constants: beside 12 accumulators they spill
        few = 2 if kv == "fp8" and rows <= 4 else 3
        return 4, few if target.registers == 16 else 6
    return tile_m, 4


def wide_tile(target: Target, unit: str, rows: int, even: bool) -> tuple[int, int]:
    """(tile_m, tile_n) for many rows; even: where an item's rows are a multiple of 16."""
    vectors = min(2 if even or unit == "amx" else 3, -(-rows // target.lanes))
    if unit == "amx":
        return vectors * target.lanes, 32
    keys = 24 if target.registers == 32 else 12  # accumulators
    return vectors * target.lanes, keys // vectors


def unit_of(target: Target, q: str, kv: str, D: int, Dv: int, page: int) -> str:
    """What multiplies: pairs of BF16 where q and kv are BF16; whole tiles where head dims and pages fill them."""
    if (q, kv) != ("bf16", "bf16"):
        return "fma"
    filled = not (D % 32 or Dv % 32 or page % 32)
    return next(unit for unit in target.units if unit != "amx" or filled)
