"""Index problems to the Triton kernel's arguments."""

from __future__ import annotations

import torch

from flash_mla.kernels.triton import indexer
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import IndexArgs, IndexProblem


def refuse(problem: IndexProblem) -> str | None:
    """Nothing is refused."""
    return None


def config(problem: IndexProblem, target: Target) -> indexer.Config:
    """The kernel's tiles."""
    return indexer.config(S_q=problem.S_q, H=problem.H, D=problem.D, target=target)


def arguments(problem: IndexProblem, config: indexer.Config, args: IndexArgs) -> tuple:
    """The arguments of the kernel that runs the problem, in its order."""
    # bytes where the GPU does not convert e4m3
    q, k = (x.view(torch.uint8) if config.widen == "fp8_bits" else x for x in (args.q, args.k))
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
    kernel = indexer.ragged_kernel if args.block_table is None else indexer.paged_kernel
    grid = indexer.grid(config, problem.B, problem.S_q, problem.width)
    kernel[grid](*arguments(problem, config, args), num_warps=config.warps, num_stages=config.stages)
