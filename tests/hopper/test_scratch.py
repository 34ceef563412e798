"""The memory that Hopper launches work in: whose it is, how long it stays. Streams are stubs here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import get_ident
from weakref import ref

import pytest
import torch

from flash_mla.backends.hopper import scratch as module
from flash_mla.backends.hopper.scratch import COUNTERS, MOST, scratch
from flash_mla.kernels.hopper.split import CLUSTERS

DEVICE = torch.device("cpu", 0)


@pytest.fixture
def stream(monkeypatch):
    """The current stream and whether it is being captured, to be set."""
    now = {"raw": 1, "capturing": False}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: now["raw"], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: now["capturing"], raising=False)
    monkeypatch.setattr(module, "KEPT", module.Kept())
    monkeypatch.setattr(module, "SPARE", {})
    monkeypatch.setattr(module, "MADE", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return now


def test_calls_of_one_stream_share_it(stream):
    first = scratch(DEVICE, 100)
    assert scratch(DEVICE, 40) is first
    stream["raw"] = 2
    assert scratch(DEVICE, 100) is not first
    stream["raw"] = 1
    assert scratch(DEVICE, 100) is first
    assert scratch(torch.device("cpu", 1), 100) is not first


def test_it_grows(stream):
    first = scratch(DEVICE, 100)
    larger = scratch(DEVICE, 101)
    assert larger is not first
    assert larger.workspace.numel() == 101
    assert scratch(DEVICE, 100) is larger


def test_threads_have_their_own(stream):
    first = scratch(DEVICE, 100)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(scratch, DEVICE, 100).result() is not first


def test_a_graph_has_its_own(stream):
    first = scratch(DEVICE, 100)
    stream["capturing"] = True
    captured = scratch(DEVICE, 100)
    assert captured is not first
    assert scratch(DEVICE, 100) is not captured
    stream["capturing"] = False
    assert scratch(DEVICE, 100) is first


def test_what_is_large_is_not_kept(stream, monkeypatch):
    monkeypatch.setattr(module, "MOST", 1000)
    assert scratch(DEVICE, 1001) is not scratch(DEVICE, 1001)
    assert scratch(DEVICE, 1000) is scratch(DEVICE, 1000)
    assert MOST >= 2 * 132 * 64 * (512 + 1) + 4 * 132, "of an MLA decode on 132 SMs"


def test_what_is_kept_is_not_of_the_callers_pool(stream, monkeypatch):
    """A pool takes the allocations of a thread: torch.compile's warm-up refuses what outlives its call there."""
    made = []
    empty, zeros = torch.empty, torch.zeros
    monkeypatch.setattr(torch, "empty", lambda *x, **y: made.append(get_ident()) or empty(*x, **y))
    monkeypatch.setattr(torch, "zeros", lambda *x, **y: made.append(get_ident()) or zeros(*x, **y))
    assert scratch(DEVICE, 100).counters
    module.unread.__wrapped__(DEVICE, torch.int32)
    assert len(made) == 3
    assert get_ident() not in made
    stream["capturing"] = True
    scratch(DEVICE, 100)
    assert made[3:] == [get_ident()], "a graph's own is of its pool"


def test_views(stream):
    kept = scratch(DEVICE, 100)
    view = kept.view((2, 3, 4))
    assert view.shape == (2, 3, 4)
    assert view.is_contiguous()
    assert view.data_ptr() == kept.workspace.data_ptr()
    assert kept.view((2, 3, 4)) is view


def test_counters_are_of_one_stream_or_graph(stream):
    """Each set is zeros and nobody else's, and stays where it is."""
    assert max(members * clusters for members, clusters in enumerate(CLUSTERS, 1)) <= COUNTERS
    kept = scratch(DEVICE, 100)
    sets = [kept]
    assert kept.counters == scratch(DEVICE, 90).counters == kept.counter.data_ptr()
    stream["capturing"] = True
    sets += [scratch(DEVICE, 100) for _ in range(2)]
    assert all(x.counters for x in sets)
    stream["capturing"], stream["raw"] = False, 2
    sets.append(scratch(DEVICE, 100))
    assert len({x.counters for x in sets}) == 4
    assert all(x._set.shape == (COUNTERS,) and not x._set.any() for x in sets)


def test_counters_of_a_graph_outlive_what_python_holds(stream, monkeypatch):
    """With the last set given away, graphs alone know where theirs are."""
    monkeypatch.setattr(module, "SETS", 2)
    assert scratch(DEVICE, 100).counters
    stream["capturing"] = True
    captured = scratch(DEVICE, 100)
    begin, sets = captured.counters, ref(captured._set._base)
    del captured
    stream["capturing"] = False
    assert scratch(DEVICE, 200).counters  # of another two, in place of the stream's first
    assert sets() is not None
    assert sets().data_ptr() <= begin < sets().data_ptr() + sets().nbytes


def test_a_graph_without_spare_counters_sets_its_own(stream):
    stream["capturing"] = True
    captured = scratch(DEVICE, 100)
    assert captured.counters
    assert not captured._set.any()
    assert not module.SPARE[DEVICE]
