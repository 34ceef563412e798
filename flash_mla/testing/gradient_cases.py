"""Gradients of prefill, dense and sparse: hostile calls and their backward, judged against autograd through the float64
reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flash_mla import deepseek
from flash_mla.api import flash_mla_prefill
from flash_mla.problem import FP8
from flash_mla.reference import prefill_reference, sparse_reference
from flash_mla.testing.cases import DTYPES, PrefillCase
from flash_mla.testing.deepseek_cases import SparsePrefillCase, library_lse
from flash_mla.testing.hostile import Call, Source


@dataclass(frozen=True)
class GradientCase(PrefillCase):
    """A call of flash_mla_prefill and its backward, through out and (with d_lse) lse.

    d_out is contiguous, `strided` ([B, P, Hq, Dv] in memory) or `expanded` (one value, as a sum gives). In a row
    without keys d_lse is NaN: lse is -inf there, whatever the inputs.
    """

    d_out: Literal["contiguous", "strided", "expanded"] = "contiguous"
    d_lse: bool = True

    function = "flash_mla_prefill (backward)"

    @property
    def more(self) -> tuple[str, ...]:
        """The inputs that have a gradient."""
        return ("q", "k", "v", "attn_sink") if self.sink else ("q", "k", "v")

    def upstream(self, lse: Tensor) -> tuple[Tensor, Tensor | None]:
        """(d_out, d_lse), the same for the call and the truth."""
        source = Source(self.seed + 1, self.device)
        B, Hq, P = lse.shape
        Dv = self.Dv or self.D
        if self.d_out == "expanded":
            d_out = source.normal((1,), self.dtype).expand(B, Hq, P, Dv)
        elif self.d_out == "strided":
            d_out = source.normal((B, P, Hq, Dv), self.dtype).transpose(1, 2)
        else:
            d_out = source.normal((B, Hq, P, Dv), self.dtype)
        d_lse = source.normal((B, Hq, P), torch.float32).masked_fill(lse.detach() == -math.inf, math.nan)
        return d_out, d_lse if self.d_lse else None

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        """(out, lse, dq, dk, dv, with a sink its gradient)."""
        leaves = {name: call.arguments[name].detach().requires_grad_() for name in self.more}
        out, lse = flash_mla_prefill(**{**call.arguments, **leaves}, return_lse=True, backend=self.backend)
        return self.differentiate(out, lse, leaves)

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        """The same by autograd in float64."""
        leaves = {name: call.reference[name].double().requires_grad_() for name in self.more}
        return self.differentiate(*prefill_reference(**{**call.reference, **leaves}), leaves)

    def differentiate(self, out: Tensor, lse: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        d_out, d_lse = self.upstream(lse)
        ends = ((out, d_out), (lse, d_lse)) if d_lse is not None else ((out, d_out),)
        gradients = torch.autograd.grad(
            [end for end, _ in ends], list(leaves.values()), [gradient.to(end.dtype) for end, gradient in ends]
        )
        return out.detach(), lse.detach(), *gradients


@dataclass(frozen=True)
class SparseGradientCase(SparsePrefillCase):
    """A call of deepseek.flash_mla_sparse_fwd and its backward, through out and lse; d_out is `expanded`, as a sum
    gives it, or contiguous."""

    expanded: bool = False

    function = "deepseek.flash_mla_sparse_fwd (backward)"

    @property
    def more(self) -> tuple[str, ...]:
        """The inputs that have a gradient."""
        return ("q", "kv", "attn_sink") if self.sink else ("q", "kv")

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        """(out, lse, dq, dkv, with a sink its gradient)."""
        leaves = {name: call.arguments[name].detach().requires_grad_() for name in self.more}
        out, _, lse = deepseek.flash_mla_sparse_fwd(**{**call.arguments, **leaves}, backend=self.backend)
        return self.differentiate(out, lse, leaves)

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        """The same by autograd in float64; a row without keys has lse +inf, as the function gives it."""
        leaves = {name: call.arguments[name].double().requires_grad_() for name in self.more}
        [(_, indices, lengths)] = call.reference["pools"]
        pools = [(leaves["kv"][:, 0], indices, lengths)]
        out, lse, _ = sparse_reference(
            leaves["q"].unsqueeze(1), pools, self.Dv, self.softmax_scale, leaves.get("attn_sink")
        )
        lse = lse[:, :, 0].masked_fill(lse.detach()[:, :, 0] == -math.inf, math.inf)
        # where no query sees a key, the reference touches no input: the sum of nothing keeps the graph
        nothing = torch.stack([x[:0].sum() for x in leaves.values()]).sum()
        return self.differentiate(out[:, :, 0] + nothing, lse + nothing, leaves)

    def differentiate(self, out: Tensor, lse: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        source = Source(self.seed + 1, self.device)
        d_out = (
            source.normal((1,), self.dtype).expand(out.shape) if self.expanded else source.normal(out.shape, self.dtype)
        )
        d_lse = source.normal(lse.shape, torch.float32).masked_fill(lse.detach() == math.inf, math.nan)
        gradients = torch.autograd.grad((out, lse), list(leaves.values()), (d_out.to(out.dtype), d_lse.to(lse.dtype)))
        out, lse = (x.detach().transpose(0, 1).unsqueeze(0) for x in (out, library_lse(lse)))
        return out, lse, *gradients


def gradient_cases() -> list[GradientCase | SparseGradientCase]:
    cases: list[GradientCase | SparseGradientCase] = []
    for name, dtype in DTYPES.items():
        if dtype == FP8:
            continue
        base = GradientCase("", 150, dtype=dtype)
        cases += [
            replace(base, name=f"gradient/causal-{name}"),
            replace(base, name=f"gradient/full-{name}", causal=False, d_lse=False, d_out="strided"),
            replace(base, name=f"gradient/mask-{name}", mask="bool", d_out="expanded"),
            replace(base, name=f"gradient/sparse-{name}", sparse="heads", causal=False, sink=True),
            replace(base, name=f"gradient/mla-{name}", D=192, Dv=128, d_lse=False),
        ]
    base = GradientCase("", 130)
    for P in (1, 63, 64, 65, 129):
        cases.append(replace(base, name=f"gradient/tokens-{P}", P=P))
    for D, Dv in ((16, 16), (40, 40), (64, 64), (128, 128), (256, 256), (64, 128), (72, 8), (576, 512)):
        cases.append(replace(base, name=f"gradient/head-dim-{D}-{Dv}", P=100, D=D, Dv=Dv, d_lse=False))
    for ratio in (1, 8):
        cases.append(GradientCase(f"gradient/ratio-{ratio}", 70, B=1, Hq=ratio, Hk=1))
    cases += [
        replace(base, name="gradient/mask-float-heads-causal", mask="float-heads", causal=True),
        replace(base, name="gradient/mask-bool-heads-sink", mask="bool-heads", sink=True),
        replace(base, name="gradient/sparse-layout", sparse="layout", causal=True),
        replace(base, name="gradient/sparse-mask", sparse="heads", mask="bool", causal=True),
        replace(base, name="gradient/ragged", lengths=(130, 77), d_lse=False),
        replace(base, name="gradient/ragged-empty", lengths=(0, 64), sink=True),
        replace(base, name="gradient/ragged-full", lengths=(130, 1), causal=False, d_lse=False),
        replace(base, name="gradient/ragged-sparse", lengths=(130, 65), sparse="heads", causal=True),
        replace(base, name="gradient/sliced", sliced=True, d_out="strided"),
        replace(base, name="gradient/sink", sink=True, d_lse=False),
        replace(base, name="gradient/sink-lse", sink=True),
        replace(base, name="gradient/scale", softmax_scale=-0.31, d_lse=False),
        replace(base, name="gradient/long", P=600, D=128, d_lse=False),
        replace(base, name="gradient/long-sparse", P=600, sparse="heads", causal=True),
    ]
    for name, dtype in DTYPES.items():
        if dtype != FP8:
            tokens = SparseGradientCase(f"gradient/token-sparse-{name}", dtype=dtype)
            cases += [tokens, replace(tokens, name=f"{tokens.name}-all", sink=True, lengths=True, expanded=True)]
    tokens = SparseGradientCase("")
    cases += [
        replace(tokens, name="gradient/token-sparse-heads-128", S_q=2, Hq=128, topk=70, S_kv=95),
        replace(tokens, name="gradient/token-sparse-heads-3", Hq=3, topk=1, sink=True),
        replace(tokens, name="gradient/token-sparse-512", D=512, Hq=64, topk=130),
        replace(tokens, name="gradient/token-sparse-narrow", D=72, Dv=40, S_q=20, lengths=True),
        replace(tokens, name="gradient/token-sparse-scale", softmax_scale=-0.04),
    ]
    return cases
