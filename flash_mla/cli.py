"""The command line: demo, check, bench, plot and info. Needs the extra `flash-mla[cli]`."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    raise SystemExit(f"flash-mla needs {missing.name}: pip install 'flash-mla[cli]'") from missing

import torch

from flash_mla import __version__, backends, contract, testing
from flash_mla.backends import ORDER
from flash_mla.backends.cpu import engine
from flash_mla.bench import report
from flash_mla.bench.measure import measure, select
from flash_mla.bench.timing import device_name, measure_ceilings
from flash_mla.problem import FP8, DecodeProblem, PrefillProblem

__all__ = ["app", "main"]

app = typer.Typer(
    name="flash-mla",
    help="Attention over paged KV caches: MLA and GQA, on CPUs and GPUs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

WIDTH = 160
"""Columns where the output is no terminal: rich would take 80 and cut the tables."""

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Backend = Annotated[str | None, typer.Option(help="One backend, without fallback. Default: the first that can.")]
Filter = Annotated[list[str] | None, typer.Option(help="Only cases whose name contains this; may be repeated.")]


def main() -> None:
    """The entry point of `flash-mla` and `python -m flash_mla`."""
    app()


def console(stderr: bool = False) -> Console:
    """Where output goes; made for each command, so that it follows a replaced sys.stdout."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def progress() -> Progress:
    """A bar on stderr, so that stdout holds the tables alone."""
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*bar, console=console(stderr=True), transient=True)


def need_device(device: str) -> str:
    """The device, or a usage error where it is not there."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r}: cpu or cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device", param_hint="--device")
    return device


def grid(title: str, *headers: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are right-aligned numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < left else "right", no_wrap=i == 0, vertical="bottom")
    return table


# --- demo -------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    text: Annotated[Path, typer.Argument(help="A text file; its bytes are the tokens.", exists=True, dir_okay=False)],
    device: Device = "cpu",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for each request.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Requests, of different lengths, cut from the text.")] = 4,
) -> None:
    """Generate from a random DeepSeek-V3-shaped model on the paged latent cache, checked against eager attention."""
    try:
        from flash_mla.demo import demo as run
    except ModuleNotFoundError as missing:
        raise typer.BadParameter(f"needs {missing.name}: pip install 'flash-mla[transformers]'") from missing
    run(text, device=need_device(device), tokens=tokens, batch=batch)


# --- check ------------------------------------------------------------------------------------------------------------


@app.command()
def check(device: Device = "cpu", backend: Backend = None, filter: Filter = None) -> None:
    """Run every function, dtype and edge case against float64, on each backend of this device.

    Exit code 1 where a case fails, or where no backend ran any.
    """
    need_device(device)
    cases = [c for c in testing.CASES if not filter or any(f in c.name for f in filter)]
    if not cases:
        raise typer.BadParameter(f"no case matches {filter}", param_hint="--filter")
    out = console()
    names = usable(out, device) if backend is None else [backend]
    results: list[testing.Result] = []
    with progress() as bar:
        task = bar.add_task("", total=len(cases) * len(names))
        for spec in cases:
            for name in names:
                bar.update(task, description=f"{name} {spec.name}")
                results.append(run_case(replace(spec, device=device, backend=name)))
                bar.advance(task)

    table = grid("Check", *CHECK_HEADERS, left=4)
    table.add_column("result", vertical="bottom")
    refusals = Counter((r.case.backend, r.refused) for r in results if r.refused is not None)
    failed = [r for r in results if r.failures]
    for result in results:
        if result.refused is None:
            table.add_row(*check_row(result))
    out.print(table)
    for (refuser, reason), count in refusals.items():
        out.print(Text(f"- {refuser} refused {count}: {reason}", style="yellow"))
    for result in failed:
        out.print(Text(str(result), style="red"))
    passed = sum(r.passed for r in results)
    seconds = sum(r.seconds for r in results)
    out.print(f"{passed} passed, {len(failed)} failed, {refusals.total()} refused, in {seconds:.0f} s")
    if failed or not passed:
        raise typer.Exit(1)


CHECK_HEADERS = (
    *("function", "case", "dtype", "backend"),
    *("max error\n/ max out", "cosine\ndistance", "lse\nerror"),
)


def run_case(case: testing.Case) -> testing.Result:
    """testing.run, where any exception is that case's failure: it must not hide the rows after it."""
    try:
        return testing.run(case)
    except Exception as error:
        return testing.Result(case, None, (f"{type(error).__name__}: {error}",))


