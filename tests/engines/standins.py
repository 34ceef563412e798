"""Modules that are not installed, for tests that need their names and none of their work."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Name(type):
    """A class that may be subclassed and subscripted, and whose attributes are such classes too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})

    def __getitem__(cls, item: Any) -> Name:
        return cls


class Module(types.ModuleType):
    """A module in which every name is a `Name`."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})


class Finder:
    """Finds the missing ones of some top-level modules, and all below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(name for name in names if importlib.util.find_spec(name) is None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def standing_in(*names: str) -> Iterator[tuple[str, ...]]:
    """Stand-ins for those of the modules that are not installed, while the block imports; which these are."""
    finder = Finder(names)
    sys.meta_path.append(finder)
    try:
        yield finder.names
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] in finder.names]:
            del sys.modules[module]
