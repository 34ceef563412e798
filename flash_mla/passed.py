"""Calls that passed their checks: one that repeats what the checks look at is not checked again.

The checks of a call cost the host several times what its launch does, and a server makes the same call for every layer
and step. `facts` are what they look at, without a value that lies in device memory. What depends on more than facts is
looked at in every call: values, where `out` lies beside the inputs, what autograd records, the stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flash_mla.problem import ALIGNMENT

TensorGuards: Any = None
with contextlib.suppress(ImportError):
    from torch._C._dynamo.guards import TensorGuards  # type: ignore[no-redef]

LOW = ALIGNMENT - 1
MOST = 4096
"""Calls that are remembered; with one more, all are forgotten."""

T = TypeVar("T")


class Like:
    """The tensors of a call, to compare those of others with: all that `facts` are, and what autograd and torch.func
    make of them. `inference`: it was made in inference mode, and holds for no call outside of it, nor the other way.

    NOTE: torch compares five tensors in 0.9 us, but for their alignment, where `facts` takes 4.5 to read them. The
    class that does so for compiled graphs is none of its documented ones; where it is missing, facts decide alone.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._given = picker([i for i, x in enumerate(tensors) if x is not None])
        self._absent = picker([i for i, x in enumerate(tensors) if x is None])
        self._number, self._nothing = len(tensors), self._absent(tensors)
        given = self._given(tensors)
        self._starts, self.inference = starts(given), torch.is_inference_mode_enabled()
        sizes, strides = [[*x.shape] for x in given], [[*x.stride()] for x in given]
        self._check = TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check

    def holds(self, tensors: tuple[Any, ...]) -> bool:
        """Whether these are like them."""
        if len(tensors) != self._number or self._absent(tensors) != self._nothing:
            return False
        given = self._given(tensors)
        return self._check(*given) and starts(given) == self._starts


def picker(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes what stands at these places of a sequence."""
    if not places:
        return lambda _: ()
    # NOTE: of one place, taken once, it would give no tuple
    return itemgetter(*(places if len(places) > 1 else 2 * places))


def starts(tensors: Iterable[Tensor]) -> list[int]:
    """Where each begins in ALIGNMENT bytes; -1 without memory."""
    return [start & LOW if start else -1 for start in map(Tensor.data_ptr, tensors)]


class Entry(NamedTuple, Generic[T]):
    """What the checks gave to a call."""

    like: Like | None
    rest: Hashable
    result: T


class Passed(Generic[T]):
    """What the checks gave, by the tensors of a call, None where one is not given, and the rest that they look at.

    Of a call without a `rest`, or with numbers in place of tensors, whose value counts, nothing is remembered.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry[T]] = {}
        self._last: Entry[T] | None = None

    def get(self, tensors: tuple[Any, ...], rest: Hashable | None) -> T | None:
        """What they gave to a call with tensors like these, and this rest."""
        if rest is None:
            return None
        # NOTE: layers repeat a call, one after another
        last = self._last
        if last is not None and last.like is not None and last.rest == rest and last.like.holds(tensors):
            return last.result
        key = key_of(tensors, rest)
        found = self._entries.get(key)
        if found is None:
            return None
        # NOTE: calls that were first made outside of inference mode would be looked up for ever in it: 4 us each
        if found.like is not None and found.like.inference != torch.is_inference_mode_enabled():
            found = self._entries[key] = found._replace(like=Like(tensors))
        self._last = found
        return found.result

    def keep(self, tensors: tuple[Any, ...], rest: Hashable | None, result: T) -> T:
        """Remember a result, and return it."""
        key = key_of(tensors, rest)
        if key is not None:
            if len(self._entries) >= MOST:
                self._entries.clear()
            like = None if TensorGuards is None else Like(tensors)
            self._last = self._entries[key] = Entry(like, rest, result)
        return result


def key_of(tensors: tuple[Any, ...], rest: Hashable | None) -> Hashable | None:
    """The key of a call, None if it has none."""
    try:
        return None if rest is None else (facts(*tensors), rest)
    except AttributeError:
        return None


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


def spans(*tensors: object) -> tuple[int, ...]:
    """Bytes from each tensor's first to past its last, 0 where there is none: what facts tell of a tensor's reach."""
    return tuple([span(x) if isinstance(x, Tensor) else 0 for x in tensors])


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
