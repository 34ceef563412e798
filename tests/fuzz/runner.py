"""Workers that make calls, and the parent that counts their failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread

from .draw import Draw

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """What to fuzz.

    Attributes:
        calls: how many, over all processes.
        seed: of the first process; each has its own numbers.
        backend: named in every call, or None.
        functions: whose names contain one of these words; empty: all.
        minutes: stop then, however many calls were made; 0: no limit.
    """

    calls: int = 1000
    seed: int = 0
    device: str = "cpu"
    backend: str | None = None
    shapes: int = 0
    dims: tuple[tuple[int, int], ...] = ()
    functions: tuple[str, ...] = ()
    minutes: float = 0.0


@dataclass
class Report:
    """What came of it."""

    made: int = 0
    failures: list[str] = field(default_factory=list)


def makers(functions: tuple[str, ...]) -> list[Callable]:
    """The kinds of call, each as often as it is drawn."""
    from . import attention, drawn, dropin, pools, stores

    weights = {
        attention.decode: 8, attention.prefill: 6, attention.mha: 6, attention.metadata: 2, dropin.dense: 3,
        dropin.sparse_decode: 3, dropin.sparse_prefill: 2, dropin.varlen: 3, dropin.pool_indices: 1,
        dropin.ragged_indices: 1, stores.paged_cache: 2, stores.fp8: 1, stores.row_format: 1, stores.block_layout: 1,
        stores.merged: 1, stores.appended: 1, pools.pages: 2, drawn.training: 1, drawn.sparse_training: 1,
        drawn.varlen_training: 1, drawn.ragged_index: 1, drawn.paged_index: 1, drawn.topk: 1,
    }  # fmt: skip
    return [
        maker
        for maker, n in weights.items()
        for _ in range(n)
        if not functions or any(word in maker.__name__ for word in functions)
    ]


def draw_case(options: Options, number: int):
    """(the draw, the case) of one call."""
    draw = Draw(options.seed, number, options.device, options.shapes, options.dims)
    maker = draw.pick(makers(options.functions))
    return draw, maker(draw, options.backend)


def work(options: Options, first: int, step: int) -> None:
    """Make the calls first, first + step, ...; one line of JSON for each event."""
    import torch

    torch.set_num_threads(1)

    def say(**event: object) -> None:
        print(json.dumps(event), flush=True)

    for number in range(first, options.calls, step):
        say(begin=number)
        case = None
        try:
            _, case = draw_case(options, number)
            failures = case.judge(options.backend)
        except Exception as error:
            if "CUDA" in str(error) or "illegal memory" in str(error):
                say(number=number, failure=f"{case}: {str(error).splitlines()[0]}")
                os._exit(9)
            failures = [f"the fuzz itself: {traceback.format_exc()[-700:]}"]
        for failure in failures:
            say(number=number, failure=f"{case}: {failure}")
    say(end=True)


def watch(options: Options, first: int, step: int, report: Report, lock: Lock, until: float) -> None:
    """Run workers over one range of numbers until it is done."""
    number, silent = first, 0
    while number < options.calls:
        command = [sys.executable, "-m", "tests.fuzz", "--worker", json.dumps([vars(options), number, step])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        tail: list[str] = []
        reader = Thread(target=lambda: tail.extend(process.stderr.read().splitlines()[-5:]), daemon=True)  # noqa: B023
        reader.start()
        done, current, told = False, None, False
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if "begin" in event:
                current, told, silent = event["begin"], False, 0
                with lock:
                    report.made += 1
            elif "failure" in event:
                told = True
                with lock:
                    report.failures.append(
                        f"[seed {options.seed} call {event['number']}] {' '.join(event['failure'].split())}"
                    )
                    print(report.failures[-1], flush=True)
            done = done or "end" in event
            if until and time.monotonic() > until:
                process.kill()
                process.wait()
                return
        code = process.wait()
        reader.join(5)
        if done:
            return
        if current is None:
            silent += 1
            if silent > 2:
                with lock:
                    report.failures.append(f"[seed {options.seed}] workers do not start: {' '.join(tail)}")
                return
            continue
        if not told:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            with lock:
                report.failures.append(f"[seed {options.seed} call {current}] the process died: {name} {tail[-1:]}")
                print(report.failures[-1], flush=True)
        number = current + step


def run(options: Options, processes: int = 1) -> Report:
    """Make the calls in so many processes."""
    report, lock = Report(), Lock()
    until = time.monotonic() + 60 * options.minutes if options.minutes else 0.0
    threads = [Thread(target=watch, args=(options, i, processes, report, lock, until)) for i in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report
