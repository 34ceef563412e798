"""MLA in vLLM: decode over its latent pages, prefill of expanded keys and values.

vLLM expands a prompt's keys and values and calls a prefill backend, with lse so that it can merge chunks of context;
it absorbs the queries of decode and calls `forward_mqa`. Source of the interfaces: vLLM 0.32,
`vllm/model_executor/layers/attention/mla_attention.py` and `vllm/v1/attention/backends/mla/prefill/base.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import envs
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from flash_mla.deepseek import flash_attn_varlen_func
from flash_mla.pages import Bound, PoolCall, attend_pools, bind
from flash_mla.passed import Passed
from flash_mla.problem import FP8, Options

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Descales of q, k and v."""


class FlashMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    """vLLM's own builder. Kernels find their work on the device, so a uniform decode batch can be captured."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM


class FlashMLABackend(MLACommonBackend):
    """What vLLM asks before it chooses."""

    supported_dtypes: ClassVar[list[torch.dtype]] = DTYPES
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        """The name of the enum's member: vLLM maps names back to members."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [16, 32, MultipleOf(64)] if current_platform.is_cpu() else [MultipleOf(64)]

    @staticmethod
    def get_impl_cls() -> type[MLACommonImpl]:
        return FlashMLACpuImpl if current_platform.is_cpu() else FlashMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMLAMetadataBuilder]:
        return FlashMLAMetadataBuilder

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Decode is told to be so; in prefill a query's keys are read in one order, whatever else is in the batch."""
        return True


class Decode:
    """Absorbed decode over the latent pages; both implementations take it.

    Checks and views of a layer's pool are made once for each shape of a batch: see `flash_mla.pages.Bound`.
    """

    can_return_lse_for_decode = True
    need_to_return_lse_for_decode: bool
    kv_lora_rank: int
    scale: float
    _pool: int = 0  # where the pool lies that the calls are bound to
    _bound: Passed[Bound]

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        layer: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a batch of decodes, each of as many query tokens.

        Args:
            q: [tokens, heads, 576], or its 512 and 64 columns apart; e4m3 where vLLM quantises queries.
            kv_c_and_k_pe_cache: [num_blocks, page, 576] in q's dtype or e4m3.

        Returns:
            out [tokens, heads, 512]; where vLLM asks for it (context parallelism) lse [tokens, heads] FP32, natural
            log, -inf where a rank holds no key, else None.
        """
        decode = attn_metadata.decode
        assert decode is not None
        q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        cache, table, seq_lens = kv_c_and_k_pe_cache, decode.block_table, decode.seq_lens
        requests, tokens = attn_metadata.num_decodes, q.shape[0]
        q_descale = layer._q_scale if q.dtype == FP8 else None
        kv_descale = layer._k_scale if cache.dtype == FP8 else None
        out = q.new_empty((tokens, q.shape[1], self.kv_lora_rank), dtype=torch.bfloat16 if q.dtype == FP8 else q.dtype)
        # [requests, heads, tokens of each, columns], views
        q, given = (x.unsqueeze(2) if tokens == requests else by_request(x, requests) for x in (q, out))
        descales = (q_descale, kv_descale, kv_descale)
        if tokens == requests or attn_metadata.causal:
            bound = self.bound(q, cache, table, seq_lens, descales, given)
            lse = bound.attend(q, table, seq_lens, given, self.need_to_return_lse_for_decode)
        else:
            call = self.call(q, cache, table, seq_lens, descales)._replace(causal=False)
            _, lse = attend_pools(call, True, given, out_is_new=True)
        return out, None if lse is None else lse.transpose(1, 2).flatten(0, 1)

    def call(self, q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, descales: Factors) -> PoolCall:
        return PoolCall(
            q, cache.unsqueeze(2), None, None, table, seq_lens, v_head_dim=self.kv_lora_rank, softmax_scale=self.scale,
            descales=descales, options=Options(batch_invariant=envs.VLLM_BATCH_INVARIANT is True),
        )  # fmt: skip

    def bound(self, q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, descales: Factors, out: Tensor) -> Bound:
        """The call, bound before where its facts were the same; a pool that is another forgets those of the last."""
        if (pool := cache.data_ptr()) != self._pool or not pool:
            self._pool, self._bound = pool, Passed()
        tensors, rest = (q, cache, table, seq_lens, *descales), tuple([x.data_ptr() for x in descales if x is not None])
        if (found := self._bound.get(tensors, rest)) is not None:
            return found
        return self._bound.keep(tensors, rest, bind(self.call(q, cache, table, seq_lens, descales), out))


def by_request(x: Tensor, requests: int) -> Tensor:
    """[tokens, heads, D] -> [requests, heads, tokens of each, D], a view."""
    tokens, (row, head, column) = x.shape[0] // requests, x.stride()
    return x.as_strided((requests, x.shape[1], tokens, x.shape[2]), (tokens * row, head, row, column))


class DecoderOnly:
    """The constructor of vLLM's MLA implementations, which refuses what no kernel computes."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **mla_args,
        )  # fmt: skip
        if alibi_slopes or sliding_window or logits_soft_cap or attn_type != AttentionType.DECODER:
            raise NotImplementedError("flash_mla: decoder attention without alibi, sliding window or soft cap")


class FlashMLAImpl(Decode, DecoderOnly, MLACommonImpl[MLACommonMetadata]):
    """On a GPU."""

    supports_dcp = True


class FlashMLACpuImpl(Decode, CPUMLAImpl):
    """On a CPU: vLLM's own, whose constructor picks no GPU prefill and which writes the cache in torch."""


class FlashMLAPrefillBackend(MLAPrefillBackend):
    """Attention of prompts over their own expanded keys and values, or over a chunk of their context."""

    supported_dtypes: ClassVar[list[torch.dtype]] = DTYPES

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    def supports_out(self) -> bool:
        return True

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        starts = self._prefill_metadata.query_start_loc
        result = self.attend(q, k, v, starts, starts, True, out)
        return result if return_softmax_lse else result[0]

    def run_prefill_context_chunk(
        self, chunk: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.attend(q, k, v, chunk.query_start_loc, chunk.cu_seq_lens, False, out)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, causal: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out [tokens, heads, Dv]; lse [heads, tokens], as vLLM merges it."""
        result, lse = flash_attn_varlen_func(
            q, k, v, q_starts.int(), k_starts.int(), 0, 0, softmax_scale=self.scale, causal=causal
        )
        return result if out is None else out.copy_(result), lse.t().contiguous()
