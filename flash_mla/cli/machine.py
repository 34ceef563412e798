"""`flash-mla info` and `flash-mla explain`: what this machine has, who serves what on it, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flash_mla import backends, contract
from flash_mla.backends import ORDER
from flash_mla.backends.cpu import engine
from flash_mla.bench.timing import device_name
from flash_mla.cli.terminal import console, grid
from flash_mla.errors import FlashMLAError
from flash_mla.explanation import Explanation, explain_problem
from flash_mla.problem import BLOCK, FP8, DecodeProblem, PrefillProblem
from flash_mla.version import __version__

Problem = DecodeProblem | PrefillProblem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}


def sample_decode(
    Hq: int, Hk: int, D: int, Dv: int, dtype: torch.dtype, S_q: int = 1, B: int = 8, S: int = 4096, **options: Any
) -> Problem:
    """The problem of a decode call on B requests of up to S tokens, made from tensors without memory."""
    blocks = -(-S // BLOCK)
    q = torch.empty(B, Hq, S_q, D, dtype=dtype, device="meta")
    k = torch.empty(B, Hk, blocks, BLOCK, D, dtype=dtype, device="meta")
    v = k[..., :Dv] if Dv < D else torch.empty(B, Hk, blocks, BLOCK, Dv, dtype=dtype, device="meta")
    table, lengths = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((B, blocks), (B,)))
    return contract.decode(contract.DecodeCall(q, k, v, table, lengths))._replace(**options)


def sample_prefill(
    Hq: int, Hk: int, D: int, Dv: int, dtype: torch.dtype, B: int = 1, P: int = 4096, **options: Any
) -> Problem:
    """The problem of a causal prefill of P tokens, made from tensors without memory."""
    q, k, v = (
        torch.empty(B, heads, P, width, dtype=dtype, device="meta") for heads, width in ((Hq, D), (Hk, D), (Hk, Dv))
    )
    return contract.prefill(contract.PrefillCall(q, k, v, None, None, True))._replace(**options)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "decode MLA 576/512, 128 heads, BF16": lambda: sample_decode(128, 1, 576, 512, BF16),
    "decode MLA 576/512, 16 heads, BF16": lambda: sample_decode(16, 1, 576, 512, BF16),
    "decode MLA 576/512, S_q 2, BF16": lambda: sample_decode(128, 1, 576, 512, BF16, 2),
    "decode MLA 576/512, FP8": lambda: sample_decode(128, 1, 576, 512, FP8, descale=True),
    "decode GQA 32/8, D 128, BF16": lambda: sample_decode(32, 8, 128, 128, BF16),
    "decode GQA 32/8, D 128, FP16": lambda: sample_decode(32, 8, 128, 128, FP16),
    "decode GQA 32/8, D 128, FP8": lambda: sample_decode(32, 8, 128, 128, FP8, descale=True),
    "decode GQA 32/8, D 128, FP32": lambda: sample_decode(32, 8, 128, 128, FP32),
    "decode GQA 32/8, D 72, BF16": lambda: sample_decode(32, 8, 72, 72, BF16),
    "decode GQA, bool mask": lambda: sample_decode(32, 8, 128, 128, BF16, mask="bool"),
    "decode GQA, attention sink": lambda: sample_decode(32, 8, 128, 128, BF16, sink=True),
    "prefill causal, D 128, BF16": lambda: sample_prefill(32, 32, 128, 128, BF16),
    "prefill causal, D 192/128, BF16": lambda: sample_prefill(32, 32, 192, 128, BF16),
    "prefill causal, D 128, FP8": lambda: sample_prefill(32, 32, 128, 128, FP8, descale=True),
    "prefill block-sparse, BF16": lambda: sample_prefill(32, 32, 128, 128, BF16, causal=False, block_mask=True),
    "prefill, float mask, BF16": lambda: sample_prefill(32, 32, 128, 128, BF16, causal=False, mask="float"),
}
"""What callers ask for most, each by a name."""


# --- info -------------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "llvmlite", "triton", "nvidia-cutlass-dsl", "transformers", "matplotlib")

EXTRAS = {
    "hopper": {"nvidia-cutlass-dsl": "flash-mla[hopper]", "apache-tvm-ffi": "flash-mla[hopper]"},
    "triton": {"triton": "triton"},
    "cpu": {"llvmlite": "flash-mla[cpu]"},
}
"""The packages behind each backend, and what pip installs them with (torch for CUDA brings Triton along)."""


def run() -> None:
    """Print it all; nothing is wider than the terminal, down to 40 columns."""
    out = console()
    versions = grid("Versions", "package", "version", left=2, wrap=True)
    versions.add_row("flash_mla", __version__)
    versions.add_row("python", platform.python_version())
    for name in PACKAGES:
        versions.add_row(name, installed(name) or "not installed")
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

    states = grid("\nBackends", "backend", "here", left=2, wrap=True)
    for name in ORDER:
        states.add_row(name, Text("\n".join(state(name))))  # Text: rich takes [hopper] in a string for a style
    out.print(states)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print_serving(out, device, [name for name in ORDER if backends.backend(name).available() is None])


def state(name: str) -> list[str]:
    """Whether a backend runs here, and which packages it lacks, with the command that brings them."""
    reason = backends.backend(name).available()
    lines = ["runs" if reason is None else f"cannot run: {reason}"]
    if name == "cpu" and (why := engine.missing()):
        lines = [f"runs torch's ops, not its own kernels: {why}"]
    lacking = [package for package in EXTRAS[name] if installed(package) is None]
    if lacking:
        wanted = dict.fromkeys(EXTRAS[name][package] for package in lacking)
        lines.append(f"missing {', '.join(lacking)}:")
        lines += [f"pip install '{what}'" for what in wanted]
    return lines


def print_serving(out: Console, device: str, names: list[str]) -> None:
    """Problem by backend: who serves it on that device, who could, and in numbered notes why the others refuse."""
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    reasons: dict[str, int] = {}
    table: Table = grid(f"\nWho serves what on {device}", "problem", *names, left=1 + len(names), wrap=True)
    for label, build in PROBLEMS.items():
        told = explain_problem(label, build()._replace(device=target))
        cells = []
        for name in names:
            if name in told.refusals:
                number = reasons.setdefault(f"{name}: {told.refusals[name]}", len(reasons) + 1)
                cells.append(Text(f"no [{number}]", style="dim"))
            else:
                cells.append(Text("serves", style="green") if name == told.backend else Text("could", style="dim"))
        table.add_row(label, *cells)
    out.print(table)
    for reason, number in reasons.items():
        out.print(Text(f"[{number}] {reason}", style="dim"))


def installed(name: str) -> str | None:
    """A distribution's version, or None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- explain ----------------------------------------------------------------------------------------------------------


