"""What a gradient meets: the functions' backward, or an error that says there is none.

A function with a backward is a custom op, in eager mode too where an input requires grad (`learning`), and its
backward is another one, which torch.compile traces. In eager mode an autograd.Function stands around the two
(`differentiable`), which torch.func transforms. Decode and the functions over a paged cache are forward only. An output
of theirs whose inputs require grad carries a grad_fn all the same, which raises GradientError: no gradient is dropped
in silence. `refusing` does so in eager mode; `refuse_op` gives the custom ops a backward that raises when the graph
runs, not when it is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_mla.errors import GradientError

FORWARD_ONLY = "it is forward only: its kernels compute no gradient"
TO_TRAIN = (
    "Call it under torch.no_grad() or with detached inputs; to train, use flash_mla.flash_mla_prefill or "
    "flash_mla.deepseek.flash_attn_varlen_func"
)


def learning(*inputs: object) -> list[Tensor]:
    """The inputs for which a call records a backward."""
    if not torch.is_grad_enabled():
        return []
    return [x for x in inputs if x is not None and isinstance(x, Tensor) and x.requires_grad]


def transformed() -> bool:
    """Whether torch.func transforms the call: its tensors are wrappers without memory."""
    return torch._C._are_functorch_transforms_active()


def no_backward(function: str, cause: str = FORWARD_ONLY, fix: str = TO_TRAIN) -> NoReturn:
    raise GradientError(
        f"a backward through {function}",
        "a function that has a backward, or inputs that do not require grad",
        f"{function}: {cause}",
        fix,
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
def no_gradient(gradient: Tensor, shape: list[int], function: str, cause: str, fix: str) -> Tensor:
    """Raise GradientError; an op, so that a compiled backward does so when it runs."""
    no_backward(function, cause, fix)


@no_gradient.register_fake
def no_gradient_fake(gradient: Tensor, shape: list[int], function: str, cause: str, fix: str) -> Tensor:
    return gradient.new_empty(shape)


def shapes_of(inputs: Iterable[object]) -> list[list[int] | None]:
    """The shapes of an op's floating inputs; None for others, which have no gradient."""
    return [list(x.shape) if isinstance(x, Tensor) and x.is_floating_point() else None for x in inputs]


def refusals(
    gradient: Tensor, shapes: Iterable[list[int] | None], wanted: Iterable[bool], function: str, *why: str
) -> tuple[Tensor | None, ...]:
    """Gradients that raise when they are computed, one for each wanted one of a floating input; why: cause and fix."""
    cause, fix = why or (FORWARD_ONLY, TO_TRAIN)
    return tuple(
        torch.ops.flash_mla.no_gradient(gradient, shape, function, cause, fix) if needs and shape is not None else None
        for shape, needs in zip(shapes, wanted, strict=True)
    )


def refusal(function: str, *why: str) -> tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]:
    """(setup_context, backward) of an op that returns tensors: a backward that raises."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shapes = shapes_of(inputs)

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return refusals(gradients[0], ctx.shapes, ctx.needs_input_grad, function, *why)

    return save, backward


def refuse_op(op: Any, function: str, *why: str) -> None:
    """Register such a backward with an op."""
    save, backward = refusal(function, *why)
    op.register_autograd(backward, setup_context=save)


# --- Functions with a backward ----------------------------------------------------------------------------------------

NO_FP8_BACKWARD = (
    "with FP8 tensors or a descale it is forward only: gradients of quantised values are not defined here",
    "Train in BF16, FP16 or FP32, and quantise what is served",
)
NO_SECOND_BACKWARD = (
    "its backward has no backward of its own",
    "Leave create_graph out; second derivatives need plain torch operators",
)
NO_BATCHED_BACKWARD = (
    "torch.autograd.grad with is_grads_batched, as in a vectorised jacobian, hands over gradients without memory",
    "Call torch.func.vmap of torch.func.vjp's function, or one backward a gradient",
)


def differentiable(
    op: str, save: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> type[torch.autograd.Function]:
    """The autograd.Function of an op of this library.

    NOTE: torch.func refuses what an op's own register_autograd makes (torch 2.13: it has no setup_context of its own).
    """

    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.flash_mla, op)(*inputs)

    def of_one(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients):
            no_backward(op, *NO_BATCHED_BACKWARD)
        return backward(ctx, *gradients)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(of_one),
        "generate_vmap_rule": True,
    }
    return type(op, (torch.autograd.Function,), members)


def one_by_one(op: Any) -> Callable[..., tuple[Any, Any]]:
    """An op's vmap rule: call after call, and the results stacked."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        calls = [
            [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        results = [op(*call) for call in calls]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
