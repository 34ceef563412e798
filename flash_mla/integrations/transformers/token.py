"""One token a sequence on a GPU, where launches bind a step: a layer's writes and attention with all else bound.

    k, v ------------------ append ----------------> pages          one launch, the latent and its rope too
    q (nope) -- w_k --> rows (latent)  \\
    q (rope) -- copy -> rows (rope)     > decode --> found          its kernel, and the combine of requests in parts
    found -- w_v --> out [B, 1, Hq, V], as the model reads it on

Views, plans and launch arguments are made in the first step. `rows` and `found` are the same memory in all layers of a
cache, which use it one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.integrations.transformers.layer import Layer
from flash_mla.mla import MLAProjection
from flash_mla.problem import AppendArgs

Scratch = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
"""rows and found, by Hq and dtype."""


class TokenDecode:
    """A layer's attention of one new token a sequence.

    Args:
        layer: the layer's part of the cache; not FP8.
        q: [B, Hq, 1, D] like that of all calls to come; of MLA not absorbed.
        k, v: [B, Hk, 1, ..] likewise; of MLA the latent and the rope.
        table: [B, table_blocks], the cache's.
        lengths: [B], the cache's, the new tokens included.
        scale: of the softmax.
        held: MLA: the layer's kv_b_proj, else None.
        scratch: what the layers of the cache share; filled by the first.
    """

    def __init__(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        lengths: Tensor,
        scale: float,
        held: MLAProjection | None,
        scratch: Scratch,
    ) -> None:
        self.table, self.held = table, held
        # NOTE: tensors and views made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            found = q.new_empty(*q.shape[:3], layer.v_cache.shape[-1])
            if held is None:
                self.caches, self.lengths, self.found = (layer.k_cache, layer.v_cache), lengths, found
                self.bound = layer.bound(q, table, lengths, found, scale)
            else:
                self._absorb(layer, q, lengths, scale, held, scratch)
        self.append = self.bound.plan.appending(AppendArgs(k, v, *self.caches, table, lengths, None))

    def _absorb(
        self, layer: Layer, q: Tensor, lengths: Tensor, scale: float, held: MLAProjection, scratch: Scratch
    ) -> None:
        """What MLA has beside: the absorbed rows, their attention and its lift, as views of the scratch."""
        B, Hq = q.shape[:2]
        nope, latent, V = *held.w_k.shape[1:], held.w_v.shape[1]
        if (Hq, q.dtype) not in scratch:
            scratch[Hq, q.dtype] = q.new_empty(B, Hq, 1, latent + held.rope), q.new_empty(B, Hq, 1, latent)
        rows, found = scratch[Hq, q.dtype]
        self.caches = (layer.v_cache, layer.k_cache[..., latent:])
        self.w_k, self.w_v = held.w_k, held.w_v.transpose(1, 2)
        self.nope = ((Hq, B, nope), (q.stride(1), q.stride(0), q.stride(3)))
        self.rope = (3, nope, held.rope)
        self.absorbed, self.rotated = rows[:, :, 0, :latent].transpose(0, 1), rows[..., latent:]
        self.found = found[:, :, 0].transpose(0, 1)  # [Hq, B, latent]
        self.out = (B, 1, Hq, V)
        self.out_by_head = ((Hq, B, V), (V, Hq * V, 1))
        self.bound = layer.bound(rows, self.table, lengths, found, scale)
        self.args = self.bound.args(rows, self.table, lengths, found, None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        """Write k, v [B, Hk, 1, ..] (MLA: latent and rope) behind `starts` [B] tokens, and attend: [B, 1, Hq, V]."""
        self.append(AppendArgs(k, v, *self.caches, self.table, starts, None))
        if self.held is None:
            out = torch.empty_like(self.found)
            self.bound.attend(q, self.table, self.lengths, out, False)
            return out.transpose(1, 2)
        torch.bmm(q.as_strided(*self.nope), self.w_k, out=self.absorbed)
        self.rotated.copy_(q.narrow(*self.rope))
        self.bound.plan.launch(self.args)
        out = q.new_empty(self.out)
        torch.bmm(self.found, self.w_v, out=out.as_strided(*self.out_by_head))
        return out
