"""Append: new rows into their pages, as they are or quantised on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_mla.backends.triton.device import device_of
from flash_mla.kernels.triton import append, rows
from flash_mla.kernels.triton.launcher import Launcher
from flash_mla.passed import Passed
from flash_mla.problem import FP8, AppendArgs, AppendRowsArgs

Launch = Callable[[AppendArgs], None]

LAUNCHES = Passed[Launch]()
"""Launches bound to all but their tensors, by what these look like."""


def launch(args: AppendArgs) -> None:
    """Write AppendArgs' rows into the pages; rows whose place lies outside the table or the cache are dropped."""
    bind(args)(args)


def bind(args: AppendArgs) -> Launch:
    """The launch of all calls with the facts of these args."""
    if (found := LAUNCHES.get(args, ())) is not None:
        return found
    device, given = args.k.device, as_copied(args)
    launcher = Launcher(append.append_kernel, append.grid(*given.k.shape[:3]), append.constants(*given[:5]), {})

    def bound(args: AppendArgs) -> None:
        with device_of(device):
            launcher(tensors(as_copied(args)))

    return LAUNCHES.keep(args, (), bound)


def as_copied(args: AppendArgs) -> AppendArgs:
    """FP8 as bytes: rows are copied as they are."""
    if args.k.dtype != FP8:
        return args
    copied = {name: getattr(args, name) for name in ("k", "v", "k_cache", "v_cache")}
    return args._replace(**{name: x.view(torch.uint8) for name, x in copied.items() if x is not None})


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
