"""What a gradient meets: the functions' backward, or an error that says there is none.

The kernels are forward only. An output of inputs that require grad carries a grad_fn all the same, whose backward
raises GradientError: no gradient is dropped in silence. `refusing` does so in eager mode; `refuse_op` gives the custom
ops, which a compiled graph calls, a backward that raises when the graph runs, not when it is traced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_mla.errors import GradientError


def no_backward(function: str) -> NoReturn:
    raise GradientError(
        f"a backward through {function}",
        "a function that has a backward, or inputs that do not require grad",
        f"{function} is forward only: its kernels compute no gradient",
        "Call it under torch.no_grad() or with detached inputs; to train, use "
        "flash_mla.deepseek.flash_attn_varlen_func or torch's scaled_dot_product_attention",
    )


class Refusing(torch.autograd.Function):
    """The identity on a result, in place; its backward raises."""

    @staticmethod
    def forward(ctx: Any, function: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        no_backward(ctx.function)


def refusing(function: str, result: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """The same result, attached to inputs that require grad."""
    return Refusing.apply(function, result, *inputs)


# --- Custom ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flash_mla::no_gradient", mutates_args=())
def no_gradient(gradient: Tensor, shape: list[int], function: str) -> Tensor:
    """Raise GradientError; an op, so that a compiled backward does so when it runs."""
    no_backward(function)


@no_gradient.register_fake
def no_gradient_fake(gradient: Tensor, shape: list[int], function: str) -> Tensor:
    return gradient.new_empty(shape)


def refuse_op(op: Any, function: str) -> None:
    """Register a backward that raises with a functional op that returns (out, lse)."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shapes = [list(x.shape) if isinstance(x, Tensor) else None for x in inputs]
        ctx.kept = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]

    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.shapes, ctx.kept, ctx.needs_input_grad, strict=True)
        return tuple(
            torch.ops.flash_mla.no_gradient(d_out, shape, function) if kept and needs else None
            for shape, kept, needs in wanted
        )

    op.register_autograd(backward, setup_context=setup_context)
