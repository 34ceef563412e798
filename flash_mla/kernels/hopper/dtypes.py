"""The DSL's types by the names that configs use."""

from __future__ import annotations

from cutlass import BFloat16, Float8E4M3FN, Float16

DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp8": Float8E4M3FN}
