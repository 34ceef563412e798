"""PagedCache: transformers' view of one PagedKVCache that holds all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_mla.cache import PagedKVCache
from flash_mla.errors import ModelError, ShapeError
from flash_mla.integrations.transformers.layer import Layer
from flash_mla.integrations.transformers.step import Step, Tokens, admit
from flash_mla.integrations.transformers.token import LatentDecode, Scratch, Shared, TokenDecode, is_captured
from flash_mla.mla import MLAProjection
from flash_mla.passed import facts
from flash_mla.problem import FP8

if TYPE_CHECKING:
    from flash_mla.integrations.transformers.graph import DecodeGraph


class PagedCache(Cache):
    """transformers' view of one PagedKVCache that holds all layers.

    Attributes:
        pages: the PagedKVCache; its KV heads are those of layer 0, then of layer 1, ...
        seen: tokens a sequence, padding included, as transformers counts them.
        dtype: of queries and of rows before they are stored.
        index_dim: columns of a row that hold the token's index key (sparse attention); 0: none.
        ids: [B, seen] int64, the tokens that went through the model; None: not known, since embeddings went in.
        graph: the CUDA graph of a decode step, or None.

    Beam search, `reset` and `crop` (assisted decoding, prompt lookup) work. Changes of the batch size do not, and say
    so.
    """

    def __init__(self, pages: PagedKVCache, layers: int, dtype: torch.dtype | None = None, index_dim: int = 0) -> None:
        super().__init__(layers=[PagedLayer(self, index) for index in range(layers)])
        self.pages = pages
        self.dtype = pages.k_cache.dtype if dtype is None else dtype
        self.index_dim = index_dim
        self.graph: DecodeGraph | None = None
        self._layers: list[Layer] = []
        self._scratch: Scratch = {}
        with torch.inference_mode(False):
            self._starts = torch.empty_like(pages.seq_lens)
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.ids: Tensor | None = torch.empty(self.batch_size, 0, dtype=torch.int64, device=self.pages.seq_lens.device)
        self._tokens: Tokens | None = None
        self._step: Step | None = None

    def step(self, tokens: Tokens) -> Step:
        """The Step of this forward pass; made, with blocks for its tokens, when the first layer asks for it."""
        if self.graph is not None and self.graph.step is not None:
            return self.graph.step
        if self._step is None or tokens is not self._tokens:
            self._step = Step(self.pages, tokens, self._starts)
            self._tokens = tokens
            self.seen += tokens.count
        return self._step

    def admit(self, tokens: Tokens) -> None:
        """Blocks for one token a sequence, whose step is a captured one."""
        admit(self.pages, tokens)
        self.seen += tokens.count

    def layer(self, index: int) -> Layer:
        """One layer's part, made once for the cache's tensors."""
        if not self._layers or self._layers[0].pool is not self.pages.k_cache:
            self._layers = [Layer(self.pages, i, len(self.layers), self.index_dim) for i in range(len(self.layers))]
        return self._layers[index]

    def token_decode(
        self, q: Tensor, new: NewTokens, scale: float, held: MLAProjection | None
    ) -> TokenDecode | LatentDecode:
        """A layer's bound call for q and its new tokens, made once for their shapes, the scale and the projection."""
        _, index, k, v = new
        layer, tensors, rest = self.layer(index), (q, k, v), (scale,)
        call = layer.tokens.get(tensors, rest)
        if call is None or not call.fits(held):
            args = (layer, q, k, v, self.pages.block_table, self.pages.seq_lens, scale)
            made = TokenDecode(*args) if held is None else LatentDecode(*args, held, self._shared(q, k, v, held))
            call = layer.tokens.keep(tensors, rest, made)
        return call

    def _shared(self, q: Tensor, k: Tensor, v: Tensor, held: MLAProjection) -> Shared:
        """What the layers share for calls with these; for graphs, unless the whole step is one."""
        key = facts(q, k, v)
        if key not in self._scratch:
            # NOTE: tensors made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                self._scratch[key] = Shared(q, k, v, held, self.graph is None and is_captured(q))
        return self._scratch[key]

    def __getstate__(self) -> dict[str, Any]:
        """Without views, which a copy would give memory of their own."""
        return vars(self) | {"_layers": [], "_scratch": {}}

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Write a layer's new index keys [B, P, index_dim]; all of its keys [B, longest, index_dim]."""
        rows, step = self.layer(layer_idx).index_rows, self._step
        assert rows is not None
        assert step is not None
        step.write(indexer_key_states[:, None].to(rows.dtype), rows)
        return rows[0, step.places]

    @property
    def batch_size(self) -> int:
        return len(self.pages.lengths)

    def reset(self) -> None:
        """Empty the cache for another batch of prompts."""
        self.pages.clear()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what beam_idx[i] was: tables move, tokens stay."""
        self.pages.reorder(beam_idx)
        self.ids = None if self.ids is None else self.ids[beam_idx.to(self.ids.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens of every sequence; they must not be padding.

        Args:
            tokens_to_remove: 0 or below, as transformers' caches take it.
        """
        dropped = -int(tokens_to_remove)  # transformers 5.17 gives a tensor
        if not 0 <= dropped <= min(self.pages.lengths):
            raise ShapeError(
                given=f"crop({tokens_to_remove}), sequences of {[*self.pages.lengths]} tokens",
                required="minus the tokens to drop, which every sequence holds",
                cause="crop counts tokens from the end",
                fix="Pass a negative number of tokens; call reset() to empty the cache",
            )
        self.pages.truncate([length - dropped for length in self.pages.lengths])
        self.seen -= dropped
        self.ids = None if self.ids is None else self.ids[:, : self.seen]
        self._tokens, self._step = None, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise not_offered("batch_repeat_interleave", "Make the cache for prompts x beams")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise not_offered("batch_select_indices", "Make a cache for the smaller batch")


CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What models call their cache: past_key_values up to transformers 5.23, and cache from 5.24 on, which takes both."""


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among a model's arguments, by either name; None without one."""
    return next((x for x in (kwargs.get("past_key_values"), kwargs.get("cache")) if x is not None), None)


def not_offered(method: str, fix: str) -> ModelError:
    return ModelError(
        given=f"PagedCache.{method}",
        required="appending, reset and reordering only",
        cause=f"The paged cache has no {method}",
        fix=fix,
    )


class PagedLayer(CacheLayerMixin):
    """One layer of a PagedCache; it only hands rows on, see NewTokens."""

    is_sliding = False
    is_croppable = True  # asked for by transformers 5.24 on
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


def compute_dtype(stored: torch.dtype, model: torch.dtype) -> torch.dtype:
    """The dtype of queries over a cache: its own; over FP8 the model's, or BF16 for an FP32 model."""
    if stored != FP8:
        return stored
    return model if model in (torch.bfloat16, torch.float16) else torch.bfloat16
