"""Clocks, ceilings and memory: what is measured and how.

Functions that are compared run alternately in one process, so that a noisy machine slows all of them alike; before each
run a large buffer is written, so that no cache holds the data from the run before (a decode step reads its cache cold:
the model's weights went through in between). On a GPU a run is the replay of a CUDA graph between two events, so that
launch gaps are not in the number.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Ceilings", "alternate", "commit", "device_name", "extra_bytes", "measure_ceilings", "median_ratio"]

FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""More than the last-level caches: 32 MiB of L3 a socket slice on the development CPU, 50 MiB of L2 on an H100."""

MIN_ROUNDS, MAX_ROUNDS = 3, 50

PATIENCE_S = 20.0
"""Of one round: a longer one is the last, so that a peer that crawls here costs two calls and not four."""

GEMM_DTYPES = (torch.bfloat16, torch.float32)
"""What a CPU's GEMM ceiling is looked for in."""

GEMM_SECONDS = 0.5
"""Of one GEMM of a CPU, at most: five run, so that the ceiling takes seconds on any machine."""


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in this run: GB/s (10^9), TFLOP/s (10^12) of a GEMM, and how.

    dtype: of the GEMM, BF16 unless the processor multiplies FP32 faster.
    """

    gbps: float
    tflops: float
    how: str
    dtype: str = "BF16"


def device_name(device: str) -> str:
    """The device's own name, and on a CPU the threads that torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread" + "s" * (threads > 1)


def commit() -> str | None:
    """The commit that this package's sources are at, with "+" where they were changed; None outside of a checkout."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None  # a virtual environment inside of somebody else's checkout
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def measure_ceilings(device: str, *, small: bool = False) -> Ceilings:
    """Memory and GEMM ceilings.

    CPU: the better of two reductions over 512 MiB with all threads (bytes read once), and a GEMM of 4096^3, or smaller
    where that would take long, in the faster of BF16 and FP32: without BF16 instructions torch multiplies BF16 at
    1 GFLOP/s. GPU: a 4 GiB copy (bytes read plus bytes written), and a BF16 GEMM of 8192^3.

    Args:
        small: 1/64 of the bytes and a GEMM of an eighth of the edge, for tests.
    """
    shrink = 64 if small else 1
    passes: dict[str, Callable[[], Tensor]]
    if device == "cuda":
        # NOTE: a kernel, not copy_: in a graph that becomes a memcpy node, which ran at 2.8 TB/s on an H200
        source = torch.empty((1 << 30) // shrink, device=device)
        target = torch.empty_like(source)
        moved, passes = 2 * source.nbytes, {"copy": partial(torch.mul, source, 1.0, out=target)}
        edge, bytes_how = 8192, f"copy of {source.nbytes >> 20} MiB, read + written"
    else:
        source = torch.zeros((512 << 20) // 4 // shrink)
        moved, passes = source.nbytes, {"sum": source.sum, "norm": partial(torch.linalg.vector_norm, source)}
        edge, bytes_how = 4096, f"reduction over {source.nbytes >> 20} MiB, read"
    fastest = min(min(times) for times in alternate(passes, device, budget_s=2.0).values())
    edge = edge // 8 if small else edge
    dtype = torch.bfloat16
    if device == "cpu":
        dtype, edge = fastest_gemm(edge)
    a = torch.randn(edge, edge, device=device).to(dtype)
    gemm = min(alternate({"gemm": lambda: a @ a}, device, budget_s=3.0)["gemm"])
    name = {torch.bfloat16: "BF16", torch.float32: "FP32"}[dtype]
    return Ceilings(moved / fastest / 1e6, 2 * edge**3 / gemm / 1e9, f"{bytes_how}; {name} GEMM of {edge}^3", name)


def fastest_gemm(most: int) -> tuple[torch.dtype, int]:
    """(the dtype in which this CPU multiplies fastest, the largest edge up to `most` whose GEMM takes GEMM_SECONDS).

    Each dtype begins at an edge of 256 and grows only while the next size is expected to stay within the time, so that
    a slow one is left early.
    """
    best: tuple[float, torch.dtype, int] | None = None
    for dtype in GEMM_DTYPES:
        edge, seconds = min(256, most), seconds_of_gemm(min(256, most), dtype)
        while edge < most and seconds * 8 < GEMM_SECONDS:
            edge *= 2
            seconds = seconds_of_gemm(edge, dtype)
        rate = edge**3 / seconds
        if best is None or rate > best[0]:
            best = rate, dtype, edge
    assert best is not None
    return best[1], best[2]


def seconds_of_gemm(edge: int, dtype: torch.dtype) -> float:
    """Of the better of two."""
    a = torch.randn(edge, edge).to(dtype)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def alternate(
    functions: dict[str, Callable[[], Tensor]], device: str, *, budget_s: float = 5.0
) -> dict[str, list[float]]:
    """Milliseconds of each function in each round; a round runs every function once, in order.

    Args:
        functions: name -> function; each runs once before the clock starts.
        budget_s: rounds go on for about so long, but at least MIN_ROUNDS (one, where it takes more than PATIENCE_S) and
            at most MAX_ROUNDS.
    """
    flush = torch.empty(FLUSH_BYTES[device], dtype=torch.int8, device=device)
    clock = _cuda_clock if device == "cuda" else _cpu_clock
    clocks = {name: clock(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + budget_s
    for i in range(MAX_ROUNDS):
        start = time.perf_counter()
        if i >= MIN_ROUNDS and start > end:
            break
        for name, run in clocks.items():
            flush.zero_()
            times[name].append(run())
        if time.perf_counter() - start > PATIENCE_S:
            break
    return times


def _cpu_clock(function: Callable[[], Tensor]) -> Callable[[], float]:
    """A function that runs `function` and gives its milliseconds: by the wall clock, or, where torch has one thread, by
    the CPU's, to which a busy machine adds little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    function()

    def run() -> float:
        start = clock()
        function()
        return (clock() - start) * 1e3

    return run


def _cuda_clock(function: Callable[[], Tensor]) -> Callable[[], float]:
    """A function that replays a CUDA graph of `function` and gives its milliseconds by the GPU's clock."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return run


def median_ratio(times: list[float], ours: list[float]) -> float:
    """Median over the rounds of theirs / ours: each pair ran within one round."""
    return statistics.median(a / b for a, b in zip(times, ours, strict=True))


def extra_bytes(function: Callable[[], Tensor], device: str) -> int:
    """Peak bytes that torch's allocator gave out during one call, its output included, above what was in use before.

    CPU: from the profiler's allocation events, which see every tensor that an op makes inside itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints its start and stop
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        result = function()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak
