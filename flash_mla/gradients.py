"""The backward of attention: gradients of checked tensors, through a backend that has one.

The equations, and how a row without keys, a sink and padding enter them, are in docs/design/backward.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.autograd import NO_FP8_BACKWARD, no_backward
from flash_mla.contract import check_scale, prefill_problem
from flash_mla.plan import plan
from flash_mla.problem import FP8, BackwardArgs, BackwardProblem, MaskKind


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
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
        out, lse: as the forward gave them; d_out, d_lse: of any strides.
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
