"""A cache that already holds tokens serves a prompt only if the prompt begins with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flash_mla.errors import ModelError
from flash_mla.integrations.transformers.cache import PagedCache, cache_of


def note_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: remember which tokens enter the cache."""
    cache = cache_of(kwargs)
    if not isinstance(cache, PagedCache):
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None or cache.ids is None or cache.ids.shape != (len(ids), cache.seen):
        cache.ids = None
    else:
        cache.ids = torch.cat([cache.ids, ids.to(cache.ids.device)], 1)


def prepare_checked(prepare: Callable[..., Any], input_ids: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's prepare_inputs_for_generation; the first of a generation checks the prompt against the cache."""
    cache = cache_of(kwargs)
    # given where `generate` takes the ids for all tokens so far; not for a chunk, or for what follows the cache
    is_whole = kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None
    if isinstance(cache, PagedCache) and is_whole and isinstance(input_ids, Tensor):
        check_prompt(cache, input_ids, kwargs.get("attention_mask"))
    return prepare(input_ids, *args, **kwargs)


def check_prompt(cache: PagedCache, input_ids: Tensor, mask: Tensor | None) -> None:
    """Refuse a whole prompt that does not begin with the tokens in the cache; waits for the GPU where it holds any."""
    seen = cache.seen
    if not seen or cache.ids is None or cache.ids.shape[1] != seen:
        return
    begins = input_ids.shape[1] > seen
    if begins:
        differs = input_ids[:, :seen] != cache.ids.to(input_ids.device)
        begins = not bool((differs if mask is None else differs & mask[:, :seen].bool()).any())
    if not begins:
        raise ModelError(
            given=f"prompts of {input_ids.shape[1]} tokens, a cache that holds {seen} tokens of other ones",
            required="prompts that begin with the tokens in the cache and go on, or an empty cache",
            cause="The cache was filled by another prompt, which the new tokens would attend to",
            fix="Call cache.reset() before new prompts",
        )
