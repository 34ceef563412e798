"""MLA decode on Hopper: what `kernels/hopper/mla_decode/` takes, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flash_mla.backends.hopper import decode
from flash_mla.backends.hopper.device import HALVES
from flash_mla.backends.hopper.strides import is_token_major, refuse_query, refuse_rows
from flash_mla.kernels.hopper.limits import TILE_M
from flash_mla.kernels.hopper.mla_decode.config import MAX_S_Q, PIECES, TEAM_SHAPES, WIDTHS, Config
from flash_mla.problem import DecodeArgs, DecodeProblem

BY_ADDRESS = True


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype not in HALVES or problem.out_dtype != problem.dtype:
        return f"dtype {problem.dtype} -> {problem.out_dtype}: the kernel takes and gives BF16 or FP16"
    if (problem.D, problem.Dv) not in WIDTHS:
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes 576/512 or 512/512"
    if problem.kv_dtype != problem.dtype:
        return f"q {problem.dtype} over a {problem.kv_dtype} cache: both must have one dtype"
    if (reason := decode.refuse_queries(problem, MAX_S_Q) or decode.refuse_mask(problem)) is not None:
        return reason
    if problem.descale:
        return "descales"
    request, _, block, row, column = problem.k_strides
    strides = (request, block, row, column)
    return refuse_query(problem) or refuse_rows("k_cache", strides, problem.D, problem.dtype.itemsize)


def config(problem: DecodeProblem) -> Config:
    """The kernel variant: teams where the table is short and rows are few, two CTAs that share K where there are two
    row tiles to share it."""
    rows = problem.Hq * problem.S_q
    kind = partial(
        Config, HALVES[problem.dtype], problem.D, masked=problem.mask != "none", token_major=is_token_major(problem)
    )
    cluster = 2 if -(-rows // TILE_M) % 2 == 0 else 1
    # NOTE: a batch-invariant call has one kernel, however long the table is
    if problem.batch_invariant:
        return kind(cluster, piece=PIECES[2 if cluster == 2 else rows >= TILE_M])
    for each, tile_m in TEAM_SHAPES:
        if (members := decode.members_of_team(problem, tile_m, each)) is not None:
            return kind(members, team=each, tile_m=tile_m)
    return kind(cluster)


def bind(problem: DecodeProblem, config: Config) -> Callable[[DecodeArgs], None]:
    """The launch, which fills args.out and args.lse. It works in `scratch`: 2 * 64 FP32 rows of 512 an SM (35 MB on
    132 SMs); of a batch-invariant call 64 rows for each piece that a row of the table has room for, at most 16 (2 MB a
    request and tile).

    The kernel is loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.mla_decode.kernel import build

    return decode.bind(store.load("mla_decode", config, build), config, problem)
