"""The distributions: what is in them, that the sdist runs its tests, and that the wheel takes the place of DeepSeek's.

Everything is built from a copy of the tree and installed without a network.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")
from packaging.requirements import Requirement

import flash_mla

ROOT = Path(__file__).parents[1]
MADE = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "*.egg-info", "site")
"""What builds and tests leave in a tree."""

BUILD = "from setuptools import build_meta; print(build_meta.build_{0}({1!r}))"


def run(command: Sequence[str | Path], folder: Path) -> str:
    """What a command prints that succeeds in that folder, without the import path of these tests."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, target: Path) -> Path:
    """Run the build backend in a tree; the file that it made."""
    return target / run([sys.executable, "-c", BUILD.format(kind, str(target))], tree).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*MADE))
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"flash_mla-{flash_mla.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as an index's users build it."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


# --- Contents ---------------------------------------------------------------------------------------------------------


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "flash_mla").rglob("*.py")}
    more = {name for name in names - code if ".dist-info/" not in name}
    assert code <= names
    assert more == {"flash_mla/py.typed", "flash_mla/demo.txt"}, "no records of benchmarks, no tests, no pages"


def test_sdist_has_what_its_tests_need(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: nobody knows which files are the project's")
    listed = run(["git", "ls-files"], ROOT).splitlines()
    theirs = {name for name in listed if (ROOT / name).exists() and not name.startswith(".")}
    assert sorted(theirs - {str(path.relative_to(sdist)) for path in sdist.rglob("*")}) == []


def test_sdist_runs_its_tests(sdist: Path) -> None:
    some = ("tests/test_layers.py", "tests/test_merge.py")
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some], sdist)


def test_metadata_is_true(wheel: Path) -> None:
    told = metadata(wheel)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told["Version"] == flash_mla.__version__
    assert told["Requires-Python"] == project["requires-python"]
    minors = {int(line.rpartition(".")[2]) for line in told.get_all("Classifier") if re.search(r":: 3\.\d+$", line)}
    assert min(minors) == int(told["Requires-Python"].removeprefix(">=3."))
    workflow = ROOT / ".github/workflows/ci.yml"
    if workflow.exists():
        assert {int(minor) for minor in re.findall(r'"3\.(\d+)"', workflow.read_text())} == minors
    extras = set(told.get_all("Provides-Extra"))
    for code in (ROOT / "flash_mla").rglob("*.py"):
        named = re.findall(r"flash-mla\[([\w,]+)\]", code.read_text())
        assert {extra for names in named for extra in names.split(",")} <= extras, code


def test_pins_are_what_the_metadata_allows(wheel: Path) -> None:
    """requirements*.txt installs our dependencies without resolving them: its versions must be allowed."""
    pins = {}
    for path in (ROOT / "requirements.txt", ROOT / "requirements-dev.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                pin = Requirement(line)
                pins[pin.name] = str(pin.specifier).removeprefix("==")
    for text in metadata(wheel).get_all("Requires-Dist"):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


def test_links_of_the_readme_work_on_an_index_page(wheel: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", str(metadata(wheel).get_payload()))
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


# --- Beside DeepSeek's ------------------------------------------------------------------------------------------------


def stub(folder: Path) -> Path:
    """A wheel of DeepSeek's name, flash_mla 1.0.0, with a module of its own that ours does not have."""
    files = {
        "flash_mla/__init__.py": "from flash_mla.flash_mla_interface import flash_mla_with_kvcache\n",
        "flash_mla/flash_mla_interface.py": "def flash_mla_with_kvcache(): return 'theirs'\n",
        "flash_mla-1.0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash_mla\nVersion: 1.0.0\n",
        "flash_mla-1.0.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={digest(text)},{len(text)}\n" for name, text in files.items())
    path = folder / "flash_mla-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (*files.items(), ("flash_mla-1.0.0.dist-info/RECORD", record)):
            archive.writestr(name, text)
    return path


def digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class Environment:
    """A virtual environment without pip, filled by ours; behind its own packages it sees those that are here."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        self.packages = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))"))
        (self.packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, *what: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--no-index", "--no-deps"]
        run([*pip, *what], self.bin)

    def python(self, code: str) -> str:
        return run([self.bin / "python", "-c", code], self.bin).strip()


def test_ours_takes_the_place_of_deepseeks(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install(stub(tmp_path))
    assert environment.python("import flash_mla; print(flash_mla.flash_mla_with_kvcache())") == "theirs"
    environment.install(wheel)
    assert not (environment.packages / "flash_mla/flash_mla_interface.py").exists()
    ours = [path.name for path in environment.packages.glob("flash_mla*.dist-info")]
    assert ours == [f"flash_mla-{flash_mla.__version__}.dist-info"]
    environment.install("flash_mla>=1")  # what depends on DeepSeek's by version is content: pip looks for nothing
    code = "import flash_mla; from flash_mla import deepseek; print(flash_mla.__file__, deepseek.FlashMLASchedMeta())"
    assert str(environment.packages / "flash_mla") in environment.python(code)
    pytest.importorskip("typer")
    assert run([environment.bin / "flash-mla", "--version"], tmp_path) == f"flash-mla {flash_mla.__version__}\n"
