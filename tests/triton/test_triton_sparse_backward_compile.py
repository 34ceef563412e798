"""Ahead-of-time compiles of sparse prefill's backward, as test_triton_backward_compile has them for prefill's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import MAX_STACK, TARGETS, Built, compile_for, cuobjdump, meta, unwritten_registers

from flash_mla.backends.triton import sparse_backward as phase
from flash_mla.kernels.triton import sparse_backward
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import SparseBackwardArgs, SparseBackwardProblem, SparseKeys, SparseProblem, SparseSet

pytestmark = pytest.mark.compile

CASES = {
    "mla_128": {},
    "mla_16_sink": dict(Hq=16, sink=True),
    "d512": dict(D=512),
}
SPILLS = {("sm_90", "mla_128", "queries"): 400, ("sm_90", "d512", "queries"): 112}
"""Bytes a thread: dq of 64 heads is 144 registers of each, and a gathered tile of K passes through 72 more."""
KERNELS = ("queries", "keys", "sum")


def problem_of(
    Hq: int = 128, D: int = 576, dtype: torch.dtype = torch.bfloat16, sink: bool = False
) -> tuple[SparseBackwardProblem, SparseBackwardArgs]:
    tokens, rows, topk, Dv = 64, 8192, 2048, 512
    q, out = meta(tokens, 1, Hq, D, dtype=dtype), meta(tokens, 1, Hq, Dv, dtype=dtype)
    lse, cache = meta(tokens, 1, Hq, dtype=torch.float32), meta(1, rows, D, dtype=dtype)
    indices, lengths = meta(tokens, 1, topk, dtype=torch.int32), meta(tokens, dtype=torch.int32)
    forward = SparseProblem(
        device=torch.device("meta"), dtype=dtype, B=tokens, S_q=1, Hq=Hq, D=D, Dv=Dv, format=None,
        sets=(SparseSet(topk, 1, rows, cache.stride()[:2], indices.stride()[:2], True),), q_strides=q.stride(),
        sink=sink, max_logits=True,
    )  # fmt: skip
    return SparseBackwardProblem(forward), SparseBackwardArgs(
        q=q, keys=SparseKeys(cache, indices, lengths), attn_sink=None, softmax_scale=0.1, out=out, lse=lse, d_out=out,
        d_lse=lse, dq=q, dkv=cache, d_sink=None,
    )  # fmt: skip


def build(case: str, kernel: str, target: Target) -> Built:
    problem, args = problem_of(**CASES[case])
    config = phase.config(problem, target)
    part = slice(0, problem.forward.B)
    with torch.device("meta"):
        chunk = phase.empty_chunk(problem, config, problem.forward.B)
        shape = (problem.forward.B, config.slots, problem.forward.D)
        partial = torch.empty(shape, dtype=phase.wide(problem))
        rows = [torch.empty(problem.forward.Hq, problem.forward.B) for _ in range(4)]
    prepared = phase.Prepared(rows[0], rows[1], *(rows[2:] if problem.forward.sink else (None, None)))
    if kernel == "queries":
        options = {"num_warps": config.warps, "num_stages": config.stages}
        arguments = phase.queries_arguments(problem, config, args, prepared, chunk, part)
        return compile_for(sparse_backward.sparse_queries_kernel, arguments, options, target)
    if kernel == "keys":
        options = {"num_warps": config.keys_warps, "num_stages": 2}
        arguments = phase.keys_arguments(problem, config, args, chunk, partial, part)
        return compile_for(sparse_backward.sparse_keys_kernel, arguments, options, target)
    order, starts, dkv = meta(64, dtype=torch.int64), meta(64, dtype=torch.int32), meta(64, 64, dtype=torch.float32)
    arguments = phase.sum_arguments(problem, config, partial, order, starts, 0, dkv)
    return compile_for(sparse_backward.sum_kernel, arguments, {"num_warps": 1}, target)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("target", "case"),
    [
        *((target, "mla_128") for target in TARGETS),
        *(("sm_90", case) for case in CASES if case != "mla_128"),
        ("sm_120", "mla_16_sink"),
    ],
)
def test_sparse_backward_compiles(target: str, case: str, kernel: str) -> None:
    """It fits, and spills no more than it says."""
    on = TARGETS[target]
    built = build(case, kernel, on)
    assert built.shared <= on.smem
    assert not built.spills_over(SPILLS.get((target, case, kernel), MAX_STACK))
    if on.backend == "cuda":
        assert unwritten_registers(cuobjdump(built.kernel, "-sass")) == []


@pytest.mark.parametrize(("rows", "step"), [(900, 16), (4080, 16), (30_000, 16), (20, 64)])
def test_slots_by_row(rows: int, step: int) -> None:
    """Of 50 tokens: sorted in 16 bits and in 32, in four chunks and in one."""
    named = torch.randint(0, rows + 1, (50, 9), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    named[:, 0] = rows
    named[3::7, 1:3] = 5
    order, starts = phase.by_row(named, rows // 16 * 16 + 16, step)
    for chunk, first in enumerate(range(0, len(named), step)):
        here = named[first : first + step].flatten()
        listed = order[starts[chunk, 0] : starts[chunk, rows]]
        wanted = here.sort(stable=True).indices[: int((here < rows).sum())]
        assert torch.equal(listed - first * named.shape[1], wanted)
        assert torch.equal(starts[chunk, : rows + 1].diff(), here[here < rows].bincount(minlength=rows).int())