def explain_call(
    phase: str,
    heads: str,
    dims: str,
    dtype: str,
    batch: int,
    length: int,
    *,
    queries: int,
    mask: str | None,
    sink: bool,
    device: str,
    backend: str | None,
) -> Explanation:
    """Who would serve a call of that kind; usage errors for sizes that no call can have."""
    Hq, Hk = pair("--heads", heads)
    D, Dv = pair("--dims", dims)
    target = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    options = {"device": target, "mask": mask or "none", "sink": sink, "descale": dtype == "fp8"}
    try:
        if phase == "decode":
            problem = sample_decode(Hq, Hk, D, Dv, DTYPES[dtype], queries, batch, length, **options)
        else:
            causal = mask is None
            problem = sample_prefill(Hq, Hk, D, Dv, DTYPES[dtype], batch, length, causal=causal, **options)
    except FlashMLAError as error:
        raise typer.BadParameter(str(error)) from error
    return explain_problem(phase, problem, backend)


def pair(option: str, text: str) -> tuple[int, int]:
    """`128/1` as two numbers; one number stands for both."""
    parts = text.split("/")
    if not (1 <= len(parts) <= 2 and all(part.isdigit() for part in parts)):
        raise typer.BadParameter(f"{text!r}: a number, or two with a slash between them", param_hint=option)
    return int(parts[0]), int(parts[-1])
