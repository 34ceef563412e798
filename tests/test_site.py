"""The site: its reference names all that is public, its navigation every page, and a browser shows it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import flash_mla

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
MADE = ("index.md", "contributing.md", "changelog.md", "security.md")
"""Pages that docs/hooks.py makes of those."""

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
MKDOCS = ROOT / ".venv-docs/bin/mkdocs"


def directives() -> dict[str, list[str] | None]:
    """What the reference documents: dotted name -> the members it is limited to."""
    found = {}
    for page in (DOCS / "api").glob("*.md"):
        for name, options in re.findall(r"^::: ([\w.]+)\n(?:    options: (.*)\n)?", page.read_text(), re.MULTILINE):
            members = re.search(r"members: \[(.*?)\]", options)
            found[name] = members[1].split(", ") if members else None
    return found


def test_the_reference_has_every_public_name() -> None:
    """Each name that the package exports, itself or with its module; and each directive's name has a docstring."""
    found = directives()
    for name in flash_mla.__all__:
        module = getattr(flash_mla, name).__module__
        assert f"flash_mla.{name}" in found or found.get(module, ()) is None, name
    for name, members in found.items():
        module, _, attribute = name.rpartition(".")
        if name.startswith(("flash_mla.integrations",)):
            continue  # what it imports is not installed everywhere
        documented = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
        assert documented.__doc__, name
        assert all(hasattr(documented, member) for member in members or ()), name


def test_the_navigation_has_every_page() -> None:
    yaml = pytest.importorskip("yaml")

    def pages(nav):
        if isinstance(nav, str):
            yield nav
        else:
            for entry in nav.values() if isinstance(nav, dict) else nav:
                yield from pages(entry)

    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(named) == sorted([*there, *MADE])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, built strictly from a copy of the pages; plots drawn as `make docs` draws them."""
    if not MKDOCS.exists():
        pytest.skip("no .venv-docs: run `make docs` first")
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs")
    for name in ("mkdocs.yml", *ROOT_PAGES):
        shutil.copy(ROOT / name, root)
    (root / "flash_mla").symlink_to(ROOT / "flash_mla")
    for records in (root / "docs/bench").glob("*.jsonl"):
        subprocess.run([sys.executable, "-m", "flash_mla", "plot", records], check=True, cwd=ROOT, capture_output=True)
    command = [MKDOCS, "build", "--strict", "--site-dir", root / "built"]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # from a server: a browser lets no page of a file load the search's index
    handler = partial(QuietHandler, directory=root / "built")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def shoot(url: str, picture: Path) -> str:
    """Take a screenshot of the page; returns what its scripts and its loads complained about."""
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,4600", "--enable-logging=stderr"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    options += [f"--user-data-dir={picture.parent}/profile", f"--screenshot={picture}", "--virtual-time-budget=4000"]
    done = subprocess.run([BROWSER, *options, url], capture_output=True, text=True, check=True, timeout=120)
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize(
    ("page", "colours"),
    [
        ("", ["#0072B2"]),  # bars of the picture of ratios
        ("bench/", ["#0072B2", "#D55E00", "#009E73"]),  # bars, and the points of three groups
        ("api/functions/", []),
    ],
    ids=["start", "bench", "reference"],
)
def test_a_browser_shows_it(page: str, colours: list[str], site: str, tmp_path: Path) -> None:
    """Its scripts run and its files load without a complaint, and its text and its pictures are drawn."""
    image = pytest.importorskip("PIL.Image")
    assert shoot(site + page, tmp_path / "page.png") == ""
    picture = image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == (1300, 4600)
    pixels = {colour: count for count, colour in picture.getcolors(1 << 22)}
    assert pixels.get((255, 255, 255), 0) > 0.3 * 1300 * 4600, "a light page"
    assert len(pixels) > 100, "text is drawn"
    for colour in colours:
        assert pixels.get(tuple(bytes.fromhex(colour[1:])), 0) > 20, colour
