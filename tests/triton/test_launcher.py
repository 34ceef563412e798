"""The launcher of a decode loop: arguments by name in the kernel's order, and one binary for each alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_mla.kernels.triton.launcher import Launcher


class Kernel:
    """Stands for a @triton.jit function: a first call compiles, and what it compiled is launched by position."""

    arg_names = ("q_ptr", "mask_ptr", "scale", "rows", "TILE")

    def __init__(self) -> None:
        self.compiles: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def compile_and_run(**given: Any) -> Any:
            self.compiles.append(given)
            return Binary(self)

        return compile_and_run


class Binary:
    name = "kernel"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *given: self.kernel.launches.append((grid, *given))


def test_arguments_by_name_go_in_the_kernels_order() -> None:
    kernel, q = Kernel(), torch.empty(64, dtype=torch.int8)
    launcher = Launcher(kernel, (1, 2, 3), {"TILE": 16, "rows": 7}, {"num_warps": 4})
    # alignment in bytes does not depend on where the test's own memory lies
    start = -q.data_ptr() % 16
    even, odd = q[start:], q[start + 1 :]
    for tensor in (even, even, odd, odd, even):
        launcher({"scale": 0.5, "mask_ptr": None, "q_ptr": tensor})
    assert [given["q_ptr"].data_ptr() % 16 for given in kernel.compiles] == [0, 1]
    assert all((given["TILE"], given["num_warps"]) == (16, 4) for given in kernel.compiles)
    assert kernel.launches == [((1, 2, 3), x.data_ptr(), None, 0.5, 7, 16) for x in (even, odd, even)]
