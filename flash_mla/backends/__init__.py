"""The backends, in order of preference, and what each must offer.

A backend is a folder of this package, imported when it is first asked. Its package has

    available() -> str | None           why the backend cannot run on this machine at all, or None
    refuse(problem) -> str | None       why no kernel of it runs on this device or with these facts, or None
    phase(problem) -> Phase             the module that such problems go to

and a phase's module (one of PHASES, or one for each kernel) has

    refuse(problem) -> str | None          why it cannot run this problem, or None
    config(problem) -> Hashable            the kernel and tile choice: a pure function that needs no device
    launch(problem, config, args) -> None  fill args.out and args.lse; allocate nothing but workspace, read no value,
                                           raise nothing of the contract: what it cannot do, refuse has said
    bind(problem, config) -> launch(args)  in place of launch, where the host's time counts: all that follows from the
                                           problem is worked out once, the kernel loaded
    BY_ADDRESS                             True of a decode whose launch asks of q, caches and out where they begin, no
                                           more: nobody need make views of them in the shapes of DecodeArgs

Its module `append` has `launch(args)`, which writes AppendArgs' rows into the pages; Triton's and the CPU's also
`launch_rows(args)`, which quantises AppendRowsArgs' on the way.

Selection (see `plan`) takes the first that does not refuse.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Hashable
from typing import Any, Protocol, cast

from flash_mla.problem import (
    AppendArgs,
    AppendRowsArgs,
    BackwardProblem,
    DecodeProblem,
    IndexProblem,
    PrefillProblem,
    Problem,
    SparseBackwardProblem,
    SparseProblem,
    TopkProblem,
)

ORDER = ("hopper", "triton", "cpu")

PHASES: dict[type[Problem], str] = {
    DecodeProblem: "decode",
    PrefillProblem: "prefill",
    BackwardProblem: "backward",
    SparseProblem: "sparse",
    SparseBackwardProblem: "sparse_backward",
    IndexProblem: "indexer",
    TopkProblem: "topk",
}
"""The module of a backend that a kind of problem goes to, where the backend does not split it further."""


class Phase(Protocol):
    """The functions of a phase's module. Each module takes the problems and arguments of its own phase alone."""

    __name__: str

    def refuse(self, problem: Any) -> str | None: ...
    def config(self, problem: Any) -> Hashable: ...
    def launch(self, problem: Any, config: Any, args: Any) -> None: ...


class Backend(Protocol):
    """The functions of a backend's package."""

    def available(self) -> str | None: ...
    def refuse(self, problem: Problem) -> str | None: ...
    def phase(self, problem: Problem) -> Phase: ...


def backend(name: str) -> Backend:
    """The backend's package of that name, imported on first use."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def module(name: str, phase: str) -> Phase:
    """A phase's module of a backend, imported on first use."""
    return cast(Phase, importlib.import_module(f"{__name__}.{name}.{phase}"))


def append(name: str, args: AppendArgs) -> None:
    """Write rows into their pages by the backend of that name."""
    appending(name).launch(args)


@functools.cache
def appending(name: str) -> Any:
    """A backend's module `append`, imported on first use."""
    return importlib.import_module(f"{__name__}.{name}.append")


def append_rows(args: AppendRowsArgs) -> None:
    """Quantise rows into their pages, by the backend of the device that they are on."""
    name = "triton" if args.codes.device.type in ("cuda", "xpu") else "cpu"
    appending(name).launch_rows(args)


def choose(name: str, problem: Problem) -> Phase | str:
    """The module of backend `name` that runs this problem, or why it does not."""
    candidate = backend(name)
    if reason := candidate.available() or candidate.refuse(problem):
        return reason
    phase = candidate.phase(problem)
    return phase.refuse(problem) or phase
