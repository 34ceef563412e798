"""The torch custom ops behind the public functions: what a compiled graph calls.

Each does the eager function's work, checks included, when the graph runs. `out` is a tensor that the result will be
copied to: it is checked here and not written. mha_fwd_kvcache is two ops, since one that writes cannot have a backward:
the first checks all and writes the caches, the second attends. Prefill's backward is an op of its own, which has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.autograd import NO_SECOND_BACKWARD, one_by_one, refuse_op
from flash_mla.backends import append_rows
from flash_mla.calls import (
    append_mha,
    attend_mha,
    attend_prefill,
    plan_decode,
    plan_mha,
    plan_prefill,
)
from flash_mla.contract import DecodeCall, MhaCall, PrefillCall
from flash_mla.gradients import gradients_of, prefill_backward, prefill_gradients, save_prefill
from flash_mla.launch import attend_decode
from flash_mla.pages import PoolCall, attend_pools, plan_pools
from flash_mla.problem import AppendRowsArgs, Options


@torch.library.custom_op("flash_mla::flash_mla_with_kvcache", mutates_args=())
def decode_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    attn_sink: Tensor | None,
    tail: bool,
    batch_invariant: bool,
    check_values: bool,
    backend: str | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """flash_mla_with_kvcache; check_values says whether the call had no metadata, tail that mask is its tail_mask."""
    descales, options = (q_descale, k_descale, v_descale), Options(tail, batch_invariant)
    call = DecodeCall(q, k_cache, v_cache, block_table, seq_lens, mask, softmax_scale, descales, attn_sink, options)
    with torch.no_grad():
        chosen = plan_decode(call, None, backend, out, check_values)
        return attend_decode(chosen, call, None, True)  # type: ignore[return-value]


@torch.library.custom_op("flash_mla::flash_mla_prefill", mutates_args=())
def prefill_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_layout: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    seq_lens: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    attn_sink: Tensor | None,
    backend: str | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """flash_mla_prefill, with causal settled."""
    descales, blocks = (q_descale, k_descale, v_descale), contract.sparse_blocks(sparse_layout, q)
    call = PrefillCall(q, k, v, blocks, attn_mask, causal, softmax_scale, seq_lens, descales, attn_sink)
    with torch.no_grad():
        return attend_prefill(plan_prefill(call, backend, out), call, None, True)  # type: ignore[return-value]


@torch.library.custom_op("flash_mla::mha_fwd_kvcache_append", mutates_args=("k_cache", "v_cache"))
def mha_append_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    attn_mask: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    start_pos: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    backend: str | None,
    out: Tensor | None,
) -> None:
    """The checks of mha_fwd_kvcache, and its writing of k and v."""
    descales = (q_descale, k_descale, v_descale)
    call = MhaCall(q, k_cache, v_cache, block_table, attn_mask, k, v, start_pos, causal, softmax_scale, descales)
    append_mha(plan_mha(call, backend, out), call)


@torch.library.custom_op("flash_mla::mha_fwd_kvcache", mutates_args=())
def mha_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    attn_mask: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    start_pos: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    backend: str | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """mha_fwd_kvcache over a cache that holds k and v already; they are here so that a gradient to them is refused."""
    descales = (q_descale, k_descale, v_descale)
    call = MhaCall(q, k_cache, v_cache, block_table, attn_mask, k, v, start_pos, causal, softmax_scale, descales)
    with torch.no_grad():
        chosen = plan_mha(call._replace(k=None, v=None), backend, out)
        return attend_mha(chosen, call, None, True)  # type: ignore[return-value]


@torch.library.custom_op("flash_mla::decode_over_pages", mutates_args=())
def pages_op(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    layout: str,
    k_rope_pages: Tensor | None,
    v_head_dim: int | None,
    causal: bool,
    check_values: bool,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    attn_sink: Tensor | None,
    tail: bool,
    batch_invariant: bool,
    backend: str | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """decode_over_pages; tail says that mask is its tail_mask."""
    call = PoolCall(
        q, k_pages, v_pages, k_rope_pages, block_table, seq_lens, mask, layout, v_head_dim, causal, softmax_scale,
        (q_descale, k_descale, v_descale), attn_sink, Options(tail, batch_invariant),
    )  # fmt: skip
    with torch.no_grad():
        if out is not None:
            plan_pools(call, backend, out, check_values=False)
        return attend_pools(call, True, None, backend, check_values=check_values)  # type: ignore[return-value]


@pages_op.register_fake
def fake_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    layout: str,
    k_rope_pages: Tensor | None,
    v_head_dim: int | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """As `fake`, V being v_pages or the first columns of k_pages."""
    v = v_pages
    if v is None:
        v = k_pages[..., :v_head_dim] if k_pages.dim() else k_pages
    return fake(q, k_pages, v)


refuse_op(pages_op, "decode_over_pages")


def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of (out, lse), for q [B, Hq, rows, D] and v [..., Dv]; of other ranks, which the op refuses."""
    dtype, Dv = contract.out_dtype(q.dtype), v.shape[-1] if v.dim() else 0
    return q.new_empty((*q.shape[:3], Dv), dtype=dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


@mha_append_op.register_fake
def fake_append(*_: Any) -> None:
    """Nothing is returned."""


for op in (decode_op, prefill_op, mha_op):
    op.register_fake(fake)
refuse_op(decode_op, "flash_mla_with_kvcache")
refuse_op(mha_op, "mha_fwd_kvcache")


def append_rows_op(*args: Any) -> None:
    """What `quant.RowFormat.append` does once it has checked, eagerly too: AppendRowsArgs' rows into their pages."""
    append_rows(AppendRowsArgs(*args))


# NOTE: defined by its schema: the first call of a `custom_op` imports torch's compiler, which takes seconds
ROWS = torch.library.Library("flash_mla", "FRAGMENT")
ROWS.define(
    "append_rows(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) rope, Tensor slots, Tensor k_nope, Tensor k_rope, "
    "Tensor? descale, int tile, int scale_size) -> ()"
)
ROWS.impl("append_rows", append_rows_op, "CompositeExplicitAutograd")
torch.library.register_fake("flash_mla::append_rows", fake_append, lib=ROWS)


# --- The backward of prefill ------------------------------------------------------------------------------------------


prefill_backward_op = torch.library.custom_op(
    "flash_mla::flash_mla_prefill_backward", prefill_gradients, mutates_args=()
)


@prefill_backward_op.register_fake
def fake_prefill_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the gradients."""
    *_, attn_sink, _backend, dq_wanted, dkv_wanted = others
    return gradients_of(q, k, v, attn_sink, dq_wanted, dkv_wanted)


refuse_op(prefill_backward_op, "flash_mla_prefill", *NO_SECOND_BACKWARD)


prefill_op.register_autograd(prefill_backward, setup_context=save_prefill)
for op in (prefill_op, prefill_backward_op):
    op.register_vmap(one_by_one(op))
