"""Compiles the Hopper backward for sm_90a, without a GPU, and gates what the assembler made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sass import NEEDS, compiled, gates

from flash_mla.kernels.hopper.backward.config import REGISTERS as ROLES
from flash_mla.kernels.hopper.backward.config import THREADS, TILE_N, TILE_Q, Config
from flash_mla.kernels.hopper.limits import REGISTERS, SMEM_BYTES, WARPGROUP

pytestmark = NEEDS

STACK = {128: 0, 192: 56}
"""Bytes that a thread of the keys' kernel spills, by D. At 192/128, of addresses, outside the loop but for two."""


@pytest.mark.parametrize(("D", "sink"), gates([(128, False)], [(128, True), (192, False), (192, True)]))
def test_keys(D: int, sink: bool, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.backward.keys_kernel import build

    config = Config("bf16", D, 128, sink)
    assert config.keys_bytes() <= SMEM_BYTES
    assert WARPGROUP * (2 * ROLES[0] + ROLES[1]) <= REGISTERS
    sass = compiled(build, config, tmp_path)
    ((registers, _),) = sass.resources
    assert registers == REGISTERS // THREADS // 8 * 8
    assert sass.spills[0] <= STACK[D]
    # S and dP of a step, dV and dK; a loop with masks and one without
    steps = TILE_Q // config.sizes.step
    assert sass.count("HGMMA") == 2 * (steps * (D + 128) // 16 + 2 * TILE_Q // 16)
    # NOTE: serialised wgmma shows as one arrive and one wait an instruction
    assert sass.count(r"WARPGROUP\.ARRIVE") == 2 * 4 * steps
    assert sass.count(r"WARPGROUP\.DEPBAR") == 2 * 3 * steps


@pytest.mark.parametrize("D", gates([192], [128]))
def test_queries(D: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.backward.queries_kernel import build

    config = Config("bf16", D, 128)
    assert config.queries_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("HGMMA") == TILE_N // 16
    assert sass.count(r"WARPGROUP\.ARRIVE") == 1
