"""Symbolic arguments: with them a kernel is compiled without a GPU, for every size and stride that they leave open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_mla.kernels.hopper.limits import TMA_BYTES


def size() -> Any:
    """Any size, the same wherever this one stands."""
    return cute.sym_int32()


def tensor(
    dtype, shape: Sequence[Any], *, tma: Sequence[int] = (), align: int | None = None, strided: bool = False
) -> cute.Tensor:
    """A tensor argument.

    shape: None is any size. tma: dims whose strides are multiples of 16 bytes; then the address is, too. align: bytes
    of the address (None: of an element). strided: the last dim's stride is any, not 1.
    """
    # NOTE: what shares a symbol must be equal in every call, or the launch is refused: every stride has its own
    unit = 8 * TMA_BYTES // dtype.width
    strides = [cute.sym_int64(divisibility=unit) if dim in tma else cute.sym_int64() for dim in range(len(shape))]
    if not strided:
        strides[-1] = 1
    sizes = [size() if length is None else length for length in shape]
    if align is None:
        align = TMA_BYTES if tma else max(1, dtype.width // 8)
    return make_fake_tensor(dtype, sizes, tuple(strides), assumed_align=align)


def numbers(*kinds) -> list[Any]:
    """Scalar arguments of these types, of any value."""
    return [kind(1) for kind in kinds]


def compiled(kernel, arguments: tuple, options: str = ""):
    """Compile a kernel for sm_90a; takes seconds."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments, stream, options=f"--enable-tvm-ffi {options}")
