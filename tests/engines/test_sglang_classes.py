"""The SGLang backend inside an installed SGLang: its base class, registry, forward modes and write locations.

    pip install --no-deps sglang==0.5.23, then what its imports ask for, and
    python -m pytest --noconftest tests/engines/test_sglang_classes.py

The wheel drags in image and GGUF packages that attention does not use; where they are missing, empty modules stand in.
Its engine, which needs a GPU, is not started: runner, batch and layer are ours. Skipped where SGLang is not installed.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import Finder

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)


transformers = pytest.importorskip("transformers")
transformers.utils.is_torchvision_available()  # asked, and the answer kept, before there is a stand-in
sys.meta_path.append(Finder(("torchvision", "gguf")))

from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES  # noqa: E402
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS  # noqa: E402
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend  # noqa: E402
from sglang.srt.mem_cache.memory_pool import KVWriteLoc  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from flash_mla.integrations import sglang as plugin  # noqa: E402

H, RANK, ROPE, PAGE = 4, 64, 16, 64
D = RANK + ROPE


class Pool:
    """Latent rows [slots, 1, D]; writes go where the batch's KVWriteLoc says."""

    def __init__(self) -> None:
        self.rows = torch.full((16 * PAGE, 1, D), float("nan"))

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.rows

    def set_kv_buffer(self, layer: Any, where: KVWriteLoc, k: torch.Tensor, v: torch.Tensor) -> None:
        assert isinstance(where, KVWriteLoc)
        self.rows[where.loc.long()] = k.view(-1, 1, D)


def test_a_prompt_its_decode_and_a_chain_through_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """register(), the registry's own call, then `AttentionBackend.forward` by ForwardMode, each against float64."""
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(dcp_enabled=False))
    monkeypatch.setattr(runtime_context, "get_spec", lambda: SimpleNamespace(speculative_num_draft_tokens=3))
    plugin.register()
    plugin.register()
    assert ATTENTION_BACKEND_CHOICES.count(plugin.NAME) == 1

    torch.manual_seed(6)
    table = torch.zeros(3, 256, dtype=torch.int32)
    order = torch.randperm(16)
    for i in range(3 * 4):
        table[i // 4, i % 4 * PAGE : (i % 4 + 1) * PAGE] = order[i] * PAGE + torch.arange(PAGE)
    pool = Pool()
    runner = SimpleNamespace(
        model_config=SimpleNamespace(kv_lora_rank=RANK, qk_rope_head_dim=ROPE, context_len=256), page_size=PAGE,
        use_mla_backend=True, req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool,
        kv_index_translator=None,
    )  # fmt: skip
    backend = ATTENTION_BACKENDS[plugin.NAME](runner)
    assert isinstance(backend, AttentionBackend)
    layer = SimpleNamespace(
        layer_id=0, head_dim=D, v_head_dim=RANK, tp_q_head_num=H, tp_k_head_num=1, scaling=0.11, k_scale=None
    )
    requests, held = torch.tensor([2, 0]), torch.zeros(2, dtype=torch.int64)
    latents = torch.randn(2, 200, D)
    for mode, counts in (
        (ForwardMode.EXTEND, [70, 33]),
        (ForwardMode.EXTEND, [20, 64]),  # over a prefix
        (ForwardMode.DECODE, [1, 1]),
        (ForwardMode.TARGET_VERIFY, [3, 3]),
    ):
        new = torch.tensor(counts)
        spans = [(int(start), int(start) + count) for start, count in zip(held, counts, strict=True)]
        slots = torch.cat([table[r, a:b] for r, (a, b) in zip(requests.tolist(), spans, strict=True)])
        batch = SimpleNamespace(
            batch_size=2, forward_mode=mode, req_pool_indices=requests, extend_seq_lens=new, extend_seq_lens_cpu=counts,
            seq_lens=held if mode == ForwardMode.TARGET_VERIFY else held + new, out_cache_loc=slots,
            out_cache_loc_is_physical=True, kv_loc_plan=None,
        )  # fmt: skip
        k = torch.cat([latents[b, first:last] for b, (first, last) in enumerate(spans)]).unsqueeze(1)
        q = torch.randn(sum(counts), H * D)
        backend.init_forward_metadata(batch)
        out = backend.forward(q, k, k[..., :RANK], layer, batch).view(-1, H, RANK)
        start = 0
        for b, (first, last) in enumerate(spans):
            x = latents[b, :last].double()
            part = slice(start, start + last - first)
            start = part.stop
            scores = 0.11 * torch.einsum("shd,td->sht", q[part].view(-1, H, D).double(), x)
            hidden = torch.arange(last) > torch.arange(first, last)[:, None]
            want = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ x[:, :RANK]
            assert (out[part] - want).abs().max() <= 1e-5 * want.abs().max()
        held = held + new
