"""One case, measured: build it, refuse to time a wrong result, time it and its peers in turn, give a record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flash_mla.bench.cases import CASES, DecodeCase, PrefillCase
from flash_mla.bench.peers import Peer, decode_peers, prefill_peers
from flash_mla.bench.timing import Ceilings, alternate, extra_bytes, median_ratio
from flash_mla.plan import plan
from flash_mla.problem import BLOCK, DecodeProblem, PrefillProblem
from flash_mla.reference import decode_reference, prefill_reference

__all__ = ["measure", "select"]

ERROR_BUDGET, COSINE_BUDGET = 1.6e-2, 5e-6
"""Contract, section 10, BF16: max error over max |out|, and cosine distance."""

GATE_HEADS = 4
"""At most so many query heads of each KV head are compared with the reference, of the last request."""

GATE_ROWS = 2 * BLOCK
"""Query rows of a prefill that are compared with the reference: the last ones, which see the most keys."""


class Ready(NamedTuple):
    """A case with its tensors made: the call, its problem, its peers; the part of out to compare, and its truth."""

    call: Callable[[], Tensor]
    problem: DecodeProblem | PrefillProblem
    peers: dict[str, Peer]
    sample: Callable[[Tensor], Tensor]
    truth: Tensor


def select(device: str, filters: Sequence[str] = ()) -> list[DecodeCase | PrefillCase]:
    """The cases of a device whose name contains one of the filters (none: all)."""
    return [c for c in CASES if device in c.devices and (not filters or any(f in c.name for f in filters))]


def measure(
    case: DecodeCase | PrefillCase,
    device: str,
    ceilings: Ceilings,
    *,
    with_peers: bool = True,
    backend: str | None = None,
    budget_s: float = 5.0,
) -> dict[str, Any]:
    """The case's record, ready for JSON: medians in ms, rates, shares of the ceilings, errors, peers.

    A result that misses the error budget gets no time: the record then has `error` instead. A peer's does likewise,
    within the record's `peers`.

    Args:
        with_peers: time the peers too, in the same rounds.
        backend: as in the public functions.
        budget_s: seconds of timing; building and checking come on top.
    """
    ready = (
        prepare_decode(case, device, backend)
        if isinstance(case, DecodeCase)
        else prepare_prefill(case, device, backend)
    )
    worst, cosine = errors(ready.sample(ready.call()), ready.truth)
    record: dict[str, Any] = {
        "case": case.name,
        "group": case.group,
        "backend": plan(ready.problem, backend).name,
        "flops": case.flops,
        "bytes": case.bytes,
        "max_error": worst,
        "cosine": cosine,
    }
    if wrong := verdict(worst, cosine):
        return record | {"error": wrong}
    record["extra_bytes"] = extra_bytes(ready.call, device)

    functions = {"ours": ready.call}
    peers: dict[str, dict[str, Any]] = {}
    for name, peer in ready.peers.items() if with_peers else ():
        if peer.run is None or (reason := refusal(peer, peer.run, ready)):
            peers[name] = {"error": peer.reason or reason}
        else:
            functions[name] = peer.run
    times = alternate(functions, device, budget_s=budget_s)
    ours = times.pop("ours")
    for name, theirs in times.items():
        peers[name] = {"ms": statistics.median(theirs), "ratio": median_ratio(theirs, ours)}
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
        "peers": peers,
    }


def prepare_decode(case: DecodeCase, device: str, backend: str | None) -> Ready:
    """Compares the last request, GATE_HEADS heads of each group."""
    inputs = case.build(device)
    heads = group_heads(case.Hq, case.Hk)
    one = [t[-1:] for t in inputs]
    truth, _ = decode_reference(one[0][:, heads], *one[1:])
    return Ready(
        case.call(inputs, backend),
        case.problem(inputs),
        decode_peers(case, inputs),
        lambda out: out[-1:, heads],
        truth,
    )


def prepare_prefill(case: PrefillCase, device: str, backend: str | None) -> Ready:
    """Compares the last GATE_ROWS rows of the last request's first heads."""
    inputs = case.build(device)
    heads = list(range(min(GATE_HEADS, case.Hq)))  # Hq = Hk
    rows = slice(case.P - GATE_ROWS, case.P)
    blocks = None if inputs.blocks is None else inputs.blocks[:, :, rows.start // BLOCK :]
    q, k, v = (t[-1:, heads] for t in inputs[:3])
    truth, _ = prefill_reference(q[:, :, rows], k, v, blocks, causal=case.causal, start=rows.start)
    return Ready(
        case.call(inputs, backend),
        case.problem(inputs),
        prefill_peers(case, inputs),
        lambda out: out[-1:, heads, rows],
        truth,
    )


def group_heads(Hq: int, Hk: int) -> list[int]:
    """The first GATE_HEADS query heads of each KV head."""
    ratio = Hq // Hk
    return [h * ratio + r for h in range(Hk) for r in range(min(ratio, GATE_HEADS))]


def errors(out: Tensor, truth: Tensor) -> tuple[float, float]:
    """Max error over max |truth|, and cosine distance; NaN anywhere gives NaN."""
    out = out.double()
    worst = (out - truth).abs().max() / truth.abs().max()
    cosine = 1 - 2 * (out * truth).sum() / (out.square().sum() + truth.square().sum())
    return float(worst), float(cosine)


def verdict(worst: float, cosine: float) -> str | None:
    """Why a result is wrong, or None."""
    if worst <= ERROR_BUDGET and cosine <= COSINE_BUDGET:
        return None
    return f"wrong result: max error {worst:.1e} of max |out|, cosine distance {cosine:.1e}"


def refusal(peer: Peer, run: Callable[[], Tensor], ready: Ready) -> str | None:
    """Why a peer that is there gets no time: it fails, or its result is wrong."""
    try:
        out = run()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return verdict(*errors(ready.sample(out), ready.truth)) if peer.gated else None
