"""Append on Hopper: the portable kernel's, since it is bound by memory on every GPU alike."""

from __future__ import annotations

from flash_mla.backends import append
from flash_mla.problem import AppendArgs


def launch(args: AppendArgs) -> None:
    """Write AppendArgs' rows into the pages."""
    append("triton", args)
