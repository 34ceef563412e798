"""Compiles the configs of the Hopper prefill for sm_90a, without a GPU, and gates what the assembler made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sass import NEEDS, compiled, gates

from flash_mla.kernels.hopper.limits import REGISTERS, SMEM_BYTES, WARPGROUP
from flash_mla.kernels.hopper.prefill.config import TRANSPOSERS, WIDTHS, Config, Listed

pytestmark = NEEDS

VARIANTS = gates(
    [
        *((*width, False, 1, False) for width in WIDTHS),
        (128, 128, False, 2, True),
        (192, 128, False, 2, False),
        (128, 128, True, 1, False),
    ],
    [
        (64, 64, True, 1, False),
        (128, 128, False, 2, False),
        (192, 128, True, 1, False),
        (256, 256, True, 1, False),
    ],
)
"""(D, Dv, paged, cluster, in_turn) in BF16. FP16 differs in the type of an instruction."""
LISTED_VARIANTS = gates(
    [(128, 128, False, 3), (128, 128, False, 2), (256, 256, False, 2)],
    [(64, 64, False, 3), (64, 64, True, 2), (128, 128, True, 3), (192, 128, False, 2), (256, 256, True, 2)],
)
"""(D, Dv, paged, teams) in BF16."""
FP8_VARIANTS = gates(
    [(64, 64, False), (128, 128, False), (256, 256, False)],
    [(192, 128, False), (64, 64, True), (128, 128, True), (192, 128, True), (256, 256, True)],
)
"""(D, Dv, paged) in FP8."""


@pytest.mark.parametrize(("D", "Dv", "paged", "cluster", "in_turn"), VARIANTS)
def test_prefill(D: int, Dv: int, paged: bool, cluster: int, in_turn: bool, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.prefill.kernel import build

    config = Config("bf16", D, Dv, paged, cluster, in_turn)
    assert config.smem_bytes() <= SMEM_BYTES
    sass = compiled(build, config, tmp_path)
    ((registers, _),) = sass.resources
    # entry registers: those of an SM over the threads of a CTA, rounded down to 8
    assert registers == REGISTERS // config.threads // 8 * 8
    assert sass.spills == (0, 0, 0)
    # Q K^T and P V: steps without and with a mask, the step across tiles, and the parts of one before the first block
    # and after the last
    assert sass.count("HGMMA") == 4 * (config.D // 16 + config.tile_n // 16)
    # Q held in registers: loaded before the first block and at the step across tiles
    assert sass.count(r"LDSM\.16\.M88\.4") == (2 * config.D // 16 if config.q_held else 0)
    # K and V to both CTAs of a cluster, Q to one
    assert (sass.count(r"UTMALDG\.\dD\.MULTICAST") > 0) == (cluster > 1)
    # NOTE: serialised wgmma shows as one arrive and one wait an instruction
    assert sass.count(r"WARPGROUP\.ARRIVE") <= 8
    assert sass.count(r"WARPGROUP\.DEPBAR") <= 8


@pytest.mark.parametrize(("D", "Dv", "paged", "teams"), LISTED_VARIANTS)
def test_listed(D: int, Dv: int, paged: bool, teams: int, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.prefill.listed import build

    config = Listed("bf16", D, Dv, paged, teams=teams)
    assert config.smem_bytes() <= SMEM_BYTES
    assert WARPGROUP * (config.teams * config.registers[0] + config.registers[1]) <= REGISTERS
    sass = compiled(build, config, tmp_path)
    ((registers, _),) = sass.resources
    assert registers == REGISTERS // config.threads // 8 * 8
    assert sass.spills == (0, 0, 0)
    # Q K^T of the first tile's first block, of other first blocks, of others; P V of a tile's last block, of others
    assert sass.count("HGMMA") == 3 * config.D // 16 + 2 * config.tile_n // 16
    # NOTE: serialised wgmma shows as one arrive and one wait an instruction
    assert sass.count(r"WARPGROUP\.ARRIVE") == 5
    assert sass.count(r"WARPGROUP\.DEPBAR") == 6


@pytest.mark.parametrize(("D", "Dv", "paged"), FP8_VARIANTS)
def test_prefill_fp8(D: int, Dv: int, paged: bool, tmp_path: Path) -> None:
    from flash_mla.kernels.hopper.prefill.kernel import build

    config = Config("fp8", D, Dv, paged)
    assert config.smem_bytes() <= SMEM_BYTES
    assert WARPGROUP * (config.consumers * config.registers[0] + config.registers[1]) <= REGISTERS
    sass = compiled(build, config, tmp_path)
    ((registers, _),) = sass.resources
    assert registers == REGISTERS // config.threads // 8 * 8
    assert sass.spills == (0, 0, 0)
    # steps as in 16 bits, of 32 elements an instruction
    assert sass.count("QGMMA") == 4 * (config.D // 32 + config.tile_n // 32)
    assert sass.count("HGMMA") == 0
    assert sass.count(r"WARPGROUP\.ARRIVE") <= 8
    assert sass.count(r"WARPGROUP\.DEPBAR") <= 8
    # V turned: 16 columns of 32 keys a load and a store
    turns = config.tile_n // 32 * config.Dv // 16 // TRANSPOSERS
    assert sass.count(r"LDSM\.16\.MT88\.4") == turns


def test_pack_mask(tmp_path: Path) -> None:
    from flash_mla.kernels.hopper import pack_mask

    assert compiled(pack_mask.build, None, tmp_path).spills == (0, 0, 0)


def test_arguments_share_no_symbol() -> None:
    """A size or stride that two placeholders share must be equal in every call, or the launch is refused."""
    from flash_mla.kernels.hopper.prefill.kernel import arguments

    *qkvo, tensors, _, _ = arguments(Config("bf16", 128, 128, True))
    symbols = [id(x) for tensor in (*qkvo, *tensors) for x in (*tensor.shape, *tensor.stride) if not isinstance(x, int)]
    assert len(symbols) > 40
    assert len(symbols) == len(set(symbols))
