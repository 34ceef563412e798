"""Who serves a call, and why the others do not: selection, told instead of done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flash_mla.backends import ORDER, choose
from flash_mla.errors import ShapeError
from flash_mla.plan import QUESTION, Asked, check_backend
from flash_mla.problem import Problem

__all__ = ["Explanation", "explain", "explain_problem"]


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `print` it.

    Attributes:
        function: the name of what was called.
        problem: what the backends were asked: shapes, strides, dtype, device and options of the call.
        backend: the backend that serves the call, None where all refuse, "empty" where there is no work.
        kernels: of each backend that could serve it, the module whose kernels would run, first the one that does.
        refusals: of each other backend, why not. A call with `backend=` asks that one alone.
    """

    function: str
    problem: Problem
    backend: str | None
    kernels: dict[str, str]
    refusals: dict[str, str]

    def __str__(self) -> str:
        if self.backend == "empty":
            return f"{self.function}: there is no work, no kernel runs"
        lines = [f"{self.function}: {'no backend serves it' if self.backend is None else f'{self.backend} serves it'}"]
        for name in ORDER:
            if name in self.kernels:
                lines.append(f"  {name}: {'serves' if name == self.backend else 'could'}, {self.kernels[name]}")
            elif name in self.refusals:
                lines.append(f"  {name}: refuses, {self.refusals[name]}")
        return "\n".join(lines)


def explain(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve this call of a public function, and why each other one refuses it.

    The call's shapes are checked; no value is read, nothing is written and no kernel runs. A function that selects more
    than once (`prefill_indices` scores, then selects) is explained by its first selection.

        print(flash_mla.explain(flash_mla.flash_mla_with_kvcache, q, k_cache, v_cache, block_table, seq_lens))

    Args:
        function: any public function that takes `backend=`, those of `flash_mla.deepseek` and `flash_mla.indexer` too.
        args, kwargs: its arguments. With `backend=` only that one is asked.

    Returns:
        An Explanation.

    Raises:
        FlashMLAError: what the call itself would raise, save that no backend serves it; or `function` has no backend.
    """
    if not inspect.isroutine(function) or "backend" not in inspect.signature(function).parameters:
        raise ShapeError(
            f"function = {function!r}"[:200],
            "a public function that takes backend=",
            "Nothing is selected in this one",
            "Pass flash_mla.flash_mla_with_kvcache, say, and its arguments behind it",
        )
    only = kwargs.pop("backend", None)
    try:
        function(*args, **kwargs, backend=QUESTION)
    except Asked as asked:
        return explain_problem(function.__name__, asked.problem, only)
    raise AssertionError(f"{function.__name__} returned without a selection")


def explain_problem(function: str, problem: Problem, only: str | None = None) -> Explanation:
    """The same of a problem."""
    check_backend(only)
    if problem.empty:
        return Explanation(function, problem, "empty", {}, {})
    chosen = {name: choose(name, problem) for name in (ORDER if only is None else (only,))}
    kernels = {name: phase.__name__ for name, phase in chosen.items() if not isinstance(phase, str)}
    refusals = {name: reason for name, reason in chosen.items() if isinstance(reason, str)}
    return Explanation(function, problem, next(iter(kernels), None), kernels, refusals)
