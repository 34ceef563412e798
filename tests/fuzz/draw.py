"""Random choices and hostile tensors, all from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

BLOCK = 64
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)
DIMS = (8, 16, 24, 32, 40, 48, 64, 64, 80, 96, 128, 128, 160, 192, 200, 256, 320, 512, 576)
NEVER = 2**31 - 1
"""In table entries that no token uses."""


class Draw:
    """What one call is made of.

    Two streams: `shape` for what selects a kernel (dims, dtypes, options), `value` for the rest. On a GPU, calls share
    few shapes, so that kernels are compiled once and run often.

    Args:
        seed, number: name the call.
        device: of its tensors, which are drawn on the CPU: a seed means the same everywhere.
        shapes: how many different shape streams there are; 0: one a call.
        dims: the head dims (D, Dv) to draw from; empty: all.
    """

    def __init__(
        self, seed: int, number: int, device: str, shapes: int = 0, dims: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.shape = random.Random(f"{seed} shape {number % shapes if shapes else number}")
        self.value = random.Random(f"{seed} value {number}")
        self.generator = torch.Generator().manual_seed(self.value.getrandbits(48))
        self.device = device
        self.dims = dims

    # Choices

    def pick(self, options: Sequence[T]) -> T:
        """One that selects a kernel."""
        return self.shape.choice(options)

    def maybe(self, probability: float) -> bool:
        """A yes that selects a kernel."""
        return self.shape.random() < probability

    def chance(self, probability: float) -> bool:
        """A yes that does not."""
        return self.value.random() < probability

    def among(self, options: Sequence[T]) -> T:
        return self.value.choice(options)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high; the ends and the edges of blocks more often than the rest."""
        edges = [n for n in (low, low + 1, 63, 64, 65, 127, 128, 129, high) if low <= n <= high]
        return self.value.choice(edges) if self.chance(0.3) else self.value.randint(low, high)

    def head_dims(self) -> tuple[int, int, bool]:
        """(D, Dv, whether V is to be the first columns of K)."""
        if self.dims:
            D, Dv = self.pick(self.dims)
            return D, Dv, Dv < D and self.maybe(0.8)
        kind = self.shape.random()
        if kind < 0.2:
            return (*self.pick(((576, 512), (192, 128), (128, 64), (64, 64), (320, 256), (576, 576))), True)
        D = self.pick(DIMS)
        return D, D if kind < 0.6 else self.pick(DIMS), False

    # Tensors

    def normal(self, *size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=self.generator) * scale).to(dtype).to(self.device)

    def uniform(self, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(size, generator=self.generator) * (high - low) + low).to(self.device)

    def integers(self, *size: int, low: int, high: int) -> Tensor:
        """int64 in [low, high), on the CPU."""
        return torch.randint(low, high, size, generator=self.generator)

    def bits(self, *size: int) -> Tensor:
        """Bool, on the CPU."""
        return torch.rand(size, generator=self.generator) < self.among((0.1, 0.5, 0.9))

    def index(self, values: Sequence[int] | Tensor) -> Tensor:
        """int32 or int64 on the device."""
        tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
        return tensor.to(self.pick((torch.int32, torch.int32, torch.int64))).to(self.device)

    def poison(self, *size: int, dtype: torch.dtype) -> Tensor:
        """NaN throughout."""
        if dtype == FP8:
            return torch.full(size, 0x7F, dtype=torch.uint8, device=self.device).view(FP8)
        return torch.full(size, math.nan, dtype=dtype, device=self.device)

    def inside(self, values: Tensor, contiguous: bool = False) -> Tensor:
        """The same values as a slice of a larger tensor of NaN, strides monotonic; contiguous: behind an offset."""
        if contiguous:
            offset = self.among((1, 3, 8))
            memory = self.poison(values.numel() + offset, dtype=values.dtype)
            return memory[offset:].view(values.shape).copy_(values)
        larger = self.poison(
            *(n + 1 + (i == values.dim() - 1) * 7 for i, n in enumerate(values.shape)), dtype=values.dtype
        )
        return larger[tuple(slice(0, n) for n in values.shape)].copy_(values)

    def scale(self, D: int) -> float | None:
        """softmax_scale: default, or any finite number; its sign selects a kernel."""
        kind = self.shape.random()
        if kind < 0.5:
            return None
        if kind < 0.6:
            return self.among((0.0, -0.0))
        if kind < 0.75:
            return -(D**-0.5) * self.value.uniform(0.5, 2)
        return D**-0.5 * self.value.uniform(0.1, 3)

    def descale(self, B: int, Hk: int) -> float | Tensor | None:
        """A factor, in one of the shapes that broadcast to [B, Hk]."""
        kind = self.among(("none", "float", (), (1,), (Hk,), (B, 1), (1, Hk), (B, Hk)))
        if kind == "none":
            return None
        if kind == "float":
            return self.value.uniform(0.25, 2)
        return self.uniform(*kind, low=0.25, high=2.0)

    def mask(self, B: int, Hq: int, rows: int, L: int, lengths: Sequence[int]) -> Tensor:
        """[B|1, Hq|1, rows|1, L]: bool or floating, sometimes a slice or stride 0; NaN past a request's keys."""
        size = (self.pick((1, B)), self.pick((1, Hq)), self.pick((1, rows)), L)
        kept = self.bits(*size)
        if self.chance(0.2):
            kept[..., :1, :] = False
        kind = self.pick(("bool", torch.float32, torch.float16, torch.bfloat16))
        if kind == "bool":
            mask: Tensor = kept
        else:
            mask = torch.randn(size, generator=self.generator).to(kind)
            hidden = self.among((-math.inf, -math.inf, torch.finfo(kind).min, -1e4))
            mask = mask.masked_fill(~kept, hidden)
            if size[0] == B and B:
                past = torch.arange(L) >= torch.tensor(lengths)[:, None, None, None]
                mask = mask.masked_fill(past, math.nan)
        mask = mask.to(self.device)
        layout = self.pick(("dense", "dense", "sliced", "expanded"))
        if layout == "sliced":
            return torch.cat([mask, mask[..., :3]], -1)[..., :L]
        return mask.expand(B, Hq, rows, L) if layout == "expanded" else mask


def describe(value: Any) -> str:
    """A tensor's shape, dtype and strides; the text of anything else."""
    if isinstance(value, Tensor):
        strides = "" if value.is_contiguous() else f" strides {value.stride()}"
        offset = f" +{value.storage_offset()}" if value.storage_offset() else ""
        return f"{str(value.dtype).split('.')[-1]}{list(value.shape)}{strides}{offset}"
    return str(value)
