"""Random calls of every public function, for about three minutes; `python -m tests.fuzz` makes any number of them."""

from __future__ import annotations

from fuzz.runner import Options, run

CALLS = 2000


def test_random_calls() -> None:
    report = run(Options(calls=CALLS, seed=2026), processes=2)
    assert report.failures == []
    assert report.made == CALLS
