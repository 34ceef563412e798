"""The records of `measure` as JSON lines, as tables for the terminal and for Markdown, and as a roofline plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

__all__ = ["Column", "columns", "markdown", "notes", "read_jsonl", "roofline", "write_jsonl"]

Record = dict[str, Any]

BYTES_NOTE = (
    "FLOPs and bytes are what the problem needs: two GEMMs over the visible keys; q, the used cache rows and out, each"
    " once. A copy that a peer makes counts as time, not as bytes. Ratios are peer time / our time, medians over rounds"
    " that ran alternately in one process with caches flushed before each run. Extra memory is the peak of torch's"
    " allocator during a call. Error is the largest |out - float64| over the largest |out|, of one request."
)


class Column(NamedTuple):
    """A column: its header, whose line break Markdown drops, and one cell a record."""

    header: str
    cells: list[str]


def write_jsonl(path: Path, machine: Record, records: Iterable[Record]) -> None:
    """One line for the machine (kind "machine"), then one a case (kind "case")."""
    lines = [{"kind": "machine"} | machine, *({"kind": "case"} | record for record in records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_jsonl(path: Path) -> tuple[Record, list[Record]]:
    """The machine and the cases of a file that write_jsonl wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    machine = next((line for line in lines if line.get("kind") == "machine"), None)
    if machine is None:
        raise ValueError(f"{path} has no line of kind 'machine': it was not written by `flash-mla bench --jsonl`")
    return machine, [line for line in lines if line.get("kind") == "case"]


# --- Tables -----------------------------------------------------------------------------------------------------------


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by table, in order of appearance."""
    result: dict[str, list[Record]] = {}
    for record in records:
        result.setdefault(record["group"], []).append(record)
    return result


def flop_unit(machine: Record) -> tuple[str, float]:
    """The unit of a machine's rates and how many of it a TFLOP/s is: a CPU's are legible in GFLOP/s."""
    return ("TFLOP/s", 1.0) if machine["tflops"] >= 10 else ("GFLOP/s", 1e3)


def columns(machine: Record, records: Sequence[Record]) -> list[Column]:
    """The table of one group. A case without a time has dashes; why is in `notes`."""
    unit, per_tflop = flop_unit(machine)
    timed = lambda f: [f(r) if "ms" in r else "-" for r in records]  # noqa: E731
    result = [
        Column("case", [r["case"] for r in records]),
        Column("backend", [r["backend"] for r in records]),
        Column("time\nms", timed(lambda r: significant(r["ms"]))),
        Column(f"rate\n{unit}", timed(lambda r: significant(r["tflops"] * per_tflop))),
        Column("of\nGEMM\n%", timed(lambda r: percent(r["share_of_gemm"]))),
        Column("rate\nGB/s", timed(lambda r: significant(r["gbps"]))),
        Column("of\nmemory\n%", timed(lambda r: percent(r["share_of_bandwidth"]))),
        Column("extra\nmemory\nMiB", timed(lambda r: f"{r['extra_bytes'] / 2**20:.1f}")),
        Column("error\n/ max", [f"{r['max_error']:.1e}" for r in records]),
    ]
    peers = dict.fromkeys(name for r in records for name in r.get("peers", {}))
    for name in peers:
        cells = [r.get("peers", {}).get(name) for r in records]
        result.append(
            Column(
                "\n".join(wrap(f"vs {name}", 11)),
                ["" if c is None else f"{c['ratio']:.2f}x" if "ratio" in c else "-" for c in cells],
            )
        )
    return result


def notes(records: Sequence[Record]) -> list[str]:
    """Why dashes stand in a group's table, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if "error" in record:
            reasons.setdefault(f"not timed: {record['error']}", []).append(record["case"])
        for name, peer in record.get("peers", {}).items():
            if "error" in peer:
                reasons.setdefault(f"{name}: {peer['error']}", []).append(record["case"])
    return [
        reason if len(cases) == len(records) else f"{reason} ({', '.join(cases)})" for reason, cases in reasons.items()
    ]


