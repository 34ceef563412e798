"""What the Hopper backend takes and refuses, and which kernel it chooses: no GPU needed."""

from __future__ import annotations

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.backends.hopper import decode, device, gqa_decode, long_decode, mla_decode, mla_decode_fp8
from flash_mla.kernels.hopper.prefill.config import Config as PrefillConfig
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


def latent(**changes: object) -> DecodeProblem:
    """MLA over a pool of FP8, 128 heads."""
    B, Hq, D, pool = 4, 128, 576, (0, 576, 64 * 576, 576, 1)
    facts = {"B": B, "Hq": Hq, "Hk": 1, "D": D, "Dv": 512, "q_strides": (Hq * D, D, D, 1)}
    fp8 = {"dtype": FP8, "kv_dtype": FP8, "k_strides": pool, "v_strides": pool, "alias": True}
    return problem(**facts, **fp8)._replace(**changes)  # type: ignore[arg-type]


def test_many_query_tokens_go_to_the_prefill_kernel() -> None:
    many = problem(S_q=300, q_strides=(32 * 300 * 128, 300 * 128, 128, 1))
    assert hopper.phase(many) is long_decode
    assert hopper.phase(many._replace(S_q=8)) is gqa_decode
    for taken in (many, many._replace(dtype=FP8, kv_dtype=FP8, descale=True), many._replace(sink=True)):
        assert long_decode.refuse(taken) is None
    assert long_decode.config(many._replace(dtype=FP8, kv_dtype=FP8)) == PrefillConfig("fp8", 128, 128, True)
    for changes, words in (
        ({"kv_dtype": FP8}, "one dtype"),
        ({"mask": "bool"}, "a bool mask"),
        ({"out_strides": (32 * 300 * 128, 128, 32 * 128, 1)}, "out must be contiguous"),
        ({"scale_sign": -1}, "not above 0"),
        ({"D": 96}, "D = 96"),
        ({"k_strides": (0, 0, 64 * 128, 128, 2)}, "k strides"),
    ):
        assert words in str(long_decode.refuse(many._replace(**changes)))


BF16_QUERIES = {"dtype": torch.bfloat16, "out_dtype": torch.bfloat16}


def test_an_fp8_latent_goes_to_its_own_kernel() -> None:
    assert hopper.phase(latent()) is mla_decode_fp8
    assert hopper.phase(latent(**BF16_QUERIES)) is mla_decode_fp8


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, ("fp8", 576, 64, 2)),
        ({"Hq": 64}, ("fp8", 576, 64, 1)),
        ({"Hq": 16, "B": 100}, ("fp8", 576, 16, 1)),
        ({"Hq": 8, "B": 100, "S_q": 3, "q_strides": (24 * 576, 3 * 576, 576, 1)}, ("fp8", 576, 32, 1)),
        ({"Hq": 1, "B": 100, **BF16_QUERIES}, ("bf16", 576, 16, 1)),
        ({"dtype": torch.float16, "out_dtype": torch.float16}, ("fp16", 576, 64, 2)),
        ({"D": 512}, ("fp8", 512, 64, 2)),
    ],
)
def test_config_of_an_fp8_latent(changes: dict, config: tuple) -> None:
    changed = latent(**changes)
    assert mla_decode_fp8.refuse(changed) is None
    assert mla_decode_fp8.config(changed) == mla_decode_fp8.Config(*config, descale=False)


@pytest.mark.parametrize(
    ("changes", "cluster", "team", "tile_m"),
    [
        ({"table_blocks": 2, "B": 1}, 1, 1, 32),
        ({"table_blocks": 1, "B": 33}, 1, 1, 32),
        ({"table_blocks": 1, "B": 34}, 1, 1, 64),
        ({"table_blocks": 1, "B": 67}, 2, 0, 64),
        ({"table_blocks": 1, "batch_invariant": True}, 2, 0, 64),
        ({"table_blocks": 2049}, 2, 0, 64),
        ({"table_blocks": 3, "B": 1}, 2, 1, 32),
        ({"table_blocks": 16, "B": 1}, 8, 1, 32),
        ({"table_blocks": 64, "B": 1}, 8, 2, 32),
        ({"table_blocks": 16, "B": 4}, 4, 2, 32),
        ({"table_blocks": 128, "B": 1}, 8, 2, 64),
        ({"table_blocks": 64, "B": 1, "Hq": 16}, 8, 1, 32),
        ({"table_blocks": 256, "B": 1, "Hq": 16}, 8, 2, 32),
        ({"table_blocks": 512, "B": 1, "Hq": 16}, 8, 4, 32),
        ({"table_blocks": 16, "B": 8}, 4, 2, 64),
    ],
)
def test_short_tables_of_few_rows_are_computed_by_teams(changes: dict, cluster: int, team: int, tile_m: int) -> None:
    config = mla_decode.config(latent(kv_dtype=torch.bfloat16, **BF16_QUERIES, **changes))
    assert (config.cluster, config.team, config.tile_m) == (cluster, team, tile_m)
    assert config.rows == tile_m * (1 if team else cluster)


