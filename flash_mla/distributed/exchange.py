"""What ranks say to each other: one collective a call, of bytes; and a clear error where a rank does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flash_mla.errors import FlashMLAError, RankError, ShapeError

T = TypeVar("T")

# NOTE: torch 2.13 renames it; the older name still serves there, with a warning
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """The ranks along one dim of a mesh; without a dim, this process alone.

    Attributes:
        rank, size: this rank's place among them.
    """

    def __init__(self, mesh: DeviceMesh, dim: str | None) -> None:
        names = mesh.mesh_dim_names or ()
        if dim is not None and dim not in names:
            raise ShapeError(
                given=f"dim {dim!r}, a mesh of dims {[*names]}",
                required="the name of a dim of the mesh",
                cause="The mesh has no such dim",
                fix="init_device_mesh(device_type, shape, mesh_dim_names=...)",
            )
        self.dim = dim
        self.rank, self.size, self._group = 0, 1, None
        if dim is not None:
            self.rank, self.size = mesh.get_local_rank(dim), mesh.size(names.index(dim))
            self._group = mesh.get_group(dim)

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, in the order of ranks: [size, *x.shape]. x is alike on all ranks in shape and dtype."""
        if self.size == 1:
            return x[None]
        gathered = x.new_empty(self.size * x.numel(), dtype=x.dtype)
        source = x.contiguous().view(-1)
        with self._answering("all_gather"):
            all_gather_single(as_bytes(gathered), as_bytes(source), group=self._group)
        return gathered.view(self.size, *x.shape)

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, ..] holds one part for each rank; what every rank had for this one, in their order."""
        if self.size == 1:
            return x
        source = x.contiguous()
        received = torch.empty_like(source)
        with self._answering("all_to_all"):
            dist.all_to_all_single(as_bytes(received.view(-1)), as_bytes(source.view(-1)), group=self._group)
        return received

    def agree(self, make: Callable[[], tuple[T, Any]]) -> T:
        """The first of what `make` returns, if it raises on no rank and its second is equal on all.

        Otherwise every rank raises: its own error where it has one, else RankError. So none waits for another that
        has left.
        """
        refusal: FlashMLAError | None = None
        facts: Any = None
        try:
            value, facts = make()
        except FlashMLAError as error:
            refusal = error
        if self.size > 1:
            reports: list[Any] = [None] * self.size
            with self._answering("comparison of arguments"):
                dist.all_gather_object(reports, (None if refusal is None else repr(refusal), facts), self._group)
        if refusal is not None:
            raise refusal
        if self.size == 1:
            return value
        for rank, (reason, _) in enumerate(reports):
            if reason is not None:
                raise RankError(
                    given=f"rank {rank} of {self.dim!r}: {reason}",
                    required="arguments that no rank refuses",
                    cause=f"Rank {rank} refused its arguments",
                    fix="Mend that rank's call; the process group still serves",
                )
        for rank, (_, others) in enumerate(reports):
            if others != facts:
                raise RankError(
                    given=f"rank {self.rank} of {self.dim!r}: {facts}; rank {rank}: {others}",
                    required="the same on all ranks",
                    cause="The ranks make different calls",
                    fix="Give all ranks the same requests in the same order; the process group still serves",
                )
        return value

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        """Turn what torch.distributed raises into a RankError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RankError(
                given=f"{what} of rank {self.rank} among the {self.size} ranks of {self.dim!r}: {reason}",
                required="every rank alive, and in the same call",
            ) from error


def as_bytes(x: Tensor) -> Tensor:
    """x [n] as bytes, which every backend of torch.distributed carries."""
    return x.view(torch.uint8)


# --- Parts of attention -----------------------------------------------------------------------------------------------


def pack(out: Tensor, lse: Tensor) -> Tensor:
    """out [.., Dv] and lse [..] FP32 side by side, in words: [.., Dv * itemsize / 4 + 1] int32, contiguous.

    Rows of out may lie anywhere, so that the order in which they are sent costs no copy of its own.
    """
    return torch.cat([out.view(torch.int32), lse.unsqueeze(-1).view(torch.int32)], -1)


def unpack(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out [.., Dv] of that dtype, lse [..] FP32) of what `pack` made: views."""
    words = packed.view(dtype)
    return words[..., : -4 // dtype.itemsize], packed.view(torch.float32)[..., -1]


def pack_rows(rows: tuple[Tensor, ...]) -> Tensor:
    """Tensors of any shapes one behind the other, as bytes."""
    return torch.cat([as_bytes(x.contiguous().view(-1)) for x in rows])


def unpack_rows(packed: Tensor, rows: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors of packed [n, bytes], each [n, *shape], where `rows` are of their shapes and dtypes."""
    parts = packed.split([x.nbytes for x in rows], -1)
    return [
        part.contiguous().view(-1).view(x.dtype).view(len(packed), *x.shape)
        for part, x in zip(parts, rows, strict=True)
    ]
