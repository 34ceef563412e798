"""Arguments of a kind that a function does not take, named: Python and torch would raise errors of their own.

The kinds are those of the signature: a tensor, a number, text. Nothing is looked at before a call has failed, so that a
right call pays nothing, except for flags, which Python would take any object for.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from flash_mla.errors import FlashMLAError, ShapeError

P_ = ParamSpec("P_")
R_ = TypeVar("R_")

RAW = (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError)
"""What Python and torch raise where an argument is of the wrong kind."""


def is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return not isinstance(value, int) or abs(value) <= sys.float_info.max


KINDS: dict[str, Callable[[object], bool]] = {
    "Tensor": lambda value: isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex(),
    "bool": lambda value: isinstance(value, bool),
    "float": is_number,
    "int": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
}
"""By their names in a signature; an argument with another name in its annotation is the function's own to check."""


def check_kinds(function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """A ShapeError for the first argument of a call that is not of its kind."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # too many arguments, or a name that it does not have: Python says so itself
        return
    for name, value in given.items():
        kinds = str(signature.parameters[name].annotation).split(" | ")
        if KINDS.keys() >= set(kinds) and not any(KINDS[kind](value) for kind in kinds):
            raise ShapeError(
                f"{name} = {value!r}"[:200],
                f"{name}: {' | '.join(kinds)}",
                f"`{name}` is not of a kind that {function.__name__} takes",
                "Pass a dense tensor where one is asked for, and a plain Python number, flag or text elsewhere",
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
        if value is not None and not isinstance(value, bool):
            check_kinds(function, args, kwargs)


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