def check_row(result: testing.Result) -> list[str | Text]:
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


# --- bench ------------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    device: Device = "cpu",
    filter: Filter = None,
    peers: Annotated[bool, typer.Option(help="Time the peers too, alternately with ours.")] = True,
    backend: Backend = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write the records here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here as Markdown.")] = None,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds of timing for each case.")] = 5.0,
    quick: Annotated[bool, typer.Option(help="Small ceilings and few rounds: to see that it works.")] = False,
) -> None:
    """Time the public functions and their peers, beside the ceilings of this device measured in the same run."""
    need_device(device)
    cases = select(device, filter or ())
    if not cases:
        raise typer.BadParameter(f"no {device} case matches {filter}", param_hint="--filter")
    out = console()
    records: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("ceilings", total=len(cases))
        ceilings = measure_ceilings(device, small=quick)
        machine = {
            "device": device,
            "name": device_name(device),
            "torch": torch.__version__,
            "flash_mla": __version__,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "gbps": ceilings.gbps,
            "tflops": ceilings.tflops,
            "how": ceilings.how,
        }
        for case in cases:
            bar.update(task, description=case.name)
            seconds = 0.2 if quick else budget
            records.append(measure(case, device, ceilings, with_peers=peers, backend=backend, budget_s=seconds))
            bar.advance(task)
    out.print(report.ceilings_line(machine))
    for group, members in report.groups(records).items():
        table_columns = report.columns(machine, members)
        table = grid(f"\n{group[0].upper()}{group[1:]}", *(c.header for c in table_columns), left=2)
        for row in zip(*(c.cells for c in table_columns), strict=True):
            table.add_row(*row)
        out.print(table)
        for note in report.notes(members):
            out.print(Text(f"- {note}", style="yellow"))
    out.print(Text(f"\n{report.BYTES_NOTE}", style="dim"))
    if jsonl is not None:
        report.write_jsonl(jsonl, machine, records)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(report.markdown(machine, records, f"flash-mla {' '.join(sys.argv[1:])}"))
    if any("error" in record for record in records):
        raise typer.Exit(1)


@app.command()
def plot(
    jsonl: Annotated[Path, typer.Argument(help="What `bench --jsonl` wrote.", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="The PNG. Default: beside the input.")] = None,
) -> None:
    """Draw a roofline from the bench's records."""
    target = out or jsonl.with_suffix(".png")
    try:
        report.roofline(*report.read_jsonl(jsonl), target)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="JSONL") from error
    console().print(f"wrote {target}")


# --- info -------------------------------------------------------------------------------------------------------------

Problem = DecodeProblem | PrefillProblem


def decode_problem(Hq: int, Hk: int, D: int, Dv: int, dtype: torch.dtype, S_q: int = 1, **options: Any) -> Problem:
    """The problem of a decode call on 8 requests of up to 4096 tokens, made from tensors without memory."""
    q = torch.empty(8, Hq, S_q, D, dtype=dtype, device="meta")
    k = torch.empty(8, Hk, 64, 64, D, dtype=dtype, device="meta")
    v = k[..., :Dv] if Dv < D else torch.empty(8, Hk, 64, 64, Dv, dtype=dtype, device="meta")
    table, lengths = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((8, 64), (8,)))
    return contract.decode(q, k, v, table, lengths, None, (None, None, None), None)._replace(**options)


