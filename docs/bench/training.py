"""200 steps of a tiny DeepSeek-V3 of transformers on a CPU: attention by flash_mla_prefill, SDPA and eager, drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM

from flash_mla import flash_mla_prefill

ROOT = Path(__file__).parents[1]
CONFIG = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "max_position_embeddings": 64,
}  # fmt: skip


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """A layer's causal attention, as transformers calls it."""
    out = flash_mla_prefill(*(x.contiguous() for x in (query, key, value)), softmax_scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def losses(attention: str, data_seed: int = 0, steps: int = 200) -> Tensor:
    """The loss of every step, on bytes of the contract's page."""
    text = torch.tensor(list((ROOT / "contract.md").read_bytes()))
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG))
    model.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(data_seed)
    curve = []
    for _ in range(steps):
        ids = torch.stack([text[i : i + 64] for i in torch.randint(len(text) - 65, (8,), generator=generator)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


def main(picture: str) -> None:
    torch.set_num_threads(1)
    AttentionInterface.register("ours", attend)
    curves = {name: losses(name) for name in ("ours", "sdpa", "eager")}
    curves["sdpa, other data"] = losses("sdpa", 1)
    for name, curve in curves.items():
        apart = (curve - curves["sdpa"]).abs().max()
        print(f"{name}: {curve[0]:.4f} to {curve[-10:].mean():.4f}, at most {apart:.4f} from SDPA")
        plt.plot(curve, label=name, linewidth=1)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.legend()
    plt.savefig(picture, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
