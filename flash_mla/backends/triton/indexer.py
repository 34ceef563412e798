"""Index problems to the Triton kernels' arguments."""

from __future__ import annotations

from typing import Any

from flash_mla.backends.triton.device import device_of, stored, target
from flash_mla.kernels.triton import indexer
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import IndexArgs, IndexProblem


def refuse(problem: IndexProblem) -> str | None:
    """Nothing is refused."""
    return None


def config(problem: IndexProblem, on: Target | None = None) -> indexer.Config:
    """The kernel's tiles, on the problem's device or on the target given."""
    return indexer.config(
        B=problem.B, S_q=problem.S_q, H=problem.H, D=problem.D, width=problem.width, target=on or target(problem.device)
    )


def kernel(problem: IndexProblem) -> Any:
    """The kernel that runs the problem."""
    return indexer.ragged_kernel if problem.table_blocks is None else indexer.paged_kernel


def arguments(problem: IndexProblem, config: indexer.Config, args: IndexArgs) -> dict[str, Any]:
    """Its arguments."""
    q, k = stored(args.q, config.widen), stored(args.k, config.widen)
    if args.block_table is not None:
        return indexer.paged_arguments(
            config, q=q, k=k, k_scale=args.k_scale, weights=args.weights, block_table=args.block_table,
            limits=args.ends, out=args.out, width=problem.width, clean=problem.clean,
        )  # fmt: skip
    assert args.starts is not None
    return indexer.ragged_arguments(
        config, q=q[0], k=k[0], k_scale=args.k_scale[0], weights=args.weights[0], starts=args.starts[0],
        ends=args.ends[0], out=args.out[0], width=problem.width, clean=problem.clean,
    )  # fmt: skip


def launch(problem: IndexProblem, config: indexer.Config, args: IndexArgs) -> None:
    """One kernel."""
    grid = indexer.grid(config, problem.B, problem.S_q, problem.width)
    with device_of(problem.device):
        kernel(problem)[grid](**arguments(problem, config, args), num_warps=config.warps, num_stages=config.stages)
