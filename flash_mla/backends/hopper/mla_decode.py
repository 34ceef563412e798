"""MLA decode on Hopper: what `kernels/hopper/mla_decode/` takes, and its launch."""

from __future__ import annotations

import math

import torch

from flash_mla.backends.hopper.device import HALVES, device_of, int32, multiprocessors
from flash_mla.kernels.hopper import packing
from flash_mla.kernels.hopper.limits import TILE_M
from flash_mla.kernels.hopper.mla_decode.config import MAX_S_Q, WIDTHS, Config
from flash_mla.problem import DecodeArgs, DecodeProblem

ALIGNMENT = 8
"""Strides that TMA reads must be multiples of 16 bytes: 8 elements."""


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype not in HALVES or problem.out_dtype != problem.dtype:
        return f"dtype {problem.dtype} -> {problem.out_dtype}: the kernel takes and gives BF16 or FP16"
    if (problem.D, problem.Dv) not in WIDTHS:
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes 576/512 or 512/512"
    if problem.kv_dtype != problem.dtype:
        return f"q {problem.dtype} over a {problem.kv_dtype} cache: both must have one dtype"
    if problem.S_q > MAX_S_Q:
        return f"S_q = {problem.S_q}: at most {MAX_S_Q} query tokens a request"
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    if problem.descale:
        return "descales"
    return refuse_strides(problem)


def refuse_strides(problem: DecodeProblem) -> str | None:
    """Why TMA cannot read these layouts, or None."""
    q_request, _, _, q_column = problem.q_strides
    q_row = query_row_stride(problem)
    if q_column != 1 or q_row is None:
        return f"q strides {problem.q_strides}: (head, token) must pack into evenly spaced rows"
    k_request, _, k_block, k_row, k_column = problem.k_strides
    if k_column != 1 or k_row < problem.D:
        return f"k_cache strides {problem.k_strides}: rows must be contiguous and must not overlap"
    for name, stride in (("q", q_request), ("q", q_row), ("k_cache", k_row), ("k_cache", k_block)):
        if stride % ALIGNMENT:
            return f"a {name} stride of {stride} elements: TMA takes multiples of {ALIGNMENT}"
    if k_request % ALIGNMENT:
        return f"a k_cache batch stride of {k_request} elements: TMA takes multiples of {ALIGNMENT}"
    return None


def query_row_stride(problem: DecodeProblem) -> int | None:
    """Elements between packed query rows; None where they are not evenly spaced."""
    _, head, token, _ = problem.q_strides
    return packing.row_stride(head, token, problem.Hq, problem.S_q, problem.D)


def config(problem: DecodeProblem) -> Config:
    """The kernel variant: two CTAs share K when there are two row tiles to share it."""
    tiles = -(-problem.Hq * problem.S_q // TILE_M)
    return Config(dtype=HALVES[problem.dtype], D=problem.D, cluster=2 if tiles % 2 == 0 else 1)


def launch(problem: DecodeProblem, config: Config, args: DecodeArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: 2 * 64 FP32 rows of 512 an SM (35 MB on 132 SMs).

    An int64 table or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.mla_decode.kernel import build

    kernel = store.load("mla_decode", config, build)
    clusters = multiprocessors(problem.device) // config.cluster
    workspace = torch.empty(config.workspace_words(clusters), dtype=torch.float32, device=problem.device)
    lse = args.lse
    if lse is None:
        lse = torch.empty((problem.B, problem.Hq, problem.S_q), dtype=torch.float32, device=problem.device)
    # NOTE: tensors go in as they are: a view costs the host a microsecond, and the kernel makes its own
    with device_of(problem.device):
        kernel(
            args.q,
            args.k,
            int32(args.block_table),
            int32(args.seq_lens),
            workspace if args.attn_sink is None else args.attn_sink,
            args.out,
            lse,
            workspace,
            args.softmax_scale * math.log2(math.e),
            int(args.attn_sink is not None),
            query_row_stride(problem),
            # a cache that all requests share has one request, whatever its batch stride says
            problem.B if problem.k_strides[0] else 1,
            clusters,
        )
