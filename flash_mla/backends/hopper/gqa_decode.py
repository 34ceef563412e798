"""GQA decode on Hopper: what `kernels/hopper/gqa_decode/` takes, and its launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flash_mla.backends.hopper import decode
from flash_mla.backends.hopper.device import DTYPES
from flash_mla.backends.hopper.strides import is_token_major, refuse_query, refuse_rows
from flash_mla.kernels.hopper.gqa_decode.config import MAX_D, MAX_S_Q, PIECE, Q_VECTOR, TILES_N, WIDE_DV, Config
from flash_mla.problem import FP8, DecodeArgs, DecodeProblem

BY_ADDRESS = True


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    out_dtype = torch.bfloat16 if problem.dtype == FP8 else problem.dtype
    if problem.dtype not in DTYPES or problem.out_dtype != out_dtype:
        return (
            f"dtype {problem.dtype} -> {problem.out_dtype}: the kernel takes BF16, FP16 and FP8, and gives BF16 for FP8"
        )
    two_terms = problem.kv_dtype != problem.dtype
    if two_terms and (problem.kv_dtype != FP8 or problem.D % Q_VECTOR):
        return (
            f"q {problem.dtype} of D = {problem.D} over a {problem.kv_dtype} cache: FP8, and D a multiple of {Q_VECTOR}"
        )
    if two_terms and (problem.mask != "none" or problem.batch_invariant):
        return f"q {problem.dtype} over a {problem.kv_dtype} cache with a mask or batch_invariant"
    if max(problem.D, problem.Dv) > MAX_D:
        return f"D = {problem.D}, Dv = {problem.Dv}: at most {MAX_D}"
    itemsize = problem.kv_dtype.itemsize
    return (
        decode.refuse_queries(problem, MAX_S_Q)
        or decode.refuse_mask(problem)
        or refuse_query(problem)
        or refuse_rows("k_cache", problem.k_strides, problem.D, itemsize)
        or refuse_rows("v_cache", problem.v_strides, problem.Dv, itemsize)
    )


def config(problem: DecodeProblem) -> Config:
    """The kernel variant: the smallest tile that holds a KV head's rows, or several of the largest; teams where the
    table is short and rows are few."""
    rows, two_terms = problem.ratio * problem.S_q, problem.kv_dtype != problem.dtype
    tiles = TILES_N[:-1] if two_terms or problem.Dv > WIDE_DV else TILES_N
    tile_n = next((n for n in tiles if n >= rows), tiles[-1])
    members = decode.members_of_team(problem, tile_n, 1)
    return Config(
        dtype=DTYPES[problem.kv_dtype],
        D=problem.D,
        Dv=problem.Dv,
        tile_n=tile_n,
        descale=problem.descale,
        q=DTYPES[problem.dtype],
        piece=PIECE if problem.batch_invariant else 0,
        masked=problem.mask != "none",
        token_major=is_token_major(problem),
        team=members is not None,
        cluster=members or 1,
    )


def bind(problem: DecodeProblem, config: Config) -> Callable[[DecodeArgs], None]:
    """The launch, which fills args.out and args.lse. It works in `scratch`: 2 * tile_n FP32 rows of Dv an SM (at most
    17 MB on 132 SMs); for a batch-invariant call tile_n rows for each piece that a row of the table has room for, at
    most 16 a head.

    The kernel is loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.gqa_decode.kernel import build

    return decode.bind(store.load("gqa_decode", config, build), config, problem)
