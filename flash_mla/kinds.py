"""Arguments of a kind that a function does not take, named: Python and torch would raise errors of their own.

The kinds are those of the signature: a tensor, a number, text, integers, a class. Nothing is looked at before a call
has failed, so that a right call pays nothing, except for flags, which Python would take any object for.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flash_mla.errors import DeviceError, FlashMLAError, LayoutError, ShapeError

P_ = ParamSpec("P_")
R_ = TypeVar("R_")
C_ = TypeVar("C_", bound=type)

RAW = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Python and torch raise where an argument is of the wrong kind."""


def is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return not isinstance(value, int) or abs(value) <= sys.float_info.max


def is_int(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def are_ints(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(is_int(x) for x in value)


def is_dense(value: object) -> bool:
    """Whether it is a tensor with memory of its own, real numbers at even distances."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_complex():
        return False
    return type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ or isinstance(value, FakeTensor)


KINDS: dict[str, Callable[[object], bool]] = {
    "Tensor": is_dense,
    "bool": lambda value: isinstance(value, bool),
    "float": is_number,
    "int": is_int,
    "Sequence[int]": are_ints,
    "tuple[Tensor, Tensor]": lambda value: (
        isinstance(value, tuple | list) and all(isinstance(x, Tensor) for x in value)
    ),
    "torch.device": lambda value: isinstance(value, torch.device),
    "torch.dtype": lambda value: isinstance(value, torch.dtype),
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
}
"""By their names in a signature. A class that the function's module has is a kind too; an argument with any other name
in its annotation is the function's own to check."""


def is_of(kind: str, value: object, function: Callable[..., Any]) -> bool:
    """Whether a value is of a kind; yes for a name that means nothing here."""
    own = inspect.unwrap(function).__globals__.get(kind)
    return KINDS[kind](value) if kind in KINDS else not isinstance(own, type) or isinstance(value, own)


def check_kinds(function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """A ShapeError for the first argument of a call that is not of its kind; a DeviceError for several devices."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # too many arguments, or a name that it does not have: Python says so itself
        return
    for name, value in given.items():
        kinds = str(signature.parameters[name].annotation).split(" | ")
        if name == "device" and value is not None:
            check_device(value)
        elif not any(is_of(kind, value, function) for kind in kinds):
            raise ShapeError(
                f"{name} = {value!r}"[:200],
                f"{name}: {' | '.join(kinds)}",
                f"`{name}` is not of a kind that {function.__name__} takes",
                "Pass a dense tensor where one is asked for, and a plain Python number, flag or text elsewhere",
            ) from None
    check_one_device(given)


def check_memory(*tensors: Tensor) -> None:
    """A LayoutError for a tensor whose storage was freed, as FSDP does: its address is 0, and a view of it fails."""
    for x in tensors:
        if not (x.is_meta or isinstance(x, FakeTensor)) and x.numel() and not x.untyped_storage().nbytes():
            raise LayoutError(
                f"a tensor {list(x.shape)} whose storage has 0 bytes",
                "tensors with memory",
                "A tensor's storage was freed",
                "Resize the storage, and write its values again",
            ) from None


def check_one_device(given: dict[str, Any]) -> None:
    """A DeviceError for tensors on several devices, those of the object whose method is called too."""
    own = {f"self.{name}": x for name, x in getattr(given.get("self"), "__dict__", {}).items()}
    tensors = {name: x for name, x in (own | given).items() if isinstance(x, Tensor)}
    if len({x.device for x in tensors.values()}) > 1:
        raise DeviceError(
            ", ".join(f"{name} on {x.device}" for name, x in tensors.items())[:300], "every tensor on one device"
        ) from None


def check_device(device: object) -> None:
    """A DeviceError for what names no device, or one that this machine lacks."""
    try:
        torch.empty(0, device=device)  # type: ignore[call-overload]
    except (*RAW, torch.AcceleratorError) as error:
        raise DeviceError(
            f"device = {device!r}"[:200],
            "a torch.device of this machine, or its name",
            f"torch has no such device: {str(error).splitlines()[0]}"[:300],
            "Pass 'cpu', 'cuda' or 'cuda:0', or none",
        ) from None


def flags_of(function: Callable[..., Any]) -> tuple[tuple[str, int], ...]:
    """(name, place) of the arguments that are True or False."""
    parameters = inspect.signature(function).parameters.values()
    return tuple((x.name, i) for i, x in enumerate(parameters) if "bool" in str(x.annotation).split(" | "))


def check_flags(
    function: Callable[..., Any], flags: tuple[tuple[str, int], ...], args: tuple[object, ...], kwargs: dict[str, Any]
) -> None:
    """A ShapeError where a flag is given that is neither True nor False; None passes for its default."""
    for name, place in flags:
        value = kwargs[name] if name in kwargs else args[place] if place < len(args) else None
        if value is not None and value is not True and value is not False:
            check_kinds(function, args, kwargs)


Kinds = tuple[tuple[str, int, frozenset[str]], ...]


def kinds_of(function: Callable[..., Any]) -> Kinds:
    """(name, place, kinds) of the arguments that are of KINDS alone."""
    parameters = inspect.signature(function).parameters.values()
    named = [(x.name, i, frozenset(str(x.annotation).split(" | "))) for i, x in enumerate(parameters)]
    return tuple(x for x in named if x[2] <= KINDS.keys())


def check_traced(kinds: Kinds, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """A ShapeError for an argument that a custom op would not take, while a graph is traced.

    The graph then breaks, and the call in eager mode says more; torch's own error would say nothing of the argument.
    """
    for name, place, right in kinds:
        if name not in kwargs and place >= len(args):
            continue
        value = kwargs[name] if name in kwargs else args[place]
        if value is None or isinstance(value, Tensor | str):
            kind = "None" if value is None else "str" if isinstance(value, str) else "Tensor"
            fits = kind in right
        else:
            fits = not right.isdisjoint(NUMBERS) and isinstance(value, int | float | torch.SymInt | torch.SymFloat)
        if not fits:
            raise ShapeError(
                f"{name} is a {type(value).__name__}",
                f"{name}: {' | '.join(sorted(right))}",
                f"`{name}` is not of a kind that the function takes",
                "Pass one of these kinds",
            )


NUMBERS = frozenset({"bool", "float", "int"})


def explained(function: Callable[P_, R_]) -> Callable[P_, R_]:
    """Our error where a call of the function fails for the kind of an argument."""
    flags = flags_of(function)

    @wraps(function)
    def call(*args: P_.args, **kwargs: P_.kwargs) -> R_:
        check_flags(function, flags, args, kwargs)
        try:
            return function(*args, **kwargs)
        except RAW as error:
            if not isinstance(error, FlashMLAError):
                check_kinds(function, args, kwargs)
            raise

    return call


def explained_class(cls: C_) -> C_:
    """The same where an object of the class is made, and for its public methods."""
    for name, member in [*vars(cls).items()]:
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod):
            setattr(cls, name, classmethod(explained(member.__func__)))
        elif inspect.isfunction(member):
            setattr(cls, name, explained(member))
    return cls
