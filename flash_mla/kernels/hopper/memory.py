"""A CTA's shared memory: allocated as a kernel's struct says, and held against the config's ledger."""

from __future__ import annotations

from typing import Any

import cutlass.utils as utils

from flash_mla.kernels.hopper.limits import smem_bytes


def allocate(storage: Any, config: Any, ledger: int | None = None) -> Any:
    """The fields of a `cute.struct`; ValueError where they take other bytes than the ledger of the launch says.

    ledger: of a config of several kernels; None: the config's `smem_bytes`.
    """
    allocated, ledger = smem_bytes(storage.size_in_bytes()), config.smem_bytes() if ledger is None else ledger
    if allocated != ledger:
        raise ValueError(f"{config} allocates {allocated} bytes, its ledger says {ledger}")
    return utils.SmemAllocator().allocate(storage)
