"""README and docs say what is so: their examples run, their commands and links exist, their tables are the code's.

A Python block runs, with the page's earlier blocks before it, and prints what the text block behind it says. One that
needs a GPU or an engine stands behind `<!-- syntax only: WHY -->` and is compiled (or run, where the GPU is). A command
of a shell block or of the prose is parsed, and what it names must exist.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_layers import LAYERS

import flash_mla

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if page.name != "CHANGELOG.md")
FENCE = re.compile(
    r"^(?:<!-- syntax only: (?P<why>.+) -->\n+)?```(?P<language>.*)\n(?P<body>(?:.*\n)*?)```$", re.MULTILINE
)
INLINE = re.compile(r"`((?:flash-mla|make|pip|pytest|python) [^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


class Block(NamedTuple):
    """A fenced block: its language, its text, why it is not run, and whether nothing stands between it and the last."""

    language: str
    body: str
    why: str | None
    follows: bool


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(), [], 0
    for match in FENCE.finditer(text):
        follows = not text[end : match.start()].strip()
        found.append(Block(match["language"], match["body"], match["why"], follows))
        end = match.end()
    assert len(found) * 2 == sum(line.startswith("```") for line in text.splitlines()), f"{page}: an open fence"
    return found


def pages_with(language: str) -> pytest.MarkDecorator:
    """A test of every page that has a block of the language, or of every page."""
    pages = [page for page in PAGES if not language or f"```{language}" in page.read_text()]
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pages_with("python")
def test_examples_print_what_they_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of one page run in order, in one namespace, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    found = blocks(page)
    names: dict[str, object] = {"__name__": "__main__"}
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        code = compile(block.body, str(page), "exec")
        if block.why and not (block.why == "needs a GPU" and torch.cuda.is_available()):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        said = after.body if after and after.language == "text" and after.follows else ""
        assert printed.getvalue().rstrip() == said.rstrip()


@pages_with("")
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    """Pictures of a schedule stand on the design pages; any other text is what a block prints."""
    before = None
    for block in blocks(page):
        assert block.language in ("python", "text", "bash"), block.language
        assert block.why is None or block.language == "python"
        if block.language == "text" and not (before and before.language == "python" and block.follows):
            is_layers = block.body.splitlines() == list(LAYERS)
            assert page.parent.name == "design" or is_layers, f"{page}: text that no test looks at\n{block.body}"
        before = block


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each simple command of a page's shell blocks and in its prose, without variables set before it."""
    shell = [block.body for block in blocks(page) if block.language == "bash"]
    for text in shell:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for line in re.split(r"\n|&&|\|\|", "\n".join([*shell, *INLINE.findall(prose(page))]).replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pages_with("")
def test_commands_name_what_exists(page: Path) -> None:
    """Make targets, subcommands with their options, extras, scripts and modules."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for program, *words in commands(page):
        if program == "make":
            assert set(words) <= set(targets)
        elif program == "flash-mla":
            check_cli(words)
        elif program == "pip" and words[0] == "install":
            for names in re.findall(r"\[(.+?)\]", " ".join(words)):
                assert set(names.split(",")) <= set(extras)
        elif program in ("python", "pytest", "bash"):
            named = [word for word in words if word.endswith((".py", ".sh")) or word.startswith("tests")]
            assert all((ROOT / name.split("::")[0].replace("tests.fuzz", "tests/fuzz")).exists() for name in named)
        else:
            assert program in ("git", "cd", "vllm", "source", ".", "pre-commit", ".ci/run"), (
                f"nobody looks at {program}"
            )


def check_cli(words: list[str]) -> None:
    typer = pytest.importorskip("typer")
    from flash_mla.cli import app

    command = typer.main.get_command(app)
    if words and not words[0].startswith("-"):
        command = command.commands[words[0]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}


# --- Links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The ids that headings get, as GitHub and Python-Markdown make them alike for plain headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages_with("")
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        ours = re.match(rf"{REPOSITORY}/(?:blob|raw)/main/", link)  # absolute in README, for an index page
        if link.startswith("http") and not ours:
            continue
        link = link[ours.end() :] if ours else link
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.parent.name == "bench" and target.suffix == ".png":  # `make docs` draws it
            target = target.with_name(target.stem.removesuffix("-peers") + ".jsonl")
        if page.parent.name == "bench" and name == "../index.md":  # docs/hooks.py makes it of README
            target = ROOT / "README.md"
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_the_contract_has_the_signatures() -> None:
    """Section 2, word for word but for annotations."""
    table = re.findall(
        r"^\| `(\w+)` \| `(\(.*\))(?: -> .+)?` \|$", (ROOT / "docs/contract.md").read_text(), re.MULTILINE
    )
    assert len(table) == 4
    for name, said in table:
        parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
        plain = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert said == str(plain), name


def test_the_contract_has_every_error() -> None:
    table = (ROOT / "docs/contract.md").read_text().split("## 8. Errors")[1].split("## 9.")[0]
    classes = [x for name in flash_mla.__all__ if isinstance(x := getattr(flash_mla, name), type)]
    assert {x.__name__ for x in classes if issubclass(x, Exception)} <= set(re.findall(r"\w+", table))


def test_every_error_has_a_class_of_its_own() -> None:
    """Nothing raises the base class."""
    for path in (ROOT / "flash_mla").rglob("*.py"):
        assert not re.search(r"(?<!class )\bFlashMLAError\(", path.read_text()), path


def test_sections_that_docstrings_cite_exist() -> None:
    sections = set(re.findall(r"^## (\d+)\.", (ROOT / "docs/contract.md").read_text(), re.MULTILINE))
    for path in (ROOT / "flash_mla").rglob("*.py"):
        for section in re.findall(r"contract\.md,\s+section (\d+)", path.read_text()):
            assert section in sections, path


def test_the_picture_shows_the_table() -> None:
    """Every bar of README's table is in the committed picture."""
    spec = importlib.util.spec_from_file_location("ratios", ROOT / "docs/bench/ratios.py")
    assert spec is not None
    assert spec.loader is not None
    ratios = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ratios)
    bars = ratios.read_table((ROOT / "README.md").read_text())
    assert len(bars) == 18
    picture = ratios.PICTURE.read_text()
    for bar in bars:
        assert f"{bar.case} · {bar.peer}" in html.unescape(picture)
        assert f"{bar.worst:.2f}" + (f" to {bar.best:.2f}" if bar.best > bar.worst else "") in picture
    assert min(bar.worst for bar in bars) < 1, "README says where a peer is faster"
