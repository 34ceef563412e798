"""Tile shapes that decode and prefill share: how a head dimension is cut, and what a pipeline of tiles takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from flash_mla.kernels.triton.target import Target

Config = TypeVar("Config", bound=Any)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def least_columns(itemsize: int, target: Target) -> int:
    """Fewest columns of a tile of K or V: 16 for Triton's dot, 64 for FP8 where shared memory feeds the dots.

    NOTE: tiles of K and V that do not come by asynchronous copies (FP8, which is widened; 16-bit caches off 16 bytes)
    take turns in one buffer. Where V's rows are shorter than K's (128 bytes for 64 columns of 16 bits or more), the
    ptxas of Triton 3.6 computes the descriptors of V's later rows from a uniform register that nothing has written: an
    illegal access, or another tile's values (H200: 0.4 to 0.8 of the largest output; right with DISABLE_PTXAS_OPT=1).
    test_triton_compile looks for such registers.
    """
    return 64 if itemsize == 1 and target.in_place else 16


def least_values(d_main: int, itemsize: int, target: Target) -> int:
    """Fewest columns of a tile of V beside K's of d_main: for wgmma, rows as long as K's (see `least_columns`)."""
    least = least_columns(itemsize, target)
    return max(least, min(d_main, 64)) if itemsize == 2 and target.wgmma else least


def least_rest(target: Target) -> int:
    """Fewest columns of a second tile of rows beside the first, where they do not come by asynchronous copies: for
    wgmma, 64, so that both have rows of 128 bytes and more (see `least_columns`).

    NOTE: gathered rows of D = 72 in FP32, 64 + 16 columns, 64 heads: Triton 3.6 read shared memory 28 KB past its
    end in the product with the first tile (H200, compute-sanitizer); a backward of D = 40, Dv = 72 in FP32 likewise, or
    its gradients were off by as much as the largest.
    """
    return 64 if target.wgmma else 16


def head_tiles(D: int, least: int = 16) -> tuple[int, int]:
    """(D_MAIN, D_REST): a head dimension as one power-of-two tile, or two: 576 is 512 + 64, 192 is 128 + 64.

    D_REST is 0 where one padded tile is no larger. A tile has at least `least` columns.
    """
    whole = max(power_of_2(D), least)
    main = whole // 2
    rest = max(power_of_2(D - main), least) if main < D else 0
    if whole == D or main < least or rest == 0 or main + rest >= whole:
        return whole, 0
    return main, rest


class Columns(NamedTuple):
    """How the columns of K (d_main + d_rest) and of V are cut into tiles; reuse: V is taken from the tile of K."""

    d_main: int
    d_rest: int
    dv_tile: int
    reuse: bool

    @property
    def loaded(self) -> tuple[int, int, int]:
        """d, dv and dv_tile of `smem_bytes`."""
        return self.d_main + self.d_rest, 0 if self.reuse else self.dv_tile, self.dv_tile


def cut_columns(D: int, Dv: int, alias: bool, itemsize: int, target: Target) -> Columns:
    """The tiles of K's D columns and V's Dv; alias: V is K's first columns."""
    least = least_columns(itemsize, target)
    d_main, d_rest = head_tiles(D, least)
    reuse = alias and d_main >= Dv
    dv_tile = d_main if reuse else max(power_of_2(Dv), least_values(d_main, itemsize, target))
    return Columns(d_main, d_rest, dv_tile, reuse)


def smaller(config: Config) -> Config | None:
    """The next config to try where a device refuses this one: fewer stages, then fewer keys, then fewer rows a tile.

    The last one has FP32's products exact, which takes less shared memory than three TF32 ones, and far longer.
    """
    if config.stages > 1:
        return replace(config, stages=config.stages - 1)
    for name in ("tile_n", "tile_m"):
        if getattr(config, name) > 16:
            return replace(config, **{name: getattr(config, name) // 2})
    return replace(config, precision="ieee") if config.precision == "tf32x3" else None


def widening(itemsize: int, target: Target, once: bool = False) -> str:
    """How FP8 becomes the dots' FP16 (`attend.widen`), exactly; "" for other dtypes.

    "fp8": by the GPU's own conversion; "fp8_bits": by integer arithmetic on bytes (sm_80, where Triton has no e4m3).
    once: in PTX, where there is PTX, so that a tile that both products read is converted once.
    NOTE: multiplying e4m3 itself makes causal prefill 1.34x faster on the H200 (465 TFLOP/s against 346), but Hopper
    then accumulates in fewer bits and lse misses 1e-4.
    """
    if itemsize > 1:
        return ""
    way = "fp8_bits" if target.backend == "cuda" and target.arch < 89 else "fp8"
    return f"{way}_once" if once and target.backend == "cuda" else way


def precision(itemsize: int, target: Target) -> str:
    """How a dot treats FP32: three TF32 products (about 1e-6) on NVIDIA, exact elsewhere. Not used by other dtypes."""
    return "tf32x3" if target.backend == "cuda" and itemsize == 4 else "ieee"


def smem_bytes(
    tile_m: int, tile_n: int, d: int, dv: int, dv_tile: int, itemsize: int, stages: int, in_place: bool, mask: int
) -> int:
    """The most that a kernel keeps in shared memory: test_triton_compile holds it against what Triton allocates.

    In the loop: tiles of K and V, q, the probabilities, the mask; for FP8 one widened tile of each; for FP32 q and the
    probabilities twice, as TF32 and the rest. After it: the accumulator on its way to rows.

    Args:
        d, dv: columns of K and V that are read (dv 0 where V is K's); dv_tile: of the accumulator.
        in_place: the matrix instruction reads a tile where its copy put it: Triton's pipeline of `stages` stages then
            holds as many tiles, else one fewer; and the probabilities stay in registers.
        mask: bytes of a mask's element, 0 without one.
    """
    buffers = stages if in_place else stages - 1
    wide, parts = max(itemsize, 2), 2 if itemsize == 4 else 1
    tiles = buffers * (d + dv) if buffers else max(d, dv)  # without a pipeline, K and V take turns
    widened = tile_n * (d + dv) * 2 if itemsize == 1 else 0
    probabilities = 0 if in_place else parts * tile_m * tile_n * wide
    loop = tile_n * tiles * itemsize + parts * tile_m * d * wide + probabilities + widened
    return max(loop + stages * tile_m * tile_n * mask, tile_m * dv_tile * 4)


def mask_kind(mask: Tensor | None) -> str:
    """The kernels' MASK, and MASK_BYTES' key."""
    if mask is None:
        return "none"
    return "float" if mask.is_floating_point() else "bool"


MASK_BYTES = {"none": 0, "bool": 1, "float": 4}
"""Of a mask's element in shared memory; a wider or narrower floating one counts as FP32."""
