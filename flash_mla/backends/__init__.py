"""The backends, in order of preference, and what each must offer.

A backend is a module of this package, imported when it is first asked, with

    refuse(problem) -> str | None          why it cannot run this problem, or None
    config(problem) -> Hashable            the kernel and tile choice: a pure function that needs no device
    launch(problem, config, args) -> None  fill args.out and args.lse; allocate nothing but workspace, read no value
    append(args) -> None                   write AppendArgs' rows into the pages
    available() -> str | None              why the backend cannot run on this machine at all, or None

Selection (see `plan`) takes the first that does not refuse.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from typing import Protocol, cast

from flash_mla.problem import AppendArgs, Args, Problem

ORDER = ("hopper", "triton", "cpu")


class Backend(Protocol):
    """The functions of a backend module."""

    def available(self) -> str | None: ...
    def refuse(self, problem: Problem) -> str | None: ...
    def config(self, problem: Problem) -> Hashable: ...
    def launch(self, problem: Problem, config: Hashable, args: Args) -> None: ...
    def append(self, args: AppendArgs) -> None: ...


def backend(name: str) -> Backend:
    """The backend module of that name, imported on first use."""
    return cast(Backend, importlib.import_module(f"flash_mla.backends.{name}"))
