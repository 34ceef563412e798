"""The mask and attention interfaces of transformers over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from flash_mla.api import flash_mla_prefill
from flash_mla.autograd import learning, refusing
from flash_mla.errors import GradientError, ModelError
from flash_mla.integrations.transformers.cache import NewTokens
from flash_mla.integrations.transformers.sparse import attend_picked
from flash_mla.integrations.transformers.step import Tokens, check_padding
from flash_mla.mla import MLAProjection

# NOTE: transformers takes any name with "flash" in it for one of FlashAttention's and checks it as such.
ATTENTION = "paged_kv_cache"

UNKNOWN = ("sliding_window", "softcap", "s_aux")
"""Arguments of attention that the paged path does not compute."""


def note_tokens(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tokens:
    """The mask interface: keep the padding mask, make no other."""
    if mask_function is not causal_mask_function:
        raise ModelError(
            given=f"the mask function {mask_function}",
            required="causal attention and padding",
            cause="The model masks tokens in a way (window, packed sequences) that the paged cache does not know",
            fix="Use a transformers cache and attention for this model",
        )
    check_padding(attention_mask, batch_size, kv_length)
    return Tokens(batch_size, q_length, attention_mask)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: write a layer's new rows and attend.

    Args:
        module: the layer's attention; `expand_kv` marks MLA, `indices` [B, P, k] among kwargs a sparse one.
        query: [B, Hq, P, D], for MLA not absorbed.
        key, value: the NewTokens that the layer's `update` gave.
        attention_mask: the step's Tokens.
        dropout, scaling, kwargs: as models pass them; what is not computed here is refused.

    Returns:
        ([B, P, Hq, Dv], None): attention weights are not made.
    """
    check_call(module, key, attention_mask, dropout, kwargs)
    cache = key.cache
    step, layer = cache.step(attention_mask), cache.layer(key.layer)
    is_latent, picked = layer.is_latent, kwargs.get("indices")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if step.is_token and picked is None and launches_bind(query, key, layer.pool):
        held = projection(module, query.dtype) if is_latent else None
        return cache.token_decode(query, key, scale, held)(query, key.k, key.v, step.starts), None
    q, k, v = (as_attention_takes(x, cache.dtype) for x in (query, key.k, key.v))
    step.write(torch.cat([k, v], -1) if is_latent else k, layer.k_rows, layer.k_descale)
    if not is_latent:
        step.write(v, layer.v_rows, layer.v_descale)
    if picked is not None and step.is_first and step.longest <= picked.shape[-1]:
        picked = None  # nothing is left out
    if picked is not None:
        held = projection(module, q.dtype)
        out = held.project(attend_picked(step, held.absorb(q), layer, picked, scale).transpose(1, 2))
    elif step.is_first:
        if is_latent:
            k, v = (as_attention_takes(x, cache.dtype) for x in module.expand_kv(key.k, key.v))
        q, k, v = step.align(q), step.align(k), step.align(v)
        out = cast(Tensor, flash_mla_prefill(q, k, v, softmax_scale=scale, seq_lens=step.lengths))
    elif is_latent:
        held = projection(module, q.dtype)
        out = held.project(step.decode(held.absorb(step.align(q)), layer, scale))
    else:
        out = step.decode(step.align(q), layer, scale)
    inputs = learning(query, key.k, key.v)
    if inputs and not out.requires_grad:
        out = refusing("attention over a paged cache", out, inputs)
    out = out.transpose(1, 2) if picked is not None else step.restore(out)
    return out.to(query.dtype), None


def check_call(module: Any, key: Any, attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """The call brings the paged cache and the step's Tokens, does not train, and asks for nothing more."""
    if not isinstance(key, NewTokens) or not isinstance(attention_mask, Tokens):
        raise ModelError(
            given=f"key {type(key).__name__}, attention_mask {type(attention_mask).__name__}",
            required="past_key_values=paged_cache(...), and an attention_mask [B, tokens] or none",
            cause="The model's attention was switched to the paged cache, and this call brings another cache or mask",
            fix="Pass the paged cache, or switch back with model.set_attn_implementation('sdpa')",
        )
    if module.training and torch.is_grad_enabled():
        raise GradientError(
            given=f"{type(module).__name__} in training mode",
            required="a model in evaluation mode, or torch.no_grad()",
            cause="Rows of a paged cache carry no gradient: the projections of K and V would learn nothing",
            fix="Call model.eval(); to train, switch back with model.set_attn_implementation('sdpa')",
        )
    extras = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if dropout or extras:
        raise ModelError(
            given=f"{dropout=}, " + ", ".join(extras),
            required="plain causal attention without dropout",
            cause="The paged path does not compute these",
            fix="Call model.eval(), or use a transformers cache for this model",
        )


def launches_bind(query: Tensor, new: NewTokens, cache: Tensor) -> bool:
    """Whether a step of one token a sequence goes through `token`: on a GPU, where nothing is cast, quantised or
    differentiated in between."""
    return query.is_cuda and is_plain(query, new, cache)


def is_plain(query: Tensor, new: NewTokens, cache: Tensor) -> bool:
    """Whether nothing is cast, quantised or differentiated on the way into the cache."""
    alike = query.dtype == new.k.dtype == new.v.dtype == cache.dtype
    return alike and not torch.is_grad_enabled() and not torch.is_autocast_enabled(query.device.type)


def as_attention_takes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the cache's dtype; under autocast rounded to autocast's first, as torch's own attention does."""
    device = x.device.type
    return (x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x).to(dtype)


def projection(module: Any, dtype: torch.dtype) -> MLAProjection:
    """A layer's kv_b_proj, in the dtype that attention computes in."""
    nope, rope = module.qk_nope_head_dim, module.qk_rope_head_dim
    weight = module.kv_b_proj.weight
    held = HELD.get(module)
    if held is not None and held.w_k.data_ptr() == weight.data_ptr() and held.w_k.dtype == dtype:
        return held
    made = MLAProjection.from_weight(weight.to(dtype), len(weight) // (nope + module.v_head_dim), nope=nope, rope=rope)
    if weight.dtype == dtype and not torch.is_grad_enabled():
        HELD[module] = made
    return made


HELD: WeakKeyDictionary[Any, MLAProjection] = WeakKeyDictionary()
"""Projections whose halves are views of the layers' own weights: made once, not twice a layer and step."""


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, note_tokens)
