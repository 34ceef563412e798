"""`flash-mla check`: every case of `testing` on every backend of a device."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from flash_mla import backends, testing
from flash_mla.backends import ORDER
from flash_mla.cli.machine import PROBLEMS
from flash_mla.cli.terminal import INTERRUPTED, console, grid, progress

HEADERS = (
    *("function", "case", "dtype", "backend"),
    *("max error\n/ max out", "cosine\ndistance", "lse\nerror"),
)


def run(device: str, backend: str | None, filters: Sequence[str], processes: int) -> None:
    """Print a row a case, what fails on stderr as it comes; exit 1 where one fails, none ran or a process died."""
    cases = [c for c in testing.CASES if not filters or any(f in c.name for f in filters)]
    if not cases:
        raise typer.BadParameter(f"no case matches {list(filters)}", param_hint="--filter")
    out = console()
    names = usable(out, device) if backend is None else [backend]
    calls = [replace(spec, device=device, backend=name) for spec in cases for name in names]
    found: dict[testing.Case, testing.Result] = {}
    ended = None
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(calls))
            each = in_turn(calls, bar, task) if processes == 1 else side_by_side(calls, processes)
            for result in each:
                found[result.case] = result
                bar.update(task, description=f"{result.case.backend} {result.case.name}", advance=1)
                if result.failures:
                    # at once, for a run that does not reach its end
                    bar.console.print(Text(str(result), style="red"))
                if any("CUDA error" in failure for failure in result.failures):
                    ended = "a CUDA error"  # what its process runs after it fails too, whatever it is
                    break
    except KeyboardInterrupt:
        ended = "interrupted"
    except BrokenProcessPool:
        ended = "a process died"
    results = [found[call] for call in calls if call in found]

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
    told = f"{passed} passed, {failed} failed, {refusals.total()} refused, in {seconds:.0f} s"
    if ended is not None:
        out.print(Text(f"{ended}: {len(results)} of {len(calls)} ran: {told}", style="bold yellow"))
        raise typer.Exit(INTERRUPTED if ended == "interrupted" else 1)
    out.print(told)
    if failed or not passed:
        raise typer.Exit(1)


def in_turn(calls: Sequence[testing.Case], bar: Progress, task: TaskID) -> Iterator[testing.Result]:
    """The results of `calls`, one after the other; the bar names the one that runs."""
    for call in calls:
        bar.update(task, description=f"{call.backend} {call.name}")
        yield run_case(call)


def side_by_side(calls: Sequence[testing.Case], processes: int) -> Iterator[testing.Result]:
    """The results of `calls` as they come from so many processes, which share this one's device and its cores."""
    threads = max(1, torch.get_num_threads() // processes)
    card = torch.cuda.current_device() if calls[0].device == "cuda" else None
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare, (threads, card)) as pool:
        try:
            for future in as_completed([pool.submit(run_case, call) for call in calls]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prepare(threads: int, card: int | None) -> None:
    """Begin a process of `side_by_side`: Ctrl-C, which reaches it too, ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
    if card is not None:
        torch.cuda.set_device(card)


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
