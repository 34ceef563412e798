"""Prefill of sequences laid end to end, with its backward.

Sequences of equal lengths that adjoin are one batch of a backend's prefill, and of its backward; the lengths are read
on the host, in the backward again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flash_mla.autograd import NO_SECOND_BACKWARD, differentiable, learning, refusal, refuse_op, transformed
from flash_mla.contract import (
    check_grouping,
    check_head_dims,
    check_last_dim,
    check_on,
    check_rank,
    check_scale,
    check_tensor,
    named,
    prefill_problem,
)
from flash_mla.deepseek.checks import check_query, check_same_dtype, check_start_values, check_starts
from flash_mla.entry import entry
from flash_mla.errors import ShapeError
from flash_mla.gradients import backward
from flash_mla.passed import traced
from flash_mla.plan import plan
from flash_mla.problem import PrefillArgs


@entry("flash_mla.deepseek")
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences laid end to end, with a backward. Reads cu_seqlens, which waits for the GPU.

    Args:
        q: [total_q, h_q, d]; k: [total_kv, h_kv, d]; v: [total_kv, h_kv, d_v]; BF16, FP16 or (CPU, Triton) FP32.
        cu_seqlens_qo, cu_seqlens_kv: [n + 1] int32, sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen_qo, max_seqlen_kv, is_varlen: not used.
        dropout_p: 0.
        softmax_scale: 1/sqrt(d) if None.
        causal: query i of s_q sees keys t <= s_kv - s_q + i of its sequence.
        deterministic: always so.
        backend: run this backend or raise; None takes the first that can. Hopper has a backward of 128/128 and 192/128;
            of other calls the backward goes to the first that has one.

    Returns:
        out [total_q, h_q, d_v] in q's dtype; lse [total_q, h_q] FP32, natural log. A query without keys: 0 and -inf.
        Both carry gradients to q, k and v, the same bits in every run.
    """
    if dropout_p:
        raise ShapeError(f"dropout_p = {dropout_p}", "dropout_p = 0", "The kernels have no dropout", "Pass 0")
    check_query(q, "[total_q, h_q, d]", 3)
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x)
        check_rank(name, x.shape, 3, "[total_kv, h_kv, d]")
        check_same_dtype(q, name, x)
        check_last_dim(name, x)
    check_on(q.device, k=k, v=v)
    check_starts(q, cu_seqlens_qo=cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv)
    if k.shape[2] != q.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ShapeError(named(q=q, k=k, v=v), "q [total_q, h_q, d], k [total_kv, h_kv, d], v [total_kv, h_kv, d_v]")
    check_grouping(q.shape[1], k.shape[1])
    check_head_dims(q.shape[2], v.shape[2])
    check_scale(softmax_scale)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    inputs = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, causal, scale, backend)
    if traced(q):
        return torch.ops.flash_mla.flash_attn_varlen(*inputs)
    return Varlen.apply(*inputs) if transformed() or learning(q, k, v) else attend_sequences(*inputs)


@entry("flash_mla.deepseek")
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func with qkv [total, h, 2 * head_dim_qk + d_v]: q, k and v side by side in the last dim."""
    check_packed("qkv", qkv, head_dim_qk, 2)
    q, k, v = (qkv[..., :head_dim_qk], qkv[..., head_dim_qk : 2 * head_dim_qk], qkv[..., 2 * head_dim_qk :])
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, deterministic,
        is_varlen, backend=backend,
    )  # fmt: skip


@entry("flash_mla.deepseek")
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func with kv [total_kv, h_kv, head_dim_qk + d_v]: k and v side by side in the last dim."""
    check_packed("kv", kv, head_dim_qk, 1)
    return flash_attn_varlen_func(
        q, kv[..., :head_dim_qk], kv[..., head_dim_qk:], cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv,
        dropout_p, softmax_scale, causal, deterministic, is_varlen, backend=backend,
    )  # fmt: skip


def check_packed(name: str, packed: Tensor, head_dim_qk: int, parts: int) -> None:
    """`packed` [total, heads, parts * head_dim_qk + d_v] with at least one column of V."""
    check_tensor(name, packed)
    check_rank(name, packed.shape, 3, f"[total, heads, {parts} * head_dim_qk + d_v]")
    if type(head_dim_qk) is not int or not 0 < parts * head_dim_qk < packed.shape[2]:
        raise ShapeError(
            f"{named(**{name: packed})}, head_dim_qk = {head_dim_qk!r}",
            f"{name} [total, heads, {parts} * head_dim_qk + d_v]",
            "No columns are left for V",
            "Pass the columns of q and k each as head_dim_qk",
        )


