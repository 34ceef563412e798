"""The public functions' types as a strict checker sees them, with the settings and the cache of `make types`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_user_code_passes_strict_mypy() -> None:
    command = [sys.executable, "-m", "mypy", str(HERE / "user_code.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
