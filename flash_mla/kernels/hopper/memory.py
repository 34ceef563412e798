"""A CTA's shared memory: allocated as a kernel's struct says, and held against the config's ledger."""

from __future__ import annotations

from typing import Any

import cutlass.utils as utils

from flash_mla.kernels.hopper.limits import smem_bytes


def allocate(storage: Any, config: Any) -> Any:
    """The fields of a `cute.struct`; ValueError where they take other bytes than the `smem_bytes` of the launch."""
    allocated = smem_bytes(storage.size_in_bytes())
    if allocated != config.smem_bytes():
        raise ValueError(f"{config} allocates {allocated} bytes, its ledger says {config.smem_bytes()}")
    return utils.SmemAllocator().allocate(storage)
