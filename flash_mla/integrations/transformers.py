"""transformers: `generate()` on a paged cache, for MLA models (absorbed) and for MHA / GQA models.

    cache = paged_cache(model, batch=2, max_seq_len=256)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=100)

Four seams of transformers (5.17 and later, where MLA models cache the latent) carry it:

    once a step    mask interface        -> Tokens: which of the step's tokens are padding; no mask tensor is made
    each layer     Cache.update(k, v)    -> NewTokens: the layer's new rows and the cache; nothing is written yet
                   expand_kv (MLA only)  -> NewTokens passed on: a cached latent is never expanded
                   attention interface   -> the step's first layer makes the Step (blocks, slots, metadata), which
                                            the others share; write the rows, attend

All layers lie in one PagedKVCache, layer l's KV heads after layer l-1's, so that they share one table, one tensor of
lengths and one metadata. A request's tokens lie in its own blocks from slot 0 on: padding takes no cache, and needs no
mask. The first tokens of a batch attend through `flash_mla_prefill` (MLA: over expanded K and V, fewer FLOPs), later
ones through `flash_mla_with_kvcache` (MLA: absorbed, over the latents).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from flash_mla.api import MLAMetadata, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.autograd import refusing
from flash_mla.cache import PagedKVCache
from flash_mla.errors import FlashMLAError, GradientError, ShapeError
from flash_mla.mla import MLAProjection
from flash_mla.problem import BLOCK

# NOTE: transformers takes any name with "flash" in it for one of FlashAttention's and checks it as such.
ATTENTION = "paged_kv_cache"
MAX_S_Q = 8  # most query tokens of a decode call


def paged_cache(model: PreTrainedModel, batch: int, max_seq_len: int, *, pool_blocks: int | None = None) -> PagedCache:
    """A paged cache for `model.generate(past_key_values=...)`; it switches the model's attention to this library's.

    `model.set_attn_implementation("sdpa")` (or "eager") switches it back; caches of transformers then work again.

    Args:
        model: a causal language model, on one device, each of whose layers sees all earlier tokens: MLA models of the
            DeepSeek-V2 and -V3 families (a latent cache, V inside K), or MHA / GQA models such as Llama (K and V).
        batch: B, sequences; with beam search, prompts x beams.
        max_seq_len: tokens that one sequence may hold, prompt and new ones, without padding.
        pool_blocks: 64-token blocks of the pool that the sequences share; default: enough for B full ones.

    Raises:
        FlashMLAError: the model has layers of another kind, projects latents otherwise than by one matrix, or has an
            attention that transformers cannot switch.
    """
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        raise FlashMLAError(
            given=f"a {type(model).__name__}",
            required="a transformers model that calls attention through its AttentionInterface",
            cause="The model's attention cannot be switched to this library's",
            fix="Use a transformers cache for this model",
        )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or any(hasattr(module, "indexer") for module in model.modules()):
        raise FlashMLAError(
            given=f"{type(model).__name__} with layers {sorted(kinds)}",
            required="full attention in every layer",
            cause="Windows, linear attention and sparse indexers need caches of their own",
            fix="Use a transformers cache for this model",
        )
    latents: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    if latents:
        for module in latents:
            check_projection(module)
            if not isinstance(module.expand_kv, partial):
                module.expand_kv = partial(expand_or_pass, module.expand_kv)
        layers = 1 + max(module.layer_idx for module in latents)
        heads, v_dim = 1, latents[0].kv_lora_rank
        dim = v_dim + latents[0].qk_rope_head_dim
    else:
        # GPT-2, NeoX and OPT have one KV head a query head, and no name for their number
        layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads)
        dim = v_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pages = PagedKVCache(
        batch,
        layers * heads,
        dim,
        max_seq_len=max_seq_len,
        v_head_dim=v_dim,
        latent=bool(latents),
        pool_blocks=batch * -(-max_seq_len // BLOCK) if pool_blocks is None else pool_blocks,
        dtype=model.dtype,
        device=model.device,
    )
    model.set_attn_implementation(ATTENTION)
    return PagedCache(pages, layers)


def check_projection(module: Any) -> None:
    """kv_b_proj is one matrix [Hq * (nope + Dv), kv_lora_rank], which absorption multiplies into q and out."""
    projection = module.kv_b_proj
    if type(projection) is not nn.Linear or projection.bias is not None:
        raise FlashMLAError(
            given=f"{type(module).__name__}.kv_b_proj = {projection}",
            required="nn.Linear without bias",
            cause="Absorbed attention multiplies by its weight directly",
            fix="Load the model without quantisation or adapters of kv_b_proj",
        )


class PagedCache(Cache):
    """transformers' view of one PagedKVCache that holds all layers.

    Attributes:
        pages: the PagedKVCache; its KV heads are those of layer 0, then of layer 1, ...
        seen: tokens a sequence, padding included, as transformers counts them.

    Beam search, `reset` and `crop` (assisted decoding, prompt lookup) work. Changes of the batch size do not, and say
    so.
    """

    def __init__(self, pages: PagedKVCache, layers: int) -> None:
        super().__init__(layers=[PagedLayer(self, index) for index in range(layers)])
        self.pages = pages
        self.seen = 0
        self._tokens: Tokens | None = None
        self._step: Step | None = None

    def step(self, tokens: Tokens) -> Step:
        """The Step of this forward pass; made, with blocks for its tokens, when the first layer asks for it."""
        if self._step is None or tokens is not self._tokens:
            self._step = Step(self.pages, tokens)
            self._tokens = tokens
            self.seen += tokens.count
        return self._step

    def layer_pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """k_cache [B, Hk, Nblk, 64, D] and v_cache [B, Hk, Nblk, 64, Dv] of one layer: views."""
        heads = self.pages.k_cache.shape[1] // len(self.layers)
        own = slice(layer * heads, (layer + 1) * heads)
        return self.pages.k_cache[:, own], self.pages.v_cache[:, own]

    @property
    def batch_size(self) -> int:
        return len(self.pages.lengths)

    def reset(self) -> None:
        """Empty the cache for another batch of prompts."""
        self.pages.clear()
        self.seen, self._tokens, self._step = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what beam_idx[i] was: tables move, tokens stay."""
        self.pages.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens of every sequence; they must not be padding.

        Args:
            tokens_to_remove: 0 or below, as transformers' caches take it.
        """
        dropped = -tokens_to_remove
        if not 0 <= dropped <= min(self.pages.lengths):
            raise ShapeError(
                given=f"crop({tokens_to_remove}), sequences of {[*self.pages.lengths]} tokens",
                required="minus the tokens to drop, which every sequence holds",
                cause="crop counts tokens from the end",
                fix="Pass a negative number of tokens; call reset() to empty the cache",
            )
        self.pages.truncate([length - dropped for length in self.pages.lengths])
        self.seen -= dropped
        self._tokens, self._step = None, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise not_offered("batch_repeat_interleave", "Make the cache for prompts x beams")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise not_offered("batch_select_indices", "Make a cache for the smaller batch")


def not_offered(method: str, fix: str) -> FlashMLAError:
    return FlashMLAError(
        given=f"PagedCache.{method}",
        required="appending, reset and reordering only",
        cause=f"The paged cache has no {method}",
        fix=fix,
    )


class PagedLayer(CacheLayerMixin):
    """One layer of a PagedCache; it only hands rows on, see NewTokens."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache was allocated when it was made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        new = NewTokens(self.cache, self.index, key_states, value_states)
        return new, new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        """-1: padding does not count towards max_seq_len, so there is no limit in transformers' terms."""
        return -1


