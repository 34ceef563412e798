"""Tile shapes that decode and prefill share: how a head dimension is cut, and what a pipeline of tiles takes."""

from __future__ import annotations

from flash_mla.kernels.triton.target import Target


def power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def head_tiles(D: int) -> tuple[int, int]:
    """(D_MAIN, D_REST): a head dimension as one power-of-two tile, or two: 576 is 512 + 64, 192 is 128 + 64.

    D_REST is 0 where one padded tile is no larger. Triton's dot needs at least 16.
    """
    whole = max(power_of_2(D), 16)
    main = whole // 2
    rest = max(power_of_2(D - main), 16) if main < D else 0
    if whole == D or main < 16 or rest == 0 or main + rest >= whole:
        return whole, 0
    return main, rest


def widening(itemsize: int, target: Target) -> str:
    """How FP8 becomes the dots' FP16 (`attend.widen`), exactly; "" for other dtypes.

    "fp8": by the GPU's own conversion; "fp8_bits": by integer arithmetic on bytes (sm_80, where Triton has no e4m3).
    NOTE: multiplying e4m3 itself makes causal prefill 1.34x faster on the H200 (465 TFLOP/s against 346), but Hopper
    then accumulates in fewer bits and lse misses 1e-4.
    """
    if itemsize > 1:
        return ""
    return "fp8_bits" if target.backend == "cuda" and target.arch < 89 else "fp8"


def precision(itemsize: int, target: Target) -> str:
    """How a dot treats FP32: three TF32 products (about 1e-6) on NVIDIA, exact elsewhere. Not used by other dtypes."""
    return "tf32x3" if target.backend == "cuda" and itemsize == 4 else "ieee"


def smem_bytes(tile_m: int, tile_n: int, d: int, dv: int, itemsize: int, stages: int, in_place: bool) -> int:
    """What a kernel keeps in shared memory: tiles of K and V, q, the probabilities, for FP8 one widened tile of each.

    Triton's pipeline of `stages` stages holds as many tiles where the matrix instruction reads them in place, and
    one fewer where they are copied to registers; the former keeps the probabilities in registers.
    """
    buffers = stages if in_place else stages - 1
    wide = max(itemsize, 2)
    widened = tile_n * (d + dv) * 2 if itemsize == 1 else 0
    probabilities = 0 if in_place else tile_m * tile_n * wide
    return buffers * tile_n * (d + dv) * itemsize + tile_m * d * wide + probabilities + widened
