"""What every public function has around it: a name in profiles, and our errors in place of Python's and torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from flash_mla import contract
from flash_mla.autograd import TO_TRAIN, transformed
from flash_mla.errors import FlashMLAError, GradientError, ShapeError
from flash_mla.kinds import RAW, check_flags, check_kinds, check_memory, check_traced, flags_of, kinds_of
from flash_mla.plan import check_backend

P_ = ParamSpec("P_")
R_ = TypeVar("R_")

ELSEWHERE = {
    "alibi_slopes": "Pass a floating mask (attn_mask in prefill)",
    "attn_bias": "Pass a floating mask (attn_mask in prefill)",
    "cache_seqlens": "Pass seq_lens",
    "causal": "Leave it out: decode is causal, and a mask says otherwise",
    "cu_seqlens_q": "Call flash_mla.deepseek.flash_attn_varlen_func, which takes sequences laid end to end",
    "dropout_p": "Leave it out: there is no kernel with dropout",
    "enable_gqa": "Leave it out: each KV head serves Hq / Hk query heads",
    "is_causal": "Pass causal in prefill; decode is causal",
    "k_scale": "Pass k_descale",
    "page_table": "Pass block_table",
    "s_aux": "Pass attn_sink",
    "scale": "Pass softmax_scale",
    "sinks": "Pass attn_sink",
    "sm_scale": "Pass softmax_scale",
    "softcap": "Leave it out: there is no kernel with a soft cap",
    "v_scale": "Pass v_descale",
    "window_size": "Pass mask (attn_mask in prefill), True where a key is in the window",
}
"""Arguments of FlashAttention's, FlashInfer's and torch's functions that a call may carry, and what to do instead."""


def entry(module: str, *, reference: bool = False) -> Callable[[Callable[P_, R_]], Callable[P_, R_]]:
    """Make a function an entry of the library.

    While torch's profiler runs (`torch.profiler`, or NVTX ranges by `torch.autograd.profiler.emit_nvtx`), its calls are
    ranges of the name `<module>.<function>`.

    Args:
        module: where users import it from.
        reference: the function is one of the reference's: a call in DeepSeek's order, or with DeepSeek's names, gets a
            ShapeError that says where to go.
    """

    def decorate(function: Callable[P_, R_]) -> Callable[P_, R_]:
        name = f"{module}.{function.__qualname__}"
        flags, kinds = flags_of(function), kinds_of(function)

        @wraps(function)
        def call(*args: P_.args, **kwargs: P_.kwargs) -> R_:
            check_flags(function, flags, args, kwargs)
            if (backend := kwargs.get("backend")) is not None and not isinstance(backend, str):
                check_backend(backend)  # a custom op takes bytes for a string
            try:
                # NOTE: first whether a graph is traced: that branch looks at no flag which dynamo would guard on
                if torch.compiler.is_compiling():
                    check_backend(kwargs.get("backend"))  # an operator takes any string
                    check_traced(kinds, args, kwargs)
                    return function(*args, **kwargs)
                if forward_ad._current_level >= 0:
                    refuse_tangents(name, args, kwargs)
                if not profiler._is_profiler_enabled:
                    return function(*args, **kwargs)
                with profiler.record_function(name):
                    return function(*args, **kwargs)
            except RAW as error:
                if isinstance(error, FlashMLAError):
                    raise
                check_backend(kwargs.get("backend"))
                if isinstance(error, TypeError):
                    refuse_other_interfaces(function, args, kwargs, reference)
                check_kinds(function, args, kwargs)
                refuse_transforms(name, error)
                check_memory(*(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
                raise

        return call

    return decorate


def refuse_tangents(name: str, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """A GradientError for an input with a forward-mode derivative, which no kernel would carry along."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise GradientError(
            f"an input of {name} with a forward-mode derivative",
            "inputs without one",
            f"{name} has no forward-mode derivative",
            TO_TRAIN,
        )


def refuse_transforms(name: str, error: Exception) -> None:
    """Our error where torch.func transforms a call that has no rule for it: its tensors have no memory."""
    if not transformed():
        return
    raise GradientError(
        f"{name} inside a transform of torch.func",
        "torch.func.grad and vmap of a function that has a backward, or plain tensors",
        f"The transform hands over tensors without memory: {str(error).splitlines()[0]}"[:300],
        "Call it outside of the transform; for a batch, fold the dim of vmap into B",
    ) from error


def refuse_other_interfaces(
    function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, Any], reference: bool
) -> None:
    """A ShapeError for a call with arguments of another library's; with DeepSeek's, of the reference's functions."""
    unknown = kwargs.keys() - inspect.signature(function).parameters
    if reference:
        contract.refuse_deepseek_order(*args)
        if not (args or kwargs) or contract.DEEPSEEK_NAMES & unknown:
            contract.deepseek_order([*args, *kwargs.values()])
    for name in sorted(unknown & ELSEWHERE.keys()):
        raise ShapeError(
            f"{name} = {kwargs[name]!r}"[:200],
            f"the arguments of {function.__name__}: {', '.join(inspect.signature(function).parameters)}",
            f"`{name}` is an argument of another library's functions",
            ELSEWHERE[name],
        ) from None
