"""A kernel with everything but its tensors bound, so that a call in a decode loop costs little on the host.

Triton's own launch looks at every argument, builds a key out of it and formats strings, about 15 us at our 60
arguments. What a problem fixes cannot change between two calls; what can is whether an address is a multiple of 16,
which selects another binary. So that is all this looks at.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from torch import Tensor

logger = logging.getLogger("flash_mla")


class Launcher:
    """One kernel at one grid with its constant arguments.

    Args:
        kernel: the @triton.jit function; the call's own arguments, tensors and FP32 scalars, stand before the others.
        grid: programs, three ints.
        constants: the other arguments, by name.
        options: num_warps and num_stages.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], constants: dict[str, int | bool | str], options: dict[str, int]
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.constants = constants
        self.options = options
        own = len(kernel.arg_names) - len(constants)
        self.own = tuple(kernel.arg_names[:own])
        self.rest = tuple(constants[name] for name in kernel.arg_names[own:])
        self.compiled: dict[int, Any] = {}

    def __call__(self, **given: Tensor | float | None) -> None:
        """Launch on the current stream of the current device, which must be the tensors'; given: the call's own."""
        values: list[float | None] = []
        aligned = 0
        for name in self.own:
            value = given[name]
            aligned *= 2
            if value is not None and not isinstance(value, float):
                value = value.data_ptr()
                aligned += value % 16 == 0
            values.append(value)
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled[self.grid](*values, *self.rest)
            return
        started = time.monotonic()
        compiled = self.kernel[self.grid](**given, **self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.compiled[aligned] = compiled
            logger.info("%s: compiled, or loaded, in %.1f s", compiled.name, time.monotonic() - started)
