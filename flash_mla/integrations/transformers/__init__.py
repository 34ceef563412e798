"""transformers: `generate()` on a paged cache, for MLA models (absorbed) and for MHA / GQA models.

    cache = paged_cache(model, batch=2, max_seq_len=256)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=100)

Four seams of transformers (5.17 and later, where MLA models cache the latent) carry it:

    once a step    mask interface        -> Tokens: which of the step's tokens are padding; no mask tensor is made
    each layer     Cache.update(k, v)    -> NewTokens: the layer's new rows and the cache; nothing is written yet
                   expand_kv (MLA only)  -> NewTokens passed on: a cached latent is never expanded
                   attention interface   -> the step's first layer makes the Step (blocks, slots), which the others
                                            share; write the rows, attend

All layers lie in one PagedKVCache, layer l's KV heads after layer l-1's, so that they share one table and one tensor of
lengths. A request's tokens lie in its own blocks from slot 0 on: padding takes no cache, and needs no
mask. The first tokens of a batch attend through `flash_mla_prefill` (MLA: over expanded K and V, fewer FLOPs), later
ones through decode calls that are checked once and bound to the layer's pages (MLA: absorbed, over the latents).

    switch.py     paged_cache: what a model must be, and its attention switched
    cache.py      PagedCache, PagedLayer, NewTokens
    layer.py      Layer: one layer's views and bound decode calls
    step.py       Tokens, Step: one forward pass over the cache
    token.py      TokenDecode: a layer's step of one token a sequence on a GPU
    attention.py  the mask and attention interfaces
    sparse.py     models with a sparse index (DeepSeek-V3.2): which tokens, and attention over them
    prompts.py    a cache that holds another prompt is refused
    graph.py      a step of decode as one CUDA graph
"""

from __future__ import annotations

from flash_mla.integrations.transformers.cache import PagedCache
from flash_mla.integrations.transformers.switch import paged_cache

__all__ = ["PagedCache", "paged_cache"]
