"""Prefill on Hopper: what `kernels/hopper/prefill.py` takes, and its launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import multiprocessors
from flash_mla.errors import ShapeError
from flash_mla.problem import BLOCK, PrefillArgs, PrefillProblem

if TYPE_CHECKING:
    from flash_mla.kernels.hopper.prefill import Config

DTYPES: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""(D, Dv) that the prefill kernel is written for."""
ALIGNMENT = 8
"""Strides that TMA reads must be multiples of 16 bytes: 8 elements."""


def refuse(problem: PrefillProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype not in DTYPES or problem.out_dtype != problem.dtype:
        return f"dtype {problem.dtype} -> {problem.out_dtype}: the kernel takes and gives BF16 or FP16"
    if (problem.D, problem.Dv) not in WIDTHS:
        widths = ", ".join(f"{D}/{Dv}" for D, Dv in WIDTHS)
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes {widths}"
    if problem.mask != "none":
        return f"a {problem.mask} mask: the kernel takes causal or full attention"
    if problem.block_mask:
        return "a block mask"
    if problem.descale:
        return "descales"
    if min(problem.B, problem.P, problem.S_kv) == 0:
        return "no query or no key"
    return refuse_strides(problem)


def refuse_strides(problem: PrefillProblem) -> str | None:
    """Why TMA cannot read these layouts, or None."""
    for name, strides in (("q", problem.q_strides), ("k", problem.k_strides), ("v", problem.v_strides)):
        if strides[-1] != 1:
            return f"{name} strides {strides}: rows must be contiguous"
        for stride in strides[:-1]:
            if stride % ALIGNMENT:
                return f"a {name} stride of {stride} elements: TMA takes multiples of {ALIGNMENT}"
    return None


def config(problem: PrefillProblem) -> Config:
    """The kernel variant."""
    from flash_mla.kernels.hopper.prefill import Config

    return Config(dtype=DTYPES[problem.dtype], D=problem.D, Dv=problem.Dv, paged=problem.paged)


def readable(x: Tensor) -> Tensor:
    """x as TMA reads it: one element in a broadcast dim (the kernel clamps its index), 16-byte aligned."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x if x.data_ptr() % (2 * ALIGNMENT) == 0 else x.clone()


def launch(problem: PrefillProblem, config: Config, args: PrefillArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: a counter, and lse where the call wants none.

    An int64 table or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import prefill, schedule, store

    if not args.softmax_scale > 0:
        raise ShapeError(
            given=f"softmax_scale={args.softmax_scale}",
            required="softmax_scale > 0 on the Hopper backend",
            cause="The running maximum is kept before scaling",
            fix="Scale q instead, or pass backend='triton'",
        )
    kernel = store.load("prefill", config, prefill.build)
    B, Hq, P = problem.B, problem.Hq, problem.P
    tiles = -(-P // config.tile_m) * B * Hq
    ctas = min(tiles, multiprocessors(problem.device))
    lse = args.lse if args.lse is not None else args.q.new_empty((B, Hq, P), dtype=torch.float32)
    # NOTE: nobody takes a second tile where each CTA has one: the counter is not read then
    counter = (torch.zeros if tiles > ctas else torch.empty)(1, dtype=torch.int32, device=problem.device)
    ints = counter if args.block_table is None else args.block_table.to(torch.int32)
    keys = min(problem.S_kv, args.block_table.shape[1] * BLOCK) if args.block_table is not None else problem.S_kv
    tensors: dict[str, Any] = {
        "table": ints.view(1, 1) if args.block_table is None else ints,
        "seq_lens": counter if args.seq_lens is None else args.seq_lens.to(torch.int32),
        "start_pos": counter if args.start_pos is None else args.start_pos.to(torch.int32),
        "sink": lse.view(-1) if args.attn_sink is None else args.attn_sink,
        "lse": lse.view(B * Hq, P),
        "counter": counter,
    }
    kv_bytes = problem.S_kv * (problem.D + problem.Dv) * problem.dtype.itemsize
    scalars = prefill.Scalars(
        scale_log2=args.softmax_scale * math.log2(math.e),
        Hq=Hq,
        Hk=problem.Hk,
        S_kv=keys,
        section=schedule.section(kv_bytes, problem.ratio, B * Hq),
        causal=int(problem.causal),
        has_lens=int(args.seq_lens is not None),
        has_start=int(args.start_pos is not None),
        has_sink=int(args.attn_sink is not None),
    )
    with torch.cuda.device(problem.device):
        kernel(readable(args.q), readable(args.k), readable(args.v), args.out, prefill.Tensors(**tensors), scalars, ctas)
