"""Repairs of Triton 3.6's interpreter (TRITON_INTERPRET=1), without which it cannot run these kernels rightly.

- It calls int() on a 1-element array, which NumPy 2.4 refuses.
- Its dot multiplies the bit patterns of BF16 operands.
- Its FP32 -> BF16 conversion cuts bits off where every GPU rounds to nearest even; so does FP32 -> e4m3, which halves
  numbers that become subnormal besides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

convert_float = interpreter._convert_float
create_dot = interpreter.InterpreterBuilder.create_dot
patch_lang_tensor = interpreter._patch_lang_tensor


def bf16_of(x: np.ndarray) -> np.ndarray:
    """FP32 as BF16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FC0), (rounded >> np.uint32(16)).astype(np.uint16))


def e4m3_of(x: np.ndarray) -> np.ndarray:
    """FP32 as e4m3 codes, rounded to nearest even, saturating; NaN stays NaN."""
    return torch.from_numpy(x.astype(np.float32)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def fp32_of(handle: Any) -> np.ndarray:
    """A BF16 handle's values."""
    return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def repaired_convert_float(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if (source, target) == (tl.float32, tl.bfloat16):
        return bf16_of(x.view(np.float32))
    if (source, target) == (tl.float32, tl.float8e4nv):
        return e4m3_of(x.view(np.float32))
    return convert_float(x, source, target, rounding)


def repaired_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (interpreter.TensorHandle(fp32_of(x), tl.float32) for x in (a, b))
    return create_dot(self, a, b, d, *options)


def repaired_lang_tensor(tensor: Any, scope: Any) -> None:
    patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def repair() -> None:
    """Put the repairs in place; more than once is as good as once."""
    interpreter._convert_float = repaired_convert_float
    interpreter.InterpreterBuilder.create_dot = repaired_dot
    interpreter._patch_lang_tensor = repaired_lang_tensor
