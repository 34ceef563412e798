"""What the assembler made of a kernel: compiled for sm_90a without a GPU, read with cuobjdump."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def tool(name: str) -> str | None:
    """A CUDA binary tool, from PATH or from the triton wheel."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


CUOBJDUMP = tool("cuobjdump")
NEEDS = [
    pytest.mark.compile,
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is neither on PATH nor in a triton wheel"),
]
"""Marks of a test that compiles."""


def gates(first: list[Any], more: list[Any]) -> list[Any]:
    """Configs to parametrize by: .ci/run builds the first, each path of a kernel; `make gates` all, 10 to 20 s each."""
    return [*first, *(pytest.param(*(x if type(x) is tuple else (x,)), marks=pytest.mark.slow) for x in more)]


@dataclass(frozen=True)
class Sass:
    """The instructions of a cubin, and (registers, bytes of stack) of each kernel in it."""

    text: str
    resources: list[tuple[int, int]]

    def count(self, instruction: str) -> int:
        """How often an instruction (a regular expression) stands there."""
        return len(re.findall(rf"\s{instruction}\b", self.text))

    @property
    def spills(self) -> tuple[int, int, int]:
        """Bytes of stack, loads and stores of local memory."""
        return max(stack for _, stack in self.resources), self.count("LDL"), self.count("STL")


def compiled(build: Callable[..., Any], config: object, folder: Path) -> Sass:
    """Build a config; the kernel itself refuses where its ledger or the arrivals of its channels are wrong."""
    build(config, f"--keep-cubin --dump-dir={folder}")
    (cubin,) = folder.glob("*.cubin")
    text = subprocess.run([str(CUOBJDUMP), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([str(CUOBJDUMP), "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return Sass(text, [(int(registers), int(stack)) for registers, stack in found])
