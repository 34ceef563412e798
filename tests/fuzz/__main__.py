"""The command line: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback

from .runner import Options, draw_case, run, work


def dims(text: str) -> tuple[int, int]:
    """ "128" or "576/512"."""
    D, _, Dv = text.partition("/")
    return int(D), int(Dv or D)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random calls against float64.")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="name it in every call; what it does not run is skipped")
    parser.add_argument("--shapes", type=int, default=0, help="different shapes (kernels to compile); 0: one a call")
    parser.add_argument("--dims", type=dims, nargs="*", default=[], help="head dims, such as 128 576/512")
    parser.add_argument("--functions", nargs="*", default=[], help="kinds of call, such as decode prefill varlen")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--only", type=int, help="make this call alone, and show where it failed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        fields, first, step = json.loads(given.worker)
        fields["dims"] = tuple(tuple(pair) for pair in fields["dims"])
        fields["functions"] = tuple(fields["functions"])
        work(Options(**fields), first, step)
        return 0
    options = Options(
        given.calls, given.seed, given.device, given.backend, given.shapes, tuple(given.dims), tuple(given.functions),
        given.minutes,
    )  # fmt: skip
    if given.only is not None:
        _, case = draw_case(options, given.only)
        print(case)
        print("expected:", case.fault or "right")
        failures = case.judge(given.backend)
        print("\n".join(failures) or "as it should be")
        if failures:
            try:
                with case.inside():
                    case.run()
            except Exception:
                traceback.print_exc()
        return bool(failures)
    start = time.monotonic()
    report = run(options, given.processes)
    print(f"{report.made} calls, {len(report.failures)} failures, {time.monotonic() - start:.0f} s")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
