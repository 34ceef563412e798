"""One token a sequence on a GPU, where launches bind a step: a layer's writes and attention with all else bound.

    k, v ------------------ append ----------------> pages          one launch, the latent and its rope too
    q (nope) -- w_k --> rows (latent)  \\
    q (rope) -- copy -> rows (rope)     > decode --> found          its kernel, and the combine of requests in parts
    found -- w_v --> out [B, 1, Hq, V], as the model reads it on

Views, plans and launch arguments are made in the first step. The six launches of MLA are one CUDA graph besides, which
takes three: q, k and v copied to where it reads them, its replay, and a copy of what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from flash_mla.integrations.transformers.layer import Layer
from flash_mla.mla import MLAProjection
from flash_mla.problem import AppendArgs

MOST_COPIED = 2**20
"""Bytes of q up to which a layer's launches are a graph; to copy more takes longer than to launch."""


def is_captured(q: Tensor) -> bool:
    """Whether an MLA layer's launches for this q are a graph."""
    return q.is_cuda and q.nbytes <= MOST_COPIED


class TokenDecode:
    """A layer's attention of one new token a sequence, K and V of each head in pages.

    Args:
        layer: the layer's part of the cache; not FP8.
        q: [B, Hq, 1, D] like that of all calls to come; of MLA not absorbed.
        k, v: [B, Hk, 1, ..] likewise; of MLA the latent and the rope.
        table: [B, table_blocks], the cache's.
        lengths: [B], the cache's, the new tokens included.
        scale: of the softmax.
    """

    def __init__(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float
    ) -> None:
        self.table, self.lengths = table, lengths
        self.caches = layer.k_cache, layer.v_cache
        # NOTE: tensors and views made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self.out = q.new_empty(*q.shape[:3], layer.v_cache.shape[-1])
            self.bound = layer.bound(q, table, lengths, self.out, scale)
        self.append = self.bound.plan.appending(AppendArgs(k, v, *self.caches, table, lengths, None))

    def fits(self, held: MLAProjection | None) -> bool:
        """Whether the call was made for this projection."""
        return held is None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        """Write k, v [B, Hk, 1, ..] behind `starts` [B] tokens, and attend: [B, 1, Hq, V]."""
        self.append(AppendArgs(k, v, *self.caches, self.table, starts, None))
        out = torch.empty_like(self.out)
        self.bound.attend(q, self.table, self.lengths, out, False)
        return out.transpose(1, 2)


# --- MLA --------------------------------------------------------------------------------------------------------------


class Shared:
    """What MLA layers of one cache use one after the other, where q, k and v look alike in all of them.

    Attributes:
        given: q, k and v that a graph reads; empty where there is none.
        rows: [B, Hq, 1, latent + rope], q absorbed.
        found: [B, Hq, 1, latent], the attention of the rows.
        out: [B, 1, Hq, V] that a graph writes.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, held: MLAProjection, in_graph: bool) -> None:
        B, Hq = q.shape[:2]
        latent, V = held.w_k.shape[2], held.w_v.shape[1]
        self.given = [torch.empty_like(x) for x in (q, k, v)] if in_graph else []
        self.rows = q.new_empty(B, Hq, 1, latent + held.rope)
        self.found = q.new_empty(B, Hq, 1, latent)
        self.out = q.new_empty((B, 1, Hq, V) if in_graph else 0)
        if in_graph and q.is_cuda:
            # NOTE: one stream, since cuBLAS keeps 32 MiB for each
            self._stream, self._pool = torch.cuda.Stream(q.device), torch.cuda.graph_pool_handle()
            self._first: torch.cuda.CUDAGraph | None = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as one CUDA graph: run once outside of it, where kernels compile, and once recorded."""
        current, graph = torch.cuda.current_stream(self.rows.device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
            # NOTE: torch.cuda.graph would collect garbage and wait for the GPU, in each layer
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        # NOTE: a pool ends with its last graph, and layers make theirs anew when the cache grows
        self._first = self._first or graph
        return graph.replay


Scratch = dict[Hashable, Shared]
"""By what q, k and v look like."""


class LatentDecode:
    """A layer's attention of one new token a sequence, over latents.

    Args:
        layer, q, k, v, table, lengths, scale: as of TokenDecode.
        held: the layer's kv_b_proj.
        shared: the cache's memory for such calls; where it is for graphs, `starts` of all calls are the same tensor.
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
        held: MLAProjection,
        shared: Shared,
    ) -> None:
        self.table, self.held, self.shared = table, held, shared
        self.replay: Callable[[], None] | None = None
        q, k, v = shared.given or (q, k, v)
        rows, found = shared.rows, shared.found
        B, Hq = q.shape[:2]
        nope, latent, V = *held.w_k.shape[1:], held.w_v.shape[1]
        # NOTE: views made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self.caches = (layer.v_cache, layer.k_cache[..., latent:])
            self.w_k, self.w_v = held.w_k, held.w_v.transpose(1, 2)
            self.nope = ((Hq, B, nope), (q.stride(1), q.stride(0), q.stride(3)))
            self.rope = (3, nope, held.rope)
            self.absorbed, self.rotated = rows[:, :, 0, :latent].transpose(0, 1), rows[..., latent:]
            self.found = found[:, :, 0].transpose(0, 1)  # [Hq, B, latent]
            self.out = (B, 1, Hq, V)
            self.out_by_head = ((Hq, B, V), (V, Hq * V, 1))
            self.bound = layer.bound(rows, table, lengths, found, scale)
            self.args = self.bound.args(rows, table, lengths, found, None)
        self.append = self.bound.plan.appending(AppendArgs(k, v, *self.caches, table, lengths, None))

    def fits(self, held: MLAProjection | None) -> bool:
        """Whether the call was made for this projection."""
        return held is self.held

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        """Write latent k and rope v [B, 1, 1, ..] behind `starts` [B] tokens, and attend: [B, 1, Hq, V]."""
        shared = self.shared
        if not shared.given:
            out = q.new_empty(self.out)
            self._launch(starts, out, q, k, v)
            return out
        torch._foreach_copy_(shared.given, [q, k, v])
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            self._launch(starts, shared.out, *shared.given)
        else:
            if self.replay is None:
                self.replay = shared.capture(lambda: self._launch(starts, shared.out, *shared.given))
            self.replay()
        return shared.out.clone()

    def _launch(self, starts: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.append(AppendArgs(k, v, *self.caches, self.table, starts, None))
        torch.bmm(q.as_strided(*self.nope), self.w_k, out=self.absorbed)
        self.rotated.copy_(q.narrow(*self.rope))
        self.bound.plan.launch(self.args)
        torch.bmm(self.found, self.w_v, out=out.as_strided(*self.out_by_head))
