"""Calls that passed their checks: one that repeats what the checks look at is not checked again.

The checks of a call cost the host several times what its launch does, and a server makes the same call for every layer
and step. `facts` are what they look at, without a value that lies in device memory. What depends on more than facts is
looked at in every call: values, where `out` lies beside the inputs, what autograd records, the stream.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flash_mla.problem import ALIGNMENT

MOST = 4096
"""Calls that are remembered; with one more, all are forgotten."""

T = TypeVar("T")


class Passed(Generic[T]):
    """What the checks gave, by the facts of the call."""

    def __init__(self) -> None:
        self._results: dict[Hashable, T] = {}
        self._last: tuple[Hashable, T | None] = None, None

    def get(self, key: Hashable) -> T | None:
        """The result of a call with this key, which is not None."""
        # NOTE: layers repeat a call: to compare its key takes half as long as to hash it and then compare
        last, result = self._last
        if key == last:
            return result
        result = self._results.get(key)
        if result is not None:
            self._last = key, result
        return result

    def keep(self, key: Hashable, result: T) -> T:
        """Remember a result, and return it."""
        if len(self._results) >= MOST:
            self._results.clear()
        self._results[key] = result
        self._last = key, result
        return result


def facts(*tensors: Any) -> tuple[Hashable, ...]:
    """Shape, strides, dtype, device and alignment of each tensor, None where none is given.

    A tensor whose memory was freed, or whose sign is kept apart from it, has None as its alignment.

    Raises:
        AttributeError: where something else than a tensor is given; the checks say which.
    """
    # NOTE: a tuple of a list: 4.3 us for five tensors, half a microsecond more of a generator
    return tuple(
        [
            None
            if x is None
            else (
                x.shape,
                x.stride(),
                x.dtype,
                x.device,
                start % ALIGNMENT if (start := x.data_ptr()) and not x.is_neg() else None,
            )
            for x in tensors
        ]
    )


def spans(*tensors: Tensor | None) -> tuple[int, ...]:
    """Bytes from each tensor's first to past its last, 0 where there is none: what facts tell of a tensor's reach."""
    return tuple([0 if x is None else span(x) for x in tensors])


def span(x: Tensor) -> int:
    """The same of one."""
    if not x.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (1 + last) * x.element_size()


def apart(written: Tensor, length: int, read: Iterable[Tensor | None], lengths: Iterable[int]) -> bool:
    """Whether a tensor that spans `length` bytes lies apart from those that span `lengths`."""
    first = written.data_ptr()
    last = first + length
    for x, own in zip(read, lengths, strict=True):
        if own and x is not None and first < (start := x.data_ptr()) + own and start < last:
            return False
    return True


def traced(x: object) -> bool:
    """Whether a call with this tensor has shapes alone: a graph is traced, or it is a fake tensor."""
    # NOTE: to ask a class with a metaclass of its own takes thrice as long as to compare a type
    return torch.compiler.is_compiling() or (type(x) is not Tensor and isinstance(x, FakeTensor))
