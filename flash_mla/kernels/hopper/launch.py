"""A kernel of one config, and the launch of one that hands out its work itself: CTAs, or clusters of its config."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import cutlass.cute as cute

C = TypeVar("C")


class Kernel(Generic[C]):
    """A kernel for one config; `cute.compile` takes it with the arguments of its `__call__`."""

    def __init__(self, config: C) -> None:
        self.config = config


def launch_persistent(kernel: Any, config: Any, clusters: Any, stream: Any) -> None:
    """Launch a kernel, called with its arguments, on `clusters` clusters of the config's `cluster` CTAs."""
    kernel.launch(
        grid=(clusters * config.cluster, 1, 1),
        block=(config.threads, 1, 1),
        cluster=(config.cluster, 1, 1) if config.cluster > 1 else None,
        smem=config.smem_bytes(),
        min_blocks_per_mp=1,
        stream=stream,
    )


def launch_ctas(kernel: Any, ctas: Any, threads: int, smem: int, stream: Any, cluster: int = 1) -> None:
    """Launch a kernel, called with its arguments, on `ctas` CTAs in clusters of `cluster`, one an SM."""
    kernel.launch(
        grid=(ctas, 1, 1),
        block=(threads, 1, 1),
        cluster=(cluster, 1, 1) if cluster > 1 else None,
        smem=smem,
        min_blocks_per_mp=1,
        # NOTE: without it the DSL asks a driver for the default, and compiling wants a GPU
        preferred_smem_carveout=100,
        stream=stream,
    )


def place_of_cta(cluster: int) -> tuple[Any, Any, Any]:
    """Where this CTA stands: (rank in its cluster of `cluster` CTAs, the cluster, clusters of the grid)."""
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    return cta % cluster, cta // cluster, ctas // cluster
