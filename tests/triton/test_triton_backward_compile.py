"""Ahead-of-time compiles of prefill's backward, as test_triton_compile has them for the forward."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import (
    MAX_STACK,
    TARGETS,
    Built,
    compile_for,
    cuobjdump,
    meta,
    prefill_case,
    unwritten_registers,
)

from flash_mla.backends.triton import backward as phase
from flash_mla.kernels.triton import backward
from flash_mla.kernels.triton.backward_keys import keys_kernel
from flash_mla.kernels.triton.backward_queries import queries_kernel
from flash_mla.kernels.triton.target import Target
from flash_mla.problem import BackwardArgs, BackwardProblem

pytestmark = pytest.mark.compile

CASES = {
    "d64": dict(D=64, Dv=64),
    "d128": dict(D=128, Dv=128),
    "d192_128": dict(D=192, Dv=128),
    "d576_512": dict(Hk=1, D=576, Dv=512),
    "fp32_d128": dict(D=128, Dv=128, dtype=torch.float32),
    "block_sparse_d128": dict(D=128, Dv=128, block_mask=True),
    "mask_d128": dict(D=128, Dv=128, mask=torch.bool),
}
ON = {
    "sm_80": ("d128",),
    "sm_89": ("d64",),
    "sm_90": ("d128", "d192_128", "block_sparse_d128", "mask_d128", "d576_512"),
    "sm_100": ("d128",),
    "sm_120": ("mask_d128",),
    "gfx942": ("d128",),
}
"""Some cases a GPU: a kernel takes 10 s to compile."""
SPILLS = {
    ("sm_90", "d128", "keys"): 200,
    ("sm_90", "d192_128", "keys"): 232,
    ("sm_90", "block_sparse_d128", "keys"): 208,
    ("sm_90", "mask_d128", "keys"): 144,
    ("sm_100", "d128", "keys"): 448,
    ("gfx942", "d128", "keys"): 768,
}
"""Bytes a thread, where dk and dv leave no room: the first thing to tune on a GPU."""
KERNELS = {"keys": keys_kernel, "queries": queries_kernel}


def build(case: str, kernel: str, target: Target) -> tuple[backward.Config, Built]:
    forward, args = prefill_case(**CASES[case])
    problem = BackwardProblem(forward._replace(sink=case == "d64"))
    config = phase.config(problem, target)
    B, Hq = args.q.shape[:2]
    like = BackwardArgs(
        q=args.q, k=args.k, v=args.v, seq_lens=args.seq_lens, start_pos=None, mask=args.mask,
        block_mask=args.block_mask, attn_sink=None, softmax_scale=0.1, out=args.out, lse=args.lse, d_out=args.out,
        d_lse=args.lse, dq=torch.empty_like(args.q), dk=torch.empty_like(args.k), dv=torch.empty_like(args.v),
        d_sink=None,
    )  # fmt: skip
    with torch.device("meta"):
        prepared = phase.empty_prepared(problem)
    live = meta(B, Hq, dtype=torch.int32)
    lists = None
    if args.block_mask is not None:
        lists = meta(B, Hq, 64, 64, dtype=torch.int32), meta(B, Hq, 64, dtype=torch.int32)
    arguments, tiles = {
        "keys": (phase.keys_arguments, config.keys),
        "queries": (phase.queries_arguments, config.queries),
    }[kernel]
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return config, compile_for(
        KERNELS[kernel], arguments(problem, config, like, prepared, live, lists), options, target
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("target", "case"), [(target, case) for target, cases in ON.items() for case in cases])
def test_backward_compiles(target: str, case: str, kernel: str) -> None:
    """It fits; what it spills is a share of what it keeps."""
    on = TARGETS[target]
    _, built = build(case, kernel, on)
    assert built.shared <= on.smem
    assert not built.spills_over(SPILLS.get((target, case, kernel), MAX_STACK))
    if on.backend == "cuda":
        assert unwritten_registers(cuobjdump(built.kernel, "-sass")) == []


@pytest.mark.parametrize("target", TARGETS)
def test_prepare_and_columns_compile(target: str) -> None:
    on = TARGETS[target]
    forward, args = prefill_case(**CASES["d192_128"])
    problem = BackwardProblem(forward._replace(sink=True))
    with torch.device("meta"):
        prepared = phase.empty_prepared(problem)
    like = BackwardArgs(
        q=args.q, k=args.k, v=args.v, seq_lens=None, start_pos=None, mask=None, block_mask=None,
        attn_sink=meta(32, dtype=torch.float32), softmax_scale=0.1, out=args.out, lse=args.lse, d_out=args.out,
        d_lse=args.lse, dq=None, dk=None, dv=None, d_sink=None,
    )  # fmt: skip
    arguments = phase.prepare_tensors(like, prepared) | phase.prepare_constants(problem, like)
    assert not compile_for(backward.prepare_kernel, arguments, {"num_warps": 4}, on).spills_over(MAX_STACK)
    ints = meta(2, dtype=torch.int32)
    arguments = dict(
        block_mask_ptr=meta(2, 32, 64, 64, dtype=torch.bool), seq_lens_ptr=ints, start_pos_ptr=ints, kept_ptr=ints,
        num_kept_ptr=ints, H=32, block_rows=64, block_columns=64, P=4096, S_kv=4096, stride_b=131072, stride_h=4096,
        stride_m=64, stride_n=1, CAUSAL=True, TILE=256,
    )  # fmt: skip
    assert not compile_for(backward.columns_kernel, arguments, {}, on).spills_over(MAX_STACK)


def test_every_config_fits() -> None:
    """By the ledger, for D and Dv from 8 to 576 and every dtype and mask; the last tiles are taken where none fits."""
    for target in TARGETS.values():
        for D in (8, 40, 64, 128, 192, 256, 576):
            for Dv in (8, 64, 128, 256, 512):
                for itemsize, mask, blocks in ((2, 0, False), (2, 4, True), (4, 1, False)):
                    config = backward.config(
                        P=4096, S_kv=4096, D=D, Dv=Dv, mask=mask, block_mask=blocks, itemsize=itemsize, target=target
                    )  # fmt: skip
                    columns = config.d_main + config.d_rest, config.dv_tile
                    for tiles, kept in ((config.keys, config.keys.tile_n), (config.queries, config.queries.tile_m)):
                        move = tiles.tile_m + tiles.tile_n - kept
                        taken = backward.smem_bytes(move, kept, *columns, itemsize, tiles.stages, mask, target)
                        assert taken <= target.smem or (move, kept, tiles.stages) == (16, 16, 1)
                        assert not blocks or max(tiles.tile_m, tiles.tile_n) <= 64
