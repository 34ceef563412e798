"""MLA's `kv_b_proj`, expanded and absorbed: what a layer computes around the attention functions.

MLA caches a row [latent | rope] a token. `kv_b_proj` makes every head's key and value from the latent; since

    q_nope . (w_k c) = (w_k^T q_nope) . c        sum_t p_t (w_v c_t) = w_v (sum_t p_t c_t)

its key half can be multiplied into q instead and its value half into the output. Decode then attends over the rows as
they lie, one KV head for all query heads (DeepSeek-V2, 2024, section 2.1.2, appendix C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_mla.errors import DTypeError, ShapeError
from flash_mla.kinds import explained_class

__all__ = ["MLAProjection"]


@explained_class
@dataclass(frozen=True, eq=False)
class MLAProjection:
    """The two halves of `kv_b_proj`; `from_weight` makes one of a checkpoint's matrix.

        kv_b = MLAProjection.from_weight(layer.kv_b_proj.weight, num_heads=128)
        k, v = kv_b.expand(rows)    # for flash_mla_prefill(q, k, v, softmax_scale=kv_b.softmax_scale)
        q_rows = kv_b.absorb(q)     # for flash_mla_with_kvcache(q_rows, ..., softmax_scale=kv_b.softmax_scale)
        out = kv_b.project(out)     # its output [B, Hq, S_q, latent] as [B, Hq, S_q, V]

    Args:
        w_k: [Hq, nope, latent], from latents to the part of the keys that carries no position.
        w_v: [Hq, V, latent], from latents to values.
        rope: dims of q and of a row that carry the position.

    Nothing is copied: the halves may be views of the layer's parameter, so that gradients reach it, and follow it where
    it is written in place.
    """

    w_k: Tensor
    w_v: Tensor
    rope: int

    @classmethod
    def from_weight(cls, weight: Tensor, num_heads: int, *, nope: int = 128, rope: int = 64) -> MLAProjection:
        """The halves of a `kv_b_proj.weight` [Hq * (nope + V), latent], as DeepSeek-V2 and -V3 store it.

        Args:
            weight: head by head, nope rows of keys and V rows of values. FP8 checkpoints: dequantise it first.
            num_heads: Hq, of this rank where heads are sharded.
            nope, rope: qk_nope_head_dim and qk_rope_head_dim of the model. Default: DeepSeek's 128 and 64.

        Raises:
            ShapeError: the matrix does not divide into such heads.
        """
        fits = weight.dim() == 2 and num_heads > 0 and weight.shape[0] % num_heads == 0
        if not fits or weight.shape[0] // num_heads <= nope:
            raise ShapeError(
                given=f"weight {list(weight.shape)}, num_heads = {num_heads}, nope = {nope}",
                required="weight [Hq * (nope + V), latent]",
                cause="kv_b_proj holds nope rows of keys and V rows of values for each head",
                fix="Pass kv_b_proj.weight (not kv_a_proj's, and not its transpose) and this rank's number of heads",
            )
        heads = weight.unflatten(0, (num_heads, -1))
        return cls(heads[:, :nope], heads[:, nope:], rope)

    @property
    def softmax_scale(self) -> float:
        """(nope + rope) ** -0.5: that of the query before absorption, which both ways of attending need.

        Models that scale their RoPE (YaRN) multiply it by a factor of their own.
        """
        return (self.w_k.shape[1] + self.rope) ** -0.5

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys and values, for the prefill of a new prompt.

        Args:
            rows: [B, 1, P, latent + rope], what the cache holds: the latent, then the rotated rope.

        Returns:
            k [B, Hq, P, nope + rope] and v [B, Hq, P, V], contiguous.
        """
        latent, rope = self._split("rows", rows, self.w_k.shape[2])
        k = torch.einsum("bpl,hnl->bhpn", latent[:, 0], self.w_k).to(rows.dtype)
        v = torch.einsum("bpl,hvl->bhpv", latent[:, 0], self.w_v).to(rows.dtype)
        # NOTE: einsum returns any order of strides, and prefill takes monotonic ones
        return torch.cat([k, rope.expand(-1, k.shape[1], -1, -1)], dim=-1).contiguous(), v.contiguous()

    def absorb(self, q: Tensor) -> Tensor:
        """The query that attends over rows: w_k multiplied into its nope dims, [B, Hq, S_q, latent + rope], contiguous.

        Args:
            q: [B, Hq, S_q, nope + rope], its rope part rotated.
        """
        nope, rope = self._split("q", q, self.w_k.shape[1])
        absorbed = by_head(nope, self.w_k)
        return torch.cat([absorbed.to(q.dtype), rope], dim=-1).contiguous()

    def project(self, out: Tensor) -> Tensor:
        """Attention over rows, out [B, Hq, S_q, latent], as values [B, Hq, S_q, V]."""
        self._split("out", out, self.w_v.shape[2], 0)
        return by_head(out, self.w_v.transpose(1, 2))

    def _split(self, name: str, x: Tensor, width: int, rope: int | None = None) -> tuple[Tensor, Tensor]:
        """x [B, heads, P, width + rope] in two, once it is sure that it has those dims."""
        rope = self.rope if rope is None else rope
        heads = 1 if name == "rows" else self.w_k.shape[0]
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != width + rope:
            raise ShapeError(
                given=f"{name} {list(x.shape)}",
                required=f"{name} [B, {heads}, P, {width + rope}]",
                cause=f"`{name}` does not fit w_k {list(self.w_k.shape)}, w_v {list(self.w_v.shape)}, rope {self.rope}",
                fix="Heads come before tokens, and the rope dims come last",
            )
        if x.dtype != self.w_k.dtype and not torch.is_autocast_enabled(x.device.type):
            raise DTypeError(
                given=f"{name} {x.dtype}, w_k {self.w_k.dtype}",
                required="one dtype",
                cause=f"`{name}` is multiplied by the projection",
                fix=f"Cast one of them, as with {name}.to(kv_b.w_k.dtype)",
            )
        return x[..., :width], x[..., width:]


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of each head [B, H, P, n] times its matrix, weight [H, n, m]: [B, H, P, m].

    All requests' rows of a head are multiplied at once: `@` would copy the weight for every request.
    """
    B, H, P, n = x.shape
    # NOTE: einsum makes the same call, after 24 views that cost a launch-bound step 20 us
    rows = torch.bmm(x.transpose(0, 1).reshape(H, B * P, n), weight)
    return rows.view(H, B, P, weight.shape[2]).transpose(0, 1)
