"""One set-up for every test: two threads, the DSL compiling for Hopper, and hypothesis without a clock or chance."""

from __future__ import annotations

import os

# NOTE: threads that spin at a barrier made the suite four times slower on cores shared with other work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# NOTE: read when the DSL is first imported
os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(2)
settings.register_profile(
    "flash_mla",
    deadline=None,
    derandomize=True,
    max_examples=8 if os.environ.get("TRITON_INTERPRET") == "1" else 40,  # the interpreter takes seconds an example
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("flash_mla")
