"""Ahead-of-time compiles of the sparse kernels, as test_triton_compile has them for the others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import TARGETS, compile_for

from flash_mla.backends.triton import sparse as phase
from flash_mla.kernels.triton import backward, sparse, sparse_backward
from flash_mla.problem import SparseArgs, SparseKeys, SparseProblem, SparseSet
from flash_mla.quant import FORMATS

pytestmark = pytest.mark.compile

CASES = {
    "prefill/v3.2": (None, 576, 4096, 1, 128, (2048,), 131072, 1),
    "prefill/model1": (None, 512, 4096, 1, 64, (512,), 65536, 1),
    "decode/v3.2": ("fp8_ds_mla", 576, 128, 2, 128, (2048,), 64, 512),
    "decode/v3.2-small": ("fp8_ds_mla", 576, 1, 1, 16, (2048,), 64, 512),
    "decode/model1": ("model1", 512, 64, 2, 64, (128, 512), 64, 256),
    "decode/model1-small": ("model1", 512, 64, 2, 16, (128, 512), 64, 256),
    "decode/v4.1": ("v4.1", 512, 64, 2, 64, (512,), 64, 256),
    # arguments of 1, which Triton makes constants
    "decode/one-row": ("model1", 512, 1, 1, 16, (65,), 1, 1),
    "decode/one-index": ("model1", 512, 2, 1, 16, (1, 1), 64, 1),
    "decode/one-index-plain": (None, 576, 1, 1, 128, (1,), 1, 1),
    "decode/v4.1-small": ("v4.1", 512, 1, 1, 8, (512,), 64, 256),
    "decode/fp8_token": ("fp8_token", 576, 64, 1, 128, (8192,), 64, 512),
}


def build(name, target):
    format_name, D, B, S_q, Hq, topks, page, pages = CASES[name]
    fmt = None if format_name is None else FORMATS[format_name]
    with torch.device("meta"):
        q = torch.empty(B, S_q, Hq, D, dtype=torch.bfloat16)
        keys = []
        for topk in topks:
            if fmt is None:
                cache = torch.empty(pages, page, D, dtype=torch.bfloat16)
            else:
                memory = torch.empty(pages, fmt.page_bytes(page), dtype=torch.uint8)
                cache = memory[:, : page * fmt.row_bytes].view(pages, page, fmt.row_bytes)
            keys.append(SparseKeys(cache, torch.empty(B, S_q, topk, dtype=torch.int32), None))
        prefill = fmt is None
        args = SparseArgs(
            q, tuple(keys), torch.empty(Hq, dtype=torch.float32), D**-0.5, torch.empty(B, S_q, Hq, 512, dtype=q.dtype),
            torch.empty(B, S_q, Hq, dtype=torch.float32),
            torch.empty(B, S_q, Hq, dtype=torch.float32) if prefill else None,
        )  # fmt: skip
    sets = tuple(SparseSet(k.indices.shape[2], pages, page, k.cache.stride()[:2], (1, 1), False) for k in keys)
    problem = SparseProblem(
        q.device, q.dtype, B, S_q, Hq, D, 512, format_name, sets, q.stride(), True, prefill
    )  # fmt: skip
    config = phase.config(problem, target)
    with torch.device("meta"):
        partial = torch.empty(1, dtype=torch.float32) if config.splits > 1 else None
    arguments = phase.arguments(problem, config, args, partial)
    return compile_for(
        sparse.sparse_kernel, arguments, {"num_warps": config.warps, "num_stages": config.stages}, target
    )


# Bytes a thread. Hopper's tiles spill (MODEL1's most), and are the fastest of those measured on an H200 all the same.
SPILLS = 1152


@pytest.mark.parametrize("gpu", ["sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", CASES)
def test_sparse_kernel_fits(name, gpu):
    built = build(name, TARGETS[gpu])
    print(name, gpu, built)
    assert built.shared <= TARGETS[gpu].smem
    assert not built.spills_over(SPILLS)


def test_rows_without_asynchronous_copies_are_cut_into_tiles_of_128_bytes():
    """See tiles.least_rest: a narrower tile beside a wide one was read past the end of shared memory on Hopper."""
    for D in range(8, 577, 8):
        common = {"Hq": 64, "D": D, "topk": 64, "target": TARGETS["sm_90"]}
        forward = sparse.config(**common, tokens=2, itemsize=4, quantised=0, flat=True, split=False)
        sparse_grad = sparse_backward.config(**common, Dv=min(D, 512), itemsize=4)
        dense = {"P": 100, "S_kv": 100, "D": D, "Dv": min(D, 512), "mask": 0, "block_mask": False, "itemsize": 4}
        dense_grad = backward.config(**dense, target=TARGETS["sm_90"])
        for config in (forward, sparse_grad, dense_grad):
            assert config.d_rest == 0 or config.d_rest >= 64
            assert config.d_main + config.d_rest >= D
