"""One set-up for every test: two threads, the DSL compiling for Hopper, and hypothesis without a clock or chance."""

from __future__ import annotations

import os

# NOTE: threads that spin at a barrier made the suite four times slower on cores shared with other work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# NOTE: numpy's matrix products, of small tiles in Triton's interpreter, take twice the CPU time on two threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# NOTE: read when the DSL is first imported
os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import pytest
import torch
from hypothesis import HealthCheck, settings

from flash_mla.backends.cpu import engine
from flash_mla.plan import plan

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import speed_up

    speed_up()

torch.set_num_threads(2)
settings.register_profile(
    "flash_mla",
    deadline=None,
    derandomize=True,
    max_examples=8 if os.environ.get("TRITON_INTERPRET") == "1" else 40,  # the interpreter takes a second an example
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("flash_mla")


MORE_GPUS = {"sm_89", "sm_120", "gfx942"}
"""Compile gates of these are `slow`: `make gates` runs them, and .ci/run leaves them out for its time."""


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        compiles = item.get_closest_marker("compile")
        assert not compiles or item.path.stem.endswith("_compile"), f"the Makefile does not look for {item.nodeid}"
        if compiles and MORE_GPUS & {x for x in parameters if isinstance(x, str)}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", params=["kernels", "torch"])
def cpu_engine(request):
    """What the CPU backend runs: its compiled kernels, and torch's ops, which serve where llvmlite is missing."""
    if os.environ.get("TRITON_INTERPRET") == "1" and request.param == "torch":
        pytest.skip("the interpreter runs another backend")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(engine, "missing", lambda: "llvmlite is hidden by a test")
        else:
            assert engine.missing() is None
        forget_plans()
        yield request.param
    forget_plans()


def forget_plans():
    """A plan holds the backend's module that was chosen."""
    plan.cache_clear()
