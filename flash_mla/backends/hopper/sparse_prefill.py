"""Sparse prefill on Hopper: what `kernels/hopper/sparse_prefill` takes, and its launch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import device_of, multiprocessors
from flash_mla.errors import ShapeError
from flash_mla.kernels.hopper.sparse_prefill.config import DV, TILE_M, Config
from flash_mla.problem import SparseArgs, SparseProblem

DTYPES: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = (576, 512)
ALIGNMENT = 8
"""Strides of q and of the rows must be multiples of 16 bytes: 8 elements."""
MAX_ROWS = 2**31 - 1
"""Row ids are 32 bits wide."""


def refuse(problem: SparseProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype not in DTYPES or problem.format is not None:
        return f"rows of {problem.format or problem.dtype}: the kernel takes BF16 and FP16"
    if problem.D not in WIDTHS or problem.Dv != DV:
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes 576/512 and 512/512"
    if len(problem.sets) != 1 or problem.S_q != 1 or problem.sets[0].pages != 1:
        return "several caches, pages or query tokens a request: the kernel takes rows of one tensor"
    (keys,) = problem.sets
    if min(problem.B, problem.Hq, keys.topk, keys.page) == 0:
        return "no query, no index or no row"
    if keys.page > MAX_ROWS:
        return f"{keys.page} rows: at most {MAX_ROWS}"
    for name, stride in (("q", problem.q_strides[0]), ("q", problem.q_strides[2]), ("kv", keys.cache_strides[1])):
        if stride % ALIGNMENT:
            return f"a {name} stride of {stride} elements: TMA and cp.async take multiples of {ALIGNMENT}"
    if problem.q_strides[2] < problem.D and problem.Hq > 1:
        return f"q strides {problem.q_strides}: heads must not overlap"
    return None


def config(problem: SparseProblem) -> Config:
    """The kernel variant."""
    return Config(dtype=DTYPES[problem.dtype], D=problem.D)


def int32(values: Tensor) -> Tensor:
    """The same ids or counts in 32 bits; what does not fit stays on its side of the range."""
    return values if values.dtype == torch.int32 else values.clamp(-1, 2**31 - 1).to(torch.int32)


def launch(problem: SparseProblem, config: Config, args: SparseArgs) -> None:
    """Fill args.out, args.lse and args.max_logits; int64 indices and lengths are converted first, on the device.

    The first launch of a config loads its kernel, and the first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_prefill import kernel as sparse_prefill

    if not args.softmax_scale > 0:
        raise ShapeError(
            given=f"softmax_scale={args.softmax_scale}",
            required="softmax_scale > 0 on the Hopper backend",
            cause="The running maximum is kept before scaling",
            fix="Scale q instead, or pass backend='triton'",
        )
    kernel = store.load("sparse_prefill", config, sparse_prefill.build)
    (keys,) = args.keys
    indices = int32(keys.indices)
    ctas = min(problem.B * -(-problem.Hq // TILE_M), multiprocessors(problem.device))
    max_logits = torch.empty_like(args.lse) if args.max_logits is None else args.max_logits
    with device_of(problem.device):
        kernel(
            args.q,
            keys.cache,
            indices,
            indices[0, 0, :1] if keys.lengths is None else int32(keys.lengths),
            args.lse.view(-1) if args.attn_sink is None else args.attn_sink,
            args.out,
            args.lse,
            max_logits,
            args.softmax_scale * math.log2(math.e),
            problem.q_strides[0],
            indices.stride(0),
            int(keys.lengths is not None),
            int(args.attn_sink is not None),
            ctas,
        )
