"""GQA and MHA in vLLM on a CPU, over its pages `[num_blocks, Hk, page, 2 * D]`: a token's K and V in one row.

Decode and prefill both read the pages where they lie (`decode_over_pages`): a prompt is a call with many query tokens.
Source of the interfaces: vLLM 0.32, `vllm/v1/attention/backends/cpu_attn.py`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from flash_mla.pages import decode_over_pages


class FlashMLAGQABackend(CPUAttentionBackend):
    """vLLM's CPU backend with another implementation behind it."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_impl_cls() -> type[FlashMLAGQAImpl]:
        return FlashMLAGQAImpl


class FlashMLAGQAImpl(CPUAttentionBackendImpl):
    """Decoder attention, with sinks or without."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (
            self.alibi_slopes is not None
            or self.sliding_window != -1
            or self.logits_soft_cap
            or self.attn_type != AttentionType.DECODER
        ):
            raise NotImplementedError("flash_mla: decoder attention without alibi, sliding window or soft cap")
        self.sinks: Tensor | None = None if self.sinks is None else self.sinks.float()

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new rows where attention reads them; a slot below 0 is padding."""
        page, D = kv_cache.shape[2], key.shape[-1]
        slots = slot_mapping.flatten().long()
        kept = slots >= 0
        slots, key, value = slots[kept], key[: len(kept)][kept], value[: len(kept)][kept]
        blocks, offsets = slots // page, slots % page
        kv_cache[blocks, :, offsets, :D] = key
        kv_cache[blocks, :, offsets, D:] = value

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [tokens, Hq, D] into output, request by request as `query_start_loc` says."""
        if attn_metadata is None:  # a run that only measures memory
            return output
        D, starts = query.shape[-1], attn_metadata.query_start_loc.tolist()
        k_pages, v_pages = kv_cache[..., :D], kv_cache[..., D:]
        out = output.view(len(output), -1, D)
        for first, last in runs_of_equal_length(starts):
            rows = slice(starts[first], starts[last])
            decode_over_pages(
                query[rows].unflatten(0, (last - first, -1)).transpose(1, 2),
                k_pages,
                v_pages,
                attn_metadata.block_table[first:last],
                attn_metadata.seq_lens[first:last],
                layout="HND",
                causal=attn_metadata.causal,
                check_values=False,
                softmax_scale=self.scale,
                attn_sink=self.sinks,
                out=out[rows].unflatten(0, (last - first, -1)).transpose(1, 2),
            )
        return output


def runs_of_equal_length(starts: list[int]) -> list[tuple[int, int]]:
    """[first, last) of requests that follow one another with as many query tokens each: one call serves a run."""
    lengths = [b - a for a, b in pairwise(starts)]
    edges = [i for i, length in enumerate(lengths) if i == 0 or length != lengths[i - 1]]
    runs = zip(edges, [*edges[1:], len(lengths)], strict=True)
    return [(first, last) for first, last in runs if lengths[first]]
