"""What a remembered call is found by: the facts of its tensors, whether torch compares them or they are looked up."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from torch import Tensor

from flash_mla import passed
from flash_mla.passed import Passed, facts


def tensor(draw: random.Random) -> Tensor | None:
    """One of few shapes, layouts, dtypes and places, so that many are alike."""
    if draw.random() < 0.2:
        return None
    dtype = draw.choice([torch.float32, torch.float16, torch.int32])
    room = torch.zeros(400, dtype=dtype)[draw.choice([0, 0, 0, 4, 1]) :]
    shape = draw.choice([(2, 1, 8), (2, 1, 8), (1, 2, 8), (2, 0, 8)])
    strides = draw.choice([(8, 8, 1), (8, 8, 1), (8, 16, 1), (0, 8, 1), (16, 8, 1)])
    x = room.as_strided(shape, strides)
    kind = draw.random()
    if kind < 0.1:
        x = torch._neg_view(x)
    elif kind < 0.2 and dtype != torch.int32:
        x = x.detach().requires_grad_()
    elif kind < 0.3:
        x = torch.nn.Parameter(x, requires_grad=False)
    elif kind < 0.4:
        x = x.clone(memory_format=torch.preserve_format)
        x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("guards", [True, False], ids=["compared", "looked-up"])
@pytest.mark.parametrize("seed", range(4))
def test_a_call_is_found_by_its_facts(guards, seed, monkeypatch):
    """Every answer is that of a plain dict of facts."""
    if guards:
        assert passed.TensorGuards is not None, "a torch without the class that compares tensors at once"
    else:
        monkeypatch.setattr(passed, "TensorGuards", None)
    draw, found, known, hits = random.Random(seed), Passed[int](), {}, 0
    calls = [((tensor(draw), tensor(draw), torch.zeros(1), torch.zeros(2)), draw.choice("ab")) for _ in range(300)]
    for number in range(2000):
        tensors, rest = draw.choice(calls)
        with torch.inference_mode(draw.random() < 0.2), torch.set_grad_enabled(draw.random() < 0.8):
            key = facts(*tensors), rest
            want = known.get(key)
            assert found.get(tensors, rest) == want
            if want is None:
                known[key] = number
                found.keep(tensors, rest, number)
                assert found.get(tensors, rest) == number
            else:
                hits += 1
    assert hits > 500


def test_one_tensor():
    found, x = Passed[int](), torch.zeros(2)
    assert found.keep((x,), "rest", 1) == 1
    assert found.get((torch.ones(2),), "rest") == 1
    assert found.get((torch.ones(3),), "rest") is None
    assert found.get((x, x), "rest") is None


def test_inference_mode_has_its_own_comparison():
    """A call that was kept outside is looked up once inside, and compared from then on."""
    found, call = Passed[int](), (torch.zeros(2), torch.zeros(3))
    found.keep(call, "rest", 1)
    for inference in (True, False):
        with torch.inference_mode(inference):
            assert found.get(call, "rest") == 1
            assert found._last.like.holds(call)


def test_what_is_not_remembered():
    found, x = Passed[int](), torch.zeros(2)
    assert found.keep((x, x), None, 1) == 1
    assert found.get((x, x), None) is None
    assert found.keep((x, x, 1.0), "rest", 1) == 1
    assert found.get((x, x, 1.0), "rest") is None


def test_all_are_forgotten_with_one_too_many(monkeypatch):
    monkeypatch.setattr(passed, "MOST", 2)
    found, x = Passed[int](), torch.zeros(2)
    for rest in range(3):
        found.keep((x, x), rest, rest)
    assert [found.get((x, x), rest) for rest in range(3)] == [None, None, 2]


def test_a_result_that_is_replaced():
    """As a plan is, once its backend has gone."""
    found, x = Passed[int](), torch.zeros(2)
    found.keep((x, x), "rest", 1)
    found.keep((x, x), "rest", 2)
    assert found.get((x, x), "rest") == 2


def test_no_tensor_is_kept_alive():
    found, x = Passed[int](), torch.zeros(2)
    found.keep((x, x), "rest", 1)
    last = weakref.ref(x)
    del x
    gc.collect()
    assert last() is None
