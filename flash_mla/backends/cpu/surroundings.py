"""A launch outside of what the caller has set for torch: autocast, a default device, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec

import torch

P_ = ParamSpec("P_")


def undisturbed(launch: Callable[P_, None]) -> Callable[P_, None]:
    """The launch in inference mode (a cache made in it can then be written), without autocast, its tensors on the CPU.

    The default dtype is process-wide, so that no context can change it: constructors name theirs.
    """

    @functools.wraps(launch)
    def call(*args: P_.args, **kwargs: P_.kwargs) -> None:
        with torch.inference_mode(), ExitStack() as around:
            # NOTE: entered where needed alone: a default device makes every torch call inside slower, by about 1 us
            if torch.is_autocast_enabled("cpu"):
                around.enter_context(torch.autocast("cpu", enabled=False))
            if torch.get_default_device().type != "cpu":
                around.enter_context(torch.device("cpu"))
            launch(*args, **kwargs)

    return call
