"""The interpreter that tests/interpreter.py speeds up checks what Triton's own checks, and gives the language back."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def twice(x):
    return x + x


@triton.jit
def kernel(out_ptr, x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(twice(x), 0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_overflow_fails(dtype):
    most = torch.iinfo(dtype).max
    x, out = torch.zeros(4, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    for value in (most // 2, -(most // 2) - 1):
        x[1] = value
        kernel[(1,)](out, x, 4)
        assert out.item() == 2 * value
    for value in (most // 2 + 1, -(most // 2) - 2):
        x[1] = value
        with pytest.raises(InterpreterError, match="overflow"):
            kernel[(1,)](out, x, 4)
    with pytest.raises(ValueError, match=r"triton\.jit"):
        tl.arange(0, 4)
