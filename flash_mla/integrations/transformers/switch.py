"""paged_cache: make the cache for a model, and switch the model's attention to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flash_mla.cache import PagedKVCache
from flash_mla.errors import DTypeError, ModelError
from flash_mla.integrations.transformers import sparse
from flash_mla.integrations.transformers.attention import ATTENTION
from flash_mla.integrations.transformers.cache import NewTokens, PagedCache, compute_dtype
from flash_mla.integrations.transformers.graph import DecodeGraph, replay_or_run
from flash_mla.integrations.transformers.prompts import note_ids, prepare_checked
from flash_mla.problem import BLOCK, FP8


def paged_cache(
    model: PreTrainedModel,
    batch: int,
    max_seq_len: int,
    *,
    pool_blocks: int | None = None,
    dtype: torch.dtype | None = None,
    k_descale: float | Tensor = 1.0,
    v_descale: float | Tensor = 1.0,
    cuda_graph: bool = False,
) -> PagedCache:
    """A paged cache for `model.generate(past_key_values=...)`; it switches the model's attention to this library's.

    `model.set_attn_implementation("sdpa")` (or "eager") switches it back; caches of transformers then work again.

    Args:
        model: a causal language model, on one device, each of whose layers sees all earlier tokens: MLA models of the
            DeepSeek-V2 and -V3 families (a latent cache, V inside K), their sparse successors DeepSeek-V3.2 and
            GLM-MoE-DSA, or MHA / GQA models such as Llama (K and V).
        batch: B, sequences; with beam search, prompts x beams.
        max_seq_len: tokens that one sequence may hold, prompt and new ones, without padding.
        pool_blocks: 64-token blocks of the pool that the sequences share; default: enough for B full ones.
        dtype: of the cache; default: the model's. float8_e4m3fn halves it; queries then are BF16 or FP16. Not with a
            sparse index.
        k_descale, v_descale: FP8 only: factors that rows are stored with, a float or [layers * Hk] (MLA: k_descale
            alone, [layers]).
        cuda_graph: run each step of decode as one CUDA graph, see `graph`. A GPU, and no sparse index.

    Raises:
        ModelError: the model has layers of another kind, projects latents otherwise than by one matrix, or has an
            attention that transformers cannot switch.
    """
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        raise ModelError(
            given=f"a {type(model).__name__}",
            required="a transformers model that calls attention through its AttentionInterface",
            cause="The model's attention cannot be switched to this library's",
        )
    config = model.config.get_text_config()
    indexers: list[Any] = [x.indexer for x in model.modules() if isinstance(getattr(x, "indexer", None), nn.Module)]
    check_layers(model, config, indexers)
    latents: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in latents:
        check_projection(module)
    index_dim = indexers[0].head_dim if indexers else 0
    layers, heads, dim, v_dim = rows_of(config, latents, index_dim)
    stored = model.dtype if dtype is None else dtype
    if indexers and (stored == FP8 or cuda_graph):
        raise DTypeError(
            given=f"{type(model).__name__}, dtype {stored}, {cuda_graph=}",
            required="the model's dtype and cuda_graph=False for a model with a sparse index",
            cause="Index keys lie in the rows of the latent, and an indexer's work grows with the tokens",
            fix="Leave dtype and cuda_graph out",
        )
    pages = PagedKVCache(
        batch,
        layers * heads,
        dim,
        max_seq_len=max_seq_len,
        v_head_dim=v_dim,
        latent=bool(latents),
        pool_blocks=batch * -(-max_seq_len // BLOCK) if pool_blocks is None else pool_blocks,
        dtype=stored,
        device=model.device,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    cache = PagedCache(pages, layers, compute_dtype(stored, model.dtype), index_dim)
    if cuda_graph:
        cache.graph = DecodeGraph(cache)
        wrap(model, "forward", replay_or_run)
    for module in latents:
        wrap(module, "expand_kv", expand_or_pass)
    for indexer in indexers:
        wrap(indexer, "forward", sparse.index_or_pass)
    wrap(model, "prepare_inputs_for_generation", prepare_checked)
    if note_ids not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(note_ids, with_kwargs=True)
    model.set_attn_implementation(ATTENTION)
    return cache


def rows_of(config: Any, latents: list[Any], index_dim: int) -> tuple[int, int, int, int]:
    """(layers, KV heads of one, D, Dv) of a model's cache; `latents` are its MLA layers' attention modules."""
    if latents:
        latent = latents[0].kv_lora_rank
        width = latent + latents[0].qk_rope_head_dim + index_dim
        return 1 + max(module.layer_idx for module in latents), 1, width, latent
    # GPT-2, NeoX and OPT have one KV head a query head, and no name for their number
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, dim, dim


def wrap(module: Any, method: str, wrapper: Callable[..., Any]) -> None:
    """Put wrapper(method, ...) in the place of one module's method, once; `inspect` sees the method's own signature."""
    original = getattr(module, method)
    if not (isinstance(original, partial) and original.func is wrapper):
        wrapped = partial(wrapper, original)
        wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        setattr(module, method, wrapped)


def expand_or_pass(expand: Callable[..., Any], latent: Any, k_rope: Any) -> Any:
    """An MLA layer's expand_kv that hands NewTokens on to the attention function."""
    return (latent, k_rope) if isinstance(latent, NewTokens) else expand(latent, k_rope)


def check_layers(model: PreTrainedModel, config: Any, indexers: list[Any]) -> None:
    """Every layer sees all earlier tokens, or those that an indexer of a known kind picks."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    allowed = {"full_attention"}
    if indexers and config.model_type in sparse.MODELS:
        allowed |= {"indexed_attention"}
    elif indexers:
        kinds.add("an indexer")
    if not kinds <= allowed:
        raise ModelError(
            given=f"{type(model).__name__} with layers {sorted(kinds)}",
            required=f"full attention in every layer; a sparse index in {', '.join(sparse.MODELS)}",
            cause="Windows, linear attention, compressed tokens and other indexers need caches of their own",
        )


def check_projection(module: Any) -> None:
    """kv_b_proj is one matrix [Hq * (nope + Dv), kv_lora_rank], which absorption multiplies into q and out."""
    projection = module.kv_b_proj
    if type(projection) is not nn.Linear or projection.bias is not None:
        raise ModelError(
            given=f"{type(module).__name__}.kv_b_proj = {projection}",
            required="nn.Linear without bias",
            cause="Absorbed attention multiplies by its weight directly",
            fix="Load the model without quantisation or adapters of kv_b_proj",
        )
