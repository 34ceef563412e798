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

OTHER_OUT = "Pass an out of that kind, or none"


def check_out(out: Tensor | None, problem: Some, call: Given) -> Some:
    """`out` has the output's shape, dtype, device and layout, and shares no memory with any tensor of the call.

    Returns the problem, whose `aligned` counts out too.
    """
    if out is None:
        return problem
    check_tensor("out", out)
    strides = problem.out_strides if isinstance(problem, DecodeProblem) else None
    if tuple(out.shape) != problem.out_shape:
        raise ShapeError(
            named(out=out), f"out {list(problem.out_shape)}", "`out` does not have the output's shape", OTHER_OUT
        )
    if out.dtype != problem.out_dtype:
        raise DTypeError(
            f"out {out.dtype}", f"out {problem.out_dtype}", "`out` does not have the output's dtype", OTHER_OUT
        )
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
        if first < end and start < last and meet(target, tensor):
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
    """Whether two tensors have a byte in common; see `meet`."""
    (start, end), (first, last) = reach(one), reach(other)
    return start < last and first < end and meet(one, other)


def meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose ends enclose each other's have a byte in common.

    Exact where both have the same strides over contiguous runs, as parts of one tensor have: K beside V, q beside out.
    Of others: yes.
    """
    (run, dims), (other_run, other_dims) = runs(one), runs(other)
    extent = max(run, other_run)
    for stride, size in dims:
        if stride < extent:
            return True
        extent += stride * (size - 1)
    if dims != other_dims:
        return True
    distance = other.data_ptr() - one.data_ptr()
    lengths = (run, other_run) if distance >= 0 else (other_run, run)
    return runs_meet(abs(distance), lengths, dims[::-1])


def runs(tensor: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """(bytes that lie one after another, [(bytes from one such run to the next, how many)]), the least stride first."""
    run = tensor.element_size()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    dims = sorted((stride * run, size) for stride, size in pairs if stride and size > 1)
    while dims and dims[0][0] == run:
        run *= dims.pop(0)[1]
    return run, dims


def runs_meet(distance: int, lengths: tuple[int, int], dims: Sequence[tuple[int, int]]) -> bool:
    """Whether a run of the lower tensor meets one of the higher, which begins `distance` bytes later.

    dims (stride, size) from the largest stride on; each stride is at least the extent of what it steps over.
    """
    if not dims:
        return -lengths[1] < distance < lengths[0]
    (stride, size), *rest = dims
    steps = distance // stride
    return any(runs_meet(distance - i * stride, lengths, rest) for i in (steps, steps + 1) if abs(i) < size)
