"""Compiles configs of the Hopper sparse decode for sm_90a, without a GPU, and gates what the assembler made."""

from __future__ import annotations

from pathlib import Path

import pytest
from sass import NEEDS, compiled, gates

from flash_mla.kernels.hopper.sparse_decode.config import Config

pytestmark = NEEDS

CONFIGS = gates(
    [
        Config("fp8_ds_mla", 1, 64, halves=True),
        Config("fp8_ds_mla", 1, 64, cluster=2),
        Config("fp8_ds_mla", 1, 8),
        Config("model1", 1, 8),
        Config("model1", 2, 64),
        Config("v4.1", 1, 16),
        Config("bf16_576", 1, 16),
        Config("bf16_576", 1, 64),
        Config("bf16_576", 1, 64, cluster=2),
        Config("fp8_ds_mla", 1, 16, cluster=8, team=True),
        Config("model1", 2, 16, cluster=5, team=True),
    ],
    [
        Config("fp8_ds_mla", 1, 16),
        Config("fp8_ds_mla", 1, 64),
        Config("fp8_ds_mla", 2, 64, halves=True),
        Config("fp8_ds_mla", 2, 8),
        Config("fp8_ds_mla", 2, 16),
        Config("fp8_token", 1, 64, cluster=2),
        Config("fp8_token", 2, 16),
        Config("model1", 2, 64, cluster=2),
        Config("flat", 1, 64, cluster=2),
        Config("bf16_512", 2, 16),
        Config("fp8_ds_mla", 2, 16, cluster=2, team=True),
        Config("fp8_ds_mla", 1, 8, cluster=8, team=True),
        Config("fp8_ds_mla", 1, 16, team=True),
        Config("v4.1", 1, 16, cluster=8, team=True),
        Config("flat", 1, 16, cluster=4, team=True),
        Config("bf16_576", 1, 16, cluster=8, team=True),
    ],
)


SPILLS = {Config("model1", 2, 64): (8, 1, 1), Config("fp8_ds_mla", 2, 64, halves=True): (16, 13, 5)}
"""Stack, stores and loads with two caches: words written once a segment and read once a pair."""


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sparse_decode(config: Config, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.sparse_decode.kernel import build

    sass = compiled(build, config, tmp_path)
    # entry registers of the two kernels: 65536 / threads, rounded down to 8; and combine's
    assert max(registers for registers, _ in sass.resources) == config.entry_registers
    assert sass.spills == SPILLS.get(config, (0, 0, 0))
    if config.few:
        # Q K^T: 16 columns each; V^T P^T: 4 steps of 16 keys for each 64 columns
        assert sass.count("HGMMA") == config.D // 16 + 4 * 8
    else:
        # rows of out, 16 bytes a thread: a stride of unknown divisor would make it 2
        assert sass.count(r"STG\.E\.128") >= 32
        # as in MLA decode
        assert sass.count("HGMMA") == 3 * config.D // 16 + 3 * 2 * 4
    # NOTE: serialised wgmma shows as one wait an instruction
    assert sass.count(r"WARPGROUP\.DEPBAR") < (32 if config.halves else 16)
