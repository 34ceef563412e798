"""Ahead-of-time compiles of the index kernels, as test_triton_compile has them for the others."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import torch
from test_triton_compile import TARGETS, compile_for, meta, within

from flash_mla.backends.triton import indexer as index_backend
from flash_mla.backends.triton import topk as topk_backend
from flash_mla.indexer import INDEX_ROWS
from flash_mla.kernels.triton import topk
from flash_mla.problem import FP8, IndexArgs, IndexProblem, TopkArgs, TopkProblem

pytestmark = pytest.mark.compile

GPUS = ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942")
RAGGED = {"prefill": (4096, 64, 128, 32768), "few": (1, 64, 128, 131072), "narrow": (512, 32, 16, 4096)}
PAGED = {"decode": (64, 1, 64), "speculative": (64, 2, 64), "32-heads": (8, 4, 32)}


def index_problem(name):
    """The problem and its arguments on the meta device."""
    if name in RAGGED:
        S_q, H, D, S_kv = RAGGED[name]
        B, table, starts = 1, None, meta(1, S_q, dtype=torch.int32)
        pages, page, width = 1, S_kv, S_kv
        k, scale = meta(1, S_kv, D, dtype=FP8), meta(1, S_kv, dtype=torch.float32)
    else:
        (B, S_q, H), D, page, pages, width = PAGED[name], 128, 64, 8192, 32768
        cache = meta(pages, page, 1, INDEX_ROWS.row_bytes, dtype=torch.uint8)
        parts = INDEX_ROWS.parts(cache)
        k, scale = parts.codes.view(FP8), parts.scales.view(torch.float32).squeeze(-1)
        table, starts = meta(B, width // page, dtype=torch.int32), None
    problem = IndexProblem(
        torch.device("meta"), B, S_q, H, D, pages, page, width, None if table is None else table.shape[1], True
    )
    args = IndexArgs(
        meta(B, S_q, H, D, dtype=FP8), k, scale, meta(B, S_q, H, dtype=torch.float32), table, starts,
        meta(B, S_q, dtype=torch.int32), meta(B, S_q, width, dtype=torch.float32),
    )  # fmt: skip
    return problem, args


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", [*RAGGED, *PAGED])
def test_scores_fit(name, gpu):
    problem, args = index_problem(name)
    config = index_backend.config(problem, TARGETS[gpu])
    options = {"num_warps": config.warps, "num_stages": config.stages}
    arguments = index_backend.arguments(problem, config, args)
    built = compile_for(index_backend.kernel(problem), arguments, options, TARGETS[gpu])
    print(name, gpu, built)
    within(name, built, TARGETS[gpu])
    if gpu == "sm_90":
        # e4m3 is multiplied as it is, by the warpgroup's instruction
        assert "wgmma" in built.kernel.asm["ptx"]
        assert "e4m3.e4m3" in built.kernel.asm["ptx"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("rows", "N", "K"), [(4096, 131072, 2048), (64, 131072, 512), (1, 4096, 512), (64, 32768, 4096)]
)
def test_topk_fits(rows, N, K, gpu):
    problem = TopkProblem(torch.device("meta"), rows, N, N, K, 64, 1)
    config = topk_backend.config(problem, TARGETS[gpu])
    ints = meta(rows, dtype=torch.int32)
    out, table = meta(rows, K, dtype=torch.int32), meta(rows, N // 64, dtype=torch.int32)
    args = TopkArgs(meta(rows, N, dtype=torch.float32), ints, ints, table, out)
    space = topk_backend.workspace(problem, config)
    if config.parts > 1:
        arguments = topk_backend.pivot_arguments(problem, config, args, space)
        built = compile_for(topk.pivot_kernel, arguments, {"num_warps": topk.PIVOT_WARPS}, TARGETS[gpu])
        within("pivot", built, TARGETS[gpu])
        arguments = topk_backend.mark_arguments(problem, config, args, space)
        built = compile_for(topk.mark_kernel, arguments, {"num_warps": topk.MARK_WARPS}, TARGETS[gpu])
        within("mark", built, TARGETS[gpu])
    arguments = topk_backend.select_arguments(problem, config, args, space)
    built = compile_for(topk.select_kernel, arguments, {"num_warps": config.warps}, TARGETS[gpu])
    print(config, gpu, built)
    within("select", built, TARGETS[gpu])
