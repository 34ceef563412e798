"""What the decode kernels' modules share: what none of them takes, and their launch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_mla.backends.hopper.device import device_of, int32
from flash_mla.backends.hopper.strides import query_row_stride
from flash_mla.problem import DecodeArgs, DecodeProblem


def refuse_queries(problem: DecodeProblem, most: int) -> str | None:
    """Why the kernels cannot run so many query tokens (at most `most`), or this mask, or None."""
    if problem.S_q > most:
        return f"S_q = {problem.S_q}: at most {most} query tokens a request"
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    return None


def factor(problem: DecodeProblem, descale: Tensor | None, unread: Tensor) -> Tensor:
    """A descale [B, Hk] as the kernels read it: of 1 where another is given, any tensor where none is."""
    if not problem.descale:
        return unread
    if descale is None:
        return torch.ones((1, 1), dtype=torch.float32, device=problem.device).expand(problem.B, problem.Hk)
    return descale


def launch(
    kernel: Callable[..., None],
    problem: DecodeProblem,
    args: DecodeArgs,
    *,
    caches: tuple[Tensor, ...],
    words: int,
    ctas: int,
    descales: bool,
) -> None:
    """Fill args.out and args.lse. An int64 table or lengths are converted first, on the device.

    Args:
        caches: K, or K and V.
        words: FP32 words of workspace.
        ctas: persistent CTAs, or clusters of them.
        descales: whether the kernel has arguments for them.
    """
    workspace = torch.empty(words, dtype=torch.float32, device=problem.device)
    lse = args.lse
    if lse is None:
        lse = torch.empty((problem.B, problem.Hq, problem.S_q), dtype=torch.float32, device=problem.device)
    factors: list[Tensor] = []
    if descales:
        factors = [factor(problem, x, workspace) for x in (args.q_descale, args.k_descale, args.v_descale)]
    # NOTE: tensors go in as they are: a view costs the host a microsecond, and the kernel makes its own
    with device_of(problem.device):
        kernel(
            args.q,
            *caches,
            int32(args.block_table),
            int32(args.seq_lens),
            workspace if args.attn_sink is None else args.attn_sink,
            *factors,
            args.out,
            lse,
            workspace,
            args.softmax_scale * math.log2(math.e),
            int(args.attn_sink is not None),
            query_row_stride(problem),
            # a cache that all requests share has one request, whatever its batch stride says
            *(problem.B if strides[0] else 1 for strides in (problem.k_strides, problem.v_strides)[: len(caches)]),
            ctas,
        )
