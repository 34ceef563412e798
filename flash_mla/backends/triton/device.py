"""What the machine offers to the Triton kernels, and what their modules share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flash_mla.problem import BLOCK, FP8, DecodeProblem, PrefillProblem, Problem

try:
    import triton
    from triton.runtime.errors import OutOfResources

    from flash_mla.kernels.triton.target import Target
except ImportError as error:
    MISSING: str | None = f"triton cannot be imported: {error}"
else:
    MISSING = None
    if triton.knobs.runtime.interpret:
        from flash_mla.kernels.triton import interpreter

        interpreter.repair()

logger = logging.getLogger("flash_mla")

MAX_D = 576
MAX_REACH = 2**31
"""Elements that the rows of a tile, or of a page larger than one, take: a kernel's offsets within are of 32 bits."""
TILE_ROWS = 128
"""Of prefill and its backward, at most."""


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return MISSING is None and triton.knobs.runtime.interpret


def available() -> str | None:
    """Why this machine cannot run Triton kernels, or None."""
    if MISSING:
        return MISSING
    if interpreted():
        return None
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "no GPU that Triton can compile for is present, and TRITON_INTERPRET=1 is not set"


@functools.cache
def target(device: torch.device) -> Target:
    """What the kernels' configs need to know of a device."""
    if device.type == "cpu":
        # three multiprocessors: small tests then split requests across programs
        return Target(backend="interpreter", arch=0, smem=99 * 1024, multiprocessors=3)
    with device_of(device):
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
        current = driver.get_current_target()
    arch = current.arch if isinstance(current.arch, int) else 0
    return Target(current.backend, arch, properties["max_shared_mem"], properties["multiprocessor_count"])


def device_of(device: torch.device) -> torch.cuda.device | torch.xpu.device | nullcontext[None]:
    """A context in which launches go to this device."""
    if device.type == "cuda":
        return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()


SMALLER: dict[tuple[Problem, Any], Any] = {}
"""Configs that a device refused (shared memory, where a Triton takes more than `config` knows of), and what ran."""


def launch_fitting(
    launch: Callable[[Any, Any, Any], None], smaller: Callable[[Any], Any], problem: Any, config: Any, args: Any
) -> None:
    """Launch a config or, where the device refuses it, the first smaller one that it takes; reported once."""
    while True:
        chosen = SMALLER.get((problem, config), config) if SMALLER else config
        try:
            with device_of(problem.device):
                return launch(problem, chosen, args)
        except OutOfResources as refusal:
            instead = smaller(chosen)
            if instead is None:
                raise
            logger.warning("%s; %s runs in place of %s", refusal, instead, chosen)
            SMALLER[problem, config] = instead


def refuse_columns(problem: DecodeProblem | PrefillProblem) -> str | None:
    """Why the kernels' tiles and offsets do not hold these rows, or None."""
    for name, columns in (("D", problem.D), ("Dv", problem.Dv)):
        if columns > MAX_D or columns % 8:
            return f"{name} must be a multiple of 8, at most {MAX_D}; it is {columns}"
    parts = {"K": problem.k_strides, "V": problem.v_strides}
    if isinstance(problem, PrefillProblem):
        return refuse_far(parts, problem.S_kv)
    if problem.rope_strides is not None:
        parts["the rope"] = problem.rope_strides
    return refuse_far(parts, problem.page, max(BLOCK, problem.page))


def refuse_far(parts: dict[str, tuple[int, ...]], count: int, rows: int = TILE_ROWS) -> str | None:
    """Why the kernels' offsets do not hold `rows` rows of these strides, or None; of one row the stride is anything."""
    for name, (*_, stride, _) in parts.items():
        if count > 1 and stride * rows > MAX_REACH:
            return f"{name}'s rows are {stride} elements apart; at most {MAX_REACH // rows} fit the kernels' offsets"
    return None


def stored(tensor: Tensor, widen: str) -> Tensor:
    """FP8 as the kernel reads it: bytes where PTX or integer arithmetic converts it."""
    return tensor.view(torch.uint8) if widen not in ("", "fp8") and tensor.dtype == FP8 else tensor
