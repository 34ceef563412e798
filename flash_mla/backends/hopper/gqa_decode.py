"""GQA decode on Hopper: what `kernels/hopper/gqa_decode/` takes, and its launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import DTYPES, device_of, int32, multiprocessors
from flash_mla.backends.hopper.strides import query_row_stride, refuse_query, refuse_rows
from flash_mla.kernels.hopper.gqa_decode.config import MAX_D, MAX_S_Q, TILES_N, WIDE_DV, Config
from flash_mla.problem import FP8, DecodeArgs, DecodeProblem


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    out_dtype = torch.bfloat16 if problem.dtype == FP8 else problem.dtype
    if problem.dtype not in DTYPES or problem.out_dtype != out_dtype:
        return (
            f"dtype {problem.dtype} -> {problem.out_dtype}: the kernel takes BF16, FP16 and FP8, and gives BF16 for FP8"
        )
    if max(problem.D, problem.Dv) > MAX_D:
        return f"D = {problem.D}, Dv = {problem.Dv}: at most {MAX_D}"
    if problem.kv_dtype != problem.dtype:
        return f"q {problem.dtype} over a {problem.kv_dtype} cache: both must have one dtype"
    if problem.S_q > MAX_S_Q:
        return f"S_q = {problem.S_q}: at most {MAX_S_Q} query tokens a request"
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    itemsize = problem.dtype.itemsize
    return (
        refuse_query(problem)
        or refuse_rows("k_cache", problem.k_strides, problem.D, itemsize)
        or refuse_rows("v_cache", problem.v_strides, problem.Dv, itemsize)
    )


def config(problem: DecodeProblem) -> Config:
    """The kernel variant: the smallest tile that holds a KV head's rows, or several of the largest."""
    rows, tiles = problem.ratio * problem.S_q, TILES_N if problem.Dv <= WIDE_DV else TILES_N[:-1]
    tile_n = next((n for n in tiles if n >= rows), tiles[-1])
    return Config(DTYPES[problem.dtype], problem.D, problem.Dv, tile_n, problem.descale)


def launch(problem: DecodeProblem, config: Config, args: DecodeArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: 2 * tile_n FP32 rows of Dv an SM (at most 17 MB on 132 SMs).

    An int64 table or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.gqa_decode.kernel import build

    kernel = store.load("gqa_decode", config, build)
    ctas = multiprocessors(problem.device)
    workspace = torch.empty(config.workspace_words(ctas), dtype=torch.float32, device=problem.device)
    lse = args.lse
    if lse is None:
        lse = torch.empty((problem.B, problem.Hq, problem.S_q), dtype=torch.float32, device=problem.device)

    def factor(descale: Tensor | None) -> Tensor:
        if not problem.descale:
            return workspace  # not read
        if descale is None:
            return torch.ones((1, 1), dtype=torch.float32, device=problem.device).expand(problem.B, problem.Hk)
        return descale

    # NOTE: tensors go in as they are: a view costs the host a microsecond, and the kernel makes its own
    with device_of(problem.device):
        kernel(
            args.q,
            args.k,
            args.v,
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
            problem.B if problem.v_strides[0] else 1,
            ctas,
        )
