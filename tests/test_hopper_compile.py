"""Compiles every config of the Hopper kernels for sm_90a, without a GPU, and gates what the assembler made of them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("cutlass") is None:
    pytest.skip("nvidia-cutlass-dsl is not installed", allow_module_level=True)


def tool(name: str) -> str | None:
    """A CUDA binary tool, from PATH or from the triton wheel."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


CUOBJDUMP = tool("cuobjdump")
CONFIGS = [(dtype, D, cluster) for dtype in ("bf16", "fp16") for D in (576, 512) for cluster in (1, 2)]


@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is neither on PATH nor in a triton wheel")
@pytest.mark.parametrize(("dtype", "D", "cluster"), CONFIGS)
def test_mla_decode(dtype: str, D: int, cluster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from flash_mla.kernels.hopper import mla_decode

    config = mla_decode.Config(dtype, D, cluster)  # type: ignore[arg-type]
    # the kernel itself refuses to compile when the ledger is not what it allocates
    mla_decode.build(config, f"--keep-cubin --dump-dir={tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    sass = subprocess.run([str(CUOBJDUMP), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([str(CUOBJDUMP), "-res-usage", cubin], capture_output=True, text=True, check=True)
    resources = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)

    def count(instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}\b", sass))

    # entry registers of the two kernels: 65536 / 384 threads, rounded down to 8; and combine's
    assert sorted(int(registers) for registers, _ in resources)[-1] == 168
    assert {stack for _, stack in resources} == {"0"}
    assert (count("LDL"), count("STL")) == (0, 0), "registers spill"
    # Q K^T: (D / 16) in each of three places; P V: 4 steps, two blocks, in each of three places
    assert count("HGMMA") == 3 * D // 16 + 3 * 2 * 4
    # NOTE: serialised wgmma shows as one wait an instruction
    assert count(r"WARPGROUP\.DEPBAR") < 16


def test_shared_memory_fits() -> None:
    from flash_mla.kernels.hopper.mla_decode import Config

    limit = 227 * 1024
    for dtype, D, cluster in CONFIGS:
        assert Config(dtype, D, cluster).smem_bytes() <= limit  # type: ignore[arg-type]


def test_store_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from flash_mla.kernels.hopper import mla_decode, store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    config = mla_decode.Config("bf16", 576, 2)
    store.load.cache_clear()
    assert callable(store.load("mla_decode", config, mla_decode.build))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "compiling" in said
    assert store.path("mla_decode", config).exists()

    def never(config: object) -> None:
        raise AssertionError("compiled twice")

    store.load.cache_clear()
    assert callable(store.load("mla_decode", config, never))
    assert capsys.readouterr().err == ""
    store.load.cache_clear()