def ceilings_line(machine: Record) -> str:
    """The machine and its ceilings in one line."""
    unit, per_tflop = flop_unit(machine)
    return (
        f"{machine['name']}; torch {machine['torch']}; ceilings of this run: {significant(machine['gbps'])} GB/s,"
        f" {significant(machine['tflops'] * per_tflop)} BF16 {unit} ({machine['how']})"
    )


def markdown(machine: Record, records: Sequence[Record], command: str) -> str:
    """All tables as a Markdown page with the command that made them."""
    parts = [f"`{command}`, {machine['date']}", ceilings_line(machine) + ".", BYTES_NOTE]
    for group, members in groups(records).items():
        table = columns(machine, members)
        head = [c.header.replace("\n", " ") for c in table]
        rows = [head, ["---", "---", *["---:"] * (len(table) - 2)], *zip(*(c.cells for c in table), strict=True)]
        parts.append(f"### {group[0].upper()}{group[1:]}")
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        parts.extend(f"- {note}" for note in notes(members))
    return "\n\n".join(parts) + "\n"


def significant(value: float) -> str:
    """Three significant digits without an exponent: 1234, 12.3, 0.0123."""
    if not value:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def percent(share: float) -> str:
    """A share as a percentage, with a decimal below 10."""
    return f"{100 * share:.{1 if share < 0.1 else 0}f}"


# --- Plot -------------------------------------------------------------------------------------------------------------

STYLES = {"decode, GQA": ("#0072B2", "o"), "decode, MLA": ("#D55E00", "s"), "prefill": ("#009E73", "^")}
INK, FAINT = "#222222", "#8a8a8a"


def roofline(machine: Record, records: Sequence[Record], path: Path) -> None:
    """A PNG: rate over arithmetic intensity, beneath the two ceilings of the run.

    Needs matplotlib (`flash-mla[cli]`).

    Raises:
        ValueError: no record has a time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [r for r in records if "ms" in r]
    if not timed:
        raise ValueError("no case of this file has a time")
    unit, per_tflop = flop_unit(machine)
    intensity = [r["flops"] / r["bytes"] for r in timed]
    rates = [r["tflops"] * per_tflop for r in timed]
    gemm, memory = machine["tflops"] * per_tflop, machine["gbps"] * per_tflop / 1e3
    ridge = gemm / memory
    left, right = min(*intensity, ridge) / 2, max(*intensity, ridge) * 6
    bottom, top = min(*rates, gemm) / 2, gemm * 2.2

    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.plot([left, ridge, right], [left * memory, gemm, gemm], color=INK, lw=1.6, zorder=2)
    axes.fill_between([left, ridge, right], [left * memory, gemm, gemm], top, color="#f2f2f0", zorder=0)
    for group, members in groups(timed).items():
        colour, marker = STYLES.get(group, (FAINT, "D"))
        x = [r["flops"] / r["bytes"] for r in members]
        y = [r["tflops"] * per_tflop for r in members]
        axes.scatter(x, y, s=46, c=colour, marker=marker, ec="white", lw=0.8, zorder=4, label=group)
    label_points(axes, timed, intensity, rates)
    above: dict[str, Any] = {"textcoords": "offset points", "color": INK}
    axes.annotate(f"BF16 GEMM, {significant(gemm)} {unit}", (right, gemm), (-6, 6), ha="right", **above)
    (x0, y0), (x1, y1) = axes.transData.transform([(left, left * memory), (ridge, gemm)])
    middle = math.sqrt(left * ridge)
    axes.annotate(
        f"memory, {significant(machine['gbps'])} GB/s",
        (middle, middle * memory),
        (-6, 6),
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        ha="center",
        **above,
    )
    axes.set_xlabel("arithmetic intensity, FLOP per byte of q, used cache and out")
    axes.set_ylabel(f"rate, {unit}")
    axes.set_title(f"flash_mla on {machine['name']}", loc="left", fontsize=12, color=INK, pad=12)
    axes.grid(True, which="major", color="#e3e3e0", lw=0.7, zorder=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


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
