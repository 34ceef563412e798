"""What the Hopper backend takes and refuses, and which kernel it chooses: no GPU needed."""

from __future__ import annotations

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.backends.hopper import device, gqa_decode, mla_decode
from flash_mla.problem import FP8, DecodeProblem


def problem(**changes: object) -> DecodeProblem:
    """GQA 32/8, D 128, BF16, over slabs of 100 blocks."""
    B, Hq, Hk, S_q, D, Nblk = 4, 32, 8, 1, 128, 100
    slab = (Hk * Nblk * 64 * D, Nblk * 64 * D, 64 * D, D, 1)
    base = DecodeProblem(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        B=B,
        Hq=Hq,
        Hk=Hk,
        S_q=S_q,
        D=D,
        Dv=D,
        Nblk=Nblk,
        table_blocks=Nblk,
        q_strides=(Hq * S_q * D, S_q * D, D, 1),
        k_strides=slab,
        v_strides=slab,
        alias=False,
        mask="none",
        descale=False,
        sink=False,
    )
    return base._replace(**changes)  # type: ignore[arg-type]


def test_separate_k_and_v_go_to_the_gqa_kernel() -> None:
    assert hopper.phase(problem()) is gqa_decode
    assert hopper.phase(problem(alias=True)) is gqa_decode
    assert hopper.phase(problem(Hk=1)) is gqa_decode
    assert hopper.phase(problem(alias=True, Hk=1)) is mla_decode


ENGINE = (0, 128, 64 * 8 * 128, 8 * 128, 1)
"""Strides of [num_blocks, 64, 8, 128], seen as [B, 8, num_blocks, 64, 128]."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "kv_dtype": torch.float16, "out_dtype": torch.float16},
        {"dtype": FP8, "kv_dtype": FP8, "descale": True},
        {"k_strides": ENGINE, "v_strides": ENGINE},
        {"sink": True},
        {"S_q": 8, "q_strides": (32 * 8 * 128, 8 * 128, 128, 1)},
    ],
)
def test_takes(changes: dict) -> None:
    assert gqa_decode.refuse(problem(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32, "kv_dtype": torch.float32, "out_dtype": torch.float32}, "BF16, FP16 and FP8"),
        ({"D": 576}, "at most 256"),
        ({"Dv": 512}, "at most 256"),
        ({"kv_dtype": FP8}, "one dtype"),
        ({"S_q": 9}, "at most 8 query tokens"),
        ({"mask": "bool"}, "a bool mask"),
        ({"q_strides": (32 * 128, 128, 32 * 128, 1), "S_q": 2}, "evenly spaced"),
        ({"k_strides": (0, 0, 64 * 128, 128, 2)}, "k_cache strides"),
        ({"v_strides": (0, 0, 64 * 64, 64, 1)}, "v_cache strides"),
        ({"k_strides": (0, 64 * 132, 64 * 132, 132, 1)}, "k_cache stride of 132"),
        ({"dtype": FP8, "kv_dtype": FP8, "v_strides": (0, 64 * 136, 64 * 136, 136, 1)}, "v_cache stride of 136"),
    ],
)
def test_refuses_with_a_reason(changes: dict, words: str) -> None:
    reason = gqa_decode.refuse(problem(**changes))
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("sign", [-1, 0])
def test_gqa_scales_before_it_looks_for_the_maximum(sign: int) -> None:
    assert device.refuse(problem(scale_sign=sign)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_sign": -1, "alias": True, "Hk": 1}, "not above 0"),
        ({"scale_sign": 0, "alias": True, "Hk": 1}, "not above 0"),
        ({"aligned": False}, "16 bytes"),
        ({"page": 16}, "pages of 16"),
        ({"rope_strides": ENGINE}, "split latent"),
        ({"device": torch.device("cpu")}, "not on cpu"),
    ],
)
def test_facts_that_no_kernel_takes(changes: dict, words: str) -> None:
    assert device.refuse(problem()) is None
    assert words in str(device.refuse(problem(**changes)))


@pytest.mark.parametrize(
    ("changes", "tile_n"),
    [({}, 8), ({"Hk": 32}, 8), ({"Hk": 1}, 32), ({"Hk": 1, "S_q": 3}, 64), ({"Hk": 1, "S_q": 3, "Dv": 256}, 32)],
)
def test_config_holds_the_rows_of_a_kv_head(changes: dict, tile_n: int) -> None:
    assert gqa_decode.config(problem(**changes)).tile_n == tile_n
