"""Two pictures of the bench's records: a roofline, and bars of the time that peers take beside ours.

Both say what ran: the machine, dtype, torch, commit and date. Needs matplotlib (`flash-mla[cli]`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flash_mla.bench.report import Record, flop_unit, groups, significant

__all__ = ["bars", "draw", "roofline"]

STYLES = {
    "decode, GQA": ("#0072B2", "o"),
    "decode, MLA": ("#D55E00", "s"),
    "decode, sparse": ("#CC79A7", "D"),
    "prefill": ("#009E73", "^"),
    "prefill, sparse": ("#56B4E9", "v"),
    "index": ("#E69F00", "P"),
}
"""Colour and marker of each group."""
INK, FAINT, OTHER = "#222222", "#8a8a8a", ("#444444", "X")
BARS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Colours of the peers."""


def draw(machine: Record, records: Sequence[Record], path: Path) -> list[Path]:
    """Write the roofline to `path`, where the machine's ceilings are known, and the bars to `<name>-peers` beside it.

    Returns:
        the files that were written.

    Raises:
        ValueError: no record has a time.
    """
    timed = [r for r in records if "ms" in r]
    if not timed:
        raise ValueError("no case of this file has a time")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    placed = [r for r in timed if r.get("flops") and r.get("bytes")]  # a selection has no FLOP
    if "gbps" in machine and placed:
        roofline(machine, placed, path)
        written.append(path)
    if any(ratios(r) for r in timed):
        beside = path.with_stem(f"{path.stem}-peers")
        bars(machine, [r for r in timed if ratios(r)], beside)
        written.append(beside)
    return written


def ratios(record: Record) -> dict[str, float]:
    """Peer -> its time over ours."""
    return {name: peer["ratio"] for name, peer in record.get("peers", {}).items() if "ratio" in peer}


MOST_COMMITS = 4
"""That a picture names; of more it gives the number."""


def provenance(machine: Record, records: Sequence[Record]) -> str:
    """What ran, in a line: dtypes, torch, commits and dates of the records, or of the machine where they have none."""

    def all_of(key: str) -> list[str]:
        return [*dict.fromkeys(str(r.get(key) or machine.get(key) or "unknown") for r in records)]

    dtypes, torches, dates = (", ".join(all_of(key)) for key in ("dtype", "torch", "date"))
    commits = all_of("commit")
    which = f"commit {', '.join(commits)}" if len(commits) <= MOST_COMMITS else f"{len(commits)} commits"
    return f"{dtypes}; torch {torches}; {which}; {dates}"