@pytest.mark.parametrize(
    ("changes", "cluster", "team", "tile_n"),
    [
        ({"table_blocks": 2, "B": 1}, 1, 1, 32),
        ({"table_blocks": 16, "B": 8, "Hq": 16}, 8, 1, 16),
        ({"table_blocks": 64, "B": 1}, 8, 2, 32),
        ({"table_blocks": 16, "B": 8}, 4, 2, 64),
        ({"table_blocks": 64, "B": 8, "Hq": 16}, 8, 4, 16),
        ({"table_blocks": 64, "B": 8}, 2, 0, 64),
    ],
)
def test_short_tables_of_an_fp8_latent(changes: dict, cluster: int, team: int, tile_n: int) -> None:
    config = mla_decode_fp8.config(latent(**changes))
    assert (config.cluster, config.team, config.tile_n) == (cluster, team, tile_n)
    assert config.rows == tile_n * (1 if team else cluster)


TOKENS_FIRST_OUT = {"out_strides": (2 * 128 * 512, 512, 128 * 512, 1)}
TOKENS_FIRST = {"S_q": 2, "q_strides": (2 * 128 * 576, 576, 128 * 576, 1), **TOKENS_FIRST_OUT}
"""q and out lie as [B, 2, 128, ..]."""


def test_deepseeks_order_of_rows_is_read_as_it_lies() -> None:
    changed = latent(**TOKENS_FIRST)
    assert device.refuse(changed) is None
    assert mla_decode_fp8.refuse(changed) is None
    assert mla_decode_fp8.config(changed) == mla_decode_fp8.Config("fp8", 576, 64, 2, descale=False, token_major=True)
    changed = latent(**TOKENS_FIRST, kv_dtype=torch.bfloat16, **BF16_QUERIES)
    assert mla_decode.refuse(changed) is None
    assert mla_decode.config(changed) == mla_decode.Config("bf16", 576, 2, token_major=True)
    shared = problem(
        Hk=1, S_q=2, q_strides=(2 * 32 * 128, 128, 32 * 128, 1), out_strides=(2 * 32 * 128, 128, 32 * 128, 1)
    )
    assert gqa_decode.refuse(shared) is None
    assert gqa_decode.config(shared).token_major
    assert "evenly spaced" in str(gqa_decode.refuse(shared._replace(Hk=8)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_dtype": torch.bfloat16}, "over FP8"),
        ({"dtype": torch.float32, "out_dtype": torch.float32}, "over FP8"),
        ({"out_dtype": torch.float16}, "BF16 for FP8"),
        ({"D": 640}, "576/512"),
        ({"S_q": 9}, "at most 8 query tokens"),
        ({"mask": "bool"}, "a bool mask"),
        ({"batch_invariant": True}, "batch_invariant"),
        ({"S_q": 2, "q_strides": (2 * 128 * 576, 576, 128 * 576, 1)}, "one order"),
        ({"S_q": 2, "q_strides": (2 * 128 * 576, 2 * 576, 576, 1), **TOKENS_FIRST_OUT}, "one order"),
        ({"S_q": 2, "q_strides": (2 * 136 * 576, 576, 136 * 576, 1), **TOKENS_FIRST_OUT}, "evenly spaced"),
        ({"k_strides": (0, 0, 64 * 576, 512, 1)}, "k_cache strides"),
        ({"k_strides": (0, 0, 64 * 584, 584, 1)}, "k_cache stride of 584"),
        ({"q_strides": (128 * 584, 584, 584, 1)}, "q stride of 584"),
    ],
)
def test_refuses_an_fp8_latent_with_a_reason(changes: dict, words: str) -> None:
    assert words in str(mla_decode_fp8.refuse(latent(**changes)))


ENGINE = (0, 128, 64 * 8 * 128, 8 * 128, 1)
"""Strides of [num_blocks, 64, 8, 128], seen as [B, 8, num_blocks, 64, 128]."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "kv_dtype": torch.float16, "out_dtype": torch.float16},
        {"dtype": FP8, "kv_dtype": FP8, "descale": True},
        {"kv_dtype": FP8},
        {"k_strides": ENGINE, "v_strides": ENGINE},
        {"sink": True},
        {"mask": "bool"},
        {"mask": "bool", "tail": True},
        {"batch_invariant": True},
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
        ({"dtype": FP8, "descale": True}, "cache: FP8"),
        ({"kv_dtype": FP8, "D": 68}, "a multiple of 8"),
        ({"kv_dtype": FP8, "mask": "bool"}, "a mask or batch_invariant"),
        ({"kv_dtype": FP8, "batch_invariant": True}, "a mask or batch_invariant"),
        ({"S_q": 129}, "at most 128 query tokens"),
        ({"mask": "float"}, "a float mask"),
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
    [
        ({}, 8),
        ({"Hk": 32}, 8),
        ({"Hk": 1}, 32),
        ({"Hk": 1, "S_q": 3}, 64),
        ({"Hk": 1, "S_q": 3, "Dv": 256}, 32),
        ({"Hk": 1, "S_q": 3, "kv_dtype": FP8}, 32),
    ],
)
def test_config_holds_the_rows_of_a_kv_head(changes: dict, tile_n: int) -> None:
    assert gqa_decode.config(problem(**changes)).tile_n == tile_n


def test_the_factor_of_1_keeps_to_fp32_on_its_device(monkeypatch):
    """Made at some call, under whatever defaults stand there, and kept."""
    monkeypatch.setattr(decode, "outlasting", lambda make: make())
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        one = decode.kept_one(torch.device("cpu"))
    torch.set_default_dtype(default)
    assert one.dtype == torch.float32
    assert one.tolist() == [[1.0]]
