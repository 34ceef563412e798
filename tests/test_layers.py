"""The order of design.md: a module imports only from layers above its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flash_mla"
LAYERS = (
    "errors problem uncompiled version",
    "kinds passed",
    "blocks heads layout mla quant merge reference kernels",
    "contract backends",
    "plan autograd",
    "entry explanation launch gradients",
    "calls",
    "api",
    "cache pages",
    "ops",
    "deepseek distributed indexer",
    "testing __init__",
    "bench integrations",
    "demo",
    "cli",
    "__main__",
)
ROOMS = {
    "cache": ("checks ledger rows", "paged", "__init__"),
    "contract": (
        "given tensors",
        "caches masks memory order scales values",
        "facts mla_metadata decode_call prefill_call",
        "__init__",
    ),
}
"""The same inside a package."""


def levels(layers):
    return {name: level for level, names in enumerate(layers) for name in names.split()}


LEVEL = levels(LAYERS)
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """The modules of this package that a file imports, as dotted names below flash_mla; "" is flash_mla itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.partition(".")[2] for name in names if name.partition(".")[0] == "flash_mla")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    for module in imported(path):
        other = module.split(".")[0] or "__init__"
        other = other if other in LEVEL else "__init__"  # a name that flash_mla/__init__.py exports
        if own == "kernels":
            folder = ".".join(parts[:2]) if len(parts) > 2 else "kernels"
            assert module.startswith(folder), f"kernels import {module}, outside of their own folder"
        else:
            assert other == own or LEVEL[other] < LEVEL[own], f"{own} (layer {LEVEL[own]}) imports {other}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms(room):
    level = levels(ROOMS[room])
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py")}
    assert files.keys() == level.keys()
    for name, path in files.items():
        for module in imported(path):
            own, _, rest = module.partition(".")
            if own == room:
                other = rest.split(".")[0]
                assert level[other] < level[name], f"{room}/{name} (layer {level[name]}) imports {other}"
