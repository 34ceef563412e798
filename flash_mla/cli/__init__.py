"""The command line: demo, check, bench, plot, info and explain. Needs the extra `flash-mla[cli]`.

This module declares the commands; what one of them needs beyond torch is imported when it runs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f"flash-mla needs {missing.name}: pip install 'flash-mla[cli]'") from missing

import torch

from flash_mla.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="flash-mla",
    help="Attention over paged KV caches: MLA and GQA, on CPUs and GPUs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Backend = Annotated[
    Literal["hopper", "triton", "cpu"] | None,
    typer.Option(help="One backend, without fallback. Default: the first that can."),
]
Filter = Annotated[list[str] | None, typer.Option(help="Only cases whose name contains this; may be repeated.")]
Heads = Annotated[str, typer.Option(help="Query heads, or query/KV heads.")]
Dims = Annotated[str, typer.Option(help="D, or D/Dv where V is narrower.")]


def main() -> None:
    """The entry point of `flash-mla` and `python -m flash_mla`."""
    app()


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flash-mla {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="-v: compiles; -vv: selection too.")] = 0,
) -> None:
    """Attention over paged KV caches: MLA and GQA, on CPUs and GPUs."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("flash_mla").setLevel(level)


def need_device(name: str) -> str:
    """The device's type, made torch's current device where it is numbered, or a usage error."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise typer.BadParameter(f"{name!r}: cpu, cuda or cuda:N", param_hint="--device")
    if device.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device", param_hint="--device")
    if device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            raise typer.BadParameter(f"{name!r}: torch sees {count} CUDA device(s)", param_hint="--device")
        torch.cuda.set_device(device.index)
    return "cuda"


@app.command()
def demo(
    text: Annotated[
        Path | None,
        typer.Argument(help="A file; its bytes are the tokens. Default: a text of ours.", exists=True, dir_okay=False),
    ] = None,
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


@app.command()
def check(
    device: Device = "cpu",
    backend: Backend = None,
    filter: Filter = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Cases side by side: on a GPU most time goes to compiling.")
    ] = 1,
) -> None:
    """Run every function, dtype and edge case against float64, on each backend of this device.

    Exit code 1 where a case fails, or where no backend ran any. Ctrl-C ends it with what ran until then, and exit
    code 130.
    """
    kind = need_device(device)
    from flash_mla.cli.checks import run

    run(kind, backend, filter or (), processes)


@app.command()
def bench(
    device: Device = "cpu",
    filter: Filter = None,
    peers: Annotated[bool, typer.Option(help="Time the peers too, alternately with ours.")] = True,
    backend: Backend = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write the records here, each as it comes.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here as Markdown.")] = None,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds of timing for each case.")] = 5.0,
    quick: Annotated[bool, typer.Option(help="Small ceilings and few rounds: to see that it works.")] = False,
) -> None:
    """Time the public functions and their peers, beside the ceilings of this device measured in the same run.

    Ctrl-C ends it with the tables of what was measured until then, and exit code 130.
    """
    kind = need_device(device)
    from flash_mla.cli.timings import run

    run(kind, filter or (), backend, with_peers=peers, jsonl=jsonl, markdown=markdown, budget=budget, quick=quick)


@app.command()
def plot(
    jsonl: Annotated[Path, typer.Argument(help="What `bench --jsonl` wrote.", exists=True, dir_okay=False)],
    out: Annotated[
        Path | None, typer.Option(help="The roofline, .png or .svg. Default: beside the input. The bars: NAME-peers.")
    ] = None,
) -> None:
    """Draw a roofline and bars of the time that peers take, from the bench's records."""
    try:
        from flash_mla.bench import plot as drawing
        from flash_mla.bench.report import read_jsonl
    except ModuleNotFoundError as missing:
        raise typer.BadParameter(f"needs {missing.name}: pip install 'flash-mla[cli]'") from missing
    target = out or jsonl.with_suffix(".png")
    try:
        machine, records = read_jsonl(jsonl)
        for path in drawing.draw(machine, records, target):
            typer.echo(f"wrote {path}")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="JSONL") from error


@app.command()
def info() -> None:
    """Show versions and devices, who serves which kind of problem here, and what is missing for the others."""
    from flash_mla.cli.machine import run

    run()


@app.command()
def explain(
    phase: Annotated[Literal["decode", "prefill"], typer.Argument(help="The kind of call.")] = "decode",
    heads: Heads = "128/1",
    dims: Dims = "576/512",
    dtype: Annotated[Literal["bf16", "fp16", "fp32", "fp8"], typer.Option(help="Of q and the cache.")] = "bf16",
    batch: Annotated[int, typer.Option(min=0, help="B.")] = 8,
    length: Annotated[int, typer.Option(min=0, help="Tokens a request.")] = 4096,
    queries: Annotated[int, typer.Option(min=1, help="S_q, new tokens a request (decode).")] = 1,
    mask: Annotated[Literal["bool", "float"] | None, typer.Option(help="With a mask.")] = None,
    sink: Annotated[bool, typer.Option(help="With an attention sink.")] = False,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Tell which backend would serve a call on this machine, and why each other one refuses it."""
    kind = need_device(device)
    from flash_mla.cli.machine import explain_call

    told = explain_call(
        phase, heads, dims, dtype, batch, length, queries=queries, mask=mask, sink=sink, device=kind, backend=backend
    )
    typer.echo(str(told))
    if told.backend is None:
        raise typer.Exit(1)
