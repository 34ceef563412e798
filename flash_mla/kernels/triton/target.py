"""What a kernel's config must know of a GPU: a value, so that a config is a pure function and testable without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU's limits.

    Args:
        backend: Triton's name of the backend: "cuda", "hip", "xpu", or "interpreter".
        arch: compute capability as one number (90) for cuda, else 0.
        smem: shared memory that one program may use, bytes.
        multiprocessors: SMs or compute units.
    """

    backend: str
    arch: int
    smem: int
    multiprocessors: int

    @property
    def wgmma(self) -> bool:
        """Hopper's warpgroup matrix instructions, which read both operands from shared memory."""
        return self.backend == "cuda" and self.arch // 10 == 9

    @property
    def in_place(self) -> bool:
        """Whether matrix instructions of 64 rows and more read K and V where the copies put them (wgmma, tcgen05)."""
        return self.backend == "cuda" and self.arch // 10 in (9, 10)
