"""The Hopper backend: kernels in CuTe DSL for sm_90a. MLA decode, BF16 and FP16.

The DSL is the optional extra `hopper` and is imported at the first launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from flash_mla.errors import ShapeError
from flash_mla.problem import BLOCK, AppendArgs, Args, DecodeArgs, DecodeProblem, PrefillProblem, Problem

if TYPE_CHECKING:
    from flash_mla.kernels.hopper.mla_decode import Config

DTYPES: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = ((576, 512), (512, 512))
"""(D, Dv) that the MLA decode kernel is written for."""
MAX_S_Q = 8
ALIGNMENT = 8
"""Strides that TMA reads must be multiples of 16 bytes: 8 elements."""


@functools.cache
def available() -> str | None:
    """Why no Hopper kernel can run on this machine, or None."""
    if importlib.util.find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl is not installed (pip install 'flash-mla[hopper]')"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if (9, 0) not in capabilities:
        return f"no device of compute capability 9.0, only {', '.join(f'{a}.{b}' for a, b in sorted(capabilities))}"
    return None


def refuse(problem: Problem) -> str | None:
    """Why the Hopper kernels cannot run this problem, or None."""
    if not isinstance(problem, DecodeProblem):
        return f"there is no Hopper {'prefill' if isinstance(problem, PrefillProblem) else 'sparse'} kernel"
    if problem.device.type != "cuda":
        return f"it runs on CUDA devices, not on {problem.device.type}"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(problem.device)) != (9, 0):
        return f"{problem.device} has compute capability {'.'.join(map(str, capability))}, not 9.0"
    if problem.dtype not in DTYPES or problem.out_dtype != problem.dtype:
        return f"dtype {problem.dtype} -> {problem.out_dtype}: the kernel takes and gives BF16 or FP16"
    if problem.Hk != 1:
        return f"Hk = {problem.Hk}: the kernel is MLA, one KV head"
    if (problem.D, problem.Dv) not in WIDTHS:
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes 576/512 or 512/512"
    if not problem.alias:
        return "v_cache is not the first 512 columns of k_cache's memory"
    if problem.S_q > MAX_S_Q:
        return f"S_q = {problem.S_q}: at most {MAX_S_Q} query tokens a request"
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    if problem.descale:
        return "descales"
    if min(problem.B, problem.Nblk, problem.table_blocks) == 0:
        return "an empty batch or cache"
    return refuse_strides(problem)


def refuse_strides(problem: DecodeProblem) -> str | None:
    """Why TMA cannot read these layouts, or None."""
    q_request, q_head, q_token, q_column = problem.q_strides
    if q_column != 1 or (problem.S_q > 1 and problem.Hq > 1 and q_head != problem.S_q * q_token):
        return f"q strides {problem.q_strides}: (head, token) must pack into evenly spaced rows"
    k_request, _, k_block, k_row, k_column = problem.k_strides
    if k_column != 1 or k_row < problem.D:
        return f"k_cache strides {problem.k_strides}: rows must be contiguous and must not overlap"
    for name, stride in (("q", q_request), ("q", query_row_stride(problem)), ("k_cache", k_row), ("k_cache", k_block)):
        if stride % ALIGNMENT:
            return f"a {name} stride of {stride} elements: TMA takes multiples of {ALIGNMENT}"
    if k_request % ALIGNMENT:
        return f"a k_cache batch stride of {k_request} elements: TMA takes multiples of {ALIGNMENT}"
    return None


def query_row_stride(problem: DecodeProblem) -> int:
    """Elements between packed query rows; row = head * S_q + token."""
    return problem.q_strides[2] if problem.S_q > 1 else problem.q_strides[1] if problem.Hq > 1 else problem.D


def config(problem: Problem) -> Hashable:
    """The kernel variant: two CTAs share K when there are two row tiles to share it."""
    from flash_mla.kernels.hopper.mla_decode import TILE_M, Config

    problem = cast(DecodeProblem, problem)
    tiles = -(-problem.Hq * problem.S_q // TILE_M)
    return Config(dtype=DTYPES[problem.dtype], D=problem.D, cluster=2 if tiles % 2 == 0 else 1)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(problem: Problem, config: Hashable, args: Args) -> None:
    """Fill args.out and args.lse. Allocates workspace: 2 * 64 FP32 rows of 512 an SM (35 MB on 132 SMs).

    An int64 table or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import mla_decode, store

    problem, args, config = cast(DecodeProblem, problem), cast(DecodeArgs, args), cast("Config", config)
    if not args.softmax_scale > 0:
        raise ShapeError(
            given=f"softmax_scale={args.softmax_scale}",
            required="softmax_scale > 0 on the Hopper backend",
            cause="The running maximum is kept before scaling",
            fix="Scale q instead, or pass backend='triton'",
        )
    kernel = store.load("mla_decode", config, mla_decode.build)
    rows = problem.Hq * problem.S_q
    clusters = multiprocessors(problem.device) // config.cluster
    # a cache that all requests share has one request, whatever its batch stride says
    requests = problem.B if problem.k_strides[0] else 1
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=problem.device)
    out_partial = fp32((2 * clusters, config.rows, problem.Dv))
    k_request, _, k_block, k_row, _ = problem.k_strides
    tensors: dict[str, Any] = {
        "table": args.block_table.to(torch.int32),
        "seq_lens": args.seq_lens.to(torch.int32),
        "sink": out_partial.view(-1) if args.attn_sink is None else args.attn_sink,
        "out": args.out.view(problem.B, rows, problem.Dv),
        "lse": (fp32((problem.B, rows)) if args.lse is None else args.lse).view(problem.B, rows),
        "out_partial": out_partial,
        "lse_partial": fp32((2 * clusters, config.rows)),
        "split_of": torch.empty((clusters, 4), dtype=torch.int32, device=problem.device),
    }
    with torch.cuda.device(problem.device):
        kernel(
            args.q.as_strided((problem.B, rows, problem.D), (problem.q_strides[0], query_row_stride(problem), 1)),
            args.k.as_strided((requests, problem.Nblk, BLOCK, problem.D), (k_request, k_block, k_row, 1)),
            mla_decode.Tensors(**tensors),
            args.softmax_scale * math.log2(math.e),
            problem.S_q,
            int(args.attn_sink is not None),
            clusters,
        )


def append(args: AppendArgs) -> None:
    """Write the rows with the portable kernel: it is bound by memory on every GPU alike."""
    importlib.import_module("flash_mla.backends.triton").append(args)
