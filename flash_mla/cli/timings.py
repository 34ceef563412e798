"""`flash-mla bench`: the cases of a device, each record written as it comes."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from flash_mla.bench import report
from flash_mla.bench.measure import measure, select
from flash_mla.bench.timing import commit, device_name, measure_ceilings
from flash_mla.cli.terminal import INTERRUPTED, console, grid, progress
from flash_mla.version import __version__


def run(
    device: str,
    filters: Sequence[str],
    backend: str | None,
    *,
    with_peers: bool,
    jsonl: Path | None,
    markdown: Path | None,
    budget: float,
    quick: bool,
) -> None:
    """Measure, write and print; exit 1 where a case has an error, 130 where the run was interrupted."""
    cases = select(device, filters)
    if not cases:
        raise typer.BadParameter(f"no {device} case matches {list(filters)}", param_hint="--filter")
    records: list[dict[str, Any]] = []
    machine: dict[str, Any] | None = None
    command = f"flash-mla {' '.join(sys.argv[1:])}"
    try:
        with progress() as bar:
            task = bar.add_task("ceilings", total=len(cases))
            ceilings = measure_ceilings(device, small=quick)
            machine = {
                "device": device,
                "name": device_name(device),
                "torch": torch.__version__,
                "flash_mla": __version__,
                "commit": commit(),
                "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
                "command": command,
                "gbps": ceilings.gbps,
                "tflops": ceilings.tflops,
                "dtype": ceilings.dtype,
                "how": ceilings.how,
            }
            if jsonl is not None:
                report.start_jsonl(jsonl, machine)
            for case in cases:
                bar.update(task, description=case.name)
                seconds = 0.2 if quick else budget
                record = measure(case, device, ceilings, with_peers=with_peers, backend=backend, budget_s=seconds)
                records.append(record)
                if jsonl is not None:
                    report.append_jsonl(jsonl, record)
                bar.advance(task)
    except KeyboardInterrupt:
        interrupted = True
    else:
        interrupted = False
    out = console()
    if machine is not None and records:
        print_tables(out, machine, records)
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(report.markdown(machine, records, command))
    if interrupted:
        out.print(Text(f"interrupted: {len(records)} of {len(cases)} cases were measured", style="bold yellow"))
        raise typer.Exit(INTERRUPTED)
    if any("error" in record for record in records):
        raise typer.Exit(1)


def print_tables(out: Console, machine: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """The machine and a table a group."""
    out.print(report.ceilings_line(machine))
    for group, members in report.groups(records).items():
        columns = report.columns(machine, members)
        table = grid(f"\n{group[0].upper()}{group[1:]}", *(c.header for c in columns), left=2)
        for row in zip(*(c.cells for c in columns), strict=True):
            table.add_row(*row)
        out.print(table)
        for note in report.notes(members):
            out.print(Text(f"- {note}", style="yellow"))
    out.print(Text(f"\n{report.BYTES_NOTE}", style="dim"))
