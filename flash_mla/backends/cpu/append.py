"""Write new rows into their pages on the CPU, as they are or quantised: by compiled kernels, or by torch's ops."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from flash_mla.backends.cpu import engine
from flash_mla.backends.cpu.surroundings import undisturbed
from flash_mla.passed import Passed
from flash_mla.problem import BLOCK, FP8, AppendArgs, AppendRowsArgs
from flash_mla.quant import RowFormat

TEAM_ROWS = 256
"""Rows from which on a team is woken to quantise them: about 50 us of one core."""
TEAM_BYTES = 1 << 19
"""Bytes of K from which on a team is woken to copy rows: the same."""


SHARED = Passed[engine.Arguments]()
"""Arguments of the copying kernel but for addresses, by what the tensors look like."""


def launch(args: AppendArgs) -> None:
    """Token i of request b goes to position start_pos[b] + i."""
    if engine.missing() is None:
        copy_rows(args)
    else:
        index_rows(args)


@functools.cache
def copying() -> engine.Entries:
    """The compiled kernel that copies."""
    from flash_mla.kernels.cpu.append import Appending

    return engine.Entries(Appending(), 0)


def copy_rows(args: AppendArgs) -> None:
    """By the compiled kernel; rows that do not lie together are put together first."""
    k, v = args.k, args.v
    if k.stride(3) != 1 or (v is not None and v.stride(3) != 1):
        args = args._replace(k=k.contiguous(), v=None if v is None else v.contiguous())
    shared = SHARED.get(args, ())
    if shared is None:
        shared = SHARED.keep(args, (), copied(args))
    packed = type(shared).from_buffer_copy(shared)
    given = [x if x is None else x.contiguous() for x in (args.start_pos, args.num_tokens)]
    tensors = (args.k, args.v, args.k_cache, args.v_cache, args.block_table, *given)
    packed[1 : 1 + len(tensors)] = [0 if x is None else x.data_ptr() for x in tensors]
    size = args.k.numel() * args.k.element_size()
    copying().run(packed, torch.get_num_threads() if size >= TEAM_BYTES else 1)


def copied(args: AppendArgs) -> engine.Arguments:
    """The kernel's arguments without addresses."""
    from flash_mla.kernels.cpu.append import ARGUMENTS

    B, heads, P, _ = args.k.shape
    values = {"N": B * P, "P": P, "heads": heads, "Nblk": args.k_cache.shape[2]}
    for name, x in (("table", args.block_table), ("starts", args.start_pos), ("counts", args.num_tokens)):
        values[f"{name}_wide"] = x is not None and x.dtype == torch.int64
    table = args.block_table
    values |= {"table_row": table.stride(0) * table.element_size(), "table_blocks": table.shape[1]}
    for name, rows, cache in (("k", args.k, args.k_cache), ("v", args.v, args.v_cache)):
        if rows is not None and cache is not None:
            values |= engine.strides(name, rows.stride()[:3], rows.dtype, "bhr")
            values |= engine.strides(f"{name}_cache", cache.stride()[:4], cache.dtype, "bhpk")
            values[f"{name}_bytes"] = rows.shape[3] * rows.element_size()
    return engine.arguments(ARGUMENTS, **values)


@undisturbed
def index_rows(args: AppendArgs) -> None:
    """By torch's ops."""
    B, _, P, _ = args.k.shape
    token = torch.arange(P).expand(B, P)
    position = token if args.start_pos is None else token + args.start_pos[:, None]
    written = torch.ones(B, P, dtype=torch.bool) if args.num_tokens is None else token < args.num_tokens[:, None]
    b, i = written.nonzero(as_tuple=True)
    block = args.block_table[b, position[b, i] // BLOCK].long()
    slot = position[b, i] % BLOCK
    for rows, cache in ((args.k, args.k_cache), (args.v, args.v_cache)):
        if rows is not None and cache is not None:
            if rows.dtype == FP8:
                rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
            rows = rows.transpose(1, 2)[b, i]
            if cache.stride(0) == 0:  # a pool; torch refuses to write to an expanded tensor
                cache[0].transpose(0, 2)[slot, block] = rows
            else:
                cache.transpose(1, 3)[b, slot, block] = rows


@undisturbed
def launch_rows(args: AppendRowsArgs) -> None:
    """Quantise AppendRowsArgs' rows into the pages; those of slots outside of the pages are dropped."""
    rows = torch.cat([args.k_nope, args.k_rope], dim=-1)
    scale = {0: torch.float32, 1: torch.float8_e8m0fnu, 4: torch.float32}[args.scale_size]
    form = RowFormat("", args.codes.shape[2], args.rope.shape[2] // 2, args.tile or None, scale, args.scales.shape[2])
    # NOTE: the kernel walks over whole vectors
    if engine.missing() is None and not (form.quantised % 32 or args.tile % 32 or form.rope % 4):
        return through_kernel(form, rows, args)
    through_torch(form, rows, args)


def through_torch(form: RowFormat, rows: Tensor, args: AppendRowsArgs) -> None:
    """Quantise rows [N, D] by torch's ops."""
    page = args.codes.shape[1]
    kept = ((args.slots >= 0) & (args.slots < len(args.codes) * page)).nonzero()[:, 0]
    index = (args.slots[kept] // page, args.slots[kept] % page)
    for part, value in zip((args.codes, args.scales, args.rope), form.encode(rows[kept], args.descale), strict=True):
        part[index] = value


@functools.cache
def kernel(form: RowFormat) -> engine.Entries:
    """The compiled kernel of a format."""
    from flash_mla.kernels.cpu.config import host
    from flash_mla.kernels.cpu.rows import Quantising

    size = 0 if form.tile is None else form.scale_dtype.itemsize
    tile = form.tile or form.quantised
    return engine.Entries(Quantising(host().lanes, form.quantised, form.rope, tile, size, form.scale_bytes), 0)


def through_kernel(form: RowFormat, rows: Tensor, args: AppendRowsArgs) -> None:
    """Quantise rows [N, D] by the compiled kernel."""
    from flash_mla.kernels.cpu.rows import ARGUMENTS

    slots, N = args.slots.contiguous(), len(rows)
    descale = 1.0 if args.descale is None else float(args.descale)
    address, wide = engine.integers(slots)
    values = {
        "N": N, "rows": rows.data_ptr(), "rows_row": 2 * form.head_dim, "slots": address, "slots_wide": wide,
        "tokens": args.codes.shape[:2].numel(), "page": args.codes.shape[1],
        "descale": struct.unpack("<I", struct.pack("<f", descale))[0],
    }  # fmt: skip
    for name in ("codes", "scales", "rope"):
        part: Tensor = getattr(args, name)
        values |= {name: part.data_ptr(), f"{name}_block": part.stride(0), f"{name}_row": part.stride(1)}
    kernel(form).run(engine.arguments(ARGUMENTS, **values), min(max(N // TEAM_ROWS, 1), torch.get_num_threads()))
