"""Sparse prefill on Hopper: what `kernels/hopper/sparse_prefill/` takes, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import HALVES, LOG2_E, int32, multiprocessors, on_device
from flash_mla.backends.hopper.scratch import unread
from flash_mla.kernels.hopper.limits import TMA_BYTES
from flash_mla.kernels.hopper.mla_decode.config import WIDTHS
from flash_mla.kernels.hopper.sparse_prefill.config import MAX_ORDERED, MAX_ROWS, TILES, Config, bin_shift
from flash_mla.problem import SparseArgs, SparseProblem

ORDER_BYTES, ORDER_TOKENS, ORDER_TOPK = 24 * 2**20, 264, 128
"""Ids are ordered first where rows take more bytes, for so many tokens and ids a token."""


def refuse(problem: SparseProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.dtype not in HALVES or problem.format is not None:
        return f"rows of {problem.format or problem.dtype}: the kernel takes BF16 and FP16"
    if (problem.D, problem.Dv) not in WIDTHS:
        widths = ", ".join(f"{D}/{Dv}" for D, Dv in WIDTHS)
        return f"D = {problem.D}, Dv = {problem.Dv}: the kernel takes {widths}"
    if len(problem.sets) != 1 or problem.S_q != 1 or problem.sets[0].pages != 1:
        return "several caches, pages or query tokens a request: the kernel takes rows of one tensor"
    (keys,) = problem.sets
    if keys.page > MAX_ROWS:
        return f"{keys.page} rows: at most {MAX_ROWS}"
    for name, stride in (("q", problem.q_strides[0]), ("q", problem.q_strides[2]), ("kv", keys.cache_strides[1])):
        if stride * problem.dtype.itemsize % TMA_BYTES:
            return f"a {name} stride of {stride} elements: TMA and cp.async take multiples of {TMA_BYTES} bytes"
    if problem.q_strides[2] < problem.D and problem.Hq > 1:
        return f"q strides {problem.q_strides}: heads must not overlap"
    return None


class Choice(NamedTuple):
    """The kernel variant, and whether its ids are ordered first."""

    kernel: Config
    order: bool


def config(problem: SparseProblem) -> Choice:
    """The kernel variant; ids are ordered where the rows do not fit into the L2 and many tokens read them."""
    (keys,) = problem.sets
    order = (
        keys.page * problem.D * problem.dtype.itemsize > ORDER_BYTES
        and problem.B >= ORDER_TOKENS
        and ORDER_TOPK <= keys.topk <= MAX_ORDERED
    )
    tile_heads = next((n for n in TILES if problem.Hq <= n), TILES[-1])
    return Choice(Config(HALVES[problem.dtype], problem.D, tile_heads), order)


def ordered(indices: Tensor, lengths: Tensor | None, num_rows: int, wave: int) -> tuple[Tensor, Tensor]:
    """(ids, counts): each token's ids that name a row, in the order of `kernels/hopper/sparse_prefill/order.py`."""
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_prefill import order

    ids, counts = torch.empty_like(indices), indices.new_empty(len(indices))
    store.load("sparse_order", None, order.build)(
        indices,
        counts if lengths is None else lengths,
        int(lengths is not None),
        num_rows,
        bin_shift(num_rows),
        wave,
        ids,
        counts,
    )
    return ids, counts


def bind(problem: SparseProblem, config: Choice) -> Callable[[SparseArgs], None]:
    """The launch, which fills args.out, args.lse and args.max_logits. It allocates workspace: the ids in order, where
    they are ordered; int64 indices and lengths are converted first, on the device.

    The kernel is loaded here, and compiled the first time ever on a machine.
    """
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_prefill import kernel as sparse_prefill

    kernel = store.load("sparse_prefill", config.kernel, sparse_prefill.build)
    head_tiles = -(-problem.Hq // config.kernel.tile_heads)
    ctas = min(problem.B * head_tiles, multiprocessors(problem.device))
    num_rows, wave = problem.sets[0].page, max(1, ctas // head_tiles)
    no_lengths, no_sink = (unread(problem.device, dtype) for dtype in (torch.int32, torch.float32))

    def launch(args: SparseArgs) -> None:
        ((cache, indices, lengths),) = args.keys
        indices, lengths = int32(indices), None if lengths is None else int32(lengths)
        if config.order:
            indices, lengths = ordered(indices, lengths, num_rows, wave)
        kernel(
            args.q,
            cache,
            indices,
            no_lengths if lengths is None else lengths,
            no_sink if args.attn_sink is None else args.attn_sink,
            args.out,
            args.lse,
            args.max_logits,
            args.softmax_scale * LOG2_E,
            args.empty_lse,
            int(lengths is not None),
            int(args.attn_sink is not None),
            ctas,
        )

    return on_device(problem.device, launch)
