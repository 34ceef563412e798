"""Problem -> (backend, its module, config), cached: a call that repeats a problem pays one dict look-up."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

from flash_mla.backends import ORDER, Phase, append, choose, empty
from flash_mla.errors import DeviceError
from flash_mla.problem import AppendArgs, Args, Problem


class Plan(NamedTuple):
    """The backend's module that runs a problem, and its kernel config. `name` is "empty" where there is no work."""

    name: str
    phase: Phase
    problem: Problem
    config: Hashable

    def launch(self, args: Args) -> None:
        """Fill args.out and args.lse."""
        self.phase.launch(self.problem, self.config, args)

    def append(self, args: AppendArgs) -> None:
        """Write rows into their pages; nothing where there is no row."""
        if args.k.numel():
            append(self.name, args)


@lru_cache(maxsize=4096)
def plan(problem: Problem, name: str | None = None) -> Plan:
    """The first backend that does not refuse; an explicit name never falls back. Work of no size needs no backend."""
    if name is not None and name not in ORDER:
        raise DeviceError(
            f"backend={name!r}",
            f"one of {', '.join(ORDER)}",
            "There is no such backend",
            "Omit backend= or name another",
        )
    if problem.empty:
        return Plan("empty", empty, problem, None)
    refusals = {}
    for candidate in ORDER if name is None else (name,):
        phase = choose(candidate, problem)
        if not isinstance(phase, str):
            return Plan(candidate, phase, problem, phase.config(problem))
        refusals[candidate] = phase
    raise DeviceError(
        "; ".join(f"{candidate}: {reason}" for candidate, reason in refusals.items()),
        f"a backend that runs this {type(problem).__name__} on {problem.device}",
        "No backend runs this problem",
        "Change what the reasons name" if name is None else "Omit backend= to let another backend serve the call",
    )
