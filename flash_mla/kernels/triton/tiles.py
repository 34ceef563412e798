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
    rest = max(power_of_2(D - main), 16) if D > main else 0
    if whole == D or main < 16 or rest == 0 or main + rest >= whole:
        return whole, 0
    return main, rest


def widening(itemsize: int, target: Target) -> str:
    """How FP8 reaches the dots (`attend.widen`); "" for other dtypes.

    "fp8_dot": q k^T multiplies e4m3 itself, and V becomes FP16 by the GPU's own conversion (NVIDIA from sm_89);
    "fp8": q, K and V become FP16 so; "fp8_bits": they do by integer arithmetic on bytes (sm_80 has no e4m3).
    """
    if itemsize > 1:
        return ""
    if target.backend == "cuda":
        return "fp8_dot" if target.arch >= 89 else "fp8_bits"
    return "fp8"


def precision(itemsize: int, target: Target) -> str:
    """How a dot treats FP32: three TF32 products (about 1e-6) on NVIDIA, exact elsewhere. Not used by other dtypes."""
    return "tf32x3" if target.backend == "cuda" and itemsize == 4 else "ieee"


def smem_bytes(tile_m: int, tile_n: int, d: int, dv: int, itemsize: int, stages: int, wgmma: bool) -> int:
    """What a kernel keeps in shared memory: tiles of K and V, q, the probabilities, for FP8 one widened tile of each.

    Triton's pipeline of `stages` stages holds as many tiles where Hopper's matrix instruction reads them in place, and
    one fewer where they are copied to registers; the former keeps the probabilities in registers.
    """
    buffers = stages if wgmma else stages - 1
    wide = max(itemsize, 2)
    widened = tile_n * (d + dv) * 2 if itemsize == 1 else 0
    probabilities = 0 if wgmma else tile_m * tile_n * wide
    return buffers * tile_n * (d + dv) * itemsize + tile_m * d * wide + probabilities + widened
