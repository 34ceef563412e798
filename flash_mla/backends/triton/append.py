"""Append: new rows into their pages, as they are or quantised on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.backends.triton.device import device_of
from flash_mla.kernels.triton import append, rows
from flash_mla.kernels.triton.launcher import Launcher
from flash_mla.passed import Passed
from flash_mla.problem import FP8, AppendArgs, AppendRowsArgs

LAUNCHERS = Passed[Launcher]()
"""Kernels bound to all but their tensors, by what these look like."""


def launch(args: AppendArgs) -> None:
    """Write AppendArgs' rows into the pages; rows whose place lies outside the table or the cache are dropped."""
    if args.k.dtype == FP8:  # a copy: the bytes do
        copied = {name: getattr(args, name) for name in ("k", "v", "k_cache", "v_cache")}
        args = args._replace(**{name: x.view(torch.uint8) for name, x in copied.items() if x is not None})
    launcher = LAUNCHERS.get(args, ())
    if launcher is None:
        bound = Launcher(append.append_kernel, append.grid(*args.k.shape[:3]), append.constants(*args[:5]), {})
        launcher = LAUNCHERS.keep(args, (), bound)
    with device_of(args.k.device):
        launcher(tensors(args))


def tensors(args: AppendArgs) -> dict[str, Tensor | None]:
    """append_kernel's arguments that a call brings."""
    return dict(
        k_ptr=args.k,
        v_ptr=args.v,
        k_cache_ptr=args.k_cache,
        v_cache_ptr=args.v_cache,
        table_ptr=args.block_table,
        start_pos_ptr=args.start_pos,
        num_tokens_ptr=args.num_tokens,
    )


def launch_rows(args: AppendRowsArgs) -> None:
    """Quantise AppendRowsArgs' rows into the pages; those of slots outside of the pages are dropped."""
    if not len(args.slots):
        return
    with device_of(args.slots.device):
        rows.append_rows_kernel[(len(args.slots),)](**rows.arguments(**args._asdict()), num_warps=1)
