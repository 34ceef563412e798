"""Sparse MLA in vLLM (DeepSeek-V3.2): prompts and decode attend to the tokens that vLLM's indexer picks.

    --attention-backend CUSTOM_SPARSE

vLLM's indexer leaves token numbers of each query's request in a buffer that all layers share; they become rows of the
pool, which `flash_mla.deepseek` reads where they lie: BF16 or FP16 latents, or V3.2's 656-byte rows. Source of the
interfaces: vLLM 0.32, `vllm/v1/attention/backends/mla/flashmla_sparse.py` and `xpu_mla_sparse.py`, whose metadata hands
every token to `forward_mqa`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.mla.xpu_mla_sparse import (
    XPUMLASparseImpl,
    XPUMLASparseMetadata,
    XPUMLASparseMetadataBuilder,
)

from flash_mla.deepseek import flash_mla_with_kvcache, pool_indices
from flash_mla.integrations.vllm.mla import DecoderOnly

ROWS = "fp8_ds_mla"  # of 656 bytes; vLLM's "fp8" is another name for it where attention is sparse


class FlashMLASparseMetadataBuilder(XPUMLASparseMetadataBuilder):
    """vLLM's own, which routes all tokens to `forward_mqa`.

    What a step's layers read is in buffers that stay (the requests of the tokens, the table, the indexer's picks), so
    that a uniform decode batch can be captured.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH


class FlashMLASparseBackend(AttentionBackend):
    """What vLLM asks before it chooses."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", ROWS, "fp8"]

    @staticmethod
    def get_name() -> str:
        """The name of the enum's member: vLLM maps names back to members."""
        return "CUSTOM_SPARSE"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(64)]

    @staticmethod
    def get_impl_cls() -> type[FlashMLASparseImpl]:
        return FlashMLASparseImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMLASparseMetadataBuilder]:
        return FlashMLASparseMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [576]

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8


class FlashMLASparseImpl(DecoderOnly, XPUMLASparseImpl):
    """vLLM's own but for the attention itself."""

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: XPUMLASparseMetadata,
        layer: Any,
    ) -> tuple[Tensor, None]:
        """Attention of absorbed queries over the picked tokens.

        Args:
            q: [tokens, heads, 576], or its 512 and 64 columns apart.
            kv_c_and_k_pe_cache: [num_blocks, page, 576] in q's dtype, or [num_blocks, page, 656] bytes.

        Returns:
            out [tokens, heads, 512]; no lse, since vLLM merges no sparse attention.
        """
        q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        assert self.topk_indices_buffer is not None
        picked = self.topk_indices_buffer[: len(q)]  # [tokens, topk], -1 past the last
        tables = attn_metadata.block_table[attn_metadata.req_id_per_token[: len(q)].long()]  # [tokens, blocks]
        rows = pool_indices(picked.unsqueeze(1), tables, kv_c_and_k_pe_cache.shape[1])
        out, _ = flash_mla_with_kvcache(
            q.unsqueeze(1), kv_c_and_k_pe_cache.unsqueeze(2), None, None, self.kv_lora_rank,
            softmax_scale=self.softmax_scale, is_fp8_kvcache=self.kv_cache_dtype in (ROWS, "fp8"), indices=rows,
        )  # fmt: skip
        return out.squeeze(1), None
