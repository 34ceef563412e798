"""Append on Hopper: the portable kernel's, since it is bound by memory on every GPU alike."""

from __future__ import annotations

from collections.abc import Callable

from flash_mla.backends import append, appending
from flash_mla.problem import AppendArgs


def launch(args: AppendArgs) -> None:
    """Write AppendArgs' rows into the pages."""
    append("triton", args)


def bind(args: AppendArgs) -> Callable[[AppendArgs], None]:
    """The launch of all calls with the facts of these args."""
    return appending("triton").bind(args)
