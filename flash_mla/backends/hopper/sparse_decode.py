"""Sparse decode on Hopper: what `kernels/hopper/sparse_decode` takes, and its launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import LOG2_E, int32, multiprocessors, on_device
from flash_mla.backends.hopper.scratch import scratch, unread
from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.mla_decode.config import START
from flash_mla.kernels.hopper.sparse_decode.config import DV, ROWS, SPLIT_COST, TILES, Config
from flash_mla.problem import ALIGNMENT, BLOCK, SparseArgs, SparseProblem
from flash_mla.quant import FORMATS

SPREAD = 128
"""CTAs that work at once on any Hopper card but the smallest."""
LONG = 4
"""Pairs of blocks of a CTA from which on raw rows are faster beside 64 heads: 2 pairs take 38.3 us where converted rows
take 36.4, 8 pairs 71.3 where they take 79.5."""
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


def config(problem: SparseProblem) -> Config:
    """The kernel variant: the smallest tile of heads that holds them, and two CTAs of 64 that share a token's keys.

    A call so small that its heads can be spread over the chip, 16 a CTA and a pair of blocks each, is. One tile of 64
    heads reads rows as they are where a CTA has LONG pairs of blocks.
    """
    rows, blocks = rows_name(problem), sum(-(-keys.topk // BLOCK) for keys in problem.sets)
    pairs = problem.B * problem.S_q * -(-blocks // 2)
    tiles = TILES[:2] if pairs * -(-problem.Hq // TILES[1]) <= SPREAD else TILES
    tile_heads = next((tile for tile in tiles if problem.Hq <= tile), tiles[-1])
    cluster = 2 if tile_heads == TILES[-1] and problem.Hq > tile_heads else 1
    halves = tile_heads == TILES[-1] and cluster == 1 and ROWS[rows].raw and pairs >= LONG * SPREAD
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
    words = config.workspace_words(clusters)
    has_lengths = sum(keys.lengths << i for i, keys in enumerate(problem.sets))
    has_sink = int(problem.sink)
    tokens, blocks = problem.B * problem.S_q, sum(-(-keys.topk // BLOCK) for keys in problem.sets)
    items, pairs = tokens * -(-problem.Hq // config.tile_rows), -(-blocks // 2)
    may_split = int(has_lengths or split.splits_equal(pairs, items, clusters, START, SPLIT_COST))
    nothing = unread(device, torch.int32)

    def launch(args: SparseArgs) -> None:
        workspace = scratch(device, words).workspace
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
            args.softmax_scale * LOG2_E,
            args.empty_lse,
            has_lengths,
            has_sink,
            may_split,
            clusters,
        )

    return on_device(device, launch)
