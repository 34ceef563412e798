"""The call that no graph holds. Apart, because `torch.compiler.disable` imports all of torch's compiler: seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P_ = ParamSpec("P_")
R_ = TypeVar("R_")


@torch.compiler.disable(
    reason="mha_fwd_kvcache writes into a pool (stride 0 on the batch dim), and a graph cannot declare that it writes "
    "to an expanded tensor: the graph breaks here. Compile without fullgraph=True, or write the rows before the graph "
    "and call without k and v in it",
)
def write_pool(function: Callable[P_, R_], *args: P_.args, **kwargs: P_.kwargs) -> R_:
    """The function, in eager mode."""
    return function(*args, **kwargs)
