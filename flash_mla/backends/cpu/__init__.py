"""The CPU backend: compiled kernels (`engine`), or torch's ops where llvmlite is missing.

Through torch: softmax does not care about the order of keys, so a request's pages need not be put in order. Decode
sorts the blocks that a request uses by physical id; each run of consecutive ids is one strided view of the cache, and
one call of `aten::_scaled_dot_product_flash_attention_for_cpu` (it returns out and lse), with the query heads of a
group as its rows, reads K and V once for all of them. What cannot be read in place is gathered in slices of bounded
size: the last blocks of a request (slots past its length may hold NaN), short runs, and dtypes or head dims that the op
does not take. Partial results meet in `merge`.

Prefill runs one request at a time through the same op; masks and block layouts go through tiles of query rows, so that
no bias of [P, P] exists.

Sparse attention gathers the named rows in slices, and multiplies. Index scores are FP32 products of all heads of a few
queries.

The backward of prefill gives torch's op what it takes (causal or full, a sink too), and the rest to FP32 products.

It runs everything that the contract admits.
"""

from __future__ import annotations

from flash_mla.backends import PHASES, Phase, module
from flash_mla.problem import Problem


def available() -> str | None:
    """The CPU is always there."""
    return None


def refuse(problem: Problem) -> str | None:
    """Only tensors elsewhere are refused."""
    return None if problem.device.type == "cpu" else f"the tensors are on {problem.device}, not on the CPU"


def phase(problem: Problem) -> Phase:
    """The module that such problems go to."""
    name = PHASES[type(problem)]
    if name in ("decode", "prefill", "sparse") and module("cpu", "engine").refuse(problem) is None:
        name = "engine"
    return module("cpu", name)
