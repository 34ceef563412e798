"""What scores and values are multiplied by: softmax_scale, descales; and the sink beside the scores."""

from __future__ import annotations

import warnings
from numbers import Real

import torch
from torch import Tensor

from flash_mla.contract.given import DESCALES, Descales
from flash_mla.contract.tensors import check_on, check_tensor, named
from flash_mla.errors import DTypeError, ScaleWarning, ShapeError, describe
from flash_mla.quant import needs_descale

MOST = torch.finfo(torch.float32).max


def is_finite(value: object) -> bool:
    """Whether it is a number that FP32, in which scores are kept, holds; not NaN."""
    if type(value) is float:  # nearly always, and an abstract class costs a microsecond to ask
        return -MOST <= value <= MOST
    return isinstance(value, Real) and not isinstance(value, bool) and value <= MOST and not value < -MOST


def check_scale(softmax_scale: float | None) -> int:
    """The sign of softmax_scale: -1, 0 or 1 (None: D ** -0.5, which is above 0)."""
    if softmax_scale is None or (type(softmax_scale) is float and 0.0 < softmax_scale <= MOST):
        return 1
    if not is_finite(softmax_scale):
        raise ShapeError(
            f"softmax_scale = {softmax_scale!r}"[:200],
            "a finite real number, as FP32 holds it, or None for D ** -0.5",
            f"`softmax_scale` is a {type(softmax_scale).__name__} and no number that is finite in FP32",
            "Pass a float",
        )
    return int(softmax_scale > 0) - int(softmax_scale < 0)


def warn_default_scale(D: int, Dv: int, stacklevel: int) -> None:
    """Tell who attends to a latent without a scale: D ** -0.5 is the absorbed query's, not the model's."""
    if D == Dv:
        return
    message = describe(
        f"softmax_scale = None; V is the first {Dv} of K's {D} columns, MLA's latent",
        "the scale of the query before absorption, (nope + rope) ** -0.5",
        f"The default, {D} ** -0.5, is made of the absorbed query's D",
        f"Pass softmax_scale: 192 ** -0.5 for DeepSeek-V2 and -V3, or {D} ** -0.5 to say that you mean it",
    )
    warnings.warn(message, ScaleWarning, stacklevel=stacklevel + 1)


def check_descale(name: str, value: float | Tensor | None, B: int, Hk: int, device: torch.device) -> bool:
    """Whether there is a descale: a finite number, not negative, or an FP32 tensor that broadcasts to [B, Hk]."""
    if value is None:
        return False
    if not isinstance(value, Tensor):
        if not is_finite(value) or value < 0:
            raise ShapeError(
                f"{name} = {value!r}"[:200],
                "a finite number, 0 or more, or a float32 tensor that broadcasts to [B, Hk]",
                f"`{name}` is no factor from stored to real values",
                "Pass the scale that the values were divided by",
            )
        return True
    check_tensor(name, value)
    if value.dtype != torch.float32:
        raise DTypeError(f"{name} {value.dtype}", "float32", f"`{name}` is not FP32", f"Call {name}.float()")
    check_on(device, **{name: value})
    if value.dim() > 2 or any(s not in (1, w) for s, w in zip(value.shape[::-1], (Hk, B), strict=False)):
        raise ShapeError(
            named(**{name: value}),
            f"a shape that broadcasts to [B, Hk] = [{B}, {Hk}]",
            f"`{name}` does not broadcast to [B, Hk]",
            "Pass a float, or a tensor [B, Hk] in which either dim may be 1",
        )
    return True


def check_descales(descales: Descales, B: int, Hk: int, device: torch.device) -> bool:
    """Whether any of (q_descale, k_descale, v_descale) is given."""
    given = [check_descale(name, value, B, Hk, device) for name, value in zip(DESCALES, descales, strict=True)]
    return any(given)


def check_descales_given(k_cache: Tensor, v_cache: Tensor, descales: Descales) -> None:
    """Refuse a cache that was stored with factors where one is left out: its values would be taken as they lie."""
    for name, cache, descale in (("k", k_cache, descales[1]), ("v", v_cache, descales[2])):
        if descale is None and needs_descale(cache):
            raise ShapeError(
                f"{name}_cache {list(cache.shape)} of a PagedKVCache made with {name}_descale, {name}_descale None",
                f"{name}_descale = cache.{name}_descale",
                f"The stored values were divided by `{name}_descale`",
                "Call cache.decode(q), which passes it, or pass it along",
            )


def check_sink(attn_sink: Tensor | None, Hq: int, device: torch.device) -> None:
    if attn_sink is None:
        return
    check_tensor("attn_sink", attn_sink)
    if tuple(attn_sink.shape) != (Hq,) or attn_sink.dtype != torch.float32:
        raise ShapeError(
            f"{named(attn_sink=attn_sink)} {attn_sink.dtype}",
            f"attn_sink [Hq] = [{Hq}] float32",
            "`attn_sink` is not one FP32 logit a query head",
        )
    check_on(device, attn_sink=attn_sink)