def title(axes: Any, machine: Record, records: Sequence[Record], what: str) -> None:
    """Two lines above the picture."""
    axes.set_title(f"flash_mla on {machine['name']}: {what}", loc="left", fontsize=12, color=INK, pad=24)
    axes.annotate(
        provenance(machine, records), (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points",
        fontsize=8, color=FAINT,
    )  # fmt: skip


def legible(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a log axis: 1, 2 and 5 of each decade, or the decades alone where they are many."""
    subs = (1.0, 2.0, 5.0) if high / low < 1e4 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=30))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.12g}"))


# --- Roofline ---------------------------------------------------------------------------------------------------------


def roofline(machine: Record, records: Sequence[Record], path: Path) -> None:
    """Rate over arithmetic intensity, beneath the ceilings of the run; the fastest peer of each case in grey."""
    unit, per_tflop = flop_unit(machine)
    intensity = [r["flops"] / r["bytes"] for r in records]
    rates = [r["flops"] / r["ms"] / 1e9 * per_tflop for r in records]
    theirs = [rate / min(ratios(r).values()) if ratios(r) else None for r, rate in zip(records, rates, strict=True)]
    memory = machine["gbps"] * per_tflop / 1e3
    roofs = {machine.get("dtype", "BF16"): machine["tflops"] * per_tflop}
    if "tflops_fp8" in machine:
        roofs["FP8"] = machine["tflops_fp8"] * per_tflop
    gemm, highest = machine["tflops"] * per_tflop, max(roofs.values())
    left, right = min(*intensity, gemm / memory) / 2, max(*intensity, highest / memory) * 6
    bottom, top = min([*rates, *(y for y in theirs if y), gemm]) / 2, highest * 2.2

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    slope = highest / memory
    axes.fill_between([left, slope, right], [left * memory, highest, highest], top, color="#f2f2f0", zorder=0)
    axes.plot([left, slope], [left * memory, highest], color=INK, lw=1.6, zorder=2)
    for dtype, roof in roofs.items():
        axes.plot([roof / memory, right], [roof, roof], color=INK, lw=1.6, zorder=2)
        note = f"{dtype} GEMM, {significant(roof)} {unit}"
        axes.annotate(note, (right, roof), (-6, 5), textcoords="offset points", ha="right", color=INK, fontsize=9)
    for x, ours, peer in zip(intensity, rates, theirs, strict=True):
        if peer is not None:
            axes.plot([x, x], [ours, peer], color=FAINT, lw=0.6, zorder=2)
    grey = [(x, y) for x, y in zip(intensity, theirs, strict=True) if y is not None]
    if grey:
        xs, ys = zip(*grey, strict=True)
        axes.scatter(xs, ys, s=22, c=FAINT, marker="x", lw=1.1, zorder=3, label="fastest peer")
    for group, members in groups(records).items():
        for dtype in dict.fromkeys(r.get("dtype", "") for r in members):
            some = [r for r in members if r.get("dtype", "") == dtype]
            colour, marker = STYLES.get(group, OTHER)
            axes.scatter(
                [r["flops"] / r["bytes"] for r in some], [r["flops"] / r["ms"] / 1e9 * per_tflop for r in some], s=46,
                c="white" if "FP8" in dtype else colour, marker=marker, ec=colour if "FP8" in dtype else "white",
                lw=1.6 if "FP8" in dtype else 0.8, zorder=4, label=f"{group}, {dtype}" if dtype else group,
            )  # fmt: skip
    legible(axes.xaxis, left, right)
    legible(axes.yaxis, bottom, top)
    if len(records) <= MOST_LABELS:
        label_points(axes, records, intensity, rates)
    (x0, y0), (x1, y1) = axes.transData.transform([(left, left * memory), (slope, highest)])
    middle = math.sqrt(left * slope)
    axes.annotate(
        f"memory, {significant(machine['gbps'])} GB/s", (middle, middle * memory), (-6, 6),
        textcoords="offset points", rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor",
        ha="center", color=INK, fontsize=9,
    )  # fmt: skip
    axes.set_xlabel("arithmetic intensity, FLOP per byte that the problem needs")
    axes.set_ylabel(f"rate, {unit}")
    title(axes, machine, records, "roofline")
    axes.grid(True, which="major", color="#e3e3e0", lw=0.7, zorder=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


MOST_LABELS = 24
"""Points that get their names beside them; the bars name every case."""


def label_points(axes: Any, records: Sequence[Record], intensity: Sequence[float], rates: Sequence[float]) -> None:
    """Each point's name beside it, moved up or down from its neighbours', with a leader where it moved."""
    size, gap, offset = 7.0, 8.5, 9.0  # points
    axes.figure.draw_without_rendering()
    points = axes.transData.transform(list(zip(intensity, rates, strict=True))) * 72 / axes.figure.dpi
    texts = [record["case"].split("/", 1)[1] for record in records]
    widths = [0.58 * size * len(text) + offset for text in texts]
    spans = [(x, x + width) for (x, _), width in zip(points, widths, strict=True)]
    heights = spread([y for _, y in points], spans, gap)
    for text, x, y, (_, y0), y1 in zip(texts, intensity, rates, points, heights, strict=True):
        moved = abs(y1 - y0) > gap / 3
        axes.annotate(
            text,
            (x, y),
            (offset, y1 - y0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=INK,
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
            if moved
            else None,
        )


def spread(heights: Sequence[float], spans: Sequence[tuple[float, float]], gap: float) -> list[float]:
    """Heights for labels: each the free one that is nearest to its point's, placed from the top down.

    Free is what lies `gap` from every placed label that overlaps horizontally, and from every other point under the
    label; points stand at the left ends of the spans, at the given heights.
    """
    placed: dict[int, float] = {}
    for label in sorted(range(len(heights)), key=heights.__getitem__, reverse=True):
        start, end = spans[label]
        taken = [y for other, y in placed.items() if start < spans[other][1] and spans[other][0] < end]
        taken += [y for (x, _), y in zip(spans, heights, strict=True) if start + gap < x < end]
        edges = [y + side * gap for y in taken for side in (-1, 1)]
        free = [y for y in (heights[label], *edges) if all(abs(y - other) > 0.999 * gap for other in taken)]
        placed[label] = min(free, key=lambda y: abs(y - heights[label]))
    return [placed[label] for label in range(len(heights))]


# --- Bars -------------------------------------------------------------------------------------------------------------

ROW_INCHES, HEAD_INCHES = 0.2, 1.1


def bars(machine: Record, records: Sequence[Record], path: Path) -> None:
    """For each case a bar a peer, as long as its time is in units of ours: past 1, we are faster. A plot a group."""
    parts = groups(records)
    names = list(dict.fromkeys(name for r in records for name in ratios(r)))
    colours = dict(zip(names, BARS * (len(names) // len(BARS) + 1), strict=False))
    rows = [sum(len(ratios(r)) for r in members) + 0.6 * len(members) for members in parts.values()]
    height = ROW_INCHES * sum(rows) + HEAD_INCHES * len(parts) + 0.6
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[r * ROW_INCHES + 0.7 for r in rows])[:, 0]
    for i, (axes, (group, members)) in enumerate(zip(plots, parts.items(), strict=True)):
        place, ticks = 0.0, []
        longest = max(1.0, *(x for r in members for x in ratios(r).values()))
        for record in members:
            found = ratios(record)
            ticks.append((place + (len(found) - 1) / 2, record["case"].split("/", 1)[-1]))
            for name, ratio in found.items():
                axes.barh(place, ratio, height=0.86, color=colours[name], zorder=2)
                axes.annotate(
                    f"{ratio:.2f}x", (ratio, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5,
                    color=INK,
                )  # fmt: skip
                place += 1.0
            place += 0.6
        axes.axvline(1.0, color=INK, lw=1.2, zorder=3)
        axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
        axes.set(ylim=(place - 0.6, -0.8), xlim=(0, longest * 1.12))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(True, axis="x", color="#e3e3e0", lw=0.7, zorder=0)
        if i == 0:
            title(axes, machine, records, "time of the peers, in units of ours")
        axes.set_ylabel(group, fontsize=9)
    plots[-1].set_xlabel("peer's time / our time: past the line at 1 ours is faster")
    handles = [plots[0].barh(0, 0, color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
