"""What one tensor must be: a tensor at all, its dims, device, dtype and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla.errors import DeviceError, DTypeError, LayoutError, ShapeError
from flash_mla.kinds import check_memory
from flash_mla.problem import ALIGNMENT, DTYPES, FP8

INDEX_DTYPES = (torch.int32, torch.int64)


def shape_of(name: str, shape: Sequence[int]) -> str:
    return f"{name} {list(shape)}"


def named(**tensors: Tensor) -> str:
    return ", ".join(shape_of(name, tensor.shape) for name, tensor in tensors.items())


def check_rank(name: str, shape: Sequence[int], rank: int, layout: str) -> None:
    if len(shape) != rank:
        raise ShapeError(
            f"{shape_of(name, shape)}, which has {len(shape)} dims",
            f"{name} {layout}",
            f"`{name}` does not have {rank} dims",
        )


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"{name} is a {type(value).__name__}",
            f"{name} is a torch.Tensor",
            f"`{name}` is not a tensor",
            "Pass tensors in the reference's argument order; see docs/contract.md",
        )
    if not torch.compiler.is_compiling() and value.is_neg():
        raise LayoutError(
            f"{shape_of(name, value.shape)}, a view that negates its memory",
            f"{name} as its memory says",
            f"`{name}` is the imaginary part of a conjugate, whose minus torch keeps apart",
            f"Call {name}.resolve_neg()",
        )


def check_on(device: torch.device, **tensors: Tensor | None) -> None:
    """Every argument that is given is a tensor on q's device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.device != device:
            raise DeviceError(f"{name} on {tensor.device}, q on {device}", f"every tensor on {device}")


def check_dtypes(**tensors: Tensor) -> torch.dtype:
    dtype = next(iter(tensors.values())).dtype
    if dtype in DTYPES and all(tensor.dtype == dtype for tensor in tensors.values()):
        return dtype
    given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise DTypeError(given, "the same dtype for all of them")
    raise DTypeError(
        given,
        "float8_e4m3fn, bfloat16, float16 or float32",
        f"{dtype} is not a dtype that attention runs in",
    )


def check_index(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """An integer tensor of exactly that shape; a -1 in `shape` admits any size."""
    fits = tensor.dim() == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ShapeError(named(**{name: tensor}), f"{name} {layout} = {list(shape)}", f"`{name}` has the wrong shape")
    if tensor.dtype not in INDEX_DTYPES:
        raise DTypeError(
            f"{name} {tensor.dtype}",
            "int32 or int64",
            f"`{name}` is not an integer tensor",
            f"Call {name}.to(torch.int32)",
        )


def check_monotonic(name: str, shape: Sequence[int], strides: Sequence[int], dims: str) -> None:
    """Strides do not grow from left to right over dims of size > 1; a broadcast dim (stride 0) may stand anywhere."""
    last, last_dim = math.inf, ""
    for dim, size, stride in zip(dims.split(), shape, strides, strict=True):
        if size <= 1 or stride == 0:
            continue
        if stride > last:
            raise LayoutError(
                f"{shape_of(name, shape)} with strides {tuple(strides)}",
                f"strides that do not grow from left to right over the dims {dims}",
                f"`{name}` has non-monotonic strides: dim {dim} has stride {stride}, more than {last_dim}'s {last}",
                f"Call {name}.contiguous() before the call",
            )
        last, last_dim = stride, dim


def check_last_dim(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise LayoutError(
            f"{named(**{name: tensor})} with strides {tensor.stride()}",
            "stride 1 on the last dim (D)",
            f"`{name}` is not contiguous on D",
        )


def is_aligned(*tensors: Tensor) -> bool:
    """Whether each tensor's first element lies on ALIGNMENT bytes; a LayoutError for one whose memory was freed."""
    starts = [tensor.data_ptr() for tensor in tensors]
    if not all(starts):
        check_memory(*tensors)
    return not any(start % ALIGNMENT for start in starts)


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == FP8 else dtype
