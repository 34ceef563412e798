"""What calls share on a GPU: the memory they work in, from threads, streams, graphs and two cards at once.

Every result must be the same bits as that of the call alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_mla import deepseek, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.backends import hopper
from flash_mla.backends.hopper.scratch import KEPT
from flash_mla.problem import FP8
from flash_mla.testing import DecodeCase, SparseDecodeCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hopper.available() is not None, reason=f"hopper: {hopper.available()}"),
]

LENGTHS = (4000, 0, 131)
MLA = {"Hk": 1, "D": 576, "Dv": 512, "alias": True}
CASES = {
    "mla-16": DecodeCase("mla", LENGTHS, Hq=16, **MLA),
    "mla-128": DecodeCase("mla", LENGTHS, Hq=128, **MLA),
    "gqa": DecodeCase("gqa", LENGTHS, Hq=32, Hk=8, D=128),
    "sparse": SparseDecodeCase("sparse", Hq=64, topk=2048),
    "sparse-many": SparseDecodeCase("sparse", Hq=128, topk=2048),
    "sparse-teams": SparseDecodeCase("sparse", B=4, S_q=1, Hq=16, topk=2048),
    "fp8": DecodeCase("fp8", LENGTHS, Hq=16, dtype=FP8, kv_dtype=FP8, **MLA),
}


class Call:
    """A call that splits its requests or has teams for them, on fresh tensors of a device."""

    def __init__(self, name: str, device: str = "cuda") -> None:
        case = replace(CASES[name], device=device)
        self.x = dict(case.call().arguments)
        self.function = deepseek.flash_mla_with_kvcache
        if isinstance(case, DecodeCase):
            self.function = flash_mla_with_kvcache
            shapes = self.x["q"].shape, self.x["k_cache"].shape
            self.x["metadata"] = get_mla_metadata(*shapes, self.x["block_table"], self.x["seq_lens"])
        self.alone = self().clone()

    def __call__(self) -> Tensor:
        found = self.function(**self.x)
        return found[0] if isinstance(found, tuple) else found


every = pytest.mark.parametrize("name", CASES)


@every
def test_threads_of_one_stream_and_of_their_own(name):
    calls = [Call(name) for _ in range(4)]

    def many(i: int) -> list[Tensor]:
        stream = torch.cuda.Stream() if i >= 2 else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            found = [calls[i]() for _ in range(50)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(many, range(4)))
    torch.cuda.synchronize()
    for call, found in zip(calls, results, strict=True):
        assert all(torch.equal(x, call.alone) for x in found)


@every
def test_streams_of_one_thread(name):
    calls, streams = [Call(name) for _ in range(3)], [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], [], []]
    for _ in range(50):
        for call, stream, found in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    for call, found in zip(calls, results, strict=True):
        assert all(torch.equal(x, call.alone) for x in found)


@every
def test_a_graph_replayed_beside_eager_calls(name):
    """The graph is captured after eager calls on its stream, whose memory it must not share."""
    eager, captured = Call(name), Call(name)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        captured()
    torch.cuda.synchronize()
    kept = {key: x.workspace.data_ptr() for key, x in KEPT.of_stream.items()}
    with torch.cuda.graph(graph, stream=stream):
        out = captured()
    assert kept == {key: x.workspace.data_ptr() for key, x in KEPT.of_stream.items()}
    for _ in range(50):
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(stream):
            found = [eager() for _ in range(3)]
        torch.cuda.synchronize()
        assert torch.equal(out, captured.alone)
        assert all(torch.equal(x, eager.alone) for x in found)


@every
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards(name):
    """Calls on the card that is not the current one too."""
    calls = [Call(name, device) for device in ("cuda:0", "cuda:1")]
    for current in (0, 1):
        with torch.cuda.device(current):
            found = [call() for _ in range(20) for call in calls]
            assert torch.cuda.current_device() == current
        for card in (0, 1):
            torch.cuda.synchronize(card)
        for x, call in zip(found, calls * 20, strict=True):
            assert torch.equal(x, call.alone)


@pytest.mark.parametrize(
    ("Hk", "Hq", "D", "Dv"), [(1, 16, 576, 512), (1, 128, 576, 512), (1, 64, 512, 512), (2, 16, 128, 128)]
)
def test_queries_without_keys_have_an_infinite_lse(Hk, Hq, D, Dv):
    """The drop-in's +inf, written by the kernels, whole and split requests beside empty ones."""
    for lengths in ((0,), (0, 5000), (0, 64, 0, 700)):
        blocks = -(-max(64, *lengths) // 64)
        table = torch.arange(len(lengths) * blocks, dtype=torch.int32, device="cuda").view(len(lengths), -1)
        pool = torch.randn(table.numel(), 64, Hk, D, device="cuda").bfloat16()
        q = torch.randn(len(lengths), 2, Hq, D, device="cuda").bfloat16()
        seen = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        for causal in (False, True):
            out, lse = deepseek.flash_mla_with_kvcache(
                q, pool, table, seen, Dv, softmax_scale=0.1, causal=causal, backend="hopper"
            )
            empty = seen == 0
            assert (lse[empty] == torch.inf).all()
            assert (out[empty] == 0).all()
            assert lse[~empty].isfinite().all()
