"""What the machine offers to the Hopper kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from flash_mla.problem import (
    ALIGNMENT,
    BLOCK,
    FP8,
    BackwardProblem,
    DecodeProblem,
    PrefillProblem,
    Problem,
    SparseBackwardProblem,
    SparseProblem,
)

HALVES: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""torch's 16-bit dtypes and their names in the kernels' configs."""
DTYPES: dict[torch.dtype, Literal["bf16", "fp16", "fp8"]] = {**HALVES, FP8: "fp8"}


LOG2_E = math.log2(math.e)
"""The kernels' exponentials are powers of 2."""


@functools.cache
def available() -> str | None:
    """Why no Hopper kernel can run on this machine, or None."""
    if importlib.util.find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl is not installed (pip install 'flash-mla[hopper]')"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if (9, 0) not in capabilities:
        return f"no device of compute capability 9.0, only {', '.join(f'{a}.{b}' for a, b in sorted(capabilities))}"
    return None


@functools.cache
def refuse_device(device: torch.device) -> str | None:
    """Why no Hopper kernel can run on this device, or None."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"{device} has compute capability {'.'.join(map(str, capability))}, not 9.0"
    return None


def refuse(problem: Problem) -> str | None:
    """Why no Hopper kernel runs on this device or with these facts, or None."""
    if (reason := refuse_device(problem.device)) is not None:
        return reason
    if isinstance(problem, BackwardProblem | SparseBackwardProblem):
        return None  # what TMA cannot read is copied
    if not isinstance(problem, DecodeProblem | PrefillProblem | SparseProblem):
        return "there is no kernel in CuTe DSL for the index, bound by the same units in Triton"
    if problem.scale_sign <= 0 and not scales_first(problem):
        return "softmax_scale is not above 0: the running maximum is kept before scaling"
    if not problem.aligned:
        return f"a tensor does not begin on {ALIGNMENT} bytes, as TMA needs"
    if isinstance(problem, DecodeProblem) and (problem.page != BLOCK or problem.rope_strides is not None):
        return f"pages of {problem.page} tokens, or a split latent: a tile is one page of {BLOCK} whole rows"
    return None


def is_latent(problem: DecodeProblem) -> bool:
    """Whether K and V are one cache of one KV head, which the MLA kernels read once."""
    return problem.alias and problem.Hk == 1


def scales_first(problem: Problem) -> bool:
    """Whether the kernel scales the scores before it looks for their maximum, as GQA decode does: any scale will do."""
    return isinstance(problem, DecodeProblem) and not is_latent(problem)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def int32(values: Tensor) -> Tensor:
    """The same integers in 32 bits; those that do not fit at its ends, which no length, count or block id reaches."""
    if values.dtype == torch.int32:
        return values
    return values.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def device_of(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, which it nearly always is: then the switch would cost the host 2 us."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def on_device(device: torch.device, launch: Callable[[Any], None]) -> Callable[[Any], None]:
    """The launch, made with this device as the current one."""
    # NOTE: asking costs the host 0.15 us and a frame, and of one device the answer is known
    if torch.cuda.device_count() == 1:
        return launch
    index = device.index

    # NOTE: 0.3 us less than `torch.cuda.current_device`, which looks first whether torch has begun with CUDA
    current = torch._C._cuda_getDevice

    def there(args: Any) -> None:
        if index == current():
            return launch(args)
        with torch.cuda.device(device):
            return launch(args)

    return there
