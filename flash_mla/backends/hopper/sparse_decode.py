"""Sparse decode on Hopper: what `kernels/hopper/sparse_decode` takes, and its launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import device_of, int32, multiprocessors
from flash_mla.kernels.hopper.sparse_decode.config import DV, TILES, Config
from flash_mla.problem import ALIGNMENT, SparseArgs, SparseProblem
from flash_mla.quant import FORMATS

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
    """The kernel variant: the smallest tile of heads that holds them, and two CTAs of 64 that share a token's keys."""
    tile_heads = next((tile for tile in TILES if problem.Hq <= tile), TILES[-1])
    return Config(rows_name(problem), len(problem.sets), tile_heads, cluster=1 if problem.Hq <= tile_heads else 2)


def launch(problem: SparseProblem, config: Config, args: SparseArgs) -> None:
    """Fill args.out and args.lse. Allocates workspace: 2 * 64 FP32 rows of 512 an SM (35 MB on 132 SMs).

    int64 indices or lengths are converted first, on the device. The first launch of a config loads its kernel, and the
    first ever on a machine compiles it.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_decode.kernel import build

    kernel = store.load("sparse_decode", config, build)
    clusters = multiprocessors(problem.device) // config.cluster
    workspace = torch.empty(config.workspace_words(clusters), dtype=torch.float32, device=problem.device)
    # NOTE: what the kernel does not read may be any tensor of the right kind
    nothing = workspace.view(torch.int32)
    caches: list[Tensor] = []
    for keys in args.keys:
        caches += [keys.cache, int32(keys.indices), nothing if keys.lengths is None else int32(keys.lengths)]
    has_lengths = sum((keys.lengths is not None) << i for i, keys in enumerate(args.keys))
    with device_of(problem.device):
        kernel(
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
            clusters,
        )
