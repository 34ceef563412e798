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
        kernel: the @triton.jit function; its tensors come first, then softmax_scale where it has one.
        grid: programs, three ints.
        constants: the arguments after the call's own.
        options: num_warps and num_stages.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], constants: tuple[int | bool | str, ...], options: dict[str, int]
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.constants = constants
        self.options = options
        self.compiled: dict[int, Any] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...] = ()) -> None:
        """Launch on the current stream of the current device, which must be the tensors'."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = 0
        for address in addresses:
            aligned = aligned * 2 + (address is not None and address % 16 == 0)
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled[self.grid](*addresses, *scalars, *self.constants)
            return
        started = time.monotonic()
        compiled = self.kernel[self.grid](*tensors, *scalars, *self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.compiled[aligned] = compiled
            logger.info("%s: compiled, or loaded, in %.1f s", compiled.name, time.monotonic() - started)
