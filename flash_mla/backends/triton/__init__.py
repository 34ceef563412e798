"""The portable GPU backend: problems and arguments to the Triton kernels' own.

It runs wherever Triton does (NVIDIA from sm_80, AMD, Intel), and on CPU tensors under TRITON_INTERPRET=1, which is how
it is tested without a GPU. Without Triton this package imports and says so; its modules do not.
"""

from __future__ import annotations

from flash_mla.backends import PHASES, Phase, module
from flash_mla.backends.triton.device import available as available
from flash_mla.backends.triton.device import interpreted, target
from flash_mla.problem import Problem


def refuse(problem: Problem) -> str | None:
    """Why no Triton kernel runs on this device, or None."""
    if problem.device.type not in (("cpu",) if interpreted() else ("cuda", "xpu")):
        wanted = "CPU tensors under TRITON_INTERPRET=1" if interpreted() else "GPU tensors"
        return f"tensors are on {problem.device}; Triton's kernels take {wanted}"
    if target(problem.device).backend == "cuda" and target(problem.device).arch < 80:
        return f"needs compute capability 8.0 or later; this GPU has {target(problem.device).arch / 10}"
    return None


def phase(problem: Problem) -> Phase:
    """The module that such problems go to."""
    return module("triton", PHASES[type(problem)])
