"""What the commands print with."""

from __future__ import annotations

import os
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 160
"""Columns where the output is no terminal and COLUMNS is not set: rich would take 80 and cut the tables."""
INTERRUPTED = 130
"""The exit code of a run that Ctrl-C ended, as shells give it."""


def console(stderr: bool = False) -> Console:
    """Where output goes; made for each command, so that it follows a replaced sys.stdout."""
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if known else WIDTH, highlight=False)


def progress() -> Progress:
    """A bar on stderr, so that stdout holds the tables alone."""
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*bar, console=console(stderr=True), transient=True)


def grid(title: str, *headers: str, left: int = 1, wrap: bool = False) -> Table:
    """A table whose first `left` columns are text and whose others are right-aligned numbers.

    wrap: the first column may be broken where the terminal is narrow.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for i, header in enumerate(headers):
        justify = "left" if i < left else "right"
        table.add_column(header, justify=justify, no_wrap=i == 0 and not wrap, vertical="top" if wrap else "bottom")  # type: ignore[arg-type]
    return table
