"""The last step of every public function: outputs, what a launch wants of its inputs, the plan's launch, gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_mla.autograd import learning, refusing
from flash_mla.contract import DecodeCall, Descales
from flash_mla.plan import Plan
from flash_mla.problem import DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem

Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_FACTORS: Factors = (None, None, None)


def attend_decode(
    chosen: Plan,
    call: DecodeCall,
    out: Tensor | None,
    return_lse: bool,
    function: str = "flash_mla_with_kvcache",
    empty_lse: float = -math.inf,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or (out, lse) with return_lse, of a checked call.

    Args:
        chosen: the plan of its problem.
        function: the public function's name, for the error of a gradient.
        empty_lse: lse of a row without keys.
    """
    q, k, v, block_table, seq_lens, mask, softmax_scale, descales, sink, _, k_rope = call
    problem = chosen.problem
    assert isinstance(problem, DecodeProblem)
    if mask is not None:
        mask = mask.expand(*problem.out_shape[:3], -1)
    if sink is not None:
        sink = sink.contiguous()
    scale = problem.D**-0.5 if softmax_scale is None else float(softmax_scale)
    factors = expand_descales(descales, problem) if problem.descale else NO_FACTORS
    out, lse = results(chosen, q, out, return_lse)
    # NOTE: kernels read the lengths without a stride; by place, where names would cost the host a microsecond
    chosen.launch(
        DecodeArgs(
            q, k, v, block_table, seq_lens.contiguous(), mask, *factors, sink, scale, out, lse, k_rope, empty_lse
        )
    )
    return returned(function, out, lse, q, k, v, call.mask, call.attn_sink, *descales)


def launch_prefill(
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
    start_pos: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same of a prefill's checked tensors.

    also: tensors whose values are in K and V already, so that a gradient to them is refused too.
    """
    problem = chosen.problem
    assert isinstance(problem, PrefillProblem)
    expanded = None if mask is None else mask.expand(*problem.out_shape[:3], -1)
    lengths = None if seq_lens is None else seq_lens.contiguous()
    sink = None if attn_sink is None else attn_sink.contiguous()
    scale = problem.D**-0.5 if softmax_scale is None else float(softmax_scale)
    factors = expand_descales(descales, problem) if problem.descale else NO_FACTORS
    out, lse = results(chosen, q, out, return_lse)
    chosen.launch(
        PrefillArgs(
            q, k, v, block_table, lengths, start_pos, expanded, block_mask, *factors, sink, scale, out, lse
        )
    )  # fmt: skip
    return returned(function, out, lse, q, k, v, mask, attn_sink, *descales, *also)


def results(chosen: Plan, q: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """What a launch fills: out, unless it is given, and lse if asked for."""
    like_out, like_lse = chosen.results_like(q)
    return torch.empty_like(like_out) if out is None else out, torch.empty_like(like_lse) if return_lse else None


def returned(function: str, out: Tensor, lse: Tensor | None, *inputs: object) -> Tensor | tuple[Tensor, Tensor]:
    """What a function without a backward returns, attached to those inputs that require grad."""
    if found := learning(*inputs):
        out = refusing(function, out, found)
        lse = None if lse is None else refusing(function, lse, found)
    return out if lse is None else (out, lse)


def expand_descales(descales: Descales, problem: DecodeProblem | PrefillProblem) -> Factors:
    """Checked descales of q, k and v as FP32 tensors [B, Hk]."""
    q_descale, k_descale = expand_descale(descales[0], problem), expand_descale(descales[1], problem)
    return q_descale, k_descale, k_descale if descales[2] is descales[1] else expand_descale(descales[2], problem)


def expand_descale(value: float | Tensor | None, problem: DecodeProblem | PrefillProblem) -> Tensor | None:
    """A checked descale as an FP32 tensor [B, Hk]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.full((), float(value), dtype=torch.float32, device=problem.device)
    return value.expand(problem.B, problem.Hk)
