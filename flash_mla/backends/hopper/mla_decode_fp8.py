"""MLA decode over an FP8 cache on Hopper: what `kernels/hopper/mla_decode_fp8` takes, and its launch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import HALVES, device_of, int32, multiprocessors
from flash_mla.kernels.hopper import packing
from flash_mla.kernels.hopper.limits import TMA_BYTES
from flash_mla.kernels.hopper.mla_decode_fp8.config import MAX_S_Q, TILES_N, WIDTHS, Config
from flash_mla.problem import FP8, DecodeArgs, DecodeProblem

QUERIES: dict[torch.dtype, Literal["fp8", "bf16", "fp16"]] = {FP8: "fp8", **HALVES}
"""Dtypes of q by the names that configs use."""


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    out_dtype = torch.bfloat16 if problem.dtype == FP8 else problem.dtype
    if problem.kv_dtype != FP8 or problem.dtype not in QUERIES or problem.out_dtype != out_dtype:
        return (
            f"q {problem.dtype} over a {problem.kv_dtype} cache -> {problem.out_dtype}: the kernel takes FP8, BF16 and "
            "FP16 over FP8, and gives q's dtype, BF16 for FP8"
        )
    if (problem.D, problem.Dv) not in WIDTHS:
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes 576/512 or 512/512"
    if problem.S_q > MAX_S_Q:
        return f"S_q = {problem.S_q}: at most {MAX_S_Q} query tokens a request"
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    return refuse_strides(problem)


def refuse_strides(problem: DecodeProblem) -> str | None:
    """Why TMA cannot read these layouts, or None."""
    q_row = query_row_stride(problem)
    if problem.q_strides[3] != 1 or q_row is None:
        return f"q strides {problem.q_strides}: (head, token) must pack into evenly spaced rows"
    k_request, _, k_block, k_row, k_column = problem.k_strides
    if k_column != 1 or k_row < problem.D:
        return f"k_cache strides {problem.k_strides}: rows must be contiguous and must not overlap"
    for name, stride in (
        ("q", problem.q_strides[0]),
        ("q", q_row),
        *(("k_cache", s) for s in (k_request, k_block, k_row)),
    ):
        if stride % TMA_BYTES:
            return f"a {name} stride of {stride} elements: TMA takes multiples of {TMA_BYTES}"
    return None


def query_row_stride(problem: DecodeProblem) -> int | None:
    """Elements between packed query rows."""
    _, head, token, _ = problem.q_strides
    return packing.row_stride(head, token, problem.Hq, problem.S_q, problem.D)


def config(problem: DecodeProblem) -> Config:
    """The kernel variant: the smallest tile that holds a request's rows; two CTAs share K when there are more."""
    rows = problem.Hq * problem.S_q
    tile_n = next((n for n in TILES_N if n >= rows), TILES_N[-1])
    return Config(QUERIES[problem.dtype], problem.D, tile_n, 2 if -(-rows // tile_n) % 2 == 0 else 1, problem.descale)


def launch(problem: DecodeProblem, config: Config, args: DecodeArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: 2 * tile_n FP32 rows of 512 an SM (35 MB on 132 SMs at most).

    An int64 table or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.mla_decode_fp8.kernel import build

    kernel = store.load("mla_decode_fp8", config, build)
    clusters = multiprocessors(problem.device) // config.cluster
    workspace = torch.empty(config.workspace_words(clusters), dtype=torch.float32, device=problem.device)
    lse = args.lse
    if lse is None:
        lse = torch.empty((problem.B, problem.Hq, problem.S_q), dtype=torch.float32, device=problem.device)

    def factor(descale: Tensor | None) -> Tensor:
        if not problem.descale:
            return workspace  # not read
        if descale is None:
            return torch.ones((1, 1), dtype=torch.float32, device=problem.device).expand(problem.B, 1)
        return descale

    # NOTE: tensors go in as they are: a view costs the host a microsecond, and the kernel makes its own
    with device_of(problem.device):
        kernel(
            args.q,
            args.k,
            int32(args.block_table),
            int32(args.seq_lens),
            workspace if args.attn_sink is None else args.attn_sink,
            factor(args.q_descale),
            factor(args.k_descale),
            factor(args.v_descale),
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
