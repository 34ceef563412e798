"""What the Hopper backward refuses, and which tensors it copies; no kernel runs."""

from __future__ import annotations

import pytest
import torch
from test_refuse_prefill import PROBLEM

from flash_mla.backends.hopper import backward
from flash_mla.problem import FP8, BackwardProblem


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, None),
        ({"dtype": torch.float16, "seq_lens": True, "sink": True, "start_pos": True}, None),
        ({"scale_sign": -1}, "softmax_scale"),
        ({"D": 192}, None),
        ({"dtype": torch.float32}, "dtype"),
        ({"dtype": FP8}, "dtype"),
        ({"D": 64, "Dv": 64}, "D = 64"),
        ({"mask": "bool"}, "mask"),
        ({"block_mask": True}, "block layout"),
    ],
)
def test_refuse(changes: dict[str, object], wanted: str | None) -> None:
    reason = backward.refuse(BackwardProblem(PROBLEM._replace(**changes)))
    assert reason is None if wanted is None else wanted in str(reason)


def test_refuse_one_gradient() -> None:
    assert "only some" in str(backward.refuse(BackwardProblem(PROBLEM, dkv=False)))


def test_readable() -> None:
    """Strides that TMA takes stay; odd ones, broadcast ones and odd addresses are copied."""
    x = torch.zeros(2, 3, 10, 136, dtype=torch.bfloat16)
    for kept in (x, x[..., :128], x[:, :, :5].transpose(1, 2)):
        assert backward.readable(kept) is kept
    broadcast = torch.zeros(1, dtype=torch.bfloat16).expand(2, 3, 10, 128)
    odd = torch.zeros(1, 2, 5, 132, dtype=torch.bfloat16)[..., :128]
    for copied in (broadcast, x[..., 1:129], odd, x[:1].expand(2, 3, 10, 136)):
        assert backward.readable(copied).stride() == torch.empty(copied.shape).stride()
    off = torch.zeros(1 + 2 * 3 * 10 * 128, dtype=torch.bfloat16)[1:].view(2, 3, 10, 128)
    assert off.is_contiguous()
    assert backward.readable(off).data_ptr() % 16 == 0
