"""Triton 3.6's interpreter without the work that it repeats: the kernels' tests take a quarter of the time.

It patches triton.language anew whenever a kernel calls a device function (10 ms), checks integer overflow by a dozen
interpreted operations, and makes the types of every tensor again. All of that is done here once, or in numpy, and
nothing is left out: an overflow still fails. What is wrong in the interpreter, not slow, is repaired where the kernels
are (flash_mla/kernels/triton/interpreter.py).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

patch_lang = interpreter._patch_lang
scalar_dtype = functools.cache(interpreter._get_np_dtype)
patched: set[object] = set()
"""The modules of the language that the running launch has patched."""


@functools.cache
def languages(fn) -> frozenset[object]:
    """The modules of the language that a function sees."""
    return frozenset(x for x in fn.__globals__.values() if x is tl or x is tl.core)


def patch_lang_once(fn):
    if languages(fn) <= patched:
        return interpreter._LangPatchScope()
    outermost = not patched
    scope = patch_lang(fn)
    patched.update(languages(fn))
    if outermost:  # the launch's own: what it restores must be patched again
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
    return scope


def checked_for_overflow(self, lhs, rhs, binary_op) -> None:
    kind = lhs.type.scalar
    if kind.int_bitwidth < 64:
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
        exact = operation(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        least, most = kind.get_int_min_value(), kind.get_int_max_value()
        fits = least <= exact.min(initial=0) and exact.max(initial=0) <= most
        assert fits, f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"


def numpy_dtype(kind) -> np.dtype:
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else scalar_dtype(kind.scalar)


@functools.cache
def block_shape(shape: tuple[int, ...]):
    return tl.tuple(list(shape)), validate_block_shape(shape)


def make_block_type(self, element_ty, shape) -> None:
    self.element_ty = element_ty
    self.shape, self.numel = block_shape(tuple(unwrapped(shape)))
    self.name = f"<{self.shape}, {element_ty}>"


@functools.cache
def tensor_shape(shape: tuple[int, ...]):
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])


def make_tensor(self, handle, type) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = tensor_shape(tuple(type.shape) if type.is_block() else ())


def unwrapped(values) -> list:
    return [value.value if isinstance(value, tl.constexpr) else value for value in values]


def same_values(self, other):
    return tl.constexpr(self.values == unwrapped(other))


def speed_up() -> None:
    interpreter._patch_lang = patch_lang_once
    interpreter._get_np_dtype = numpy_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = checked_for_overflow
    tl.tensor.__init__ = make_tensor
    tl.block_type.__init__ = make_block_type
    tl.tuple.__eq__ = same_values
