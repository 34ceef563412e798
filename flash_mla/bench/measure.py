"""One case, measured: build it, refuse to time a wrong result, time it and its peers in turn, give a record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flash_mla.bench.cases import CASES, Arguments, Case
from flash_mla.bench.peers import Peer, peers
from flash_mla.bench.sparse import SPARSE_CASES, SparseBench
from flash_mla.bench.timing import Ceilings, alternate, extra_bytes, median_ratio
from flash_mla.errors import DeviceError
from flash_mla.explanation import explain
from flash_mla.problem import BLOCK
from flash_mla.reference import decode_reference, prefill_reference
from flash_mla.testing import DecodeCase, Verdict, check

__all__ = ["measure", "select"]

GATE_HEADS = 4
"""At most so many query heads of each KV head are compared with the reference, of the last request."""

GATE_ROWS = 2 * BLOCK
"""Query rows of a prefill that are compared with the reference: the last ones, which see the most keys."""


AnyCase = Case | SparseBench
Gate = Callable[[Tensor], Verdict]
"""The verdict on a whole out, from a part of it and its truth in float64: a speed is given for right results alone."""


def select(device: str, filters: Sequence[str] = ()) -> list[AnyCase]:
    """The cases of a device whose name contains one of the filters (none: all)."""
    return [
        c for c in (*CASES, *SPARSE_CASES) if device in c.devices and (not filters or any(f in c.name for f in filters))
    ]


def measure(
    case: AnyCase,
    device: str,
    ceilings: Ceilings,
    *,
    with_peers: bool = True,
    backend: str | None = None,
    budget_s: float = 5.0,
) -> dict[str, Any]:
    """The case's record, ready for JSON: medians in ms, rates, shares of the ceilings, errors, peers.

    A result that misses the error budget gets no time, nor does a case that the backend refuses: the record then has
    `error` instead. A peer's does likewise, within the record's `peers`.

    Args:
        with_peers: time the peers too, in the same rounds.
        backend: as in the public functions.
        budget_s: seconds of timing; building and checking come on top.
    """
    case = case.on(device, backend)
    record: dict[str, Any] = {
        "case": case.name,
        "group": case.group,
        "dtype": case.dtype,
        "backend": backend or "-",
        "flops": case.flops,
        "bytes": case.bytes,
    }
    arguments = case.arguments()
    call = case.function(arguments)
    try:
        record["backend"] = explain(call.func, *call.args, **call.keywords).backend or record["backend"]
        out = call()
    except DeviceError as error:
        return record | {"error": f"refused: {error.given}"}
    gate = gate_of(case, arguments) if isinstance(case, Case) else case.gate(arguments)
    verdict = gate(out)
    record |= {"max_error": verdict.out_error, "cosine": verdict.cosine}
    if not verdict.passed:
        return record | {"error": f"wrong result: {'; '.join(verdict.failures)}"}
    record["extra_bytes"] = extra_bytes(call, device)

    functions: dict[str, Callable[[], Tensor]] = {"ours": call}
    others: dict[str, dict[str, Any]] = {}
    found = peers(case, arguments) if isinstance(case, Case) else case.peers(arguments)
    for name, peer in found.items() if with_peers else ():
        others[name] = {}  # keeps the order of the tables
        if peer.run is None or (reason := refusal(peer, peer.run, gate)):
            others[name]["error"] = peer.reason or reason
        else:
            functions[name] = peer.run
    times = alternate(functions, device, budget_s=budget_s)
    ours = times.pop("ours")
    for name, theirs in times.items():
        others[name] |= {"ms": statistics.median(theirs), "ratio": median_ratio(theirs, ours)}
    ms = statistics.median(ours)
    gbps, tflops = case.bytes / ms / 1e6, case.flops / ms / 1e9
    return record | {
        "rounds": len(ours),
        "ms": ms,
        "ms_min": min(ours),
        "ms_max": max(ours),
        "gbps": gbps,
        "tflops": tflops,
        "share_of_bandwidth": gbps / ceilings.gbps,
        "share_of_gemm": tflops / ceilings.tflops,
        "peers": others,
    }


def gate_of(case: Case, arguments: Arguments) -> Gate:
    """Decode: the last request. Prefill: its last GATE_ROWS rows, of the first heads."""
    x = arguments
    if isinstance(case.spec, DecodeCase):
        ratio = case.spec.Hq // case.spec.Hk
        heads = [h * ratio + r for h in range(case.spec.Hk) for r in range(min(ratio, GATE_HEADS))]
        one = [x[name][-1:] for name in ("k_cache", "v_cache", "block_table", "seq_lens")]
        truth = decode_reference(x["q"][-1:, heads], *one)
        return lambda out: check(out[-1:, heads], None, *truth, case.spec.dtype)
    rows = slice(max(0, case.spec.P - GATE_ROWS), case.spec.P)
    q, k, v = (x[name][-1:, :GATE_HEADS] for name in ("q", "k", "v"))  # Hq = Hk
    blocks = x["sparse_layout"]
    blocks = None if blocks is None else blocks[:, :, rows.start // BLOCK :]
    truth = prefill_reference(q[:, :, rows], k, v, blocks, causal=x["causal"], start=rows.start)
    return lambda out: check(out[-1:, :GATE_HEADS, rows], None, *truth, case.spec.dtype)


def refusal(peer: Peer, run: Callable[[], Tensor], gate: Gate) -> str | None:
    """Why a peer that is there gets no time: it fails, or its result is wrong."""
    try:
        out = run()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if not peer.gated or (verdict := gate(out)).passed:
        return None
    return f"wrong result: {'; '.join(verdict.failures)}"
