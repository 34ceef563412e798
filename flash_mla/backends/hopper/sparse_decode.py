"""Sparse decode on Hopper: what `kernels/hopper/sparse_decode` takes, and its launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import device_of, int32, multiprocessors
from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.mla_decode.config import START
from flash_mla.kernels.hopper.sparse_decode.config import DV, SPLIT_COST, TILES, Config
from flash_mla.problem import ALIGNMENT, BLOCK, SparseArgs, SparseProblem
from flash_mla.quant import FORMATS

SPREAD = 128
"""CTAs that work at once on any Hopper card but the smallest."""
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

    A call so small that its heads can be spread over the chip, 16 a CTA and a pair of blocks each, is.
    """
    blocks = sum(-(-keys.topk // BLOCK) for keys in problem.sets)
    spread = problem.B * problem.S_q * -(-problem.Hq // TILES[1]) * -(-blocks // 2)
    tiles = TILES[:2] if spread <= SPREAD else TILES
    tile_heads = next((tile for tile in tiles if problem.Hq <= tile), tiles[-1])
    cluster = 2 if tile_heads == TILES[-1] and problem.Hq > tile_heads else 1
    return Config(rows_name(problem), len(problem.sets), tile_heads, cluster)


@functools.cache
def loaded(config: Config) -> Callable[..., None]:
    """The kernel of a config. The first call loads it, and the first ever on a machine compiles it."""
    # NOTE: imports in a function cost the host a microsecond each in every call
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_decode.kernel import build

    return store.load("sparse_decode", config, build)


@functools.cache
def grid(config: Config, device: torch.device) -> tuple[int, int]:
    """Clusters of a launch, and the words of its workspace."""
    clusters = multiprocessors(device) // config.cluster
    return clusters, config.workspace_words(clusters)


@functools.cache
def splits(config: Config, tokens: int, Hq: int, blocks: int, clusters: int) -> bool:
    """Whether a call whose tokens all have so many blocks of keys may leave partial results."""
    groups = -(-Hq // config.tile_rows)
    return split.splits_equal(-(-blocks // 2), tokens * groups, clusters, START, SPLIT_COST)


def launch(problem: SparseProblem, config: Config, args: SparseArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: 2 * 64 FP32 rows of 512 an SM (35 MB on 132 SMs).

    int64 indices or lengths are converted first, on the device.
    """
    clusters, words = grid(config, problem.device)
    workspace = torch.empty(words, dtype=torch.float32, device=problem.device)
    # NOTE: what the kernel does not read may be any tensor of the right kind
    nothing = workspace.view(torch.int32)
    caches: list[Tensor] = []
    for keys in args.keys:
        caches += [keys.cache, int32(keys.indices), nothing if keys.lengths is None else int32(keys.lengths)]
    has_lengths = sum((keys.lengths is not None) << i for i, keys in enumerate(args.keys))
    blocks = sum(-(-keys.topk // BLOCK) for keys in problem.sets)
    may_split = has_lengths or splits(config, problem.B * problem.S_q, problem.Hq, blocks, clusters)
    with device_of(problem.device):
        loaded(config)(
            args.q,
            *caches,
            *(caches if config.caches == 1 else ()),
            workspace if args.attn_sink is None else args.attn_sink,
            args.out,
            args.lse,
            workspace,
            args.softmax_scale * math.log2(math.e),
            args.empty_lse,
            has_lengths,
            int(args.attn_sink is not None),
            int(may_split != 0),
            clusters,
        )