# --- Custom ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flash_mla::flash_attn_varlen", mutates_args=())
def varlen_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    causal: bool,
    softmax_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func where a backward is recorded, or a graph traced."""
    with torch.no_grad():
        return attend_sequences(q, k, v, cu_seqlens_qo, cu_seqlens_kv, causal, softmax_scale, backend)


@varlen_op.register_fake
def fake_varlen(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of (out, lse)."""
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("flash_mla::flash_attn_varlen_backward", mutates_args=())
def varlen_backward_op(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    causal: bool,
    softmax_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): one backward of prefill for sequences of equal lengths that adjoin."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    with torch.no_grad():
        for rows, keys, count, blind in groups(q, k, cu_seqlens_qo, cu_seqlens_kv, causal):
            of_q = [as_batch(x, rows, count)[:, :, blind:] for x in (q, out, lse, d_out, d_lse, dq)]
            of_k = [as_batch(x, keys, count) for x in (k, v, dk, dv)]
            start = of_k[0].shape[2] - of_q[0].shape[2] if causal else 0
            backward(
                of_q[0], of_k[0], of_k[1], *of_q[1:5], causal=causal, softmax_scale=softmax_scale, dq=of_q[5],
                dk=of_k[2], dv=of_k[3], start_pos=start_positions(count, start, q.device), backend=backend,
            )  # fmt: skip
    return dq, dk, dv


@varlen_backward_op.register_fake
def fake_varlen_backward(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Contiguous gradients."""
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *starts, causal, softmax_scale, backend = inputs
    ctx.options = causal, softmax_scale, backend
    ctx.save_for_backward(q, k, v, *output, *starts)


def varlen_backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *VarlenBackward.apply(d_out, d_lse, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


Varlen = differentiable("flash_attn_varlen", save_varlen, varlen_backward)
VarlenBackward = differentiable("flash_attn_varlen_backward", *refusal("flash_attn_varlen_func", *NO_SECOND_BACKWARD))
varlen_op.register_autograd(varlen_backward, setup_context=save_varlen)
refuse_op(varlen_backward_op, "flash_attn_varlen_func", *NO_SECOND_BACKWARD)


# --- Sequences as batches ---------------------------------------------------------------------------------------------


def attend_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    causal: bool,
    softmax_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of tensors whose shapes are checked; their values are checked here."""
    out, lse = fake_varlen(q, k, v)
    out.zero_()
    lse.fill_(-math.inf)
    for rows, keys, count, blind in groups(q, k, cu_seqlens_qo, cu_seqlens_kv, causal):
        batch = [as_batch(x, own, count) for x, own in ((q, rows), (k, keys), (v, keys))]
        part, part_lse = attend_batch(batch[0][:, :, blind:], batch[1], batch[2], causal, softmax_scale, backend)
        as_batch(out, rows, count)[:, :, blind:] = part
        as_batch(lse, rows, count)[:, :, blind:] = part_lse
    return out, lse


def groups(
    q: Tensor, k: Tensor, cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor, causal: bool
) -> Iterator[tuple[slice, slice, int, int]]:
    """alike_sequences of checked cu_seqlens, and how many queries of each are before its first key."""
    starts = cu_seqlens_qo.tolist(), cu_seqlens_kv.tolist()
    check_start_values("cu_seqlens_qo", starts[0], len(q))
    check_start_values("cu_seqlens_kv", starts[1], len(k))
    for rows, keys, count in alike_sequences(*starts):
        S_q, S_kv = (rows.stop - rows.start) // count, (keys.stop - keys.start) // count
        yield rows, keys, count, max(S_q - S_kv, 0) if causal else 0


def as_batch(x: Tensor, own: slice, count: int) -> Tensor:
    """[total, heads, ..] -> a view of [count, heads, rows of a sequence, ..]."""
    return x[own].unflatten(0, (count, -1)).transpose(1, 2)


def start_positions(count: int, start: int, device: torch.device) -> Tensor | None:
    """Where the queries of `count` sequences begin among their keys."""
    return torch.full((count,), start, dtype=torch.int32, device=device) if start else None


def alike_sequences(starts_q: list[int], starts_kv: list[int]) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring sequences of equal lengths, together: (rows of q, rows of k, how many). Empty ones are left out."""
    lengths = [(starts_q[i + 1] - starts_q[i], starts_kv[i + 1] - starts_kv[i]) for i in range(len(starts_q) - 1)]
    first = 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        if all(lengths[first]):
            yield slice(starts_q[first], starts_q[last]), slice(starts_kv[first], starts_kv[last]), last - first
        first = last


def attend_batch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Our prefill of q [B, Hq, P, D] over k [B, Hk, S_kv, D] and v; if causal, the last query sees all keys."""
    B, Hq, P, _ = q.shape
    S_kv, Dv = v.shape[2:]
    offset = S_kv - P if causal else 0
    problem = prefill_problem(q, k, v, S_kv=S_kv, causal=causal, start_pos=offset > 0, scale_sign=check_scale(scale))
    args = PrefillArgs(
        q=q,
        k=k,
        v=v,
        block_table=None,
        seq_lens=None,
        start_pos=start_positions(B, offset, q.device),
        mask=None,
        block_mask=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        attn_sink=None,
        softmax_scale=scale,
        out=q.new_empty((B, Hq, P, Dv), dtype=problem.out_dtype),
        lse=q.new_empty((B, Hq, P), dtype=torch.float32),
    )
    plan(problem, backend).launch(args)
    assert args.lse is not None
    return args.out, args.lse
