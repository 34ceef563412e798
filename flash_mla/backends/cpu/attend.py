"""One call of torch's CPU flash attention op, and what goes around it: descales, biases, merging, the sink."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_mla.merge import apply_sink, merge
from flash_mla.problem import BLOCK, FP8, DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem

BIAS_BYTES = 16 << 20
"""Most bytes of FP32 bias at a time."""

EXACT_KEYS = 4 * BLOCK
"""Rows of so few keys are attended in FP32: in BF16 the op's exponential errs by 5e-5, and where a row sees one key its
lse is the score itself, which may be near 0; and its weights are rounded to BF16, which over 94 keys and 8 columns gave
a cosine distance of 7e-6."""

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def compute_dtype(problem: DecodeProblem | PrefillProblem) -> torch.dtype:
    """What the op runs in: FP8 in BF16, which holds every e4m3 value; FP16, and BF16 with a descale on q, in FP32."""
    # NOTE: the op took 3.2 ms in FP16, 0.5 ms in FP32 and BF16 (32/8 heads, S 1024, Zen 4, one thread).
    if problem.dtype == torch.bfloat16 and problem.descale:
        return torch.float32
    return {FP8: torch.bfloat16, torch.float16: torch.float32}.get(problem.dtype, problem.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, Dv: int, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of N x H independent problems.

    Args:
        q: [N, H, M, D]; k: [N, H, S, D]; v: [N, H, S, Dv], or None where V is K's first Dv columns (MLA: the op then
            takes V = K, reads each row once, and the last columns of its output are dropped).
        bias: FP32, broadcasts to [N, H, M, S], added to the scaled scores.
        causal: row i sees keys t <= i.

    Returns:
        out [N, H, M, Dv] (FP32 over few keys: it may be merged) and the natural-log lse [N, H, M] FP32; rows whose bias
            is -inf throughout give 0 and -inf.
    """
    if q.dtype != torch.float32 and few_keys(k.shape[2], bias):
        return attend(q.float(), k.float(), None if v is None else v.float(), Dv, scale, bias, causal)
    D = q.shape[-1]
    if v is None:
        v = k
    elif Dv < D:
        v = F.pad(v, (0, D - Dv))
    elif Dv > D:
        q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
    out, lse = flash(q, k, v, is_causal=causal, attn_mask=bias, scale=scale)
    if bias is not None:
        # the op reports lse 0 where every key is hidden
        lse = lse.masked_fill((bias == -math.inf).all(-1), -math.inf)
    return out[..., :Dv], lse


def few_keys(keys: int, bias: Tensor | None) -> bool:
    """Whether a row sees at most EXACT_KEYS keys, and one at least."""
    if keys <= EXACT_KEYS or bias is None:
        return keys <= EXACT_KEYS
    seen = (bias > -math.inf).sum(-1)
    return bool(((seen > 0) & (seen <= EXACT_KEYS)).any())


def merge_two(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge (out, lse) pairs over disjoint keys, in FP32."""
    return merge(torch.stack([one[0].float(), other[0].float()]), torch.stack([one[1], other[1]]))


def to_bias(mask: Tensor) -> Tensor:
    """Bool (True = attend) or floating -> FP32 addend."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -math.inf)
    return mask.float()


def grouped_rows(problem: DecodeProblem | PrefillProblem, args: DecodeArgs | PrefillArgs) -> Tensor:
    """q as [B, Hk, ratio, rows, D] in the compute dtype, with the descales of Q and K folded in."""
    q = args.q.unflatten(1, (problem.Hk, problem.ratio))
    dtype = compute_dtype(problem)
    if args.q_descale is None and args.k_descale is None:
        return q.to(dtype)
    factor = torch.ones(problem.B, problem.Hk, dtype=torch.float32)
    for descale in (args.q_descale, args.k_descale):
        if descale is not None:
            factor = factor * descale
    return (q.float() * factor[:, :, None, None, None]).to(dtype)


def store(args: DecodeArgs | PrefillArgs, requests: slice, out: Tensor, lse: Tensor) -> None:
    """Apply V's descale and the sink to [b, Hk, ratio, rows, Dv] and [b, Hk, ratio, rows]; write those requests."""
    if args.v_descale is not None:
        out = out.float() * args.v_descale[requests, :, None, None, None]
    if args.attn_sink is not None:
        out = apply_sink(out.float(), lse, args.attn_sink.view(1, *lse.shape[1:3], 1))
    args.out[requests].copy_(out.flatten(1, 2))
    if args.lse is not None:
        args.lse[requests].copy_(lse.flatten(1, 2))
