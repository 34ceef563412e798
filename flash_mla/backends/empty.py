"""The backend of a call without work, on any device: no query, or no key to see.

Rows are 0, their lse and max_logits -inf.
"""

from __future__ import annotations

import math

from flash_mla.problem import Args, Problem, SparseArgs


def refuse(problem: Problem) -> str | None:
    """Why there is work, or None."""
    return None if problem.empty else "the problem has queries and keys"


def config(problem: Problem) -> None:
    """Nothing is chosen."""
    return


def launch(problem: Problem, config: None, args: Args) -> None:
    """Fill args.out and args.lse; no kernel runs where they have no element."""
    args.out.zero_()
    if args.lse is not None:
        args.lse.fill_(-math.inf)
    if isinstance(args, SparseArgs) and args.max_logits is not None:
        args.max_logits.fill_(-math.inf)
