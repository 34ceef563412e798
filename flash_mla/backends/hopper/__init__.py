"""The Hopper backend: kernels in CuTe DSL for sm_90a, one module for each.

Every module has `refuse(problem)`, `config(problem)` and `launch(problem, config, args)` of the backend protocol, for
its own kind of problem. The DSL is the optional extra `hopper` and is imported at the first launch.
"""

from __future__ import annotations

from flash_mla.backends import PHASES, Phase, module
from flash_mla.backends.hopper.device import available as available
from flash_mla.backends.hopper.device import is_latent
from flash_mla.backends.hopper.device import refuse as refuse
from flash_mla.kernels.hopper.gqa_decode.config import MAX_S_Q
from flash_mla.problem import FP8, DecodeProblem, Problem, SparseProblem


def phase(problem: Problem) -> Phase:
    """The module that such problems go to."""
    name = PHASES[type(problem)]
    if isinstance(problem, DecodeProblem):
        if not is_latent(problem):
            name = "gqa_decode" if problem.S_q <= MAX_S_Q else "long_decode"
        else:
            name = "mla_decode_fp8" if problem.kv_dtype == FP8 else "mla_decode"
    if isinstance(problem, SparseProblem):
        name = "sparse_prefill" if problem.max_logits else "sparse_decode"
    return module("hopper", name)
