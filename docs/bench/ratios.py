"""Draw README's table of ratios as docs/bench/ratios.svg: `python docs/bench/ratios.py`. Needs matplotlib.

The table is the one source of the numbers. A bar goes from a case's worst ratio to its best; 1 is the peer's speed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PICTURE = Path(__file__).with_name("ratios.svg")
HEADER = "| case | peer | x the peer's speed | commit |"
INK, FAINT, OVER, UNDER = "#222222", "#8a8a8a", "#0072B2", "#D55E00"


class Ratios(NamedTuple):
    """One bar: our speed over one peer's in one row of the table."""

    case: str
    peer: str
    worst: float
    best: float


def read_table(page: str) -> list[Ratios]:
    """The bars of a page's table, in its order.

    A cell's numbers belong to the row's peer. Where the row names two, apart by " / ", so are their numbers, in the
    same order, once for each part of the cell between semicolons.
    """
    lines = page[page.index(HEADER) :].splitlines()[2:]
    bars = []
    for line in lines:
        if not line.startswith("|"):
            break
        case, peer, cell, _ = (part.strip() for part in line.strip("|").split("|"))
        peers = peer.split(" / ")
        parts = [part.split(" / ") for part in cell.split(";")]
        for i, name in enumerate(peers):
            own = " ".join(" ".join(part) if len(peers) == 1 else part[i] for part in parts)
            numbers = [float(number) for number in re.findall(r"\d+\.\d+", own)]
            bars.append(Ratios(case, name, min(numbers), max(numbers)))
    return bars


def draw(bars: list[Ratios], path: Path) -> None:
    """The bars as an SVG whose text is text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ratios", "font.family": "sans-serif"}):
        figure = Figure(figsize=(11.5, 0.36 * len(bars) + 1.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for y, bar in enumerate(bars):
            colour = OVER if bar.worst >= 1 else UNDER if bar.best < 1 else FAINT
            axes.barh(y, max(bar.best - bar.worst, 0.004), left=bar.worst, height=0.55, color=colour, zorder=3)
            text = f"{bar.worst:.2f}" + (f" to {bar.best:.2f}" if bar.best > bar.worst else "")
            axes.annotate(text, (bar.best, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)
        axes.axvline(1, color=INK, lw=1.2, zorder=2)
        axes.set_yticks(range(len(bars)), [f"{bar.case} · {bar.peer}" for bar in bars], fontsize=8.5, color=INK)
        axes.set(xlim=(0.8, max(bar.best for bar in bars) + 0.16), ylim=(len(bars) - 0.4, -0.6))
        axes.set_xlabel("times the peer's speed, one NVIDIA H200: each case from its worst row to its best", fontsize=9)
        axes.grid(True, axis="x", color="#e3e3e0", lw=0.7, zorder=0)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.patch.set_facecolor("white")
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(read_table((ROOT / "README.md").read_text()), PICTURE)
