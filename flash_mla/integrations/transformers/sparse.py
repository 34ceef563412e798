"""Models with a sparse index, such as DeepSeek-V3.2: an indexer picks tokens, attention reads only these.

The model's own indexer scores and picks. Its keys lie behind the latent in the rows of the paged cache, so that a block
that is shared, copied or dropped takes them along. What it picks, token numbers of a request, become rows of the pool,
and `flash_mla.deepseek`'s sparse attention reads these, absorbed, for prompts and for later tokens alike. While all
requests have at most `index_topk` tokens, nothing is left out and a prompt attends as in a dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_mla.deepseek import flash_mla_with_kvcache
from flash_mla.integrations.transformers.cache import PagedCache
from flash_mla.integrations.transformers.layer import Layer
from flash_mla.integrations.transformers.step import Step, Tokens

MODELS = ("deepseek_v32", "glm_moe_dsa")
"""config.model_type of the models whose indexer takes `update_indexer`'s keys and a mask, and whose attention passes
`indices` on."""


def index_or_pass(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """An indexer's forward that, over a paged cache, sees each request's own tokens from 0 on.

    Returns:
        [B, P, k] int32 token numbers, as the indexer gives them.
    """
    given = (*args, *kwargs.values())
    cache = next((x for x in given if isinstance(x, PagedCache)), None)
    if cache is not None:
        tokens = next(x for x in given if isinstance(x, Tokens))
        step = cache.step(tokens)
        visible = torch.arange(step.longest, device=step.position.device) <= step.position[..., None]  # [B, P, longest]
        args = tuple(visible if x is tokens else x for x in args)
        kwargs = {name: visible if x is tokens else x for name, x in kwargs.items()}
    return forward(*args, **kwargs)


def attend_picked(step: Step, q: Tensor, layer: Layer, picked: Tensor, scale: float) -> Tensor:
    """Attention of absorbed q [B, Hq, P, D] over the picked tokens [B, P, k] of each query: [B, P, Hq, Dv].

    A token that the indexer picked for want of others, later than the query, is left out; padding gets 0.
    """
    picked = picked.long()
    rows = step.places[torch.arange(len(picked), device=picked.device)[:, None, None], picked]
    seen = picked <= step.position[..., None]
    if step.keep is not None:
        seen &= step.keep[..., None]
    indices = rows.where(seen, -1).int()
    pool = layer.k_cache[0, 0].unsqueeze(2)  # [Nblk, 64, 1, D]
    out, _ = flash_mla_with_kvcache(
        q.transpose(1, 2).contiguous(), pool, None, None, layer.v_cache.shape[-1], softmax_scale=scale, indices=indices
    )
    return out
