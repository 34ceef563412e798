"""Which tensors of a call may lie on the same memory: none that is written, beside any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from flash_mla.contract.given import Given, inputs_of
from flash_mla.contract.tensors import check_on, check_tensor, is_aligned, named
from flash_mla.errors import DTypeError, GradientError, LayoutError, ShapeError
from flash_mla.passed import apart, span
from flash_mla.problem import BLOCK, DecodeProblem, PrefillProblem

Some = TypeVar("Some", DecodeProblem, PrefillProblem)


def check_out(out: Tensor | None, problem: Some, call: Given) -> Some:
    """`out` has the output's shape, dtype, device and layout, and shares no memory with any tensor of the call.

    Returns the problem, whose `aligned` counts out too.
    """
    if out is None:
        return problem
    check_tensor("out", out)
    strides = problem.out_strides if isinstance(problem, DecodeProblem) else None
    if tuple(out.shape) != problem.out_shape:
        raise ShapeError(named(out=out), f"out {list(problem.out_shape)}", "`out` does not have the output's shape")
    if out.dtype != problem.out_dtype:
        raise DTypeError(f"out {out.dtype}", f"out {problem.out_dtype}", "`out` does not have the output's dtype")
    if strides is None and not out.is_contiguous():
        raise LayoutError(
            f"out with strides {out.stride()}", "out contiguous", "`out` is not contiguous", "Pass a contiguous out"
        )
    check_on(problem.device, out=out)
    refuse_learning_out(out)
    check_apart("out", out, **inputs_of(call))
    return problem if is_aligned(out) else problem._replace(aligned=False)


def check_out_again(out: Tensor, spans: Sequence[int], call: Given) -> None:
    """Of an `out` whose facts passed `check_out`, what they do not tell: where it lies, and whether it requires grad.

    spans: of out, then of the call's tensors.
    """
    refuse_learning_out(out)
    if not apart(out, spans[0], call.tensors, spans[1:]):
        check_apart("out", out, **inputs_of(call))


def refuse_learning_out(out: Tensor) -> None:
    """No gradient to what `out` held."""
    if out.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            "out, which requires grad",
            "an out that does not",
            "`out` is written in place, and what it held has then no gradient",
            "Pass out.detach(), or none",
        )


def check_apart(written: str, target: Tensor, **inputs: object) -> None:
    """What is written shares no memory with what the call reads: the tensors among its inputs."""
    first, last = reach(target)
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            continue
        start, end = reach(tensor)
        if first < end and start < last:
            raise LayoutError(
                f"{written} at bytes {first:#x} to {last:#x}, {name} at {start:#x} to {end:#x}",
                f"{written} in memory of its own",
                f"`{written}` overlaps `{name}`, which is read while {written} is written",
                "Pass another tensor, or none" if written == "out" else f"Pass a copy: {name}.clone()",
            )


def reach(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to past its last."""
    start = tensor.data_ptr() if tensor.numel() else 0
    return start, start + span(tensor)


def check_writable(name: str, cache: Tensor) -> None:
    """No two heads or blocks of a request lie on the same memory; requests may all share one pool (stride 0)."""
    extent = BLOCK * cache.shape[4]
    for dim in (2, 1, 0):
        size, stride = cache.shape[dim], cache.stride(dim)
        if size > 1 and stride < extent and not (dim == 0 and stride == 0):
            raise LayoutError(
                f"{named(**{name: cache})} with strides {cache.stride()}",
                f"a {('batch', 'head', 'block')[dim]} stride of at least {extent}" + (", or 0" if dim == 0 else ""),
                f"`{name}` is written, and has several names for the same memory",
                "Pass a cache whose heads and blocks lie apart",
            )
        extent = max(extent, stride * (size - 1) + extent if stride else extent)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two written caches meet. Exact where both have the same strides, as parts of one tensor have."""
    (start, end), (first, last) = reach(one), reach(other)
    if start >= last or first >= end:
        return False
    if one.stride()[:3] != other.stride()[:3]:
        return True
    low, high = (one, other) if start <= first else (other, one)
    dims = sorted(((s, n) for s, n in zip(one.stride()[:3], one.shape[:3], strict=True) if s and n > 1), reverse=True)
    slabs = (BLOCK * low.shape[4], BLOCK * high.shape[4])
    return slabs_meet(abs(first - start) // one.element_size(), slabs, dims)


def slabs_meet(distance: int, slabs: tuple[int, int], dims: Sequence[tuple[int, int]]) -> bool:
    """Whether a slab of the lower tensor meets one of the higher, which begins `distance` elements later.

    dims (stride, size) from the largest stride on; each stride is at least the extent of what it steps over.
    """
    if not dims:
        return -slabs[1] < distance < slabs[0]
    (stride, size), *rest = dims
    steps = distance // stride
    return any(slabs_meet(distance - i * stride, slabs, rest) for i in (steps, steps + 1) if abs(i) < size)
