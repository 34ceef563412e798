"""SGLang's MLA attention on this library: the entry point that SGLang finds, and the backend `flash_mla`.

    python -m sglang.launch_server --model-path MODEL --attention-backend flash_mla --page-size 64

`register` is an entry point of `sglang.srt.plugins`; nothing of SGLang is imported before SGLang calls it. Reads of the
pool go through its pages as they lie (`decode_over_pages`):

    decode         one token a request, absorbed
    target verify  a chain of draft tokens a request: seq_lens does not count them yet
    draft extend   a fixed window of tokens a request
    extend         a prompt without a prefix over its own expanded K and V; with one absorbed, over the pages

SGLang hands an unknown backend's prompts out as it does Triton's: expanded where no request has a prefix, absorbed
otherwise. The table of a captured graph is one tensor, filled anew before each replay, and no value is read on the host
but the lengths of prompts, which the scheduler holds there.

Source: SGLang 0.5.23, `sglang/srt/layers/attention/base_attn_backend.py`, `flashmla_backend.py` and
`models/deepseek_common/attention_backend_handler.py`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from flash_mla.deepseek import flash_attn_varlen_func
from flash_mla.pages import decode_over_pages
from flash_mla.problem import BLOCK, FP8

NAME = "flash_mla"


def register() -> None:
    """Make the backend known; SGLang calls it in every process, perhaps twice."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(make_backend)


def make_backend(runner: Any) -> Any:
    """The backend of one model runner, a subclass of SGLang's own base class."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.runtime_context import get_parallel, get_spec

    if get_parallel().dcp_enabled:  # SGLang would take an unknown backend's lse for one in base 2
        raise NotImplementedError("flash_mla: no decode context parallelism in SGLang")
    backend = type("FlashMLABackend", (PagedMLA, AttentionBackend), {})
    return backend(runner, get_spec().speculative_num_draft_tokens or 0)


class PagedMLA:
    """MLA over the pool's pages of 64 tokens; mixed into SGLang's AttentionBackend.

    Attributes:
        table: [requests, pages] int32, pages of the requests of this pass. Under a graph its memory stays.
        lengths: [requests] int32, keys that the newest query of each request sees.
        runs: extend only: (first, last, start, stop), requests one after another with as many new tokens each, and
            the rows of q that these are.
    """

    needs_cpu_seq_lens = False  # what decode and verify work out is on the device

    def __init__(self, runner: Any, window: int = 0) -> None:
        """window: draft tokens a request, of verify and draft extend."""
        super().__init__()
        config = runner.model_config
        if runner.page_size != BLOCK:
            raise NotImplementedError(f"flash_mla: pages of {runner.page_size} tokens; pass --page-size {BLOCK}")
        if not runner.use_mla_backend:
            raise NotImplementedError("flash_mla: MLA models")
        self.req_to_token: Tensor = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.latent_dim = config.kv_lora_rank
        self.row_dim = config.kv_lora_rank + config.qk_rope_head_dim
        self.translator = getattr(runner, "kv_index_translator", None)
        self.window = window
        self.pages = -(-config.context_len // BLOCK) + 1  # drafts may reach past the context
        self.table = torch.zeros(0, self.pages, dtype=torch.int32, device=self.req_to_token.device)
        self.lengths = torch.zeros(0, dtype=torch.int32, device=self.req_to_token.device)
        self.runs: list[tuple[int, int, int, int]] = []

    # Once a pass

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Tables and lengths that every graph reads."""
        self.table = self.table.new_zeros(max_bs, self.pages)
        self.lengths = self.lengths.new_zeros(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a request that only pads a captured batch."""
        return 1

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """An eager pass."""
        seq_lens = forward_batch.seq_lens
        if forward_batch.forward_mode.is_draft_extend_v2():  # a window is padded to its width; a captured one counts it
            seq_lens = seq_lens - forward_batch.extend_seq_lens + self.window
        self._prepare(forward_batch, seq_lens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """A capture or a replay: table and lengths change in place."""
        self._prepare(forward_batch, forward_batch.seq_lens)

    def _prepare(self, forward_batch: Any, seq_lens: Tensor) -> None:
        B, mode = forward_batch.batch_size, forward_batch.forward_mode
        if len(self.table) < B:  # never under a graph: none is captured above init_cuda_graph_state's batch
            self.init_cuda_graph_state(B, 0)
        self.lengths[:B].copy_(seq_lens[:B] + self.window if mode.is_target_verify() else seq_lens[:B])
        if self.translator is not None and self.translator.reads_are_translated:
            self.translator.copy_page_table(forward_batch.kv_loc_plan, out=self.table[:B])
        else:
            first = self.req_to_token[forward_batch.req_pool_indices[:B], ::BLOCK]  # a page's slots follow one another
            pages = min(first.shape[1], self.pages)
            self.table[:B, :pages].copy_(first[:, :pages] // BLOCK)
        is_prompt = mode.is_extend_without_speculative()
        self.runs = runs_of_equal_length(forward_batch.extend_seq_lens_cpu) if is_prompt else []

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Nothing: kernels find their share of the work from lengths on the device."""

    # Each layer

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Absorbed attention of q [tokens, Hq * D], as many tokens of each request, over the pages."""
        self._write(k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, layer, 0, forward_batch.batch_size)

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Verify, draft extend and prompts: [tokens, Hq * Dv]."""
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if layer.head_dim != self.row_dim or layer.v_head_dim != self.latent_dim:
            return self._expanded(q, cast(Tensor, k), cast(Tensor, v), layer, forward_batch)
        self._write(k, v, layer, forward_batch, save_kv_cache)
        parts = [self._attend(q[start:stop], layer, first, last) for first, last, start, stop in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q: Tensor, layer: Any, first: int, last: int) -> Tensor:
        """Requests first..last of this pass, causal from their newest query backwards."""
        rows = self.pool.get_key_buffer(layer.layer_id)  # [slots, 1, D]
        rows = rows.view(FP8) if rows.dtype == torch.uint8 else rows
        scale = None
        if rows.dtype == FP8:
            scale = 1.0 if layer.k_scale is None else layer.k_scale.float().reshape(())
        q = q.view(last - first, -1, layer.tp_q_head_num, layer.head_dim)
        out = decode_over_pages(
            q.transpose(1, 2),
            rows.unflatten(0, (-1, BLOCK)),
            None,
            self.table[first:last],
            self.lengths[first:last],
            v_head_dim=self.latent_dim,
            check_values=False,
            softmax_scale=layer.scaling,
            k_descale=scale,
            v_descale=scale,
        )
        return cast(Tensor, out).transpose(1, 2).reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _expanded(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any) -> Tensor:
        """Prompts without a prefix, over their own expanded K and V; their latents are written by the model."""
        H = layer.tp_q_head_num
        lengths = forward_batch.extend_seq_lens
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        out, _ = flash_attn_varlen_func(
            q.view(-1, H, layer.head_dim), k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_k_head_num, layer.v_head_dim), starts, starts, 0, 0,
            softmax_scale=layer.scaling, causal=True,
        )  # fmt: skip
        return out.flatten(1)

    def _write(self, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any, save_kv_cache: bool) -> None:
        if k is None or not save_kv_cache:
            return
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        self.pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)


def runs_of_equal_length(lengths: list[int]) -> list[tuple[int, int, int, int]]:
    """(first, last, start, stop): requests that follow one another with as many tokens each, and their tokens."""
    runs = []
    first = start = 0
    for length, group in groupby(lengths):
        last = first + len([*group])
        stop = start + (last - first) * length
        if length:
            runs.append((first, last, start, stop))
        first, start = last, stop
    return runs
