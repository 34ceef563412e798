"""Problem and device -> (backend, config), cached: a call that repeats a problem pays one dict look-up."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

from flash_mla.backends import ORDER, Backend, backend
from flash_mla.errors import DeviceError
from flash_mla.problem import Args, Problem


class Plan(NamedTuple):
    """The backend that runs a problem, and its kernel config."""

    name: str
    backend: Backend
    problem: Problem
    config: Hashable

    def launch(self, args: Args) -> None:
        """Fill args.out and args.lse."""
        self.backend.launch(self.problem, self.config, args)


@lru_cache(maxsize=4096)
def plan(problem: Problem, name: str | None = None) -> Plan:
    """The first backend that does not refuse; an explicit name never falls back."""
    if name is not None and name not in ORDER:
        raise DeviceError(
            f"backend={name!r}",
            f"one of {', '.join(ORDER)}",
            "There is no such backend",
            "Omit backend= or name another",
        )
    refusals = {}
    for candidate in ORDER if name is None else (name,):
        module = backend(candidate)
        reason = module.available() or module.refuse(problem)
        if reason is None:
            return Plan(candidate, module, problem, module.config(problem))
        refusals[candidate] = reason
    raise DeviceError(
        "; ".join(f"{candidate}: {reason}" for candidate, reason in refusals.items()),
        f"a backend that runs this {type(problem).__name__} on {problem.device}",
        "No backend runs this problem",
        "Change what the reasons name" if name is None else "Omit backend= to let another backend serve the call",
    )
