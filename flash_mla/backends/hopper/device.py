"""What the machine offers to the Hopper kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
