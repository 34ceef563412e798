"""What the decode kernels' modules share: what none of them takes, and their launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import LOG2_E, int32, multiprocessors, on_device
from flash_mla.backends.hopper.scratch import outlasting, scratch
from flash_mla.backends.hopper.strides import query_row_stride
from flash_mla.kernels.hopper import split
from flash_mla.problem import DecodeArgs, DecodeProblem


def refuse_queries(problem: DecodeProblem, most: int) -> str | None:
    """Why the kernels cannot run so many query tokens (at most `most`), or None."""
    return f"S_q = {problem.S_q}: at most {most} query tokens a request" if problem.S_q > most else None


def refuse_mask(problem: DecodeProblem) -> str | None:
    """Why the kernels with masks cannot run this one, or None."""
    return "a float mask: only bool ones" if problem.mask == "float" else None


def bytes_of(mask: Tensor) -> Tensor:
    """A bool mask [B, Hq, S_q, columns] as the kernels read it: one without a column hides all keys."""
    return mask.view(torch.uint8) if mask.shape[-1] else mask.new_zeros(1, dtype=torch.uint8).expand(*mask.shape[:3], 1)


def items(problem: DecodeProblem, rows: int) -> int:
    """Items of a call: the groups of query rows, so many as a cluster takes, of every request."""
    return problem.B * problem.Hk * -(-problem.ratio * problem.S_q // rows)


def members_of_team(problem: DecodeProblem, rows: int, each: int) -> int | None:
    """CTAs of a team, with so many query rows and pairs of blocks each, where teams can compute the call; else None."""
    return None if problem.batch_invariant else split.members_of_team(items(problem, rows), problem.table_blocks, each)


def piece_slots(config: Any, problem: DecodeProblem) -> int:
    """Partial results of a call whose requests are cut into pieces; 0 where they are not."""
    if not config.piece:
        return 0
    return items(problem, config.rows) * split.piece_slots(problem.table_blocks, config.piece)


def grid(config: Any, problem: DecodeProblem) -> tuple[int, bool]:
    """Clusters of a launch, and whether it needs combine."""
    groups = items(problem, config.rows)
    if config.team:
        return groups * split.teams(problem.table_blocks, config.reach), False
    # NOTE: CTAs without work cost a short call up to a microsecond
    clusters = multiprocessors(problem.device) // config.cluster
    clusters = split.useful_clusters(clusters, groups, problem.table_blocks)
    # NOTE: not pairs of CTAs: 64 in place of 66 brought nothing, and ragged lengths took 1.02 times as long
    if config.cluster == 1:
        clusters = split.even_clusters(clusters, groups)
    return clusters, split.may_split(problem.table_blocks)


def factor(problem: DecodeProblem, descale: Tensor | None) -> Tensor:
    """A descale [B, Hk] as the kernels read it: of 1 where another is given alone."""
    if descale is not None:
        return descale
    # NOTE: a graph in capture fills a tensor of its own, since nothing may wait for the host there
    if torch.cuda.is_current_stream_capturing():
        one = torch.ones((1, 1), dtype=torch.float32, device=problem.device)
    else:
        one = kept_one(problem.device)
    return one.expand(problem.B, problem.Hk)


@functools.cache
def kept_one(device: torch.device) -> Tensor:
    """A factor of 1, [1, 1]. The copy has arrived when this returns: a launch on any stream may read it."""
    return outlasting(lambda: torch.ones((1, 1), dtype=torch.float32, device="cpu").to(device))


def bind(kernel: Callable[..., None], config: Any, problem: DecodeProblem) -> Callable[[DecodeArgs], None]:
    """The launch of a kernel of a config, which fills args.out and args.lse: by address. An int64 table or lengths are
    converted first."""
    device = problem.device
    clusters, splits = grid(config, problem)
    lse_offset = 4 * config.workspace_words(clusters, piece_slots(config, problem))
    words = lse_offset // 4 + math.prod((problem.B, problem.Hq, problem.S_q))
    q_request, q_head, _, _ = problem.q_strides
    scalars = (
        int(problem.sink),
        problem.ratio,
        problem.Hk,
        problem.S_q,
        problem.Nblk,
        q_request,
        problem.ratio * q_head,
        query_row_stride(problem),
        *problem.k_strides[:4],
        *problem.v_strides[:4],
        int(problem.tail),
        # a cache that all requests share has one request, whatever its batch stride says
        *(problem.B if strides[0] else 1 for strides in (problem.k_strides, problem.v_strides)),
        int(splits),
        clusters,
    )
    descale, team = config.descale, config.team

    def launch(args: DecodeArgs) -> None:
        q, k, v, table, seq_lens, mask, q_descale, k_descale, v_descale, sink, scale, out, lse, _, empty_lse = args
        kept = scratch(device, words)
        if descale:
            q_descale, k_descale, v_descale = (factor(problem, x) for x in (q_descale, k_descale, v_descale))
        kernel(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            # an lse that the call does not want lies behind the workspace
            kept.start + lse_offset if lse is None else lse.data_ptr(),
            int32(table),
            int32(seq_lens),
            0 if sink is None else sink.data_ptr(),
            q_descale,
            k_descale,
            v_descale,
            kept.start,
            kept.counters if team else 0,
            None if mask is None else bytes_of(mask),
            scale * LOG2_E,
            empty_lse,
            *scalars,
        )

    return on_device(device, launch)
