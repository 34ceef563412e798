"""The Hopper sparse backward without a GPU: what it takes, and what the assembler made of its kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sass import NEEDS, compiled, gates

from flash_mla.backends.hopper import sparse_backward
from flash_mla.kernels.hopper.limits import SMEM_BYTES
from flash_mla.kernels.hopper.sparse_backward.config import Config
from flash_mla.problem import SparseBackwardProblem, SparseProblem, SparseSet


def problem(**changes: object) -> SparseBackwardProblem:
    """4096 tokens of 128 heads, 2048 of 8192 rows each."""
    keys = SparseSet(2048, 1, 8192, (8192 * 576, 576), (2048, 2048), lengths=False)
    forward = SparseProblem(
        device=torch.device("cuda"), dtype=torch.bfloat16, B=4096, S_q=1, Hq=128, D=576, Dv=512, format=None,
        sets=(keys,), q_strides=(128 * 576, 128 * 576, 576, 1), sink=False, max_logits=True,
    )  # fmt: skip
    return SparseBackwardProblem(forward._replace(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": torch.float16, "sink": True}, {"D": 512}, {"Hq": 1}, {"aligned": False}, {"scale_sign": -1}],
)
def test_takes(changes: dict[str, object]) -> None:
    assert sparse_backward.refuse(problem(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float32}, "float32"), ({"D": 128, "Dv": 128}, "D = 128"), ({"Hq": 129}, "129 heads")],
)
def test_refuses(changes: dict[str, object], reason: str) -> None:
    assert reason in str(sparse_backward.refuse(problem(**changes)))


CONFIGS = gates(
    [Config("bf16", 576)],
    [Config("bf16", 512, 64), Config("fp16", 576, 128, sink=True), Config("bf16", 576, 64, sink=True)],
)


def marked(test):
    """The test with the marks of all that compile."""
    for mark in NEEDS:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_compile(config: Config, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.sparse_backward.weights_kernel import build

    assert config.weights_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    assert (sass.resources, sass.spills) == ([(168, 0)], (0, 0, 0))
    # Q K^T and dout V^T, whose first operands are loaded once
    assert sass.count("HGMMA") == sass.count("LDSM") == (config.D + config.Dv) // 16
    # NOTE: serialised wgmma shows as one wait an instruction
    assert sass.count(r"WARPGROUP\.DEPBAR") == 2
    # a gathered row, 16 bytes a thread; P, handed over
    assert sass.count(r"LDGSTS\.E\.BYPASS\.LTC128B\.128") == 4 * config.chunks
    assert sass.count(r"STS\.128") == 4


@marked
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_compile(config: Config, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.sparse_backward.gradients_kernel import build

    config = replace(config, sink=False)
    assert config.gradients_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    assert (sass.resources, sass.spills) == ([(168, 0)], (0, 0, 0))
    # of the last part and the others: dS K of the tile before and of its own; dS q and P dout of all heads
    assert sass.count("HGMMA") == 2 * (2 * 4 + 2 * config.heads // 16)
    assert sass.count(r"WARPGROUP\.DEPBAR") == 2 * 4
    # 8 columns a store, of two rows: of dq, and of partial rows, two stores where they are FP32
    columns = config.D - 2 * 192 + 192
    assert sass.count(r"STG\.E\.128") == (2 + config.wide) * 2 * columns // 32
    assert sass.count(r"STG\b") == sass.count(r"STG\.E\.128")
