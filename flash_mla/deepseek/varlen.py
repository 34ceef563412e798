"""Prefill of sequences laid end to end, with its backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
from flash_mla.plan import plan
from flash_mla.problem import PrefillArgs

BACKWARD_BYTES = 64 << 20
"""Of one tile of scores in the backward, FP32."""


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
        backend: for the forward: run this backend or raise; None takes the first that can.

    Returns:
        out [total_q, h_q, d_v] in q's dtype; lse [total_q, h_q] FP32, natural log. A query without keys: 0 and -inf.
        Both carry gradients to q, k and v.
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
    starts = cu_seqlens_qo.tolist(), cu_seqlens_kv.tolist()
    check_start_values("cu_seqlens_qo", starts[0], len(q))
    check_start_values("cu_seqlens_kv", starts[1], len(k))
    check_scale(softmax_scale)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return Varlen.apply(q, k, v, starts, causal, scale, backend)


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


class Varlen(torch.autograd.Function):
    """Forward through a backend's prefill; backward in torch, FP32, from the saved lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[list[int], list[int]],
        causal: bool,
        scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
        for rows, keys, count in alike_sequences(*starts):
            S_q, S_kv = (rows.stop - rows.start) // count, (keys.stop - keys.start) // count
            # a causal query before the first key sees none
            blind = max(S_q - S_kv, 0) if causal else 0
            batch = [x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q[rows], k[keys], v[keys])]
            part, part_lse = attend_batch(batch[0][:, :, blind:], batch[1], batch[2], causal, scale, backend)
            out[rows].unflatten(0, (count, -1))[:, blind:] = part.transpose(1, 2)
            lse[rows].unflatten(0, (count, -1))[:, blind:] = part_lse.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.starts, ctx.causal, ctx.scale = starts, causal, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for rows, keys, count in alike_sequences(*ctx.starts):
            split = [x.unflatten(0, (count, -1)) for x in (q[rows], out[rows], lse[rows], d_out[rows], d_lse[rows])]
            for i in range(count):
                own_keys = slice(keys.start + i * (n := (keys.stop - keys.start) // count), keys.start + (i + 1) * n)
                own_rows = slice(rows.start + i * (n := (rows.stop - rows.start) // count), rows.start + (i + 1) * n)
                dq[own_rows], dk[own_keys], dv[own_keys] = sequence_gradients(
                    k[own_keys], v[own_keys], *(x[i] for x in split), causal=ctx.causal, scale=ctx.scale
                )
        return dq, dk, dv, None, None, None, None


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
        start_pos=torch.full((B,), offset, dtype=torch.int32, device=q.device) if offset else None,
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


def sequence_gradients(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one sequence, FP32, in tiles of query rows.

    With P = exp(S - lse): dV = P^T dO; dS = P (dO V^T - rowsum(dO O) + dlse); dQ = scale dS K; dK = scale dS^T Q.

    q, out, d_out [S_q, Hq, D or Dv]; lse, d_lse [S_q, Hq]; k [S_kv, Hk, D]; v [S_kv, Hk, Dv].
    """
    S_q, Hq, _ = q.shape
    S_kv, Hk, _ = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).transpose(0, 1) for x in (k, v))  # [Hk, S_kv, D]
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = torch.zeros_like(q, dtype=dtype)
    # dlse enters as the row sum of dO O does, with the other sign
    shift = (out.to(dtype) * d_out.to(dtype)).sum(-1) - d_lse.to(dtype)  # [S_q, Hq]
    step = max(1, BACKWARD_BYTES // (4 * Hq * S_kv))
    for first in range(0, S_q, step):
        rows = slice(first, min(first + step, S_q))
        # [Hk, rows * ratio, ..]: the heads of a group are rows over one K and V
        tiles = [by_group(x[rows].to(dtype), Hk) for x in (q, d_out, lse.unsqueeze(-1), shift.unsqueeze(-1))]
        q_tile, d_out_tile, lse_tile, shift_tile = tiles
        p = torch.bmm(q_tile, k.transpose(1, 2)).mul_(scale)
        # a row without keys has lse -inf, and weights 0
        p = p.sub_(lse_tile.masked_fill(lse_tile == -math.inf, math.inf)).exp_()
        if causal:
            last = torch.arange(rows.start, rows.stop, device=q.device) + (S_kv - S_q)
            hidden = torch.arange(S_kv, device=q.device) > last.repeat_interleave(Hq // Hk).unsqueeze(1)
            p.masked_fill_(hidden, 0.0)
        dv += torch.bmm(p.transpose(1, 2), d_out_tile)
        ds = torch.bmm(d_out_tile, v.transpose(1, 2)).sub_(shift_tile).mul_(p).mul_(scale)
        dk += torch.bmm(ds.transpose(1, 2), q_tile)
        dq[rows] = torch.bmm(ds, k).unflatten(1, (rows.stop - first, -1)).transpose(0, 1).flatten(1, 2)
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)


def by_group(x: Tensor, Hk: int) -> Tensor:
    """[rows, Hq, n] -> [Hk, rows * ratio, n]."""
    return x.unflatten(1, (Hk, -1)).transpose(0, 1).flatten(1, 2)
