"""GQA and MHA in vLLM on a CPU, over its pages `[num_blocks, Hk, page, 2 * D]`: a token's K and V in one row.

Decode and prefill both read the pages where they lie (`flash_mla.pages`): a prompt is a call with many query tokens.
What all layers of a step share, the builder works out once. Source of the interfaces: vLLM 0.32,
`vllm/v1/attention/backends/cpu_attn.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from flash_mla.pages import PoolCall, attend_pools


class Run(NamedTuple):
    """Requests that follow one another with as many query tokens each: one call serves them.

    Attributes:
        requests: how many.
        rows: their query tokens among the step's.
        block_table, seq_lens: theirs.
    """

    requests: int
    rows: slice
    block_table: Tensor
    seq_lens: Tensor


@dataclass
class StepMetadata(CPUAttentionMetadata):
    """vLLM's own, and what its layers share.

    Attributes:
        runs: of the step's requests.
        written: [n] int64, the tokens whose rows are stored; None: all of the first n.
        blocks, offsets: [n] int64 each, where their rows go.
    """

    runs: list[Run] = field(default_factory=list)
    written: Tensor | None = None
    blocks: Tensor | None = None
    offsets: Tensor | None = None


class FlashMLAGQAMetadataBuilder(CPUAttentionMetadataBuilder):
    """Once a step: the runs of its requests, and the places of its new rows."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            raise NotImplementedError("flash_mla: causality is the same for all requests of a step")
        starts = common.query_start_loc.tolist()
        slots = common.slot_mapping[: common.num_actual_tokens].long()
        written = None
        if bool((slots < 0).any()):  # padding
            written = (slots >= 0).nonzero().squeeze(1)
            slots = slots[written]
        return StepMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=common.causal,
            runs=[
                Run(
                    last - first,
                    slice(starts[first], starts[last]),
                    common.block_table_tensor[first:last],
                    common.seq_lens[first:last],
                )
                for first, last in runs_of_equal_length(starts)
            ],
            written=written,
            blocks=slots // self.block_size,
            offsets=slots % self.block_size,
        )


class FlashMLAGQABackend(CPUAttentionBackend):
    """vLLM's CPU backend with another implementation behind it."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type[FlashMLAGQAImpl]:
        return FlashMLAGQAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMLAGQAMetadataBuilder]:
        return FlashMLAGQAMetadataBuilder


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

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write key and value [tokens, Hk, D] where attention reads them; attention of query [tokens, Hq, D]."""
        if attn_metadata is None:  # a run that only measures memory
            return output
        if self.kv_sharing_target_layer_name is None and key is not None and value is not None:
            write(torch.cat([key, value], -1), kv_cache, attn_metadata)
        k_pages, v_pages = kv_cache.chunk(2, dim=-1)
        out = output.view(*query.shape)
        for run in attn_metadata.runs:
            own_query, own_out = (x[run.rows].unflatten(0, (run.requests, -1)).transpose(1, 2) for x in (query, out))
            call = PoolCall(
                own_query,
                k_pages,
                v_pages,
                None,
                run.block_table,
                run.seq_lens,
                layout="HND",
                causal=attn_metadata.causal,
                softmax_scale=self.scale,
                attn_sink=self.sinks,
            )
            attend_pools(call, False, own_out, out_is_new=True)
        return output


def write(rows: Tensor, kv_cache: Tensor, step: StepMetadata) -> None:
    """Rows [tokens, Hk, 2 * D] into their pages."""
    assert step.blocks is not None
    rows = rows[: len(step.blocks)] if step.written is None else rows[step.written]
    kv_cache.transpose(1, 2).index_put_((step.blocks, step.offsets), rows)


def runs_of_equal_length(starts: list[int]) -> list[tuple[int, int]]:
    """[first, last) of requests that follow one another with as many query tokens each."""
    lengths = [b - a for a, b in pairwise(starts)]
    edges = [i for i, length in enumerate(lengths) if i == 0 or length != lengths[i - 1]]
    runs = zip(edges, [*edges[1:], len(lengths)], strict=True)
    return [(first, last) for first, last in runs if lengths[first]]
