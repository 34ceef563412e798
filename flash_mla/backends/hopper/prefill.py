"""Prefill on Hopper: what `kernels/hopper/prefill/` takes, and its launch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import DTYPES, LOG2_E, int32, multiprocessors, on_device
from flash_mla.backends.hopper.scratch import scratch, unread
from flash_mla.backends.hopper.strides import refuse_rows
from flash_mla.kernels.hopper.prefill import schedule
from flash_mla.kernels.hopper.prefill.config import MOST_TEAMS, WIDTHS, Config, Listed
from flash_mla.problem import BLOCK, FP8, PrefillArgs, PrefillProblem

LEAST_TILES = {128: (8, 128), 192: (32, 32)}
"""Row tiles of a head from which on pairs of them share what they load, by D: of tiles that are all alike, and of
others, where a pair takes as long as its upper tile (measured: docs/design/prefill.md)."""
FEW_TILES = 2 * 132
"""Tiles over listed blocks, up to two an SM, of which each is a chain of waits: two teams make a shorter one."""
MANY_TILES = 32
"""Row tiles of a head from which on one without a partner costs less than sharing saves."""


def refuse(problem: PrefillProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype}: the kernel takes BF16, FP16 and FP8 (e4m3)"
    if problem.dtype == FP8 and problem.out_dtype != torch.bfloat16:
        return f"FP8 -> {problem.out_dtype}: the kernel gives BF16"
    if (problem.D, problem.Dv) not in WIDTHS:
        widths = ", ".join(f"{D}/{Dv}" for D, Dv in WIDTHS)
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes {widths}"
    if problem.mask == "float":
        return "a floating mask: the kernel takes bool masks and block layouts"
    if problem.dtype == FP8 and is_sparse(problem):
        return "FP8 pages with a mask or a block layout: the kernel takes them in 16 bits" if problem.paged else None
    return refuse_strides(problem)


def refuse_strides(problem: PrefillProblem) -> str | None:
    """Why TMA cannot read these layouts, or None."""
    layouts = (
        ("q", problem.q_strides, problem.D),
        ("k", problem.k_strides, problem.D),
        ("v", problem.v_strides, problem.Dv),
    )
    reasons = (refuse_rows(*layout, problem.dtype.itemsize) for layout in layouts)
    return next((reason for reason in reasons if reason is not None), None)


def is_sparse(problem: PrefillProblem) -> bool:
    """Whether blocks are listed."""
    return problem.block_mask or problem.mask == "bool"


def config(problem: PrefillProblem) -> Config:
    """The kernel variant. FP8 under a mask or a block layout is converted to BF16, which holds every e4m3."""
    # NOTE: e4m3 products take 0.75 to 0.86 of BF16's time, and cost accuracy: docs/design/prefill.md
    if is_sparse(problem):
        dtype = "bf16" if problem.dtype == FP8 else DTYPES[problem.dtype]
        few = -(-problem.P // BLOCK) * problem.B * problem.Hq <= FEW_TILES
        teams = 2 if few else MOST_TEAMS[problem.D]
        return Listed(dtype=dtype, D=problem.D, Dv=problem.Dv, paged=problem.paged, teams=teams)
    kernel = Config(dtype=DTYPES[problem.dtype], D=problem.D, Dv=problem.Dv, paged=problem.paged)
    if not shares_keys(problem, kernel):
        return kernel
    # NOTE: at 192/128 the counter is the faster, too, where all tiles are alike: 774 TFLOP/s for 768
    return dataclasses.replace(kernel, cluster=2, in_turn=problem.D == 128 and alike(problem))


def alike(problem: PrefillProblem) -> bool:
    """Whether all tiles see the same keys."""
    return not problem.causal and not problem.seq_lens


def shares_keys(problem: PrefillProblem, config: Config) -> bool:
    """Whether pairs of row tiles share what they load: where that pays, and few have no partner."""
    if config.paged or config.fp8 or config.D not in LEAST_TILES:
        return False
    row_tiles = -(-problem.P // config.tile_m)
    least_alike, least = LEAST_TILES[config.D]
    paired = row_tiles % 2 == 0 or row_tiles > MANY_TILES
    return paired and row_tiles >= (least_alike if alike(problem) else least)


def narrow(x: Tensor) -> Tensor:
    """x with one element in each leading dim that it is broadcast over: the kernel clamps its index."""
    for dim, stride in enumerate(x.stride()[:2]):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def readable(x: Tensor, config: Config) -> Tensor:
    """x as the kernel reads it."""
    x = narrow(x)
    return x.contiguous().to(torch.bfloat16) if x.dtype == FP8 and config.dtype != "fp8" else x


def factors(problem: PrefillProblem, *descales: Tensor | None) -> Tensor:
    """The product of the descales that are there, [B, Hk]."""
    given = [descale for descale in descales if descale is not None]
    if not given:
        return torch.ones((1, 1), dtype=torch.float32, device=problem.device).expand(problem.B, problem.Hk)
    return functools.reduce(torch.mul, given)


def byte_rows(mask: Tensor) -> Tensor:
    """A bool mask as bytes [B or 1, Hq or 1, rows, columns], rows contiguous."""
    mask = narrow(mask)
    return (mask if mask.stride(3) == 1 else mask.contiguous()).view(torch.uint8)


def list_blocks(problem: PrefillProblem, args: PrefillArgs) -> tuple[Tensor, Tensor]:
    """(block_map, mask_bits) of a sparse call, see `Tensors` of the kernel. A bool mask is packed by a kernel first.

    Allocates the map, ceil(P / 64) * ceil(keys / 64) bytes, and the bits, P * keys / 8 bytes, for each request and head
    in which the mask differs.
    """
    from flash_mla.kernels.hopper import pack_mask, store

    blocks = None if args.block_mask is None else byte_rows(args.block_mask)
    if args.mask is None:
        assert blocks is not None
        return blocks, torch.empty((1, 1, 1, 1), dtype=torch.int32, device=problem.device)
    mask = byte_rows(args.mask)
    requests, heads, P, keys = mask.shape
    key_blocks = -(-min(keys, problem.S_kv) // BLOCK)
    bits = torch.empty((requests, heads, P, 2 * key_blocks), dtype=torch.int32, device=problem.device)
    if blocks is not None:
        requests, heads = max(requests, blocks.shape[0]), max(heads, blocks.shape[1])
    shape = (requests, heads, -(-P // BLOCK), key_blocks)
    block_map = torch.empty(shape, dtype=torch.uint8, device=problem.device)
    kernel = store.load("pack_mask", None, pack_mask.build)
    kernel(mask, block_map if blocks is None else blocks, int(blocks is not None), block_map, bits)
    return block_map, bits


def bind(problem: PrefillProblem, config: Config) -> Callable[[PrefillArgs], None]:
    """The launch, which fills args.out and args.lse. It allocates workspace: a counter, in a dense call; what
    `list_blocks` says. The counter of a sparse call, and an lse that the call does not want, lie in `scratch`. An int64
    table or lengths are converted first, on the device.

    The kernel is loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.prefill import kernel as dense
    from flash_mla.kernels.hopper.prefill import listed
    from flash_mla.kernels.hopper.prefill.shared import Scalars, Tensors

    sparse = isinstance(config, Listed)
    kernel = store.load("prefill", config, listed.build if sparse else dense.build)
    device = problem.device
    B, Hq, P = problem.B, problem.Hq, problem.P
    row_tiles = -(-P // config.rows)
    tiles = row_tiles * B * Hq
    clusters = min(tiles, multiprocessors(device) // config.cluster)
    at_once = clusters * (config.teams if isinstance(config, Listed) else 1)
    counts = tiles > at_once and not config.in_turn
    kv_bytes = config.itemsize * problem.S_kv * (problem.D + problem.Dv)
    order = schedule.order(kv_bytes, problem.ratio, B * Hq, row_tiles, problem.causal, at_once)
    flags = (problem.causal, problem.seq_lens, problem.start_pos, problem.sink, problem.descale)
    scalars = (*order, *map(int, flags))
    nothing, no_number = (unread(device, dtype) for dtype in (torch.int32, torch.float32))
    no_bits, no_factor = nothing.view(1, 1, 1, 1), no_number.view(1, 1).expand(B, problem.Hk)
    no_blocks, no_table = no_bits.view(torch.uint8), nothing.view(1, 1)
    # NOTE: the kernel counts its heads on q, so that a broadcast q must have them all
    broadcast = 0 in problem.q_strides
    converted = problem.dtype == FP8 and config.dtype != "fp8"
    as_given = not broadcast and not converted and 0 not in (*problem.k_strides[:2], *problem.v_strides[:2])

    def launch(args: PrefillArgs) -> None:
        q, k, v, table, seq_lens, start_pos, *_ = args
        keys = problem.S_kv if table is None else min(problem.S_kv, table.shape[1] * BLOCK)
        blocks, bits = list_blocks(problem, args) if sparse else (no_blocks, no_bits)
        if not as_given:
            q = q.contiguous() if broadcast else q
            q, k, v = (readable(x, config) for x in (q, k, v))
        lse = args.lse
        lse = scratch(device, B * Hq * P).view((B * Hq, P)) if lse is None else lse.view(B * Hq, P)
        counter = nothing  # not read where each CTA, or team, has one tile, or takes the others in turn
        if counts:
            counter = scratch(device, 1).counter if sparse else torch.zeros(1, dtype=torch.int32, device=device)
        score_scale = value_scale = no_factor
        if problem.descale:
            score_scale, value_scale = (
                factors(problem, args.q_descale, args.k_descale),
                factors(problem, args.v_descale),
            )
        tensors: tuple[Any, ...] = (
            no_table if table is None else int32(table),
            nothing if seq_lens is None else int32(seq_lens),
            nothing if start_pos is None else int32(start_pos),
            no_number if args.attn_sink is None else args.attn_sink,
            score_scale,
            value_scale,
            lse,
            counter,
            blocks,
            bits,
        )
        numbers: tuple[Any, ...] = (args.softmax_scale * LOG2_E, Hq, problem.Hk, keys, *scalars)
        kernel(q, k, v, args.out, Tensors(*tensors), Scalars(*numbers), clusters * config.cluster)

    return on_device(device, launch)
