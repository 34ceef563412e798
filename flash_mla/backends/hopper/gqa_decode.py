"""GQA decode on Hopper: what `kernels/hopper/gqa_decode/` takes, and its launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import DTYPES, device_of, int32, multiprocessors
from flash_mla.kernels.hopper import packing
from flash_mla.kernels.hopper.gqa_decode.config import MAX_D, MAX_S_Q, TILES_N, WIDE_DV, Config
from flash_mla.kernels.hopper.limits import TMA_BYTES
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
    return refuse_strides(problem)


def refuse_strides(problem: DecodeProblem) -> str | None:
    """Why TMA cannot read these layouts, or None."""
    q_request, q_head, _, q_column = problem.q_strides
    q_row = query_row_stride(problem)
    if q_column != 1 or q_row is None:
        return f"q strides {problem.q_strides}: (head, token) must pack into evenly spaced rows"
    for name, strides, width in (("k", problem.k_strides, problem.D), ("v", problem.v_strides, problem.Dv)):
        if strides[4] != 1 or strides[3] < width:
            return f"{name}_cache strides {strides}: rows must be contiguous and must not overlap"
    q = (q_request, q_head * problem.ratio, q_row)
    for name, strides in (("q", q), ("k_cache", problem.k_strides[:4]), ("v_cache", problem.v_strides[:4])):
        for stride in strides:
            if stride * problem.dtype.itemsize % TMA_BYTES:
                return f"a {name} stride of {stride} elements: TMA takes multiples of {TMA_BYTES} bytes"
    return None


def query_row_stride(problem: DecodeProblem) -> int | None:
    """Elements between the packed query rows of a KV head; None where they are not evenly spaced."""
    _, head, token, _ = problem.q_strides
    return packing.row_stride(head, token, problem.ratio, problem.S_q, problem.D)


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
