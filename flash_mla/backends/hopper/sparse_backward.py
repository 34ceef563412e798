"""The backward of sparse prefill on Hopper: its queries' kernel in CuTe DSL, within Triton's backward."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import torch

from flash_mla.backends.hopper.backward import readable
from flash_mla.backends.hopper.device import HALVES, device_of, int32
from flash_mla.kernels.hopper.sparse_backward.config import WIDTHS, Config
from flash_mla.kernels.hopper.sparse_prefill.config import MAX_ROWS
from flash_mla.problem import SparseBackwardArgs, SparseBackwardProblem


class Choice(NamedTuple):
    """The queries' kernel, and the tiles of Triton's kernels beside it."""

    queries: Config
    others: Any


def refuse(problem: SparseBackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    forward = problem.forward
    if forward.dtype not in HALVES:
        return f"dtype {forward.dtype}: the backward takes BF16 and FP16"
    if (forward.D, forward.Dv) not in WIDTHS:
        widths = ", ".join(f"{D}/{Dv}" for D, Dv in WIDTHS)
        return f"D = {forward.D}, Dv = {forward.Dv}: the backward takes {widths}"
    if forward.sets[0].page > MAX_ROWS:
        return f"{forward.sets[0].page} rows: at most {MAX_ROWS}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: its kernels prepare the heads and sum dkv"
    return None


def config(problem: SparseBackwardProblem) -> Choice:
    """The kernels' variants."""
    from flash_mla.backends.triton import sparse_backward as others

    forward = problem.forward
    return Choice(Config(HALVES[forward.dtype], forward.D, forward.sink), others.config(problem))


def launch(problem: SparseBackwardProblem, config: Choice, args: SparseBackwardArgs) -> None:
    """Fill the gradients. Allocates Triton's workspace; what is not laid out as TMA needs is copied."""
    from flash_mla.backends.triton import sparse_backward as others
    from flash_mla.kernels.hopper import store
    from flash_mla.kernels.hopper.sparse_backward import kernel as sparse_queries

    kernel = store.load("sparse_backward_queries", config.queries, sparse_queries.build)
    q, d_out, kv = (readable(x) for x in (args.q, args.d_out, args.keys.cache))
    indices, lengths = int32(args.keys.indices), args.keys.lengths
    lengths = None if lengths is None else int32(lengths)

    def queries(prepared: others.Prepared, chunk: others.Chunk, part: slice) -> None:
        tokens = part.stop - part.start
        p, ds = (x[:tokens].view(torch.int32) for x in (chunk.p, chunk.ds))
        lse2, shift = prepared.lse2[:, part], prepared.shift[:, part]
        kernel(
            q[part],
            d_out[part],
            kv,
            indices[part],
            indices[0, 0, :1] if lengths is None else lengths[part],
            lse2,
            shift,
            shift if prepared.left is None else prepared.left[:, part],
            args.dq[part],
            p,
            ds,
            args.softmax_scale * math.log2(math.e),
            args.softmax_scale,
            int(lengths is not None),
        )

    with device_of(problem.device):
        others.in_chunks(problem, config.others, args._replace(q=q, d_out=d_out), queries)
