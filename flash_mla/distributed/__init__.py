"""Attention over the ranks of a device mesh: some blocks of every request each, some heads each, or both.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("context", "heads"))
    attention = ShardedAttention(mesh, context="context", heads="heads")
    once a step    step = attention.step(q.shape, k_cache.shape, block_table, seq_lens)
    each layer     out = attention.decode(q, k_cache, v_cache, block_table, step)

`split` says which rank holds what and needs no process group; `exchange` is the only module that talks to other ranks;
`attention` computes; `cache` keeps a rank's blocks as requests grow.
"""

from flash_mla.distributed.attention import DecodeStep, ShardedAttention
from flash_mla.distributed.cache import ContextCache
from flash_mla.distributed.split import (
    head_slices,
    local_cache,
    local_lengths,
    local_mask,
    local_positions,
    local_table,
    prompt_chunks,
)

__all__ = [
    "ContextCache",
    "DecodeStep",
    "ShardedAttention",
    "head_slices",
    "local_cache",
    "local_lengths",
    "local_mask",
    "local_positions",
    "local_table",
    "prompt_chunks",
]
