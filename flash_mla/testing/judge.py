"""Run a case and judge what it gives."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.api import flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata, mha_fwd_kvcache
from flash_mla.errors import DeviceError, FlashMLAError
from flash_mla.pages import decode_over_pages
from flash_mla.reference import decode_reference, mha_reference, prefill_reference
from flash_mla.testing.budget import BUDGETS, Verdict, check, worst
from flash_mla.testing.cases import DecodeCase, MhaCase, PrefillCase
from flash_mla.testing.deepseek_cases import DropInCase
from flash_mla.testing.gradient_cases import GradientCase, SparseGradientCase
from flash_mla.testing.hostile import Call, nan_filled, same_bits, storage_bytes
from flash_mla.testing.index_cases import IndexCase
from flash_mla.testing.index_cases import judge as judge_index

WithMore = DropInCase | GradientCase | SparseGradientCase
"""Cases that call and know the truth themselves: they give more than out and lse."""
AttentionCase = DecodeCase | PrefillCase | MhaCase | WithMore
Case = AttentionCase | IndexCase


@dataclass(frozen=True)
class Result:
    """What became of a case. `refused` is the reason of the backend that does not run it (nothing was checked)."""

    case: Case
    verdict: Verdict | None
    failures: tuple[str, ...] = ()
    refused: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.verdict is not None and not self.failures

    def __str__(self) -> str:
        if self.refused is not None:
            return f"{self.case.name}: refused: {self.refused}"
        if self.passed and self.verdict is not None:
            return (
                f"{self.case.name}: passed, error {self.verdict.out_error:.1e} of m, lse {self.verdict.lse_error:.1e}"
            )
        return "\n  ".join([f"{self.case.name}: FAILED ({self.case})", *self.failures])


def run(case: Case) -> Result:
    """Call the case's function twice (once into memory that holds NaN, in decode once with metadata) and judge both.

    An error that the call raises is a failure, except a DeviceError, which is a refusal.
    """
    begin = time.perf_counter()
    if isinstance(case, IndexCase):
        return run_index(case)
    call = case.call()
    want_caches = {name: storage_bytes(call.reference[name]) for name in CACHES if name in call.reference}
    before = {name: storage_bytes(x) for name, x in call.arguments.items() if isinstance(x, Tensor)}
    try:
        first = invoke(case, call, True)
        second = invoke(case, call, False)
    except DeviceError as error:
        return Result(case, None, refused=error.given, seconds=time.perf_counter() - begin)
    except FlashMLAError as error:
        return Result(case, None, (f"{type(error).__name__}: {error}",), seconds=time.perf_counter() - begin)
    true = truth(case, call)
    (out, lse), (true_out, true_lse) = first[:2], true[:2]
    budget = case.budget if isinstance(case, DecodeCase) else case.dtype
    verdict = check(out, lse, true_out, true_lse, budget)
    failures = list(verdict.failures)
    if isinstance(case, WithMore):
        for name, got, want in zip(case.more, first[2:], true[2:], strict=True):
            failures += check_more(name, got, want, case.dtype)
    if out.dtype != contract.out_dtype(case.dtype):
        failures.append(f"out: {out.dtype}, not {contract.out_dtype(case.dtype)}")
    if not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
        failures.append("a second call differs in bits")
    if isinstance(case, DecodeCase) and case.batch_invariant:
        for b in range(len(case.lengths)):
            alone = invoke(case, alone_of(call, b), False)
            if not all(same_bits(a[b : b + 1], one) for a, one in zip(first, alone, strict=True)):
                failures.append(f"request {b} alone differs in bits")
    for name, content in before.items():
        if name not in want_caches and not torch.equal(content, storage_bytes(call.arguments[name])):
            failures.append(f"the call wrote to {name}")
    for name, content in want_caches.items():
        if not torch.equal(content, storage_bytes(call.arguments[name])):
            failures.append(f"{name} does not hold, bit for bit, what it should after the call")
    return Result(case, verdict, tuple(failures), seconds=time.perf_counter() - begin)


def run_index(case: IndexCase) -> Result:
    """As `run`, for what has scores and indices instead of out and lse."""
    begin = time.perf_counter()
    try:
        verdict, failures = judge_index(case)
    except DeviceError as error:
        return Result(case, None, refused=error.given, seconds=time.perf_counter() - begin)
    return Result(case, verdict, tuple(failures), seconds=time.perf_counter() - begin)


def check_more(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> list[str]:
    """Judge what a drop-in returns beside out and lse: max_logits as lse is, a gradient as out is."""
    if got.shape != want.shape:
        return [f"{name} {list(got.shape)}, not {list(want.shape)}"]
    finite = want.isfinite()
    if not torch.equal(got[~finite].double(), want[~finite]):
        return [f"{name}: not {want[~finite][0]} in a row that sees no key"]
    # NOTE: a gradient may be 0 throughout, as q's is where every query sees one key: products that cancel leave 1e-6
    m = 1.0 if name == "max_logits" or not want.any() else want.abs().max().item()
    budget = BUDGETS[dtype].lse if name == "max_logits" else BUDGETS[dtype].out * m
    error = (got.double() - want).masked_fill(~finite, 0.0).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    if error.numel() and error.max() > budget:
        return [f"{name}: error {error.max():.1e}, budget {budget:.1e}, {worst(error, got, want)}"]
    return []


CACHES = ("k_cache", "v_cache")


def truth(case: AttentionCase, call: Call) -> tuple[Tensor, ...]:
    """(out, lse) of the case in float64, and what else the function returns."""
    if isinstance(case, WithMore):
        return case.truth(call)
    if isinstance(case, DecodeCase):
        return decode_reference(**call.reference)
    if isinstance(case, PrefillCase):
        return prefill_reference(**call.reference)
    return mha_reference(**call.reference)


def poisoned_out(case: DecodeCase | PrefillCase | MhaCase, call: Call) -> Tensor:
    """A NaN-filled output."""
    v = call.arguments["v"] if isinstance(case, PrefillCase) else call.arguments["v_cache"]
    shape = (*call.arguments["q"].shape[:3], v.shape[-1])
    return nan_filled(shape, contract.out_dtype(case.dtype), case.device)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, workspaces too: torch's deterministic mode fills what it leaves uninitialised."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def alone_of(call: Call, b: int) -> Call:
    """A decode call with request b alone."""
    B = len(call.arguments["seq_lens"])
    alone = {
        name: x[b : b + 1] if isinstance(x, Tensor) and name != "attn_sink" and x.shape[:1] == (B,) else x
        for name, x in call.arguments.items()
    }
    return Call(alone, alone)


def invoke(case: AttentionCase, call: Call, poison: bool) -> tuple[Tensor, ...]:
    """(out, lse, ..) of the case's function, where `poison` says so into memory that holds NaN; else decode goes
    through metadata."""
    if isinstance(case, WithMore):
        with poisoned_memory() if poison else contextlib.nullcontext():
            return case.invoke(call)
    out = poisoned_out(case, call) if poison else None
    if isinstance(case, DecodeCase):
        if case.layout == "serving":
            return launch_serving(case, call, out)
        x = call.arguments
        metadata = None
        if out is None:
            metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"])
        result = flash_mla_with_kvcache(**x, metadata=metadata, return_lse=True, out=out, backend=case.backend)
    elif isinstance(case, PrefillCase):
        result = flash_mla_prefill(**call.arguments, return_lse=True, out=out, backend=case.backend)
    else:
        result = mha_fwd_kvcache(**call.arguments, return_lse=True, out=out, backend=case.backend)
    assert isinstance(result, tuple)
    return result


def launch_serving(case: DecodeCase, call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a page view that the public functions refuse (an engine's [num_blocks, 64, Hk, D] pool) as engines do."""
    x = call.arguments
    k, v = (x[name][0].permute(1, 2, 0, 3) for name in CACHES)
    names = ("mask", "q_descale", "k_descale", "v_descale", "attn_sink", "softmax_scale")
    result = decode_over_pages(
        x["q"],
        k,
        v,
        x["block_table"],
        x["seq_lens"],
        **{name: x[name] for name in names},
        check_values=out is None,
        return_lse=True,
        out=out,
        backend=case.backend,
    )
    assert isinstance(result, tuple)
    return result
