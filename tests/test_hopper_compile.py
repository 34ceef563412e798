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


GQA_CONFIGS = [
    ("bf16", 128, 128, 8),
    ("bf16", 128, 128, 64),
    ("bf16", 256, 256, 8),
    ("bf16", 256, 256, 32),
    ("fp16", 64, 64, 64),
    ("bf16", 192, 128, 16),
    ("bf16", 96, 96, 8),
    ("bf16", 72, 8, 8),
    ("fp8", 128, 128, 8),
    ("fp8", 128, 128, 64),
    ("fp8", 256, 256, 32),
]


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


@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is neither on PATH nor in a triton wheel")
@pytest.mark.parametrize(("dtype", "D", "Dv", "tile_n"), GQA_CONFIGS)
def test_gqa_decode(dtype: str, D: int, Dv: int, tile_n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from flash_mla.kernels.hopper import gqa_decode

    config = gqa_decode.Config(dtype, D, Dv, tile_n, descale=dtype == "fp8")  # type: ignore[arg-type]
    assert config.stages >= 2, "loads and products must overlap"
    assert config.smem_bytes() <= 227 * 1024
    gqa_decode.build(config, f"--keep-cubin --dump-dir={tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    sass = subprocess.run([str(CUOBJDUMP), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([str(CUOBJDUMP), "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert set(re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr)) == {"0"}

    def count(instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}\b", sass))

    assert (count("LDL"), count("STL")) == (0, 0), "registers spill"
    # K Q^T: 32 bytes of a row each; V^T P^T: 4 steps of 16 keys for each 64 columns
    row_bytes = D if dtype == "fp8" else 2 * D
    scores, values = -(-row_bytes // 32), 4 * -(-Dv // 64)
    assert (count("QGMMA"), count("HGMMA")) == ((scores, values) if dtype == "fp8" else (0, scores + values))
    # NOTE: serialised wgmma shows as one wait an instruction
    assert count(r"WARPGROUP\.DEPBAR") == 2


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
