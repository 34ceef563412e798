"""MLA decode over an FP8 cache on Hopper: what `kernels/hopper/mla_decode_fp8` takes, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from flash_mla.backends.hopper import decode
from flash_mla.backends.hopper.device import HALVES
from flash_mla.backends.hopper.strides import is_token_major, refuse_query, refuse_rows
from flash_mla.kernels.hopper.mla_decode.config import WIDTHS
from flash_mla.kernels.hopper.mla_decode_fp8.config import MAX_S_Q, TEAM_SHAPES, TILES_N, Config
from flash_mla.problem import FP8, DecodeArgs, DecodeProblem

QUERIES: dict[torch.dtype, Literal["fp8", "bf16", "fp16"]] = {FP8: "fp8", **HALVES}
"""Dtypes of q by the names that configs use."""

BY_ADDRESS = True


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
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    if problem.batch_invariant:
        return "batch_invariant: requests are split so that all together fill the machine"
    request, _, block, row, column = problem.k_strides
    return (
        decode.refuse_queries(problem, MAX_S_Q)
        # NOTE: 16-bit queries are held to FP8's steps, though the kernel takes half of them: those have not run
        or refuse_query(problem, itemsize=1)
        or refuse_rows("k_cache", (request, block, row, column), problem.D, 1)
    )


def config(problem: DecodeProblem) -> Config:
    """The kernel variant: teams where the table is short and rows are few; else the smallest tile that holds the rows
    of a request, and two CTAs that share K where there are more."""
    rows = problem.Hq * problem.S_q
    tile_n = next((n for n in TILES_N if n >= rows), TILES_N[-1])
    kind = partial(
        Config, QUERIES[problem.dtype], problem.D, descale=problem.descale, token_major=is_token_major(problem)
    )
    for each, most_rows in TEAM_SHAPES:
        team_tile = min(tile_n, most_rows)
        if (members := decode.members_of_team(problem, team_tile, each)) is not None:
            return kind(team_tile, members, team=each)
    return kind(tile_n, 2 if -(-rows // tile_n) % 2 == 0 else 1)


def bind(problem: DecodeProblem, config: Config) -> Callable[[DecodeArgs], None]:
    """The launch, which fills args.out and args.lse. It works in `scratch`: 2 * tile_n FP32 rows of 512 an SM (35 MB
    on 132 SMs at most).

    The kernel is loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.mla_decode_fp8.kernel import build

    return decode.bind(store.load("mla_decode_fp8", config, build), config, problem)
