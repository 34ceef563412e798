"""A drawn call, and its verdict."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from flash_mla import DeviceError, FlashMLAError

from .draw import FP8, Draw, describe


@dataclass
class Case:
    """One call.

    Attributes:
        function: the public function, by name.
        run: makes the call.
        arguments: of the call, by name; their tensors are watched.
        verify: the result's failures; a legal call's.
        refused: the errors of which one must be raised; empty for a legal call.
        fault: what is illegal, in words.
        writes: tensors that a legal call may change, which `verify` then looks at.
        inside: what the call runs under (autocast, inference mode, ...).
    """

    function: str
    run: Callable[[], Any]
    arguments: dict[str, Any]
    verify: Callable[[Any], list[str]] | None = None
    refused: tuple[type[FlashMLAError], ...] = ()
    fault: str = ""
    writes: tuple[Tensor, ...] = ()
    inside: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    under: str = ""

    def __str__(self) -> str:
        given = ", ".join(f"{name}={describe(x)}" for name, x in self.arguments.items() if x is not None)
        return f"{self.function}({given})" + (f" under {self.under}" if self.under else "")

    def judge(self, backend: str | None) -> list[str]:
        """Its failures; none if it did what the contract says, or if a named backend does not run the problem."""
        memory = {name: raw(x) for name, x in self.tensors()}
        before = {name: None if x is None else x.clone() for name, x in memory.items()}
        try:
            with self.inside():
                result = self.run()
            synchronise(memory.values())
        except FlashMLAError as error:
            if not self.refused:
                return [] if backend and isinstance(error, DeviceError) else [f"refused: {shown(error)}"]
            failures = changed(memory, before, ())
            if not isinstance(error, self.refused):
                wanted = " | ".join(kind.__name__ for kind in self.refused)
                failures.append(f"{self.fault}: {wanted} expected, got {shown(error)}")
            return failures
        except Exception as error:
            if "CUDA error" in str(error) or "illegal memory" in str(error):
                raise  # nothing can run in this process any more
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = (
                f"{type(error).__name__}: {str(error)[:300]} ({where.filename.split('flash_mla/')[-1]}:{where.lineno})"
            )
            return [f"{self.fault}: raw {line}" if self.refused else f"raised {line}"]
        if self.refused:
            return [f"{self.fault}: not refused", *changed(memory, before, ())]
        writes = {raw(x).data_ptr() for x in self.writes if x.numel()}
        return [*changed(memory, before, writes), *(self.verify(result) if self.verify else [])]

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        for name, value in self.arguments.items():
            for x in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(x, Tensor) and x.device.type != "meta":
                    yield name, x


def raw(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor views."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.detach().untyped_storage())


def changed(memory: dict[str, Tensor], before: dict[str, Tensor], writes: Iterable[int]) -> list[str]:
    """Which tensors do not hold the bytes that they held."""
    return [
        f"{name}'s memory was written"
        for name, x in memory.items()
        if x.data_ptr() not in writes and not torch.equal(x, before[name])
    ]


def shown(error: FlashMLAError) -> str:
    return f"{type(error).__name__}({error.given} | {error.required} | {error.cause} | {error.fix})"


def synchronise(tensors: Iterable[Tensor]) -> None:
    if any(x.is_cuda for x in tensors):
        torch.cuda.synchronize()


def called_before(draw: Draw, call: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Make the same call on tensors that are gone afterwards: whatever is remembered of it must not show.

    It runs in a thread, on another stream, in inference mode or with a q that requires grad, or as the call itself.
    """
    memory = {raw(x).data_ptr(): raw(x).clone() for x in arguments.values() if isinstance(x, Tensor)}

    def twin(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.device.type == "meta":
            return x
        whole = memory[raw(x).data_ptr()].view(x.dtype)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    others = {name: twin(x) for name, x in arguments.items()}
    kind = draw.among(("plain", "thread", "stream", "inference", "grad"))
    if kind == "grad" and isinstance(others.get("q"), Tensor) and others["q"].dtype != FP8:
        others["q"].requires_grad_()

    def run() -> None:
        # the call itself is judged when it is made; with gradients, some arguments are refused
        with torch.inference_mode() if kind == "inference" else nullcontext(), suppress(FlashMLAError):
            call(**others)

    if kind == "thread":
        thread = Thread(target=run)
        thread.start()
        thread.join()
    elif kind == "stream" and draw.device != "cpu":
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
    else:
        run()
    synchronise(memory.values())
    for bytes_of_tensor in memory.values():
        bytes_of_tensor.fill_(0x7F)


def surroundings(draw: Draw) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """What must not change a result: (its name, a maker of it); mostly nothing."""
    kinds: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "autocast": lambda: torch.autocast(draw.device, torch.bfloat16),
        "inference mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "default device meta": lambda: torch.device("meta"),
        "default dtype float64": lambda: DefaultDtype(torch.float64),
        "default dtype bfloat16": lambda: DefaultDtype(torch.bfloat16),
    }
    if not draw.chance(0.12):
        return "", nullcontext
    name = draw.among([*kinds])
    return name, kinds[name]


class DefaultDtype:
    """torch's default dtype, for a while."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
