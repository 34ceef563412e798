"""Where compiled kernels are kept: `cute.compile` takes seconds and keeps nothing, so every process would pay again.

A kernel is compiled once for each (kernel, config, architecture, version of the DSL, sources of this tree), written
to an object file under `$XDG_CACHE_HOME/flash_mla` (default `~/.cache/flash_mla`), and loaded from there by every later
process in tens of milliseconds. A changed source is a new key; old files are left alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

ARCH = "sm_90a"
logger = logging.getLogger("flash_mla")
COMPILING = threading.Lock()
"""The DSL traces into a state of the whole process: two threads that compiled at once got errors of its own."""


def directory() -> Path:
    """Where compiled kernels lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flash_mla"


def path(name: str, config: Hashable) -> Path:
    """The object file of a kernel."""
    key = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        key.update(source.read_bytes())
    for part in (name, config, ARCH, importlib.metadata.version("nvidia-cutlass-dsl")):
        key.update(repr(part).encode())
    return directory() / f"{name}-{key.hexdigest()[:24]}.o"


@functools.cache
def load(name: str, config: Hashable, build: Callable[[Any], Any]) -> Callable[..., None]:
    """The callable of a kernel, from the store; compiled with `build(config)` and stored when it is not there.

    Logs what it compiles, and how long it took.
    """
    import cutlass.cute as cute

    with COMPILING:
        file = path(name, config)
        if not file.exists():
            started = time.monotonic()
            logger.info("compiling %s %s for %s", name, config, ARCH)
            os.environ.setdefault("CUTE_DSL_ARCH", ARCH)
            compiled = build(config)
            file.parent.mkdir(parents=True, exist_ok=True)
            # NOTE: written aside and renamed, so that a process beside this one never reads half a file
            with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
                part = Path(scratch) / file.name
                compiled.export_to_c(str(part), function_name=name)
                part.replace(file)
            logger.info("compiled %s in %.0f s, kept in %s", name, time.monotonic() - started, file.parent)
        return getattr(cute.runtime.load_module(str(file), enable_tvm_ffi=True), name)