def prefill_problem(Hq: int, Hk: int, D: int, Dv: int, dtype: torch.dtype, **options: Any) -> Problem:
    """The problem of a causal prefill of 4096 tokens, made from tensors without memory."""
    q, k, v = (
        torch.empty(1, heads, 4096, width, dtype=dtype, device="meta") for heads, width in ((Hq, D), (Hk, D), (Hk, Dv))
    )
    none = (None, None, None)
    return contract.prefill(q, k, v, None, None, none, None, causal=True, block_mask=False)._replace(**options)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "decode MLA 576/512, 128 heads, BF16": lambda: decode_problem(128, 1, 576, 512, BF16),
    "decode MLA 576/512, 16 heads, BF16": lambda: decode_problem(16, 1, 576, 512, BF16),
    "decode MLA 576/512, S_q 2, BF16": lambda: decode_problem(128, 1, 576, 512, BF16, 2),
    "decode MLA 576/512, FP8": lambda: decode_problem(128, 1, 576, 512, FP8, descale=True),
    "decode GQA 32/8, D 128, BF16": lambda: decode_problem(32, 8, 128, 128, BF16),
    "decode GQA 32/8, D 128, FP16": lambda: decode_problem(32, 8, 128, 128, FP16),
    "decode GQA 32/8, D 128, FP8": lambda: decode_problem(32, 8, 128, 128, FP8, descale=True),
    "decode GQA 32/8, D 128, FP32": lambda: decode_problem(32, 8, 128, 128, FP32),
    "decode GQA 32/8, D 72, BF16": lambda: decode_problem(32, 8, 72, 72, BF16),
    "decode GQA, bool mask": lambda: decode_problem(32, 8, 128, 128, BF16, mask="bool"),
    "decode GQA, attention sink": lambda: decode_problem(32, 8, 128, 128, BF16, sink=True),
    "prefill causal, D 128, BF16": lambda: prefill_problem(32, 32, 128, 128, BF16),
    "prefill causal, D 192/128, BF16": lambda: prefill_problem(32, 32, 192, 128, BF16),
    "prefill causal, D 128, FP8": lambda: prefill_problem(32, 32, 128, 128, FP8, descale=True),
    "prefill block-sparse, BF16": lambda: prefill_problem(32, 32, 128, 128, BF16, causal=False, block_mask=True),
    "prefill, float mask, BF16": lambda: prefill_problem(32, 32, 128, 128, BF16, causal=False, mask="float"),
}
"""What callers ask for most, each by a name."""

PACKAGES = ("torch", "llvmlite", "triton", "nvidia-cutlass-dsl", "transformers", "matplotlib")


@app.command()
def info() -> None:
    """Show versions and devices, and for each kind of problem the backend that serves it and why the others refuse."""
    out = console()
    versions = grid("Versions", "package", "version", left=2)
    versions.add_row("flash_mla", __version__)
    versions.add_row("python", platform.python_version())
    for name in PACKAGES:
        versions.add_row(name, installed(name))
    out.print(versions)

    devices = grid("\nDevices", "device", "name", left=2)
    devices.add_row("cpu", device_name("cpu"))
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        devices.add_row(f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {memory}")
    if not torch.cuda.is_available():
        devices.add_row("cuda", Text("none that torch sees", style="dim"))
    out.print(devices)

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        names = [name for name in ORDER if backends.backend(name).available() is None]
        out.print(serving_table(device, names))
    for name in ORDER:
        if reason := backends.backend(name).available():
            out.print(Text(f"- backend {name} cannot run here: {reason}", style="yellow"))
    if reason := engine.missing():
        out.print(Text(f"- backend cpu runs torch's ops, not its own kernels: {reason}", style="yellow"))


def serving_table(device: str, names: list[str]) -> Table:
    """Problem by backend: who serves it on that device, who could, and why the others refuse."""
    table = grid(f"\nWho serves what on {device}", "problem", *names, left=1 + len(names))
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    for label, build in PROBLEMS.items():
        problem = build()._replace(device=target)
        cells, served = [], False
        for name in names:
            reason = backends.choose(name, problem)
            if isinstance(reason, str):
                cells.append(Text(reason, style="dim"))
            else:
                cells.append(Text("could", style="dim") if served else Text("serves", style="green"))
                served = True
        table.add_row(label, *cells)
    return table


def installed(name: str) -> str:
    """A distribution's version, or that it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
