"""How decode packs query rows, and that the configs need no DSL."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flash_mla.kernels.hopper import packing


@pytest.mark.parametrize(("heads", "S_q"), [(1, 1), (1, 4), (8, 1), (6, 3)])
def test_rows_are_head_major(heads: int, S_q: int) -> None:
    """Row head * S_q + token of the packed matrix is q[head, token]."""
    D = 8
    q = torch.arange(heads * S_q * D).view(heads, S_q, D)
    stride = packing.row_stride(q.stride(0), q.stride(1), heads, S_q, D)
    assert stride is not None
    check_rows(q, q.as_strided((heads * S_q, D), (stride, 1)), packing.Packing(S_q))


def check_rows(q: torch.Tensor, packed: torch.Tensor, order: packing.Packing) -> None:
    """packed [heads * S_q, D] holds the rows of q [heads, S_q, D] in that order."""
    heads, S_q, _ = q.shape
    for row in range(heads * S_q):
        head, token = order.head_of(row), order.token_of(row)
        assert torch.equal(packed[row], q[head, token])
        assert order.last_key(row, 100) == 100 - S_q + token
        assert order.lse_of(row) == head * S_q + token


@pytest.mark.parametrize(("heads", "S_q"), [(1, 4), (8, 1), (6, 3), (128, 2)])
def test_rows_are_token_major(heads: int, S_q: int) -> None:
    """Row token * heads + head is q[head, token] of a q that lies as [S_q, heads, D]."""
    D = 8
    q = torch.arange(heads * S_q * D).view(S_q, heads, D).transpose(0, 1)
    stride = packing.row_stride(q.stride(1), q.stride(0), S_q, heads, D)
    assert stride is not None
    check_rows(q, q.as_strided((heads * S_q, D), (stride, 1)), packing.Packing(S_q, heads))


def test_rows_that_do_not_pack() -> None:
    assert packing.row_stride(head_stride=8, token_stride=64, heads=8, S_q=2, D=8) is None
    assert packing.row_stride(head_stride=8, token_stride=64, heads=8, S_q=1, D=8) == 8
    assert packing.row_stride(head_stride=8, token_stride=64, heads=1, S_q=2, D=8) == 64


def test_configs_import_no_dsl() -> None:
    """The backend chooses a config on machines without the DSL."""
    names = (
        "mla_decode.config",
        "gqa_decode.config",
        "prefill.config",
        "prefill.schedule",
        "split",
        "packing",
        "limits",
    )
    code = f"""
import importlib, sys
sys.modules["cutlass"] = None
for name in {names}:
    importlib.import_module("flash_mla.kernels.hopper." + name)
import flash_mla.backends.hopper
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
