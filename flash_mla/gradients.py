"""The backward of attention: gradients of checked tensors, through a backend that has one.

The equations, and how a row without keys, a sink and padding enter them, are in docs/design/backward.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_mla.autograd import (
    NO_FP8_BACKWARD,
    NO_SECOND_BACKWARD,
    differentiable,
    no_backward,
    refusal,
    refusals,
    shapes_of,
    transformed,
)
from flash_mla.contract import check_scale, prefill_problem, sparse_blocks
from flash_mla.passed import traced
from flash_mla.plan import plan
from flash_mla.problem import FP8, BackwardArgs, BackwardProblem, MaskKind

NO_MASK_BACKWARD = (
    "it has no gradient of attn_mask, which would be as large as the scores",
    "Detach the mask; a learned bias needs torch's scaled_dot_product_attention",
)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    d_sink: Tensor | None = None,
    seq_lens: Tensor | None = None,
    start_pos: Tensor | None = None,
    mask: Tensor | None = None,
    block_mask: Tensor | None = None,
    attn_sink: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Fill dq, dk and dv, and d_sink with a sink: see BackwardArgs, whose fields the arguments are.

    Args:
        out, lse: as the forward gave them; d_out, d_lse: of any strides. d_lse: None is 0.
        dk, dv: None both where neither is wanted.
        backend: the forward's. Hopper's backward takes fewer problems: its other calls go to the first backend that
            takes them.
    """
    if q.dtype == FP8:
        no_backward("attention", *NO_FP8_BACKWARD)
    kind: MaskKind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    forward = prefill_problem(
        q,
        k,
        v,
        S_kv=k.shape[2],
        causal=causal,
        mask=kind,
        block_mask=block_mask is not None,
        seq_lens=seq_lens is not None,
        start_pos=start_pos is not None,
        sink=attn_sink is not None,
        scale_sign=check_scale(softmax_scale),
    )
    args = BackwardArgs(
        q=q,
        k=k,
        v=v,
        # NOTE: kernels read these without a stride
        seq_lens=None if seq_lens is None else seq_lens.contiguous(),
        start_pos=start_pos,
        mask=None if mask is None else mask.expand(*q.shape[:3], -1),
        block_mask=block_mask,
        attn_sink=None if attn_sink is None else attn_sink.contiguous(),
        softmax_scale=softmax_scale,
        out=out,
        lse=lse,
        d_out=d_out if d_out.stride(-1) == 1 else d_out.contiguous(),
        d_lse=d_lse,
        dq=dq,
        dk=dk,
        dv=dv,
        d_sink=d_sink,
    )
    problem = BackwardProblem(forward, dq=dq is not None, dkv=dk is not None)
    plan(problem, None if backend == "hopper" else backend).launch(args)


# --- Prefill's -------------------------------------------------------------------------------------------------------


def prefill_gradients(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sparse_layout: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    seq_lens: Tensor | None,
    attn_sink: Tensor | None,
    backend: str | None,
    dq_wanted: bool,
    dkv_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d_sink) of a flash_mla_prefill that gave out and lse; empty tensors in place of what is not wanted,
    and of d_sink without a sink."""
    dq, dk, dv, d_sink = gradients_of(q, k, v, attn_sink, dq_wanted, dkv_wanted)
    backward(
        q, k, v, out, lse, d_out, d_lse, causal=causal, seq_lens=seq_lens, mask=attn_mask,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        block_mask=sparse_blocks(sparse_layout, q), attn_sink=attn_sink, backend=backend,
        dq=dq if dq_wanted else None, dk=dk if dkv_wanted else None, dv=dv if dkv_wanted else None,
        d_sink=None if attn_sink is None else d_sink,
    )  # fmt: skip
    return dq, dk, dv, d_sink


def gradients_of(
    q: Tensor, k: Tensor, v: Tensor, attn_sink: Tensor | None, dq_wanted: bool, dkv_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for (dq, dk, dv, d_sink): contiguous, of q's dtype, the sink's FP32."""
    wanted = ((q, dq_wanted), (k, dkv_wanted), (v, dkv_wanted))
    dq, dk, dv = (x.new_empty(x.shape if needs else (0,)) for x, needs in wanted)
    return dq, dk, dv, q.new_empty((0,) if attn_sink is None else attn_sink.shape, dtype=torch.float32)


def save_prefill(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, mask, causal, softmax_scale, seq_lens, *descales, attn_sink, backend, _ = inputs
    ctx.shapes = shapes_of(inputs)
    ctx.quantised = q.dtype == FP8 or any(x is not None for x in descales)
    ctx.causal, ctx.softmax_scale, ctx.backend = causal, softmax_scale, backend
    # a zero gradient of lse would be written and read for nothing
    ctx.set_materialize_grads(False)
    if not ctx.quantised:
        ctx.save_for_backward(q, k, v, *output, blocks, mask, seq_lens, attn_sink)


def prefill_backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted, given = ctx.needs_input_grad, d_lse if d_out is None else d_out
    if given is None:
        return (None,) * len(wanted)
    if ctx.quantised:
        return refusals(given, ctx.shapes, wanted, "flash_mla_prefill", *NO_FP8_BACKWARD)
    masks = [i == 4 and needs for i, needs in enumerate(wanted)]
    gradients = list(refusals(given, ctx.shapes, masks, "flash_mla_prefill", *NO_MASK_BACKWARD))
    q, k, v, out, lse, blocks, mask, seq_lens, attn_sink = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    dq, dk, dv, d_sink = how(d_out)(
        d_out, d_lse, q, k, v, out, lse, blocks, mask, ctx.causal, ctx.softmax_scale, seq_lens, attn_sink, ctx.backend,
        wanted[0], wanted[1] or wanted[2],
    )  # fmt: skip
    computed = {0: dq, 1: dk, 2: dv, 11: d_sink}
    for i, gradient in computed.items():
        gradients[i] = gradient if wanted[i] else None
    return tuple(gradients)


def how(d_out: Tensor) -> Any:
    """prefill_gradients, or what stands around it where the call is recorded, transformed or traced."""
    if torch.is_grad_enabled():
        return PrefillBackward.apply
    # NOTE: torch's layers around an op cost a call 60 us on the host, and the GPU waits for the first kernel
    if traced(d_out) or transformed() or torch._C._len_torch_dispatch_stack():
        return torch.ops.flash_mla.flash_mla_prefill_backward
    return prefill_gradients


Prefill = differentiable("flash_mla_prefill", save_prefill, prefill_backward)
PrefillBackward = differentiable("flash_mla_prefill_backward", *refusal("flash_mla_prefill", *NO_SECOND_BACKWARD))
