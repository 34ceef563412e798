"""What the Hopper prefill refuses, and how its launch prepares tensors; no kernel runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_mla.backends.hopper import prefill
from flash_mla.kernels.hopper.prefill.config import Config
from flash_mla.problem import FP8, PrefillProblem

PROBLEM = PrefillProblem(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    out_dtype=torch.bfloat16,
    B=2,
    Hq=4,
    Hk=2,
    P=100,
    S_kv=100,
    D=128,
    Dv=128,
    q_strides=(4 * 100 * 128, 100 * 128, 128, 1),
    k_strides=(2 * 100 * 128, 100 * 128, 128, 1),
    v_strides=(2 * 100 * 128, 100 * 128, 128, 1),
    paged=False,
    alias=False,
    causal=True,
    mask="none",
    block_mask=False,
    seq_lens=False,
    start_pos=False,
    descale=False,
    sink=False,
)
PAGES = {"paged": True, "k_strides": (0, 128, 64 * 256, 256, 1), "v_strides": (0, 128, 64 * 256, 256, 1)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16},
        {"dtype": FP8, "descale": True},
        {"dtype": FP8, "mask": "bool"},
        {"dtype": FP8, "mask": "bool", "k_strides": (2 * 100 * 132, 100 * 132, 132, 1)},
        {"dtype": FP8, **PAGES},
        {"D": 192, "q_strides": (4 * 100 * 192, 100 * 192, 192, 1), "k_strides": (2 * 100 * 192, 100 * 192, 192, 1)},
        {"mask": "bool", "block_mask": True},
        PAGES,
    ],
)
def test_takes(changes: dict) -> None:
    assert prefill.refuse(PROBLEM._replace(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dtype": FP8, **PAGES, "mask": "bool"}, "FP8 pages"),
        ({"dtype": FP8, **PAGES, "v_strides": (0, 128, 64 * 264, 264, 1)}, "a v stride of 264 elements"),
        ({"dtype": FP8, "k_strides": (2 * 100 * 136, 100 * 136, 136, 1)}, "multiples of 16"),
        ({"dtype": FP8, "out_dtype": torch.float16}, "gives BF16"),
        ({"D": 576, "Dv": 512}, "576"),
        ({"D": 64, "Dv": 128}, "D = 64, Dv = 128"),
        ({"mask": "float"}, "floating mask"),
        ({"q_strides": (4 * 100 * 132, 100 * 132, 132, 1)}, "multiples of 8"),
        ({"k_strides": (2 * 100 * 128, 100 * 128, 64, 1)}, "overlap"),
        ({"v_strides": (2 * 100 * 128, 100 * 128, 1, 100)}, "contiguous"),
    ],
)
def test_refuses(changes: dict, reason: str) -> None:
    said = prefill.refuse(PROBLEM._replace(**changes))
    assert said is not None
    assert reason in said


def test_narrow_leaves_one_element_of_broadcast_dims() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3).expand(4, 5, 2, 3)
    assert prefill.narrow(x).shape == (1, 1, 2, 3)
    assert prefill.narrow(x[:, :1]).shape == (1, 1, 2, 3)
    y = torch.zeros(4, 1, 2, 3).expand(4, 5, 2, 3)
    assert prefill.narrow(y).shape == (4, 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, "fp8"), (PAGES, "fp8"), ({"mask": "bool"}, "bf16"), ({"block_mask": True}, "bf16")],
)
def test_config_of_fp8(changes: dict, dtype: str) -> None:
    """FP8 is computed as it is; under a mask or a block layout, in BF16."""
    assert prefill.config(PROBLEM._replace(dtype=FP8, **changes)).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "cluster"),
    [
        ({"P": 1024}, 2),
        ({"P": 4096, "D": 192, "dtype": torch.float16, "sink": True}, 2),
        ({"P": 16384, "causal": True}, 2),
        ({"P": 16384, "seq_lens": True}, 2),
        ({"P": 4096, "D": 192, "causal": True}, 2),
        ({"P": 16384 + 1, "causal": True}, 2),
        # few tiles, or one without a partner
        ({"P": 512}, 1),
        ({"P": 8192, "causal": True}, 1),
        ({"P": 8192, "seq_lens": True}, 1),
        ({"P": 2048, "D": 192}, 1),
        ({"P": 1025}, 1),
        # what no pair shares
        ({"P": 8192, "block_mask": True}, 1),
        ({"P": 8192, "dtype": FP8}, 1),
        ({"P": 8192, "D": 256, "Dv": 256}, 1),
        ({"P": 8192, **PAGES}, 1),
    ],
)
def test_pairs_of_tiles_share_keys(changes: dict, cluster: int) -> None:
    """Where that pays, and few have no partner."""
    config = prefill.config(PROBLEM._replace(**{"causal": False, **changes}))
    assert config.cluster == cluster
    assert config.in_turn == (cluster > 1 and config.D == 128 and not changes.keys() & {"causal", "seq_lens"})


def test_readable_widens() -> None:
    x, fp8 = torch.arange(32.0).view(1, 1, 2, 16), Config("fp8", 64, 64, False)
    bf16 = replace(fp8, dtype="bf16")
    for dtype, config in ((torch.bfloat16, bf16), (FP8, fp8)):
        assert prefill.readable(x.to(dtype), config).dtype == dtype
    wide = prefill.readable(x.to(FP8), bf16)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide, x.to(FP8).to(torch.bfloat16))


def test_factors() -> None:
    problem = PROBLEM._replace(device=torch.device("cpu"), descale=True)
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(0.5).expand(2, 2)
    assert torch.equal(prefill.factors(problem, a, b), a / 2)
    assert torch.equal(prefill.factors(problem, None, a), a)
    assert torch.equal(prefill.factors(problem, None), torch.ones(2, 2))
