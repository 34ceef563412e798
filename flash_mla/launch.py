"""The last step of every public function: outputs, what a launch wants of its inputs, the plan's launch, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.autograd import learning, refusing
from flash_mla.contract import Descales
from flash_mla.plan import Plan
from flash_mla.problem import DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem


def launch(
    chosen: Plan,
    function: str,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    mask: Tensor | None,
    softmax_scale: float | None,
    descales: Descales,
    attn_sink: Tensor | None,
    out: Tensor | None,
    return_lse: bool,
    also: tuple[Tensor | None, ...] = (),
    k_rope: Tensor | None = None,
    start_pos: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or (out, lse) with return_lse, of checked tensors.

    Args:
        chosen: the plan of their problem.
        function: the public function's name, for the error of a gradient.
        also: tensors whose values are in K and V already, so that a gradient to them is refused too.
        k_rope: of a decode; start_pos, block_mask: of a prefill.
    """
    problem = chosen.problem
    assert isinstance(problem, (DecodeProblem, PrefillProblem))
    shape = problem.out_shape
    q_descale = k_descale = v_descale = None
    if problem.descale:
        q_descale, k_descale = expand_descale(descales[0], problem), expand_descale(descales[1], problem)
        v_descale = k_descale if descales[2] is descales[1] else expand_descale(descales[2], problem)
    expanded = None if mask is None else mask.expand(*shape[:3], -1)
    # NOTE: kernels read these without a stride
    lengths = None if seq_lens is None else seq_lens.contiguous()
    sink = None if attn_sink is None else attn_sink.contiguous()
    scale = problem.D**-0.5 if softmax_scale is None else float(softmax_scale)
    out = q.new_empty(shape, dtype=problem.out_dtype) if out is None else out
    lse = q.new_empty(shape[:3], dtype=torch.float32) if return_lse else None
    # NOTE: by place, where names would cost the host a microsecond
    if isinstance(problem, DecodeProblem):
        assert block_table is not None
        assert lengths is not None
        chosen.launch(
            DecodeArgs(
                q, k, v, block_table, lengths, expanded, q_descale, k_descale, v_descale, sink, scale, out, lse, k_rope
            )
        )
    else:
        chosen.launch(
            PrefillArgs(
                q, k, v, block_table, lengths, start_pos, expanded, block_mask, q_descale, k_descale, v_descale, sink,
                scale, out, lse,
            )
        )  # fmt: skip
    if torch.is_grad_enabled():
        inputs = learning(q, k, v, mask, attn_sink, *descales, *also)
        if inputs:
            out = refusing(function, out, inputs)
            lse = None if lse is None else refusing(function, lse, inputs)
    return out if lse is None else (out, lse)


def expand_descale(value: float | Tensor | None, problem: DecodeProblem | PrefillProblem) -> Tensor | None:
    """A checked descale as an FP32 tensor [B, Hk]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.full((), float(value), dtype=torch.float32, device=problem.device)
    return value.expand(problem.B, problem.Hk)
