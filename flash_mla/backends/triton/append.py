"""Append: new rows into their pages, as they are or quantised on the way."""

from __future__ import annotations

import torch

from flash_mla.backends.triton.device import device_of
from flash_mla.kernels.triton import append, rows
from flash_mla.problem import FP8, AppendArgs, AppendRowsArgs


def launch(args: AppendArgs) -> None:
    """Write AppendArgs' rows into the pages; rows whose place lies outside the table or the cache are dropped."""
    bytes_of = {name: getattr(args, name) for name in ("k", "v", "k_cache", "v_cache")}
    if args.k.dtype == FP8:  # a copy: the bytes do
        bytes_of = {name: None if x is None else x.view(torch.uint8) for name, x in bytes_of.items()}
    B, Hk, P, _ = args.k.shape
    with device_of(args.k.device):
        append.append_kernel[append.grid(B, Hk, P)](
            **append.arguments(
                **bytes_of, block_table=args.block_table, start_pos=args.start_pos, num_tokens=args.num_tokens
            )
        )


def launch_rows(args: AppendRowsArgs) -> None:
    """Quantise AppendRowsArgs' rows into the pages; those of slots outside of the pages are dropped."""
    if not len(args.slots):
        return
    with device_of(args.slots.device):
        rows.append_rows_kernel[(len(args.slots),)](**rows.arguments(**args._asdict()), num_warps=1)
