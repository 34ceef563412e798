"""Calls as the user gave them: the arguments of the reference's attention functions, but for backend, out and metadata.

`causal` is settled, blocks are a tensor, and descales lie together.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from flash_mla.problem import PLAIN, Options

Descales = tuple[float | Tensor | None, float | Tensor | None, float | Tensor | None]
NO_DESCALES: Descales = (None, None, None)
DESCALES = ("q_descale", "k_descale", "v_descale")
"""Their names, in this order."""


class DecodeCall(NamedTuple):
    """A `flash_mla_with_kvcache` call; of `decode_over_pages` too, the caches then page views, k_rope a split latent's.

    Of the two masks, options say which one is given.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    mask: Tensor | None = None
    softmax_scale: float | None = None
    descales: Descales = NO_DESCALES
    attn_sink: Tensor | None = None
    options: Options = PLAIN
    k_rope: Tensor | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the call reads."""
        q, k, v, table, lengths, mask, _, descales, sink, _, k_rope = self
        return (q, k, v, table, lengths, mask, sink, k_rope, *descales)


class PrefillCall(NamedTuple):
    """A `flash_mla_prefill` call; sparse_layout: bool [B, Hq, ceil(P/64), ceil(P/64)]."""

    q: Tensor
    k: Tensor
    v: Tensor
    sparse_layout: Tensor | None
    attn_mask: Tensor | None
    causal: bool
    softmax_scale: float | None = None
    seq_lens: Tensor | None = None
    descales: Descales = NO_DESCALES
    attn_sink: Tensor | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the call reads."""
        q, k, v, blocks, mask, _, _, lengths, descales, sink = self
        return (q, k, v, blocks, mask, lengths, sink, *descales)


class MhaCall(NamedTuple):
    """A `mha_fwd_kvcache` call."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    attn_mask: Tensor | None
    k: Tensor | None
    v: Tensor | None
    start_pos: Tensor | None
    causal: bool
    softmax_scale: float | None
    descales: Descales

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the call reads."""
        q, k_cache, v_cache, table, mask, k, v, start_pos, _, _, descales = self
        return (q, k_cache, v_cache, table, mask, k, v, start_pos, *descales)


class Given(Protocol):
    """Any of them."""

    @property
    def q(self) -> Tensor: ...
    @property
    def softmax_scale(self) -> float | None: ...
    @property
    def descales(self) -> Descales: ...
    @property
    def tensors(self) -> tuple[Any, ...]: ...
    def _asdict(self) -> dict[str, Any]: ...


def inputs_of(call: Given) -> dict[str, Any]:
    """What a call reads, by the names of its arguments."""
    return call._asdict() | dict(zip(DESCALES, call.descales, strict=True))
