"""A kernel with everything but its tensors bound, so that a call in a decode loop costs little on the host.

Triton's own launch looks at every argument, builds a key out of it and formats strings, about 15 us at our 60
arguments. What a problem fixes cannot change between two calls; what can is whether an address is a multiple of 16,
which selects another binary. So that is all this looks at. Arguments come by name; a launcher knows their order, and
which of them are tensors, from its first call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from operator import itemgetter
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
        self.in_order = itemgetter(*kernel.arg_names[:own])
        self.rest = tuple(constants[name] for name in kernel.arg_names[own:])
        self.tensors: list[int] | None = None
        self.compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, given: Mapping[str, Tensor | float | None]) -> None:
        """Launch on the current stream of the current device, which must be the tensors'.

        given: the call's own arguments; in every call of a launcher, the same ones are tensors, and the same None.
        """
        values: list[Any] = [*self.in_order(given)]
        if self.tensors is None:
            self.tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        addresses = 0
        for i in self.tensors:
            values[i] = address = values[i].data_ptr()
            addresses |= address
        # NOTE: all are aligned, nearly always: which are not is only asked where one is not
        aligned = () if addresses % 16 == 0 else tuple(values[i] % 16 == 0 for i in self.tensors)
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled[self.grid](*values, *self.rest)
            return
        started = time.monotonic()
        compiled = self.kernel[self.grid](**given, **self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.compiled[aligned] = compiled
            logger.info("%s: compiled, or loaded, in %.1f s", compiled.name, time.monotonic() - started)
