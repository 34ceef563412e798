"""vLLM's attention on this library: the entry points that vLLM finds. Nothing of vLLM is imported before it calls.

    flash_mla               general   registers `CUSTOM`: MLA decode and MLA prefill; `CUSTOM_SPARSE`: DeepSeek-V3.2's
    flash_mla_cpu           platform  a CPU platform that honours `CUSTOM`, for MLA (pages of 64) and GQA
    flash_mla_cpu_override  general   our classes in the place of the stock CPU platform's, for MLA (pages of 16), GQA

The first is always there; vLLM uses it where `attention_config.backend` is `CUSTOM`. The stock CPU platform takes its
own backend, whatever is selected; hence the two ways for a CPU. Both change what a server does, so that VLLM_PLUGINS,
vLLM's own list of plugins to load, must name them.

Source: vLLM 0.32, `vllm/plugins/__init__.py` and `vllm/v1/attention/backends/registry.py`.
"""

from __future__ import annotations

import os

HERE = __name__


def named(plugin: str) -> bool:
    """Whether VLLM_PLUGINS names the plugin."""
    return plugin in os.environ.get("VLLM_PLUGINS", "").split(",")


def register() -> None:
    """Register `CUSTOM` and `CUSTOM_SPARSE`; vLLM calls it in every process, perhaps twice."""
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{HERE}.mla.FlashMLABackend")
    if "CUSTOM_SPARSE" not in AttentionBackendEnum.__members__:  # a name can be made once
        register_backend("CUSTOM_SPARSE", f"{HERE}.sparse.FlashMLASparseBackend")
    register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, f"{HERE}.mla.FlashMLAPrefillBackend")


def override_cpu() -> None:
    """Put our classes in the place of the stock CPU platform's, if asked for by name."""
    if not named("flash_mla_cpu_override"):
        return
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_MLA, f"{HERE}.mla.FlashMLABackend")
    register_mla_prefill_backend(MLAPrefillBackendEnum.CPU, f"{HERE}.mla.FlashMLAPrefillBackend")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{HERE}.gqa.FlashMLAGQABackend")


def cpu_platform() -> str | None:
    """The path of our CPU platform, if asked for by name; vLLM allows one platform plugin at a time."""
    return f"{HERE}.platform.FlashMLACpuPlatform" if named("flash_mla_cpu") else None
