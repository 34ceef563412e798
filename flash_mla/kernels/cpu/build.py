"""From a Spec to LLVM IR."""

from __future__ import annotations

from llvmlite import ir

from flash_mla.kernels.cpu.append import Append, Appending
from flash_mla.kernels.cpu.config import Spec
from flash_mla.kernels.cpu.few import Few
from flash_mla.kernels.cpu.ir import POINTER, Code
from flash_mla.kernels.cpu.many import Many
from flash_mla.kernels.cpu.pairs import Pairs
from flash_mla.kernels.cpu.rows import Quantising, Rows
from flash_mla.kernels.cpu.tiles import Tiles
from flash_mla.kernels.cpu.topk import Selection, Topk

Kernel = Spec | Selection | Quantising | Appending
"""What names a kernel."""

BY_UNIT = {"fma": Many, "avx512bf16": Pairs, "neon": Pairs, "amx": Tiles}
"""A step with many rows, by what multiplies."""


def build(spec: Kernel) -> ir.Module:
    """The module with `run(args)`, args as FIELDS names them, and `member(_, _, args)` for LLVM's OpenMP."""
    if isinstance(spec, Selection):
        module = Topk(spec).build()
    elif isinstance(spec, Quantising):
        module = Rows(spec).build()
    elif isinstance(spec, Appending):
        module = Append().build()
    else:
        module = (BY_UNIT[spec.unit] if spec.many else Few)(spec).build()
    member = Code(module, "member", [POINTER] * 3)
    module.globals["run"].attributes.add("noinline")  # its code once
    member.b.call(module.globals["run"], [member.args[2].v])
    member.finish()
    return module
