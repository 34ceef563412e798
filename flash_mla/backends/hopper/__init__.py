"""The Hopper backend: kernels in CuTe DSL for sm_90a, one module for each.

Every module has `refuse(problem)`, `config(problem)` and `launch(problem, config, args)` of the backend protocol, for
its own kind of problem. The DSL is the optional extra `hopper` and is imported at the first launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from typing import Any

from flash_mla.backends.hopper import gqa_decode, mla_decode, mla_decode_fp8, prefill
from flash_mla.backends.hopper.device import available as available
from flash_mla.backends.hopper.device import refuse_device
from flash_mla.problem import FP8, AppendArgs, Args, DecodeProblem, PrefillProblem, Problem


def kernel(problem: Problem) -> Any:
    """The module that such problems go to, or None."""
    if isinstance(problem, DecodeProblem):
        if problem.alias and problem.Hk == 1:
            return mla_decode_fp8 if problem.dtype == FP8 else mla_decode
        return gqa_decode
    if isinstance(problem, PrefillProblem):
        return prefill
    return None


def refuse(problem: Problem) -> str | None:
    """Why the Hopper kernels cannot run this problem, or None."""
    if (reason := refuse_device(problem.device)) is not None:
        return reason
    if (module := kernel(problem)) is None:
        return "there is no kernel in CuTe DSL for sparse attention"
    return module.refuse(problem)


def config(problem: Problem) -> Hashable:
    """The kernel variant."""
    return kernel(problem).config(problem)


def launch(problem: Problem, config: Hashable, args: Args) -> None:
    """Fill args.out and args.lse. The first launch of a config loads its kernel, the first ever compiles it."""
    kernel(problem).launch(problem, config, args)


def append(args: AppendArgs) -> None:
    """Write the rows with the portable kernel: it is bound by memory on every GPU alike."""
    importlib.import_module("flash_mla.backends.triton").append(args)
