"""Prefill on Hopper: what `kernels/hopper/prefill/` takes, and its launch."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import DTYPES, device_of, int32, multiprocessors
from flash_mla.backends.hopper.strides import refuse_rows
from flash_mla.kernels.hopper.prefill import schedule
from flash_mla.kernels.hopper.prefill.config import WIDTHS, Config
from flash_mla.problem import BLOCK, FP8, PrefillArgs, PrefillProblem


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
    sparse = is_sparse(problem)
    dtype = "bf16" if problem.dtype == FP8 and sparse else DTYPES[problem.dtype]
    return Config(dtype=dtype, D=problem.D, Dv=problem.Dv, paged=problem.paged, sparse=sparse)


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
    """The product of the descales that are there, [B, Hk]; not read where the call has none at all."""
    given = [descale for descale in descales if descale is not None]
    if not given:
        make = torch.ones if problem.descale else torch.empty
        return make((1, 1), dtype=torch.float32, device=problem.device).expand(problem.B, problem.Hk)
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


def launch(problem: PrefillProblem, config: Config, args: PrefillArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: a counter; lse where the call wants none; what
    `list_blocks` says.

    An int64 table or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.prefill.kernel import build
    from flash_mla.kernels.hopper.prefill.shared import Scalars, Tensors

    kernel = store.load("prefill", config, build)
    B, Hq, P = problem.B, problem.Hq, problem.P
    tiles = -(-P // config.tile_m) * B * Hq
    ctas = min(tiles, config.ctas_sm * multiprocessors(problem.device))
    lse = args.lse if args.lse is not None else args.q.new_empty((B, Hq, P), dtype=torch.float32)
    # NOTE: nobody takes a second tile where each CTA has one: the counter is not read then
    counter = (torch.zeros if tiles > ctas else torch.empty)(1, dtype=torch.int32, device=problem.device)
    ints = counter if args.block_table is None else int32(args.block_table)
    keys = min(problem.S_kv, args.block_table.shape[1] * BLOCK) if args.block_table is not None else problem.S_kv
    # NOTE: the kernel counts its heads on q, so that a broadcast q must have them all
    q = args.q.contiguous() if 0 in problem.q_strides else args.q
    nothing = counter.view(1, 1, 1, 1)
    block_map, mask_bits = (nothing.view(torch.uint8), nothing)
    if config.sparse:
        with device_of(problem.device):
            block_map, mask_bits = list_blocks(problem, args)
    tensors: dict[str, Any] = {
        "table": ints.view(1, 1) if args.block_table is None else ints,
        "seq_lens": counter if args.seq_lens is None else int32(args.seq_lens),
        "start_pos": counter if args.start_pos is None else int32(args.start_pos),
        "score_scale": factors(problem, args.q_descale, args.k_descale),
        "value_scale": factors(problem, args.v_descale),
        "sink": lse.view(-1) if args.attn_sink is None else args.attn_sink,
        "lse": lse.view(B * Hq, P),
        "counter": counter,
        "block_map": block_map,
        "mask_bits": mask_bits,
    }
    kv_bytes = config.itemsize * problem.S_kv * (problem.D + problem.Dv)
    order = schedule.order(kv_bytes, problem.ratio, B * Hq, -(-P // config.tile_m), problem.causal, ctas)
    scalars: dict[str, Any] = {
        "scale_log2": args.softmax_scale * math.log2(math.e),
        "Hq": Hq,
        "Hk": problem.Hk,
        "S_kv": keys,
        **order._asdict(),
        "causal": int(problem.causal),
        "has_lens": int(args.seq_lens is not None),
        "has_start": int(args.start_pos is not None),
        "has_descale": int(problem.descale),
        "has_sink": int(args.attn_sink is not None),
    }
    with device_of(problem.device):
        kernel(
            readable(q, config),
            readable(args.k, config),
            readable(args.v, config),
            args.out,
            Tensors(**tensors),
            Scalars(**scalars),
            ctas,
        )
