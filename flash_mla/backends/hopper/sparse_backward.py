"""The backward of sparse prefill on Hopper: its products in CuTe DSL, within Triton's backward."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.hopper.backward import readable, refuse_kind
from flash_mla.backends.hopper.device import HALVES, LOG2_E, device_of, int32, multiprocessors
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.sparse_backward.config import HEADS, WIDTHS, Config
from flash_mla.kernels.hopper.sparse_prefill.config import MAX_ROWS
from flash_mla.problem import SparseBackwardArgs, SparseBackwardProblem


class Choice(NamedTuple):
    """The kernels' variant, and the tiles of Triton's kernels beside them."""

    kernels: Config
    others: Any


def refuse(problem: SparseBackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    forward = problem.forward
    if (reason := refuse_kind(forward, WIDTHS)) is not None:
        return reason
    if forward.Hq > HEADS[-1]:
        return f"{forward.Hq} heads: the backward takes at most {HEADS[-1]}"
    if forward.sets[0].page > MAX_ROWS:
        return f"{forward.sets[0].page} rows: at most {MAX_ROWS}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: its kernels prepare the heads and sum dkv"
    return None


def config(problem: SparseBackwardProblem) -> Choice:
    """The kernels' variants."""
    from flash_mla.backends.triton import sparse_backward as others

    forward = problem.forward
    heads = next(n for n in HEADS if forward.Hq <= n)
    return Choice(Config(HALVES[forward.dtype], forward.D, heads, forward.sink), others.config(problem))


def launch(problem: SparseBackwardProblem, config: Choice, args: SparseBackwardArgs) -> None:
    """Fill the gradients. Allocates workspace of a chunk of the tokens; what is not laid out as TMA needs is copied."""
    from flash_mla.backends.triton import sparse_backward as others
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_backward import gradients_kernel, weights_kernel

    kernels, without_sink = config.kernels, replace(config.kernels, sink=False)
    weigh = store.load("sparse_backward_weights", kernels, weights_kernel.build)
    differentiate = store.load("sparse_backward_gradients", without_sink, gradients_kernel.build)
    q, d_out, kv = (readable(x) for x in (args.q, args.d_out, args.keys.cache))
    indices, lengths = int32(args.keys.indices), args.keys.lengths
    lengths = None if lengths is None else int32(lengths)
    has_lengths = int(lengths is not None)
    items = 2 * -(-indices.shape[2] // BLOCK)
    step = others.chunk_tokens(problem, config.others, 2 * items * kernels.item)

    def products(prepared: others.Prepared, partial: Tensor, part: slice) -> None:
        counts = indices[0, 0, :1] if lengths is None else lengths[part]
        shift = prepared.shift[:, part]
        weigh(
            q[part],
            d_out[part],
            kv,
            indices[part],
            counts,
            prepared.lse2[:, part],
            shift,
            shift if prepared.left is None else prepared.left[:, part],
            weights,
            args.softmax_scale * LOG2_E,
            args.softmax_scale,
            has_lengths,
            min((part.stop - part.start) * kernels.head_tiles, multiprocessors(problem.device)),
        )
        differentiate(q[part], d_out[part], kv, indices[part], counts, weights, args.dq[part], partial, has_lengths)

    with device_of(problem.device):
        weights = torch.empty((step * items, kernels.item // 2), dtype=torch.int32, device=problem.device)
        target = args.dkv.unflatten(-1, (-1, *gradients_kernel.ORDER)).transpose(-3, -2)
        others.in_chunks(problem, config.others, args, step, products, target)
