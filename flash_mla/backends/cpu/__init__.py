"""The CPU backend: torch's flash attention op over pages where they lie.

Softmax does not care about the order of keys, so a request's pages need not be put in order. Decode sorts the blocks
that a request uses by physical id; each run of consecutive ids is one strided view of the cache, and one call of
`aten::_scaled_dot_product_flash_attention_for_cpu` (it returns out and lse), with the query heads of a group as its
rows, reads K and V once for all of them. What cannot be read in place is gathered in slices of bounded size: the last
blocks of a request (slots past its length may hold NaN), short runs, and dtypes or head dims that the op does not take.
Partial results meet in `merge`.

Prefill runs one request at a time through the same op; masks and block layouts go through tiles of query rows, so that
no bias of [P, P] exists.

Sparse attention gathers the named rows in slices, and multiplies.

It runs everything that the contract admits, forward only.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from flash_mla.backends.cpu import engine
from flash_mla.backends.cpu.append import append
from flash_mla.backends.cpu.decode import decode
from flash_mla.backends.cpu.prefill import prefill
from flash_mla.backends.cpu.sparse import sparse
from flash_mla.problem import Args, DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem, Problem, SparseArgs

__all__ = ["append", "available", "config", "launch", "refuse"]


def available() -> str | None:
    """The CPU is always there."""
    return None


def refuse(problem: Problem) -> str | None:
    """Only tensors elsewhere are refused."""
    return None if problem.device.type == "cpu" else f"the tensors are on {problem.device}, not on the CPU"


def config(problem: Problem) -> Hashable:
    """The problem bound to its compiled kernel, or None where torch serves: there the runs of blocks decide."""
    return engine.bind(problem)


def launch(problem: Problem, config: Any, args: Args) -> None:
    """Fill args.out and args.lse."""
    if config is None:
        launch_torch(problem, args)
    else:
        config.launch(args)


@torch.no_grad()
def launch_torch(problem: Problem, args: Args) -> None:
    """The same through torch's ops."""
    if isinstance(problem, DecodeProblem):
        assert isinstance(args, DecodeArgs)
        decode(problem, args)
    elif isinstance(problem, PrefillProblem):
        assert isinstance(args, PrefillArgs)
        prefill(problem, args)
    else:
        assert isinstance(args, SparseArgs)
        sparse(problem, args)
