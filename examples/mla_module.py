"""A multi-head latent attention layer as an nn.Module: prompt expanded, decode absorbed, RoPE, any device and dtype.

    python examples/mla_module.py

The layer owns parameters alone. A cache belongs to a batch of requests, so it is made by `new_cache` and passed in:
`state_dict` and `.to()` then mean what they always do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_mla import PagedKVCache, flash_mla_prefill
from flash_mla.mla import MLAProjection


class LatentAttention(nn.Module):
    """DeepSeek-V3's attention, without YaRN. x [B, T, dim] -> [B, T, dim].

    Args:
        dim, heads: of the model.
        nope, rope: dims of a query that carry no position, and those that do.
        v: dims of a value.
        latent: dims that the cache keeps beside rope.
        q_latent: rank of the queries' projection.
    """

    def __init__(
        self, dim: int, heads: int, nope: int = 128, rope: int = 64, v: int = 128, latent: int = 512, q_latent: int = 96
    ) -> None:
        super().__init__()
        self.heads, self.nope, self.rope, self.latent = heads, nope, rope, latent
        self.q_a_proj = nn.Linear(dim, q_latent, bias=False)
        self.q_a_norm = nn.RMSNorm(q_latent)
        self.q_b_proj = nn.Linear(q_latent, heads * (nope + rope), bias=False)
        self.kv_a_proj = nn.Linear(dim, latent + rope, bias=False)
        self.kv_a_norm = nn.RMSNorm(latent)
        self.kv_b_proj = nn.Linear(latent, heads * (nope + v), bias=False)
        self.o_proj = nn.Linear(heads * v, dim, bias=False)

    def new_cache(self, batch: int, max_seq_len: int) -> PagedKVCache:
        """An empty cache where the parameters are now, in their dtype."""
        weight = self.kv_b_proj.weight
        storage = {"max_seq_len": max_seq_len, "dtype": weight.dtype, "device": weight.device}
        return PagedKVCache.mla(batch, self.latent + self.rope, self.latent, **storage)

    def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Attend from x's tokens, which follow those in the cache and are added to it; up to 8 unless it is empty."""
        B, T, _ = x.shape
        first = torch.tensor(cache.lengths, device=x.device)[:, None]
        positions = (first + torch.arange(T, device=x.device)).unsqueeze(1)  # [B, 1, T]
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).view(B, T, self.heads, -1).transpose(1, 2)
        q = torch.cat([q[..., : self.nope], rotate(q[..., self.nope :], positions)], dim=-1)  # [B, H, T, nope + rope]
        c, k_rope = self.kv_a_proj(x).unsqueeze(1).split((self.latent, self.rope), dim=-1)
        rows = torch.cat([self.kv_a_norm(c), rotate(k_rope, positions)], dim=-1)  # [B, 1, T, latent + rope]

        # NOTE: two views of the parameter, made in each call: they follow .to() and load_state_dict
        kv_b = MLAProjection.from_weight(self.kv_b_proj.weight, self.heads, nope=self.nope, rope=self.rope)
        is_prompt = not any(cache.lengths)
        cache.append(rows)
        if is_prompt:
            k, v = kv_b.expand(rows)
            out = flash_mla_prefill(q.contiguous(), k, v, softmax_scale=kv_b.softmax_scale)
        else:
            attended = cache.decode(kv_b.absorb(q), softmax_scale=kv_b.softmax_scale)
            out = kv_b.project(attended)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE of x [B, heads, T, rope] at positions [B, 1, T], neighbouring dims as pairs."""
    rope = x.shape[-1]
    speeds = 10000.0 ** (torch.arange(0, rope, 2, device=x.device) / -rope)
    angles = positions.unsqueeze(-1) * speeds  # [B, 1, T, rope / 2]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)
    return turned.flatten(-2).to(x.dtype)


@torch.no_grad()
def main(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Decode a few tokens behind a prompt; returns the largest difference from one call over all of them."""
    torch.manual_seed(0)
    layer = LatentAttention(dim=256, heads=4).to(device, dtype)
    x = torch.randn(2, 70, 256, dtype=dtype, device=device)
    cache = layer.new_cache(batch=2, max_seq_len=128)
    steps = [layer(x[:, :64], cache)]  # the prompt
    steps += [layer(x[:, i : i + 1], cache) for i in range(64, 67)]  # three tokens, one by one
    steps += [layer(x[:, 67:], cache)]  # three at once
    whole = layer(x, layer.new_cache(batch=2, max_seq_len=128))
    difference = float((torch.cat(steps, dim=1) - whole).abs().max() / whole.abs().max())
    print(cache)
    print("parameters:", ", ".join(layer.state_dict()))
    print(f"decode against one call over all tokens: {difference:.1e} of the largest output")
    return difference


if __name__ == "__main__":
    main()
