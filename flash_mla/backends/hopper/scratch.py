"""Memory that a launch writes and that nobody reads after it: kept from call to call, so that a call allocates its
results alone."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MOST = 2**24
"""Words that are kept, 64 MB: the workspace of any call but a batch-invariant one of many requests."""
MOST_VIEWS = 256
COUNTERS = 132
"""Of a set: one a CTA."""
SETS = 4096
"""That are made at once, 2 MB."""
SPARE: dict[torch.device, list[Tensor]] = {}
"""Sets of counters of each device that nobody has yet."""
MADE: list[Tensor] = []
"""All sets ever made: graphs hold addresses of theirs, no tensor."""


def outlasting(make: Callable[[], T]) -> T:
    """What `make` allocates on the current stream, for longer than a call.

    By a thread of its own: this one's memory may come from the pool of a graph in the making, in which torch.compile
    warms up and then suffers nothing that the results do not hold, or from a MemPool.
    """
    stream = torch.cuda.current_stream()

    def made() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


@functools.cache
def unread(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1], for an argument that a kernel does not read."""
    return outlasting(lambda: torch.empty(1, dtype=dtype, device=device))


class Scratch:
    """FP32 words of a device; `workspace` are all of them, which begin at address `start`."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.words, self.device = words, device
        self.workspace = torch.empty(words, dtype=torch.float32, device=device)
        self.start = self.workspace.data_ptr()
        self._views: dict[tuple[int, ...], Tensor] = {}

    def view(self, shape: tuple[int, ...]) -> Tensor:
        """The first words, as a contiguous tensor."""
        if shape not in self._views:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[shape] = self.workspace[: math.prod(shape)].view(shape)
        return self._views[shape]

    @functools.cached_property
    def _set(self) -> Tensor:
        return take_counters(self.device)

    @functools.cached_property
    def counters(self) -> int:
        """Where its set of counters begins: COUNTERS int32, 0, and 0 again behind every launch."""
        return self._set.data_ptr()

    @functools.cached_property
    def counter(self) -> Tensor:
        """The first of them, [1]."""
        return self._set[:1]


def take_counters(device: torch.device) -> Tensor:
    """A set of counters that nobody else has, nor ever will: nobody tells when a graph is gone."""
    spare = SPARE.setdefault(device, [])
    try:
        return spare.pop()
    except IndexError:  # not asked before: another thread may take the last
        pass
    # NOTE: zeros of the graph's own cost each replay a launch, but nothing else is safe where none are left
    if torch._C._cuda_isCurrentStreamCapturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    # the copy has arrived when it returns: a launch on any stream may read it
    made = outlasting(lambda: torch.zeros((SETS, COUNTERS), dtype=torch.int32, device="cpu").to(device))
    MADE.append(made)
    first, *others = made.unbind(0)
    spare += others
    return first


class Kept(threading.local):
    """The scratch of each stream on which this thread launched.

    Launches of one stream run one after another and may share it. Two threads may not: between the two kernels of one's
    call could stand those of the other's.
    """

    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], Scratch] = {}


KEPT = Kept()


def scratch(device: torch.device, words: int) -> Scratch:
    """At least so many words of the current device, for launches on its current stream.

    More than MOST words are not kept. A graph in capture gets memory of its own, since it may be replayed beside other
    calls.
    """
    # NOTE: 1 us where an allocation and a view take 4; torch's public functions for the two questions take 2
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    # NOTE: on the default stream, 0, nothing is ever captured
    if words > MOST or (stream and torch._C._cuda_isCurrentStreamCapturing()):
        return Scratch(words, device)
    key = device.index, stream
    kept = KEPT.of_stream.get(key)
    if kept is None or kept.words < words:
        kept = KEPT.of_stream[key] = outlasting(lambda: Scratch(words, device))
    return kept
