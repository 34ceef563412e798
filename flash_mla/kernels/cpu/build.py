"""From a Spec to LLVM IR."""

from __future__ import annotations

from llvmlite import ir

from flash_mla.kernels.cpu.config import Spec
from flash_mla.kernels.cpu.few import Few
from flash_mla.kernels.cpu.ir import POINTER, Code
from flash_mla.kernels.cpu.many import Many


def build(spec: Spec) -> ir.Module:
    """The module with `attend(args)`, args as FIELDS names them, and `member(_, _, args)` for LLVM's OpenMP."""
    module = (Many if spec.many else Few)(spec).build()
    member = Code(module, "member", [POINTER] * 3)
    module.globals["attend"].attributes.add("noinline")  # its code once
    member.b.call(module.globals["attend"], [member.args[2].v])
    member.finish()
    return module
