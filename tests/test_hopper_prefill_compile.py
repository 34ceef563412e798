"""Compiles the configs of the Hopper prefill for sm_90a, without a GPU, and gates what the assembler made of them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("nvidia-cutlass-dsl is not installed", allow_module_level=True)

from test_hopper_compile import CUOBJDUMP

WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
VARIANTS = [
    (*width, paged, sparse) for width in WIDTHS for paged, sparse in ((False, False), (True, False), (False, True))
]
"""(D, Dv, paged, sparse) in BF16. FP16 differs in the type of an instruction; pages and a list together in the loader
alone, and each is compiled."""


@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is neither on PATH nor in a triton wheel")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prefill(variant: tuple[int, int, bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from flash_mla.kernels.hopper import prefill

    config = prefill.Config("bf16", *variant)
    # the kernel itself refuses to compile when the ledger is not what it allocates
    prefill.build(config, f"--keep-cubin --dump-dir={tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    sass = subprocess.run([str(CUOBJDUMP), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([str(CUOBJDUMP), "-res-usage", cubin], capture_output=True, text=True, check=True)
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)

    def count(instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}\b", sass))

    # entry registers: 65536 over the threads of two CTAs or one, rounded down to 8
    assert int(registers) == 65536 // (config.threads * (2 if config.sparse else 1)) // 8 * 8
    wide = config.sparse and config.D == 256
    assert (int(stack), count("LDL"), count("STL")) <= ((16, 8, 9) if wide else (0, 0, 0)), "registers spill"
    # Q K^T and P V: steps without and with a mask (one where blocks are listed) and, with two Q stages, the step across
    # tiles; the parts of one before the first block and after the last
    scores, values = config.D // 16, config.tile_n // 16 * (2 if wide else 1)
    steps = (1 if config.sparse else 2) + 1 + (config.q_stages > 1)
    assert count("HGMMA") == steps * (scores + values) + (scores if config.q_stages == 1 else 0)
    # NOTE: serialised wgmma shows as one arrive and one wait an instruction
    assert count(r"WARPGROUP\.ARRIVE") <= 8
    assert count(r"WARPGROUP\.DEPBAR") <= 8


def test_shared_memory_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from flash_mla.kernels.hopper.prefill import Config

    for variant in VARIANTS:
        config = Config("bf16", *variant)
        assert config.smem_bytes() <= 227 * 1024


def test_pack_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from flash_mla.kernels.hopper import pack_mask

    pack_mask.build(None, f"--keep-cubin --dump-dir={tmp_path}")
    assert len(list(tmp_path.glob("*.cubin"))) == 1


def test_arguments_share_no_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size or stride that two placeholders share must be equal in every call, or the launch is refused."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from flash_mla.kernels.hopper import prefill

    *qkvo, tensors, _, _ = prefill.arguments(prefill.Config("bf16", 128, 128, True, True))
    symbols = [id(x) for tensor in (*qkvo, *tensors) for x in (*tensor.shape, *tensor.stride) if not isinstance(x, int)]
    assert len(symbols) > 40
    assert len(symbols) == len(set(symbols))
