"""Decode of more query tokens than the decode kernels take, over pages of K and V: the prefill kernel's.

Such a call is a prefill whose first query stands S_q tokens before the end of its request; before the first key, where
the request is shorter: those rows see nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from flash_mla.backends.hopper import prefill
from flash_mla.backends.hopper.device import int32
from flash_mla.kernels.hopper.prefill.config import Config
from flash_mla.problem import BLOCK, DecodeArgs, DecodeProblem, PrefillArgs, PrefillProblem


def refuse(problem: DecodeProblem) -> str | None:
    """Why the kernel cannot run this problem, or None."""
    if problem.kv_dtype != problem.dtype:
        return f"q {problem.dtype} over a {problem.kv_dtype} cache: the prefill kernel takes one dtype"
    if problem.mask != "none":
        return f"a {problem.mask} mask: only causal decode"
    if problem.batch_invariant:
        return f"S_q = {problem.S_q} with batch_invariant"
    if problem.out_strides is not None:
        return f"out strides {problem.out_strides}: out must be contiguous"
    if problem.scale_sign <= 0:
        return "softmax_scale is not above 0: the running maximum is kept before scaling"
    return prefill.refuse(as_prefill(problem))


def as_prefill(problem: DecodeProblem) -> PrefillProblem:
    """The same call as a prefill."""
    same = {name: value for name, value in problem._asdict().items() if name in PrefillProblem._fields}
    keys = problem.table_blocks * BLOCK
    return PrefillProblem(**same, P=problem.S_q, S_kv=keys, paged=True, causal=True, seq_lens=True, start_pos=True)


def config(problem: DecodeProblem) -> Config:
    """The kernel variant."""
    return prefill.config(as_prefill(problem))


def bind(problem: DecodeProblem, config: Config) -> Callable[[DecodeArgs], None]:
    """The launch, which fills args.out and args.lse. It allocates what `prefill.bind` says, and the positions of the
    first queries."""
    attend = prefill.bind(as_prefill(problem), config)

    def launch(args: DecodeArgs) -> None:
        same = {name: value for name, value in args._asdict().items() if name in PrefillArgs._fields}
        lengths = int32(args.seq_lens).clamp(0, problem.table_blocks * BLOCK)
        same["seq_lens"] = lengths
        attend(PrefillArgs(**same, start_pos=lengths - problem.S_q, block_mask=None))
        args.mark_empty()

    return launch
