"""`make hub`: the package for Hugging Face's kernels, built and loaded back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "hub"))

import make_hub as hub  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub")
    hub.build(target)
    return target


def test_layout(folder: Path) -> None:
    variants = sorted(path.name for path in (folder / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    ids = set()
    for variant in variants:
        metadata = json.loads((folder / "build" / variant / "metadata.json").read_text())
        assert metadata["name"] == "flash-mla"
        assert f"torch-{metadata['backend']['type']}" == variant
        ids.add(metadata["id"])
        files = {
            path.relative_to(folder / "build" / variant).as_posix() for path in (folder / "build" / variant).rglob("*")
        }
        assert {"__init__.py", "flash_mla/__init__.py", "kernels/triton/decode.py", "kernels/cpu/attend.py"} <= files
        assert not any("hopper" in name or name.startswith(("integrations", "bench")) for name in files)
    assert len(ids) == 4
    assert all((hub.SOURCE / name).exists() for name in hub.LEFT_OUT), "a name that is no more leaves nothing out"
    assert (folder / "README.md").read_text().startswith("---\nlicense: mit\n")


@pytest.mark.parametrize(
    ("path", "line", "want"),
    [
        ("api.py", "from flash_mla import contract", "from . import contract"),
        (
            "kernels/triton/decode.py",
            "from flash_mla.kernels.triton import tiles",
            "from ...kernels.triton import tiles",
        ),
        ("deepseek/decode.py", "    from flash_mla.errors import (", "    from ..errors import ("),
        ("api.py", '"""from flash_mla import contract"""', '"""from flash_mla import contract"""'),
        ("api.py", "from flash_mla_other import x", "from flash_mla_other import x"),
    ],
)
def test_imports_become_relative(path: str, line: str, want: str) -> None:
    text, end = (f"if True:\n{line}\n", "    ShapeError)\n") if line.startswith(" ") else (f"{line}\n", "")
    assert hub.relative(Path(path), text + end) == text.replace(line, want) + end


@pytest.mark.parametrize("line", ["import flash_mla.api", 'importlib.import_module("flash_mla.api")'])
def test_what_has_no_relative_form_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"ops\.py:1: "):
        hub.relative(Path("ops.py"), line)


LOAD = """
import importlib.util, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.modules["flash_mla"] = None  # an import of the installed package fails
id = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(id, folder / "__init__.py")
module = sys.modules[id] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
old = importlib.util.spec_from_file_location("old", folder / "flash_mla" / "__init__.py")
names = importlib.util.module_from_spec(old)
old.loader.exec_module(names)
assert names.PagedKVCache is module.PagedKVCache

import torch
cache = module.PagedKVCache(2, 2, 64, max_seq_len=128, dtype=torch.float32)
k, q = torch.randn(2, 2, 70, 64), torch.randn(2, 4, 1, 64)
cache.append(k, k)
call = (q, cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)
true = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
torch.testing.assert_close(module.flash_mla_with_kvcache(*call), true, rtol=1e-4, atol=1e-4)
op = getattr(torch.ops, id).flash_mla_with_kvcache
out, _ = op(*call, *[None] * 6, tail=False, batch_invariant=False, check_values=True, backend=None, out=None)
torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-4)
"""


def test_it_loads_without_the_installed_package(folder: Path, tmp_path: Path) -> None:
    """As kernels imports it, under the id; its ops beside an installed flash_mla's."""
    done = run(sys.executable, "-c", LOAD, str(folder / "build" / "torch-cpu"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_kernels_loads_it(folder: Path, tmp_path: Path) -> None:
    python = ROOT / ".venv-hub" / "bin" / "python"
    if not python.exists():
        pytest.skip("kernels is not installed: `make hub` makes .venv-hub, and runs this check itself")
    done = run(str(python), str(ROOT / "hub" / "load.py"), str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is that of float64" in done.stdout


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
