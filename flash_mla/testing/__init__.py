"""Hostile problems and the error budget: what `flash-mla check` and the tests run.

A case is a frozen description of one call. `case.call()` makes its tensors from the seed, the same on every device:
random data, shuffled tables, NaN in every slot that holds no token, in rows that no index names and in the mask past a
request's keys, 2^31-1 in every unused table entry. `run(case)` calls the public function, with outputs that hold NaN
beforehand, and judges it against float64 (`reference`), against a second call, and against what it may write. `CASES`
is the list that `flash-mla check` walks.
"""

from __future__ import annotations

from flash_mla.testing.budget import BUDGETS, Budget, Verdict, check
from flash_mla.testing.cases import DTYPES, DecodeCase, MhaCase, PrefillCase, decode_cases, mha_cases, prefill_cases
from flash_mla.testing.deepseek_cases import (
    DenseDecodeCase,
    SparseDecodeCase,
    SparsePrefillCase,
    VarlenCase,
    drop_in_cases,
    library_lse,
)
from flash_mla.testing.gradient_cases import GradientCase, SparseGradientCase, gradient_cases
from flash_mla.testing.hostile import UNUSED_ENTRY, CacheLayout, Order, nan_cache, nan_filled, same_bits, storage_bytes
from flash_mla.testing.index_cases import IndexCase, PagedIndexCase, RaggedIndexCase, TopkCase, index_cases
from flash_mla.testing.judge import Case, Result, run

__all__ = [
    "BUDGETS",
    "CASES",
    "DTYPES",
    "UNUSED_ENTRY",
    "Budget",
    "CacheLayout",
    "Case",
    "DecodeCase",
    "DenseDecodeCase",
    "GradientCase",
    "IndexCase",
    "MhaCase",
    "Order",
    "PagedIndexCase",
    "PrefillCase",
    "RaggedIndexCase",
    "Result",
    "SparseDecodeCase",
    "SparseGradientCase",
    "SparsePrefillCase",
    "TopkCase",
    "VarlenCase",
    "Verdict",
    "check",
    "decode_cases",
    "drop_in_cases",
    "gradient_cases",
    "index_cases",
    "library_lse",
    "mha_cases",
    "nan_cache",
    "nan_filled",
    "prefill_cases",
    "run",
    "same_bits",
    "storage_bytes",
]

CASES: tuple[Case, ...] = (
    *decode_cases(),
    *prefill_cases(),
    *gradient_cases(),
    *mha_cases(),
    *drop_in_cases(),
    *index_cases(),
)
"""Every function, dtype and edge of docs/contract.md, small enough for a CPU: `replace(case, device=..., backend=...)`
moves one elsewhere."""
