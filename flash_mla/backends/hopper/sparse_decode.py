"""Sparse decode on Hopper: what `kernels/hopper/sparse_decode` takes, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import LOG2_E, int32, multiprocessors, on_device
from flash_mla.backends.hopper.scratch import scratch, unread
from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.mla_decode.config import START
from flash_mla.kernels.hopper.sparse_decode.config import DV, ROWS, SPLIT_COST, TILES, Config
from flash_mla.problem import ALIGNMENT, BLOCK, SparseArgs, SparseProblem
from flash_mla.quant import FORMATS

LONG = 4 * 128
"""Pairs of blocks of a call from which on raw rows are faster beside 64 heads: two a CTA take 38.3 us where converted
rows take 36.4, eight 71.3 where they take 79.5."""
PAIRS = {"raw": (2.0, 8), "copied": (2.0, 4), "converted": (3.5, 2)}
"""What a pair of blocks takes a CTA of a team, us, 16 heads beside it; and pairs of one at most: by the rows' way."""
WIDTHS = (576, 512)
"""D that the kernel is written for, with Dv 512."""


def refuse(problem: SparseProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype != torch.bfloat16:
        return f"dtype {problem.dtype}: the kernel takes and gives BF16"
    if problem.D not in WIDTHS or problem.Dv != DV:
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes 576/512 or 512/512"
    if any(keys.pages * keys.page == 0 for keys in problem.sets):
        return "an empty cache beside one with rows"
    return refuse_strides(problem)


def refuse_strides(problem: SparseProblem) -> str | None:
    """Why the kernel cannot read these layouts, or None."""
    q_request, q_token, q_head, q_column = problem.q_strides
    if q_column != 1:
        return f"q strides {problem.q_strides}: rows must be contiguous"
    for name, stride in (("batch", q_request), ("token", q_token), ("head", q_head)):
        if 2 * stride % ALIGNMENT:
            return f"a q {name} stride of {stride} elements: TMA takes multiples of {ALIGNMENT // 2}"
    size = 2 if problem.format is None else 1
    for keys in problem.sets:
        for name, stride in zip(("page", "row"), keys.cache_strides, strict=True):
            # NOTE: the scales of a page-split format lie apart, so its rows are no longer than their data
            apart = name == "row" and problem.format is not None and FORMATS[problem.format].page_split
            one = name == "page" and keys.pages == 1
            if size * stride % ALIGNMENT and not apart and not one:
                return f"a cache {name} stride of {size * stride} bytes: the kernel reads {ALIGNMENT} at a time"
    return None


def rows_name(problem: SparseProblem) -> str:
    """What the kernel calls the caches' rows."""
    return f"bf16_{problem.D}" if problem.format is None else problem.format


class Team(NamedTuple):
    """How teams compute a call: heads of a CTA, pairs of blocks that it has at most, CTAs of a team, and teams that a
    token's tile of heads has."""

    tile_heads: int
    each: int
    members: int
    teams: int


def token_blocks(problem: SparseProblem) -> int:
    """Blocks of a token's keys, at most."""
    return sum(-(-keys.topk // BLOCK) for keys in problem.sets)


def team(problem: SparseProblem) -> Team | None:
    """The teams that compute a call in the least time, of those that the chip has room for at once; None: there are
    none."""
    tile_heads = TILES[0] if problem.Hq <= TILES[0] else TILES[1]
    items, pairs = problem.B * problem.S_q * -(-problem.Hq // tile_heads), -(-token_blocks(problem) // 2)
    kind = Config(rows_name(problem), len(problem.sets), tile_heads)
    pair_us, most_pairs = PAIRS["raw" if kind.raw else "copied" if kind.copied else "converted"]
    found: list[tuple[float, Team]] = []
    for members, clusters in enumerate(split.CLUSTERS, 1):
        # NOTE: a lone CTA writes its result to out
        most_teams = clusters // items if members > 1 else min(1, clusters // items)
        for teams in range(1, most_teams + 1):
            each = max(1, -(-pairs // (members * teams)))
            # about 1 us to merge, 7 of a CTA's to add several teams
            cost = each * pair_us + (members > 1) + (teams > 1) * 7 / members
            if each <= most_pairs:
                found.append((cost, Team(tile_heads, each, members, teams)))
    return min(found, key=lambda one: (one[0], one[1].members * one[1].teams), default=(0.0, None))[1]


def config(problem: SparseProblem) -> Config:
    """The kernel variant: teams where keys and heads are few; else the smallest tile of heads that holds them, and two
    CTAs of 64 that share a token's keys. One tile of 64 heads reads rows as they are in LONG calls."""
    rows = rows_name(problem)
    if (found := team(problem)) is not None:
        return Config(rows, len(problem.sets), found.tile_heads, found.members, team=True)
    tile_heads = next((tile for tile in TILES if problem.Hq <= tile), TILES[-1])
    cluster = 2 if problem.Hq > TILES[-1] else 1
    pairs = problem.B * problem.S_q * -(-token_blocks(problem) // 2)
    halves = tile_heads == TILES[-1] and cluster == 1 and ROWS[rows].raw and pairs >= LONG
    return Config(rows, len(problem.sets), tile_heads, cluster, halves)


def bind(problem: SparseProblem, config: Config) -> Callable[[SparseArgs], None]:
    """The launch, which fills args.out and args.lse. It works in `scratch`: 2 * 64 FP32 rows of 512 an SM (35 MB on
    132 SMs); int64 indices or lengths are converted first, on the device.

    The kernel is loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_decode.kernel import build

    kernel = store.load("sparse_decode", config, build)
    device = problem.device
    clusters = multiprocessors(device) // config.cluster
    has_lengths = sum(keys.lengths << i for i, keys in enumerate(problem.sets))
    has_sink = int(problem.sink)
    items, pairs = problem.B * problem.S_q * -(-problem.Hq // config.tile_rows), -(-token_blocks(problem) // 2)
    may_split = int(has_lengths or split.splits_equal(pairs, items, clusters, START, SPLIT_COST))
    teams, each = 1, 1
    if (found := team(problem)) is not None:
        teams, each = found.teams, found.each
        clusters, may_split = items * teams, 0
    words = config.workspace_words(clusters)
    nothing = unread(device, torch.int32)

    def launch(args: SparseArgs) -> None:
        kept = scratch(device, words)
        workspace = kept.workspace
        caches: list[Tensor] = []
        for cache, indices, lengths in args.keys:
            caches += (cache, int32(indices), nothing if lengths is None else int32(lengths))
        if len(args.keys) == 1:
            caches *= 2
        kernel(
            args.q,
            *caches,
            workspace if args.attn_sink is None else args.attn_sink,
            args.out,
            args.lse,
            workspace,
            kept.counters if config.team else 0,
            args.softmax_scale * LOG2_E,
            args.empty_lse,
            has_lengths,
            has_sink,
            may_split,
            clusters,
            teams,
            each,
        )

    return on_device(device, launch)