class NewTokens(NamedTuple):
    """What a layer's `Cache.update` returns in place of keys and values.

    k is [B, Hk, P, D] and v [B, Hk, P, Dv]; for MLA the latent [B, 1, P, kv_lora_rank] and the rope part of K.
    """

    cache: PagedCache
    layer: int
    k: Tensor
    v: Tensor


class Tokens:
    """What the mask interface returns in place of a mask; one object a forward pass.

    Attributes:
        batch, count: B and P, the tokens of this pass.
        mask: [B, seen + P] bool, False for padding; None: no padding.
    """

    def __init__(self, batch: int, count: int, mask: Tensor | None) -> None:
        self.batch, self.count, self.mask = batch, count, mask


class Step:
    """One forward pass over the cache, worked out once for all layers; making it gives the requests their blocks.

    Attributes:
        is_first: no request held a token before.
    """

    def __init__(self, pages: PagedKVCache, tokens: Tokens) -> None:
        B, P = tokens.batch, tokens.count
        if len(pages.lengths) != B:
            raise ShapeError(
                given=f"a batch of {B}, a cache for {len(pages.lengths)}",
                required="the same number of sequences",
                cause="The cache was made for another batch (beam search: prompts x beams)",
                fix=f"paged_cache(model, batch={B}, ...)",
            )
        counts, keep = [P] * B, None
        if tokens.mask is not None:
            keep = tokens.mask[:, -P:]
            counts, totals = torch.stack([keep.sum(-1), tokens.mask.sum(-1)]).tolist()  # waits for the GPU
            held = [total - count for total, count in zip(totals, counts, strict=True)]
            if held != [*pages.lengths]:
                raise ShapeError(
                    given=f"an attention_mask that keeps {held} earlier tokens, a cache that holds {[*pages.lengths]}",
                    required="the same tokens kept as in the passes before",
                    cause="The attention_mask of earlier tokens changed, or the cache holds other prompts",
                    fix="Call cache.reset() before new prompts",
                )
            keep = None if min(counts) == P else keep
        device = pages.seq_lens.device
        starts = pages.seq_lens.clone()
        self.is_first = not any(pages.lengths)
        pages.extend(counts)
        self._pages, self._tokens = pages, P
        self._calls: list[tuple[slice, Tensor, MLAMetadata]] = []

        arrival = torch.arange(P, device=device).expand(B, P) if keep is None else (keep.cumsum(-1) - 1).clamp(min=0)
        request = torch.arange(B, device=device)[:, None].expand(B, P).flatten()
        position = (starts[:, None] + arrival).flatten()
        self._keep, self._kept = keep, None
        if keep is not None:
            # prefill is causal from the first row of a tile on, decode from the last one backwards
            self._order = keep.to(torch.int8).argsort(dim=-1, stable=True, descending=self.is_first)
            rank = arrival if self.is_first else arrival + P - keep.sum(-1, keepdim=True)
            self._rank = rank.clamp(max=P - 1)
            self._request = torch.arange(B, device=device)[:, None]
            self._kept = keep.flatten().nonzero().squeeze(1)
            request, position = request[self._kept], position[self._kept]
        blocks = pages.block_table[request, position // BLOCK].long()
        self._slots = blocks * BLOCK + position % BLOCK

    @property
    def lengths(self) -> Tensor | None:
        """[B] int32, tokens of each request; None where all of them are as many as the step's tokens."""
        return None if self._keep is None else self._pages.seq_lens

    def write(self, rows: Tensor, cache: Tensor) -> None:
        """Write new rows [B, Hk, P, D], those of padding aside, into a layer's pool [B, Hk, Nblk, 64, D]."""
        rows = rows.detach().transpose(0, 1).flatten(1, 2)  # [Hk, B * P, D]
        rows = rows if self._kept is None else rows[:, self._kept]
        cache[0].flatten(1, 2).index_copy_(1, self._slots, rows)

    def align(self, rows: Tensor) -> Tensor:
        """[B, H, P, D] with a request's tokens side by side: first in the step's prefill, last in its decode."""
        if self._keep is None:
            return rows.contiguous()
        # NOTE: for [4, 8, 384, 192] FP32 on a CPU thread, take_along_dim took 22 ms and this takes 4 ms.
        return rows[self._request, :, self._order].transpose(1, 2).contiguous()

    def restore(self, out: Tensor) -> Tensor:
        """Undo `align` and put heads behind tokens: [B, H, P, Dv] -> [B, P, H, Dv]; padding gets 0."""
        if self._keep is None:
            return out.transpose(1, 2)
        return out[self._request, :, self._rank].masked_fill_(~self._keep[:, :, None, None], 0)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """Attention of q [B, Hq, P, D] over a layer's pages, at most MAX_S_Q tokens a call."""
        if not self._calls:
            for first in range(0, self._tokens, MAX_S_Q):
                queries = slice(first, min(first + MAX_S_Q, self._tokens))
                later = self._tokens - queries.stop
                lengths = (self._pages.seq_lens - later).clamp(min=0) if later else self._pages.seq_lens
                metadata = get_mla_metadata(
                    q[:, :, queries].shape,
                    k_cache.shape,
                    self._pages.block_table,
                    lengths,
                    v_head_dim=v_cache.shape[-1],
                    check_values=False,
                )
                self._calls.append((queries, lengths, metadata))
        table = self._pages.block_table
        parts = []
        for queries, lengths, metadata in self._calls:
            few = q[:, :, queries].contiguous()
            part = flash_mla_with_kvcache(few, k_cache, v_cache, table, lengths, metadata=metadata, softmax_scale=scale)
            parts.append(cast(Tensor, part))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def expand_or_pass(expand: Callable[..., Any], latent: Any, k_rope: Any) -> Any:
    """An MLA layer's expand_kv that hands NewTokens on to the attention function."""
    return (latent, k_rope) if isinstance(latent, NewTokens) else expand(latent, k_rope)


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
        raise FlashMLAError(
            given=f"the mask function {mask_function}",
            required="causal attention and padding",
            cause="The model masks tokens in a way (window, packed sequences) that the paged cache does not know",
            fix="Use a transformers cache and attention for this model",
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise ShapeError(
            given=f"attention_mask {list(attention_mask.shape)}",
            required=f"[B, earlier + new tokens] = [{batch_size}, {kv_length}]",
            cause="The attention_mask does not cover the tokens in the cache and the new ones",
            fix="Pass the mask of all of them; call cache.reset() before new prompts",
        )
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
        module: the layer's attention; `expand_kv` marks MLA.
        query: [B, Hq, P, D], for MLA not absorbed.
        key, value: the NewTokens that the layer's `update` gave.
        attention_mask: the step's Tokens.

    Returns:
        ([B, P, Hq, Dv], None): attention weights are not made.
    """
    if not isinstance(key, NewTokens) or not isinstance(attention_mask, Tokens):
        raise FlashMLAError(
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
    extras = {name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux", "indices")}
    if dropout or any(extra is not None for extra in extras.values()):
        raise FlashMLAError(
            given=f"{dropout=}, " + ", ".join(name for name, extra in extras.items() if extra is not None),
            required="plain causal attention without dropout",
            cause="The paged path does not compute these",
            fix="Call model.eval(), or use a transformers cache for this model",
        )
    step = key.cache.step(attention_mask)
    k_cache, v_cache = key.cache.layer_pages(key.layer)
    is_latent = hasattr(module, "expand_kv")
    q, k, v = (as_attention_takes(x, k_cache.dtype) for x in (query, key.k, key.v))
    step.write(torch.cat([k, v], -1) if is_latent else k, k_cache)
    if not is_latent:
        step.write(v, v_cache)
    q = step.align(q)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if step.is_first:
        if is_latent:
            k, v = (as_attention_takes(x, k_cache.dtype) for x in module.expand_kv(k, v))
        k, v = step.align(k), step.align(v)
        out = cast(Tensor, flash_mla_prefill(q, k, v, softmax_scale=scale, seq_lens=step.lengths))
    elif is_latent:
        out = decode_absorbed(module, step, q, k_cache, v_cache, scale)
    else:
        out = step.decode(q, k_cache, v_cache, scale)
    if torch.is_grad_enabled():
        learning = [x for x in (query, key.k, key.v) if x.requires_grad]
        out = refusing("attention over a paged cache", out, learning) if learning and not out.requires_grad else out
    return step.restore(out).to(query.dtype), None


def as_attention_takes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the cache's dtype; under autocast rounded to autocast's first, as torch's own attention does."""
    device = x.device.type
    return (x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x).to(dtype)


def decode_absorbed(module: Any, step: Step, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
    """MLA over latents: K's projection moves to q, V's to the output, so that all heads share the cache's rows.

    q [B, Hq, P, nope + rope] -> [B, Hq, P, Dv], as `expand_kv` and attention of every head would give.
    """
    heads, nope, rope = q.shape[1], module.qk_nope_head_dim, module.qk_rope_head_dim
    kv_b = MLAProjection.from_weight(module.kv_b_proj.weight, heads, nope=nope, rope=rope)
    return kv_b.project(step.decode(kv_b.absorb(q), k_cache, v_cache, scale))


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, note_tokens)
