"""Random calls of every public function; `python -m tests.fuzz` makes any number of them."""

from __future__ import annotations

import pytest
from fuzz.runner import Options, run

CALLS = 250


@pytest.mark.parametrize("seed", range(2026, 2030))
def test_random_calls(seed: int) -> None:
    """One process a seed, so that two workers share the seeds."""
    report = run(Options(calls=CALLS, seed=seed))
    assert report.failures == []
    assert report.made == CALLS
