"""`flash-mla check`: every case of `testing` on every backend of a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
import typer
from rich.console import Console
from rich.text import Text

from flash_mla import backends, testing
from flash_mla.backends import ORDER
from flash_mla.cli.machine import PROBLEMS
from flash_mla.cli.terminal import console, grid, progress

HEADERS = (
    *("function", "case", "dtype", "backend"),
    *("max error\n/ max out", "cosine\ndistance", "lse\nerror"),
)


def run(device: str, backend: str | None, filters: Sequence[str]) -> None:
    """Print a row a case, what fails on stderr as it comes; exit 1 where one fails, or none ran."""
    cases = [c for c in testing.CASES if not filters or any(f in c.name for f in filters)]
    if not cases:
        raise typer.BadParameter(f"no case matches {list(filters)}", param_hint="--filter")
    out = console()
    names = usable(out, device) if backend is None else [backend]
    results: list[testing.Result] = []
    with progress() as bar:
        task = bar.add_task("", total=len(cases) * len(names))
        for spec in cases:
            for name in names:
                bar.update(task, description=f"{name} {spec.name}")
                results.append(run_case(replace(spec, device=device, backend=name)))
                if results[-1].failures:
                    # at once, for a run that does not reach its end
                    bar.console.print(Text(str(results[-1]), style="red"))
                bar.advance(task)

    table = grid("Check", *HEADERS, left=4)
    table.add_column("result", vertical="bottom")
    refusals = Counter((r.case.backend, r.refused) for r in results if r.refused is not None)
    failed = sum(bool(r.failures) for r in results)
    for result in results:
        if result.refused is None:
            table.add_row(*row(result))
    out.print(table)
    for (refuser, reason), count in refusals.items():
        out.print(Text(f"- {refuser} refused {count}: {reason}", style="yellow"))
    passed = sum(r.passed for r in results)
    seconds = sum(r.seconds for r in results)
    out.print(f"{passed} passed, {failed} failed, {refusals.total()} refused, in {seconds:.0f} s")
    if failed or not passed:
        raise typer.Exit(1)


def run_case(case: testing.Case) -> testing.Result:
    """testing.run, where any exception is that case's failure: it must not hide the rows after it."""
    try:
        return testing.run(case)
    except Exception as error:
        return testing.Result(case, None, (f"{type(error).__name__}: {error}",))


def row(result: testing.Result) -> list[str | Text]:
    """The row of a case that ran, or that raised an error before it gave anything to judge."""
    spec, verdict = result.case, result.verdict
    errors = (verdict.out_error, verdict.cosine, verdict.lse_error) if verdict is not None else ()
    return [
        *(spec.function, spec.name, str(spec.dtype).removeprefix("torch."), spec.backend or ""),
        *([f"{x:.1e}" for x in errors] or ["", "", ""]),
        Text("passed", style="green") if result.passed else Text("FAILED", style="bold red"),
    ]


def usable(out: Console, device: str) -> list[str]:
    """The backends that run here and take a device's tensors at all; why the others do not is printed."""
    names = []
    for name in ORDER:
        chosen = [backends.choose(name, build()._replace(device=torch.device(device))) for build in PROBLEMS.values()]
        if all(isinstance(reason, str) for reason in chosen):
            out.print(Text(f"- backend {name} does not run on {device}: {chosen[0]}", style="yellow"))
        else:
            names.append(name)
    return names
