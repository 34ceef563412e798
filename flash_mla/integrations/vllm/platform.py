"""vLLM's CPU platform, honouring the backend `CUSTOM` and giving MLA pages of 64 tokens."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flash_mla.problem import BLOCK


class FlashMLACpuPlatform(CpuPlatform):
    """The stock platform wherever `CUSTOM` is not what the user selected."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM:
            if attn_selector_config.use_mla:
                return selected_backend.get_path()
            return "flash_mla.integrations.vllm.gqa.FlashMLAGQABackend"
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: Any) -> Any:
        custom = MLAPrefillBackendEnum.CUSTOM
        return (
            custom.get_class() if custom.is_overridden() else super().get_mla_prefill_backend_cls(mla_selector_config)
        )

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)  # without AMX it sets pages of 16 for MLA
        if vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM:
            vllm_config.cache_config.block_size = BLOCK
