"""Problem -> (backend, its module, config), cached: a call that repeats a problem pays one dict look-up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import profiler

from flash_mla.backends import ORDER, Phase, append, appending, choose, empty
from flash_mla.errors import DeviceError
from flash_mla.problem import AppendArgs, Args, Attention, Problem

logger = logging.getLogger("flash_mla")
"""The library's one logger: info for a kernel that is compiled, warning for a fallback, debug for selection."""


@dataclass(frozen=True)
class Plan:
    """The backend's module that runs a problem, and its kernel config. `name` is "empty" where there is no work."""

    name: str
    phase: Phase
    problem: Problem
    config: Hashable

    def results_like(self, q: Tensor) -> tuple[Tensor, ...]:
        """Tensors like those that an attention with this q fills: out; lse, or max_logits. Nobody reads them."""
        if type(q) is Tensor:
            return self._results
        assert isinstance(self.problem, Attention)
        return tuple(x.beside(q) for x in self.problem.results)

    @cached_property
    def _results(self) -> tuple[Tensor, ...]:
        """The same without memory."""
        # NOTE: `empty_like` takes the host half as long as `empty`, which has a shape to read
        assert isinstance(self.problem, Attention)
        device = torch.empty(0, device=self.problem.device)
        assert type(device) is Tensor
        return tuple(without_memory(x.beside(device)) for x in self.problem.results)

    @property
    def by_address(self) -> bool:
        """Whether the launch asks of q, caches and out of a decode only where they begin."""
        return getattr(self.phase, "BY_ADDRESS", False)

    @cached_property
    def bound(self) -> Callable[[Any], None]:
        """The launch, bound to this problem at the first call by a phase that does so."""
        bind = getattr(self.phase, "bind", None)
        # NOTE: a launch that held the plan would keep it alive when it is forgotten, until cycles are collected
        return (bind or partial(unbound, self.phase))(self.problem, self.config)

    def launch(self, args: Args) -> None:
        """Fill args.out and args.lse; while torch's profiler runs, as a range of the phase's module name.

        Of fake tensors nothing: they have shapes alone.
        """
        if type(args[0]) is not Tensor and isinstance(args[0], FakeTensor):
            return None
        if not profiler._is_profiler_enabled:
            return self.bound(args)
        with profiler.record_function(self.phase.__name__):
            return self.bound(args)

    def append(self, args: AppendArgs) -> None:
        """Write rows into their pages; nothing where there is no row."""
        if args.k.numel():
            append(self.name, args)

    def appending(self, args: AppendArgs) -> Callable[[AppendArgs], None]:
        """`append` for all args that look like these (`passed.facts`); a backend that can binds its kernel to them."""
        module = appending(self.name)
        bind = getattr(module, "bind", None)
        return module.launch if bind is None else bind(args)


def without_memory(x: Tensor) -> Tensor:
    """The same tensor, its memory given back: to make others like it. A fake one has none."""
    if type(x) is Tensor:
        x.untyped_storage().resize_(0)
    return x


def unbound(phase: Phase, problem: Problem, config: Hashable) -> Callable[[Any], None]:
    """The launch of a phase that binds none."""
    return lambda args: phase.launch(problem, config, args)


QUESTION = "which problem does this call pose?"
"""In place of a backend's name: `plan` answers by raising the problem, before anything is written. A plain string, so
that it passes through custom ops."""


class Asked(Exception):
    """The answer to QUESTION."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


def check_backend(name: object) -> None:
    """None or a backend's name. Whoever catches the TypeError of an unhashable name asks here."""
    if name is not None and not (isinstance(name, str) and name in ORDER):
        raise DeviceError(
            f"backend={name!r}"[:200],
            f"one of {', '.join(ORDER)}",
            "There is no such backend",
            "Omit backend= or name another",
        )


@lru_cache(maxsize=4096)
def plan(problem: Problem, name: str | None = None) -> Plan:
    """The first backend that does not refuse; an explicit name never falls back. Work of no size needs no backend."""
    if name == QUESTION:
        raise Asked(problem)
    check_backend(name)
    if problem.empty:
        return Plan("empty", empty, problem, None)
    refusals: dict[str, str] = {}
    for candidate in ORDER if name is None else (name,):
        phase = choose(candidate, problem)
        if not isinstance(phase, str):
            logger.debug("%s serves %s; refused: %s", phase.__name__, problem, refusals)
            return Plan(candidate, phase, problem, phase.config(problem))
        refusals[candidate] = phase
    raise DeviceError(
        "; ".join(f"{candidate}: {reason}" for candidate, reason in refusals.items()),
        f"a backend that runs this {type(problem).__name__} on {problem.device}",
        "No backend runs this problem",
        "Change what the reasons name" if name is None else "Omit backend= to let another backend serve the call",
    )
