"""The backward of sparse prefill: problems and arguments to `kernels/triton/sparse_backward.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla.backends.triton import sparse as forward_phase
from flash_mla.backends.triton.device import launch_fitting, target
from flash_mla.kernels.triton import backward, sparse_backward
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import SparseBackwardArgs, SparseBackwardProblem

WORKSPACE = 2**31
"""Bytes that a chunk of the tokens may take, of one token at least."""
SORTED = 2**24
"""Slots that are sorted together, of one chunk at least: 8M of them take 0.45 ms, in seven parts 0.78 (H200)."""


class Prepared(NamedTuple):
    """What prepare_kernel wrote: lse2, shift, left and the sink's shares [Hq, tokens] FP32."""

    lse2: Tensor
    shift: Tensor
    left: Tensor | None
    d_sink: Tensor | None


class Chunk(NamedTuple):
    """What the queries' kernel leaves for the keys' of a chunk of the tokens: [tokens, Hq, slots] in q's dtype."""

    p: Tensor
    ds: Tensor


def refuse(problem: SparseBackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    return forward_phase.refuse(problem.forward)


def config(problem: SparseBackwardProblem, on: Target | None = None) -> sparse_backward.Config:
    """The kernels' tiles for a problem, on its device or on the target given."""
    forward = problem.forward
    return sparse_backward.config(
        Hq=forward.Hq, D=forward.D, Dv=forward.Dv, topk=forward.sets[0].topk, itemsize=forward.dtype.itemsize,
        target=on or target(problem.device),
    )  # fmt: skip


def launch(problem: SparseBackwardProblem, config: sparse_backward.Config, args: SparseBackwardArgs) -> None:
    """The whole call, chunk after chunk of the tokens; smaller tiles where the device refuses these."""
    launch_fitting(launch_config, sparse_backward.smaller, problem, config, args)


def launch_config(problem: SparseBackwardProblem, config: sparse_backward.Config, args: SparseBackwardArgs) -> None:
    """The kernels with these tiles."""
    Hq, itemsize = problem.forward.Hq, problem.forward.dtype.itemsize
    step = chunk_tokens(problem, config, 2 * Hq * config.slots * itemsize)
    chunk = empty_chunk(problem, config, step)

    def products(prepared: Prepared, partial: Tensor, part: slice) -> None:
        tokens = part.stop - part.start
        sparse_backward.sparse_queries_kernel[(tokens * -(-Hq // config.tile_m),)](
            **queries_arguments(problem, config, args, prepared, chunk, part),
            num_warps=config.warps,
            num_stages=config.stages,
        )
        sparse_backward.sparse_keys_kernel[(tokens * (config.slots // config.keys_n),)](
            **keys_arguments(problem, config, args, chunk, partial, part),
            num_warps=config.keys_warps,
            num_stages=2,
        )

    in_chunks(problem, config, args, step, products, args.dkv)


def in_chunks(
    problem: SparseBackwardProblem,
    config: sparse_backward.Config,
    args: SparseBackwardArgs,
    step: int,
    products: Callable[[Prepared, Tensor, slice], None],
    target: Tensor,
) -> None:
    """The whole call around the products, which fill dq and the partial rows of a chunk of `step` tokens. target: dkv,
    or a view of it that has its elements in the order of the partial rows'."""
    forward = problem.forward
    tokens, rows = forward.B, args.keys.cache.shape[1]
    prepared = prepare(problem, config, args)
    if args.d_sink is not None and prepared.d_sink is not None:
        torch.sum(prepared.d_sink, dim=1, out=args.d_sink)
    named = named_rows(args, rows)
    dkv = torch.zeros((rows, forward.D), dtype=torch.float32, device=problem.device)
    partial = torch.empty((step, config.slots, forward.D), dtype=wide(problem), device=problem.device)
    # NOTE: a multiple of 16, so that each chunk's row of starts is aligned and the kernel compiled once
    width = rows // 16 * 16 + 16
    together = step * max(min(SORTED // max(step * named.shape[1], 1), (2**31 - 1) // width), 1)
    for base in range(0, tokens, together):
        order, starts = by_row(named[base : base + together], width, step)
        for chunk, first in enumerate(range(base, min(base + together, tokens), step)):
            part = slice(first, min(first + step, tokens))
            products(prepared, partial, part)
            sparse_backward.sum_kernel[(rows,)](
                **sum_arguments(problem, config, partial, order, starts[chunk], chunk * step, dkv), num_warps=1
            )
    target.copy_(dkv.view(target.shape))


def named_rows(args: SparseBackwardArgs, rows: int) -> Tensor:
    """[tokens, topk] int32: the row that a slot names, or `rows` where it names none."""
    indices = args.keys.indices[:, 0]
    live = (indices >= 0) & (indices < rows)
    if args.keys.lengths is not None:
        live &= torch.arange(indices.shape[1], device=indices.device) < args.keys.lengths.unsqueeze(1)
    return indices.masked_fill(~live, rows).int()


def by_row(named: Tensor, width: int, step: int) -> tuple[Tensor, Tensor]:
    """The slots of tokens, by their chunk of `step` tokens, the row that they name (`named_rows`) and the token; where
    those of a row, or past the last one, begin: [chunks, width] int32."""
    chunks = torch.arange(len(named), dtype=torch.int32, device=named.device) // step * width
    keys = (named + chunks.unsqueeze(1)).flatten()
    firsts = torch.arange(-(-len(named) // step) * width, dtype=torch.int32, device=named.device)
    if len(firsts) <= 2**16:
        # NOTE: a radix sort of 16 bits takes half the passes
        keys, firsts = ((x - 2**15).short() for x in (keys, firsts))
    keys, order = keys.sort(stable=True)
    return order, torch.searchsorted(keys, firsts, out_int32=True).view(-1, width)


def wide(problem: SparseBackwardProblem) -> torch.dtype:
    """Of partial rows."""
    # NOTE: rounding each partial row to FP16 would miss FP16's budget where few tokens name a row, and flush small ones
    return torch.bfloat16 if problem.forward.dtype == torch.bfloat16 else torch.float32


def chunk_tokens(problem: SparseBackwardProblem, config: sparse_backward.Config, weights: int) -> int:
    """Tokens whose workspace fits WORKSPACE, of `weights` bytes each and partial rows; a multiple of 16, so that what
    begins at a chunk stays aligned, or all."""
    forward = problem.forward
    token = weights + config.slots * forward.D * wide(problem).itemsize
    return min(max(WORKSPACE // token // 16 * 16, 16), forward.B)


def empty_chunk(problem: SparseBackwardProblem, config: sparse_backward.Config, tokens: int) -> Chunk:
    shape = (2, tokens, problem.forward.Hq, config.slots)
    return Chunk(*torch.empty(shape, dtype=problem.forward.dtype, device=problem.device))


def prepare(problem: SparseBackwardProblem, config: sparse_backward.Config, args: SparseBackwardArgs) -> Prepared:
    """Launch prepare_kernel; its rows are the tokens of one request."""
    forward = problem.forward
    shape = (4 if forward.sink else 2, forward.Hq, forward.B)
    rows = torch.empty(shape, dtype=torch.float32, device=problem.device)
    prepared = Prepared(rows[0], rows[1], rows[2] if forward.sink else None, rows[3] if forward.sink else None)
    tiles = -(-forward.B // config.rows)
    live = torch.empty((forward.Hq, tiles), dtype=torch.int32, device=problem.device)
    backward.prepare_kernel[(tiles, forward.Hq, 1)](
        **prepare_arguments(problem, config, args, prepared, live), num_warps=4
    )
    return prepared


# --- Arguments, by the kernels' names ---------------------------------------------------------------------------------


def prepare_arguments(
    problem: SparseBackwardProblem,
    config: sparse_backward.Config,
    args: SparseBackwardArgs,
    prepared: Prepared,
    live: Tensor,
) -> dict[str, Any]:
    out, d_out, lse, d_lse = (x.transpose(0, 1) for x in (args.out, args.d_out, args.lse, args.d_lse))
    return {
        "out_ptr": out,
        "d_out_ptr": d_out,
        "lse_ptr": lse,
        "d_lse_ptr": d_lse,
        "sink_ptr": args.attn_sink,
        "lse2_ptr": prepared.lse2,
        "shift_ptr": prepared.shift,
        "left_ptr": prepared.left,
        "d_sink_ptr": prepared.d_sink,
        "live_ptr": live,
        "P": problem.forward.B,
        **strides("o", "bsh", out),
        **strides("d", "bsh", d_out),
        **strides("l", "bsh", lse),
        **strides("g", "bsh", d_lse),
        "DV": problem.forward.Dv,
        "TILE_M": config.rows,
        "DV_TILE": max(sparse_backward.power_of_2(problem.forward.Dv), 16),
    }


def queries_arguments(
    problem: SparseBackwardProblem,
    config: sparse_backward.Config,
    args: SparseBackwardArgs,
    prepared: Prepared,
    chunk: Chunk,
    part: slice,
) -> dict[str, Any]:
    forward = problem.forward
    q, d_out, dq, indices = (x[part, 0] for x in (args.q, args.d_out, args.dq, args.keys.indices))
    return {
        "q_ptr": q,
        "index_ptr": indices,
        "length_ptr": None if args.keys.lengths is None else args.keys.lengths[part],
        "kv_ptr": args.keys.cache,
        "d_out_ptr": d_out,
        "lse2_ptr": prepared.lse2[:, part],
        "shift_ptr": prepared.shift[:, part],
        "left_ptr": None if prepared.left is None else prepared.left[:, part],
        "dq_ptr": dq,
        "p_ptr": chunk.p,
        "ds_ptr": chunk.ds,
        "softmax_scale": args.softmax_scale,
        "Hq": forward.Hq,
        "topk": forward.sets[0].topk,
        "kv_rows": args.keys.cache.shape[1],
        **strides("q", "sh", q),
        **strides("i", "s", indices),
        **strides("o", "sh", d_out),
        **strides("l", "h", prepared.lse2),
        **strides("dq", "sh", dq),
        "STRIDE_KV": args.keys.cache.stride(1),
        "D": forward.D,
        "DV": forward.Dv,
        "SLOTS": config.slots,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "D_MAIN": config.d_main,
        "D_REST": config.d_rest,
        "PRECISION": config.precision,
    }


def keys_arguments(
    problem: SparseBackwardProblem,
    config: sparse_backward.Config,
    args: SparseBackwardArgs,
    chunk: Chunk,
    partial: Tensor,
    part: slice,
) -> dict[str, Any]:
    forward = problem.forward
    q, d_out = args.q[part, 0], args.d_out[part, 0]
    return {
        "q_ptr": q,
        "length_ptr": None if args.keys.lengths is None else args.keys.lengths[part],
        "d_out_ptr": d_out,
        "p_ptr": chunk.p,
        "ds_ptr": chunk.ds,
        "partial_ptr": partial,
        "Hq": forward.Hq,
        "topk": forward.sets[0].topk,
        **strides("q", "sh", q),
        **strides("o", "sh", d_out),
        "D": forward.D,
        "DV": forward.Dv,
        "SLOTS": config.slots,
        "TILE_M": config.keys_m,
        "TILE_N": config.keys_n,
        "TILE_D": config.keys_d,
        "PRECISION": config.precision,
    }


def sum_arguments(
    problem: SparseBackwardProblem,
    config: sparse_backward.Config,
    partial: Tensor,
    order: Tensor,
    starts: Tensor,
    token: int,
    dkv: Tensor,
) -> dict[str, Any]:
    return {
        "partial_ptr": partial,
        "order_ptr": order,
        "start_ptr": starts,
        "token": token,
        "dkv_ptr": dkv,
        "topk": problem.forward.sets[0].topk,
        "D": problem.forward.D,
        "SLOTS": config.slots,
        "D_MAIN": config.d_main,
        "D_REST": config.d_rest,
        "TILE": 4,
    }
