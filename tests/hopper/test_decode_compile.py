"""Compiles every config of the Hopper decode kernels for sm_90a, without a GPU, and gates what the assembler made."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock
from types import SimpleNamespace

import pytest
from sass import NEEDS, compiled, gates

from flash_mla.kernels.hopper.gqa_decode.config import Config as GqaConfig
from flash_mla.kernels.hopper.limits import SMEM_BYTES
from flash_mla.kernels.hopper.mla_decode.config import Config as MlaConfig
from flash_mla.kernels.hopper.mla_decode_fp8.config import Config as MlaFp8Config

pytestmark = NEEDS

CONFIGS = gates(
    [("bf16", 576, 1), ("bf16", 576, 2), ("bf16", 512, 1)],
    [("bf16", 512, 2), ("fp16", 576, 1), ("fp16", 576, 2), ("fp16", 512, 1), ("fp16", 512, 2)],
)
GQA_CONFIGS = gates(
    [
        ("bf16", "bf16", 128, 128, 8),
        ("bf16", "bf16", 128, 128, 64),
        ("bf16", "bf16", 256, 256, 8),
        ("bf16", "bf16", 192, 128, 16),
        ("bf16", "bf16", 72, 8, 8),
        ("fp8", "fp8", 128, 128, 8),
        ("fp8", "fp8", 256, 256, 32),
        ("bf16", "fp8", 128, 128, 8),
        ("fp16", "fp8", 256, 256, 32),
    ],
    [
        ("bf16", "bf16", 256, 256, 32),
        ("fp16", "fp16", 64, 64, 64),
        ("bf16", "bf16", 96, 96, 8),
        ("fp8", "fp8", 128, 128, 64),
        ("bf16", "fp8", 128, 128, 32),
        ("bf16", "fp8", 72, 8, 16),
    ],
)
"""(q, K and V, D, Dv, tile_n)"""
MLA_FP8_CONFIGS = gates(
    [("fp8", 576, 64, 2), ("fp8", 576, 64, 1), ("fp8", 576, 16, 1), ("bf16", 576, 64, 2), ("bf16", 576, 16, 1)],
    [("fp8", 576, 32, 1), ("fp8", 512, 64, 2), ("bf16", 576, 32, 1), ("fp16", 512, 64, 1)],
)
"""(q, D, tile_n, cluster)"""


@pytest.mark.parametrize(("dtype", "D", "cluster"), CONFIGS)
def test_mla_decode(dtype: str, D: int, cluster: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.mla_decode.kernel import build

    config = MlaConfig(dtype, D, cluster)  # type: ignore[arg-type]
    assert config.smem_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    # rows of out, 16 bytes a thread: a stride of unknown divisor would make it 2
    assert sass.count(r"STG\.E\.128") >= 32
    # entry registers of the two kernels: 65536 / 384 threads, rounded down to 8; and combine's
    assert max(registers for registers, _ in sass.resources) == 168
    assert sass.spills == (0, 0, 0)
    # Q K^T: (D / 16) in each of three places; P V: 4 steps, two blocks, in each of three places
    assert sass.count("HGMMA") == 3 * D // 16 + 3 * 2 * 4
    # NOTE: serialised wgmma shows as one wait an instruction
    assert sass.count(r"WARPGROUP\.DEPBAR") < 16


@pytest.mark.parametrize(("cluster", "tile_m"), gates([(8, 32)], [(1, 32), (8, 64)]))
def test_mla_decode_of_a_pair_a_cta(cluster: int, tile_m: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.mla_decode.kernel import build

    sass = compiled(build, MlaConfig("bf16", 576, cluster, team=1, tile_m=tile_m), tmp_path)
    assert sass.spills == (0, 0, 0)
    # Q K^T of each warpgroup; P V: 4 steps, two blocks each, and a lone even block
    assert sass.count("HGMMA") == 2 * 576 // 16 + 5 * 4
    assert sass.count(r"WARPGROUP\.DEPBAR") < 16


@pytest.mark.parametrize(("cluster", "each"), gates([], [(8, 2), (4, 4)]))
def test_mla_decode_of_teams(cluster: int, each: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.mla_decode.kernel import build

    sass = compiled(build, MlaConfig("bf16", 576, cluster, team=each), tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("HGMMA") == 3 * 576 // 16 + 3 * 2 * 4
    assert sass.count(r"WARPGROUP\.DEPBAR") < 16


def test_mla_decode_of_a_mask_in_pieces(tmp_path: Path) -> None:
    """What a mask and a split by the request alone add: no spill, no product more."""
    from flash_mla.kernels.hopper.mla_decode.kernel import build

    sass = compiled(build, MlaConfig("bf16", 576, 2, piece=64, masked=True), tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("HGMMA") == 3 * 576 // 16 + 3 * 2 * 4


def test_gqa_decode_of_a_mask_in_pieces(tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.gqa_decode.kernel import build

    sass = compiled(build, GqaConfig("bf16", 128, 128, 8, False, "bf16", piece=16, masked=True), tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("HGMMA") == 16


@pytest.mark.parametrize(("q", "D", "tile_n", "cluster"), MLA_FP8_CONFIGS)
def test_mla_decode_fp8(q: str, D: int, tile_n: int, cluster: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.mla_decode_fp8.kernel import build

    config = MlaFp8Config(q, D, tile_n, cluster, descale=True)  # type: ignore[arg-type]
    assert config.stages >= 4, "loads and products must overlap"
    assert config.smem_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    # entry registers: 65536 / 512 threads
    assert max(registers for registers, _ in sass.resources) == 128
    assert sass.spills == (0, 0, 0)
    # Q K^T in two places, 32 columns each; V^T P^T: 4 tiles of 64 columns, 32 keys each
    assert sass.count("QGMMA") == 2 * config.q_tiles * D // 32 + 4 * 2 * config.p_parts
    assert sass.count("HGMMA") == 0
    # NOTE: serialised wgmma shows as one wait an instruction
    assert sass.count(r"WARPGROUP\.DEPBAR") < 8
    # V goes through ldmatrix once: 4 tiles, 32 keys each, and the loads of two tiles before P is there
    assert sass.count("LDSM") == 8


@pytest.mark.parametrize(
    ("q", "tile_n", "cluster", "each"),
    gates([("fp8", 32, 8, 2), ("bf16", 16, 8, 1)], [("fp8", 16, 1, 1), ("fp8", 64, 8, 2), ("bf16", 64, 4, 2)]),
)
def test_mla_decode_fp8_of_teams(q: str, tile_n: int, cluster: int, each: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.mla_decode_fp8.kernel import build

    config = MlaFp8Config(q, 576, tile_n, cluster, descale=True, team=each)  # type: ignore[arg-type]
    sass = compiled(build, config, tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("QGMMA") == 2 * config.q_tiles * 576 // 32 + 4 * 2 * config.p_parts
    assert sass.count(r"WARPGROUP\.DEPBAR") < 8


@pytest.mark.parametrize(("q", "dtype", "D", "Dv", "tile_n"), GQA_CONFIGS)
def test_gqa_decode(q: str, dtype: str, D: int, Dv: int, tile_n: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.gqa_decode.kernel import build

    config = GqaConfig(dtype, D, Dv, tile_n, descale=dtype == "fp8", q=q)  # type: ignore[arg-type]
    assert config.stages >= 2, "loads and products must overlap"
    assert config.smem_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    assert sass.spills == (0, 0, 0)
    # K Q^T: 32 bytes of a row each; V^T P^T: 4 steps of 16 keys for each 64 columns
    row_bytes = D if dtype == "fp8" else 2 * D
    scores, values = -(-row_bytes // 32), 4 * -(-Dv // 64)
    expected = (scores, values) if dtype == "fp8" else (0, scores + values)
    assert (sass.count("QGMMA"), sass.count("HGMMA")) == expected
    # NOTE: serialised wgmma shows as one wait an instruction
    assert sass.count(r"WARPGROUP\.DEPBAR") == 2


@pytest.mark.parametrize(
    ("q", "dtype", "D", "tile_n", "cluster"),
    gates(
        [("bf16", "bf16", 128, 8, 8)],
        [("bf16", "bf16", 128, 8, 1), ("fp8", "fp8", 128, 64, 8), ("bf16", "fp8", 64, 32, 2)],
    ),
)
def test_gqa_decode_of_teams(q: str, dtype: str, D: int, tile_n: int, cluster: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.gqa_decode.kernel import build

    config = GqaConfig(dtype, D, D, tile_n, dtype == "fp8", q, team=True, cluster=cluster)  # type: ignore[arg-type]
    sass = compiled(build, config, tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("[HQ]GMMA") == config.k_steps + 4 * config.tiles_m
    assert sass.count(r"WARPGROUP\.DEPBAR") < 4


@pytest.mark.parametrize("kernel", gates(["mla"], ["fp8", "gqa"]))
def test_rows_token_by_token(kernel: str, tmp_path: Path) -> None:
    """What the other order of rows adds, a mask too: no spill, no product more."""
    from flash_mla.kernels.hopper.gqa_decode.kernel import build as build_gqa
    from flash_mla.kernels.hopper.mla_decode.kernel import build as build_mla
    from flash_mla.kernels.hopper.mla_decode_fp8.kernel import build as build_fp8

    fp8 = MlaFp8Config("fp8", 576, 64, 2, descale=True, token_major=True)
    build, config, products = {
        "mla": (build_mla, MlaConfig("bf16", 576, 2, masked=True, token_major=True), 3 * 576 // 16 + 3 * 2 * 4),
        "fp8": (build_fp8, fp8, 2 * fp8.q_tiles * 576 // 32 + 4 * 2 * fp8.p_parts),
        "gqa": (build_gqa, GqaConfig("bf16", 128, 128, 64, False, "bf16", token_major=True), 16),
    }[kernel]
    sass = compiled(build, config, tmp_path)
    assert sass.spills == (0, 0, 0)
    assert sass.count("QGMMA" if kernel == "fp8" else "HGMMA") == products


def test_store_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from flash_mla.kernels.hopper import pack_mask, store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO", "flash_mla")
    store.load.cache_clear()
    assert callable(store.load("pack_mask", None, pack_mask.build))  # the smallest kernel
    assert [message.split()[0] for message in caplog.messages] == ["compiling", "compiled"]
    assert store.path("pack_mask", None).exists()

    def never(config: object) -> None:
        raise AssertionError("compiled twice")

    store.load.cache_clear()
    assert callable(store.load("pack_mask", None, never))
    assert len(caplog.messages) == 2
    store.load.cache_clear()


def test_threads_compile_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DSL's own state is the process's: kernels of two threads at once failed in its middle."""
    import cutlass.cute as cute

    from flash_mla.kernels.hopper import store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cute.runtime, "load_module", lambda *_, **__: SimpleNamespace(kernel=print))
    busy, together = Lock(), Barrier(4)

    def build(config: int) -> SimpleNamespace:
        assert busy.acquire(blocking=False)
        time.sleep(0.02)
        busy.release()
        return SimpleNamespace(export_to_c=lambda file, function_name: Path(file).write_text(function_name))

    def load(config: int) -> object:
        together.wait()
        return store.load.__wrapped__("kernel", config, build)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(load, range(4)))
    assert len([*store.directory().iterdir()]) == 4
