"""Build the package that Hugging Face's `kernels` loads: the Triton and CPU parts, one folder a kind of device.

    python hub/make_hub.py build/hub
    kernels.get_local_kernel(Path("build/hub"))

Layout (https://huggingface.co/docs/kernels, "Kernel requirements", noarch kernels):

    README.md
    build/torch-<cpu|cuda|rocm|xpu>/   the package itself, its metadata.json
                                       flash_mla/__init__.py, the same names for old versions of kernels

`kernels` imports a package under the id of its metadata, so that several versions, an installed flash_mla among them,
live in one process. So the copy may not name itself: its imports become relative, and its torch ops move to a
namespace of the id. The Hopper kernels stay out: CuTe DSL is not part of a kernel that runs everywhere.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "flash_mla"
NAME = "flash-mla"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
LEFT_OUT = (
    "kernels/hopper", "backends/hopper", "integrations", "bench", "testing",
    "cli", "demo.py", "__main__.py",
)  # fmt: skip
ORDER = 'ORDER = ("hopper", "triton", "cpu")', 'ORDER = ("triton", "cpu")'

OLD_LAYOUT = '''"""The names of the folder above, where older versions of `kernels` look for them."""

import importlib.util
import sys
from pathlib import Path

ID = "{id}"
if ID not in sys.modules:
    spec = importlib.util.spec_from_file_location(ID, Path(__file__).parents[1] / "__init__.py")
    sys.modules[ID] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[ID])
globals().update({{name: value for name, value in vars(sys.modules[ID]).items() if not name.startswith("__")}})
'''


def sources() -> dict[Path, str]:
    """The package's files that go in, by their path inside of it."""
    files = {path.relative_to(SOURCE): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}
    left_out = tuple(f"{name}/" for name in LEFT_OUT)
    return {path: text for path, text in files.items() if not f"{path.as_posix()}/".startswith(left_out)}


def relative(path: Path, text: str) -> str:
    """The text with imports of this package relative to the file's place in it.

    Raises:
        ValueError: an import that has no relative form: `import flash_mla...`, or its name in a string.
    """
    lines = text.splitlines(keepends=True)
    dots = "." * len(path.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "flash_mla" for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: import flash_mla, which has no relative form")
        if (
            isinstance(node, ast.Call)
            and "import_module" in ast.unparse(node.func)
            and "flash_mla" in ast.unparse(node)
        ):
            raise ValueError(f"{path}:{node.lineno}: the package's name in import_module; use __name__")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "flash_mla":
            inside = (node.module or "").removeprefix("flash_mla").removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {dots}{inside} import", 1)
    return "".join(lines)


def build(target: Path) -> None:
    """Write the package to `target`, whose `build` folder is replaced."""
    files = {path: relative(path, text) for path, text in sources().items()}
    order = Path("backends/__init__.py")
    if ORDER[0] not in files[order]:
        raise ValueError(f"{order} no longer says {ORDER[0]}")
    files[order] = files[order].replace(*ORDER)
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:7]
    major = int(re.search(r'__version__ = "(\d+)', files[Path("version.py")])[1])  # type: ignore[index]

    shutil.rmtree(target / "build", ignore_errors=True)
    for backend in BACKENDS:
        own = f"_{NAME.replace('-', '_')}_{backend}_{digest}"
        folder = target / "build" / f"torch-{backend}"
        for path, text in files.items():
            text = text.replace("torch.ops.flash_mla.", f"torch.ops.{own}.").replace('"flash_mla::', f'"{own}::')
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        (folder / "flash_mla").mkdir()
        (folder / "flash_mla" / "__init__.py").write_text(OLD_LAYOUT.format(id=own))
        metadata = {
            "name": NAME,
            "id": own,
            "version": major,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "hub" / "card.md", target / "README.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the package for Hugging Face's kernels.")
    parser.add_argument("target", type=Path)
    build(parser.parse_args().target)
