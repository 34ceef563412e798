"""The backend of a call without work, on any device: no query, or no key to see.

Rows are 0, their lse and max_logits -inf (a call may want another lse); scores are -inf, indices -1; gradients
are 0.
"""

from __future__ import annotations

import math

from flash_mla.problem import (
    Args,
    BackwardArgs,
    DecodeArgs,
    IndexArgs,
    Problem,
    SparseArgs,
    SparseBackwardArgs,
    TopkArgs,
)


def refuse(problem: Problem) -> str | None:
    """Why there is work, or None."""
    return None if problem.empty else "the problem has queries and keys"


def config(problem: Problem) -> None:
    """Nothing is chosen."""
    return


def launch(problem: Problem, config: None, args: Args) -> None:
    """Fill the outputs; no kernel runs where they have no element."""
    if isinstance(args, IndexArgs):
        args.out.fill_(-math.inf)
        return
    if isinstance(args, TopkArgs):
        args.out.fill_(-1)
        return
    if isinstance(args, (BackwardArgs, SparseBackwardArgs)):
        for gradient in args.gradients:
            if gradient is not None:
                gradient.zero_()
        return
    args.out.zero_()
    if args.lse is not None:
        args.lse.fill_(-math.inf)
    if isinstance(args, (DecodeArgs, SparseArgs)):
        args.mark_empty()
    if isinstance(args, SparseArgs) and args.max_logits is not None:
        args.max_logits.fill_(-math.inf)
