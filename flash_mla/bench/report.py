"""The records of `measure` as JSON lines, and as tables for the terminal and for Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

__all__ = ["Column", "append_jsonl", "columns", "markdown", "notes", "read_jsonl", "start_jsonl"]

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


def start_jsonl(path: Path, machine: Record) -> None:
    """A new file with one line for the machine (kind "machine")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": "machine"} | machine) + "\n")


def append_jsonl(path: Path, record: Record) -> None:
    """One more line for a case (kind "case"), closed at once: a run that is ended keeps what it measured."""
    with path.open("a") as file:
        file.write(json.dumps({"kind": "case"} | record) + "\n")


def read_jsonl(path: Path) -> tuple[Record, list[Record]]:
    """The machine and the cases of a file that `bench --jsonl` wrote."""
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
    """The table of one group. What a record does not have is a dash; why a case has no time is in `notes`."""
    unit, per_tflop = flop_unit(machine)

    def each(key: str, text: Callable[[float], str]) -> list[str]:
        return [text(r[key]) if key in r else "-" for r in records]

    result = [
        Column("case", [r["case"] for r in records]),
        Column("backend", [r["backend"] for r in records]),
        Column("time\nms", each("ms", significant)),
        Column(f"rate\n{unit}", each("tflops", lambda x: significant(x * per_tflop))),
        Column("of\nGEMM\n%", each("share_of_gemm", percent)),
        Column("rate\nGB/s", each("gbps", significant)),
        Column("of\nmemory\n%", each("share_of_bandwidth", percent)),
        Column("extra\nmemory\nMiB", each("extra_bytes", lambda x: f"{x / 2**20:.1f}")),
        Column("error\n/ max", each("max_error", lambda x: f"{x:.1e}")),
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
        f" {significant(machine['tflops'] * per_tflop)} {machine.get('dtype', 'BF16')} {unit} ({machine['how']})"
    )


def markdown(machine: Record, records: Sequence[Record], command: str) -> str:
    """All tables as a Markdown page with the command that made them."""
    title, ran = f"# flash_mla on {machine['name']}", f"`{command}`, {machine['date']}"
    parts = [title, ran, ceilings_line(machine) + ".", BYTES_NOTE]
    for group, members in groups(records).items():
        table = columns(machine, members)
        head = [c.header.replace("\n", " ") for c in table]
        rows = [head, ["---", "---", *["---:"] * (len(table) - 2)], *zip(*(c.cells for c in table), strict=True)]
        parts.append(f"## {group[0].upper()}{group[1:]}")
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
