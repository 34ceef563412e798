"""Calls that are not checked again: a changed input is never served by what an earlier call left.

Every test makes a call twice, so that the second is remembered, changes one thing, and calls again.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_mla
from flash_mla import contract, deepseek, pages
from flash_mla.backends.cpu import engine
from flash_mla.deepseek import sparse
from flash_mla.errors import (
    BlockTableError,
    DeviceError,
    DTypeError,
    FlashMLAError,
    GradientError,
    LayoutError,
    MaskShapeError,
    SequenceLengthError,
    ShapeError,
)
from flash_mla.plan import Plan, plan
from flash_mla.problem import FP8
from flash_mla.quant import mark_scaled

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="checks of the CPU's calls")
B, Hq, Hk, S_q, D, BLOCKS, PROMPT = 2, 4, 2, 3, 64, 4, 70


class Call:
    """A call of a door on fresh random tensors; `again` makes it, with other arguments if given."""

    checks: tuple[Any, str]  # what a remembered call does not ask for

    def __init__(self) -> None:
        self.x: dict[str, Any] = self.draw()
        self.first = self.again()

    def draw(self) -> dict[str, Any]:
        raise NotImplementedError

    def function(self, **x: Any) -> Any:
        raise NotImplementedError

    def again(self, **others: Any) -> Any:
        return self.function(**self.x | others)


def caches(blocks: int = BLOCKS) -> dict[str, Any]:
    order = torch.randperm(B * blocks).view(B, blocks).int() % blocks
    return {"block_table": order, "seq_lens": torch.tensor([100, 200], dtype=torch.int32)}


class Decode(Call):
    checks = contract, "decode"

    def draw(self) -> dict[str, Any]:
        k, v = (torch.randn(B, Hk, BLOCKS, 64, D) for _ in "kv")
        return {"q": torch.randn(B, Hq, S_q, D), "k_cache": k, "v_cache": v, **caches()}

    def function(self, **x: Any) -> Any:
        return flash_mla.flash_mla_with_kvcache(**x)


class Pages(Call):
    checks = pages, "checked"

    def draw(self) -> dict[str, Any]:
        k, v = (torch.randn(BLOCKS, 64, Hk, D) for _ in "kv")
        return {"q": torch.randn(B, Hq, S_q, D), "k_pages": k, "v_pages": v, **caches()}

    def function(self, **x: Any) -> Any:
        return flash_mla.decode_over_pages(**x)


class Prefill(Call):
    checks = contract, "prefill"

    def draw(self) -> dict[str, Any]:
        q, k, v = (torch.randn(B, H, PROMPT, D) for H in (Hq, Hk, Hk))
        return {"q": q, "k": k, "v": v, "seq_lens": torch.tensor([70, 50])}

    def function(self, **x: Any) -> Any:
        return flash_mla.flash_mla_prefill(**x)


class Mha(Call):
    checks = contract, "mha"

    def draw(self) -> dict[str, Any]:
        q, k, v = (torch.randn(B, Hq, PROMPT, D) for _ in "qkv")
        k_cache, v_cache = (torch.zeros(B, Hq, BLOCKS, 64, D) for _ in "kv")
        table = torch.stack([torch.randperm(BLOCKS) for _ in range(B)]).int()
        x = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        return {**x, "block_table": table, "start_pos": torch.tensor([0, 0], dtype=torch.int32)}

    def function(self, **x: Any) -> Any:
        return flash_mla.mha_fwd_kvcache(**x)


class DropIn(Call):
    checks = pages, "checked"

    def draw(self) -> dict[str, Any]:
        named = caches()
        q, k = torch.randn(B, S_q, Hq, D), torch.randn(BLOCKS, 64, 1, D)
        lengths = named["seq_lens"]
        return {"q": q, "k_cache": k, "block_table": named["block_table"], "cache_seqlens": lengths, "head_dim_v": D}

    def function(self, **x: Any) -> Any:
        return deepseek.flash_mla_with_kvcache(**x)[0]


class Sparse(Call):
    checks = sparse, "check_query"

    def draw(self) -> dict[str, Any]:
        indices = torch.randint(0, BLOCKS * 64, (B, S_q, 32), dtype=torch.int32)
        q, k = torch.randn(B, S_q, Hq, D), torch.randn(BLOCKS, 64, 1, D)
        nothing = {"block_table": None, "cache_seqlens": None}
        return {"q": q, "k_cache": k, "indices": indices, "head_dim_v": D, **nothing}

    def function(self, **x: Any) -> Any:
        return deepseek.flash_mla_with_kvcache(**x)[0]


DOORS = (Decode, Pages, Prefill, Mha, DropIn, Sparse)
WITH_OUT = (Decode, Pages, Prefill, Mha)
every = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
with_out = pytest.mark.parametrize("door", WITH_OUT, ids=lambda door: door.__name__)


@every
def test_the_same_facts_are_not_checked_again(door, monkeypatch):
    call = door()
    monkeypatch.setattr(*door.checks, lambda *_: pytest.fail("checked again"))
    assert torch.equal(call.again(), call.first)
    call.x["q"] = -call.x["q"]  # other values, elsewhere
    assert not torch.equal(call.again(), call.first)


@every
def test_a_layout_changed_in_place(door):
    """q keeps its object and its memory, and gets other strides or another shape: a right answer, or our error."""
    call = door()
    q = call.x["q"]
    q.transpose_(1, 2)
    try:
        out = call.again()
    except FlashMLAError:
        assert door is not DropIn
    else:
        torch.testing.assert_close(out, call.again(q=q.contiguous()))
    q.transpose_(1, 2)
    assert torch.equal(call.again(), call.first)
    q.resize_(*q.shape[:3], D // 2)
    with pytest.raises(FlashMLAError):
        call.again()


@every
def test_a_dtype_changed_in_place(door):
    call = door()
    call.x["q"].data = call.x["q"].half()
    with pytest.raises(DTypeError):
        call.again()


@every
@pytest.mark.parametrize("name", ["q", "cache"])
def test_memory_that_was_freed(door, name):
    call = door()
    cache = next(x for x in ("k_cache", "k_pages", "k") if x in call.x)
    call.x[cache if name == "cache" else "q"].untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="freed"):
        call.again()


@every
def test_a_sign_kept_apart_from_the_memory(door):
    call = door()
    with pytest.raises(LayoutError, match="negates"):
        call.again(q=torch._neg_view(call.x["q"]))


@every
def test_another_backend_is_asked(door):
    call = door()
    assert torch.equal(call.again(backend="cpu"), call.first)
    with pytest.raises(DeviceError):
        call.again(backend="hopper")
    with pytest.raises(DeviceError, match="no such backend"):
        call.again(backend=["cpu"])


@every
def test_a_plan_that_is_forgotten_serves_no_call(door, monkeypatch):
    """Where the kernels come back, they serve at once what torch's ops have served, and the other way round."""
    kernels = []
    run = engine.Call.run
    monkeypatch.setattr(engine.Call, "run", lambda *args: kernels.append(1) or run(*args))
    call = door()
    for missing in ("hidden by a test", None, "hidden by a test"):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "missing", lambda missing=missing: missing)
            plan.cache_clear()
            kernels.clear()
            call.again()
            call.again()
            assert len(kernels) == (0 if missing else 2)
    plan.cache_clear()


@every
def test_a_scale_is_looked_at_in_every_call(door):
    call = door()
    assert not torch.equal(call.again(softmax_scale=-1.0), call.again(softmax_scale=1.0))
    with pytest.raises(ShapeError, match="finite"):
        call.again(softmax_scale=float("nan"))


# --- Autograd ---------------------------------------------------------------------------------------------------------


@every
def test_requires_grad_and_grad_mode_are_looked_at_in_every_call(door):
    call = door()
    q = call.x["q"].requires_grad_()
    with torch.no_grad():
        assert not call.again().requires_grad
    out = call.again()
    assert out.requires_grad
    if door is Prefill:
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.abs().sum() > 0
    else:
        with pytest.raises(GradientError):
            out.sum().backward()
    q.requires_grad_(False)
    assert not call.again().requires_grad
    with torch.inference_mode():
        result = call.again()
    assert result.is_inference()
    assert torch.equal(result, call.first)
    assert not call.again().is_inference()


@every
def test_results_are_of_their_own_call(door):
    """The first call of a plan is made in inference mode or on fake tensors, or has its result written to."""
    call = door()
    plan.cache_clear()
    with torch.inference_mode():
        assert call.again().is_inference()
    assert not call.again().is_inference()
    plan.cache_clear()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in call.x.items()}
        assert call.function(**fake).shape == call.first.shape
    one, other = call.again(), call.again()
    assert type(one) is torch.Tensor
    one.zero_()
    assert torch.equal(other, call.first)


@with_out
def test_an_out_that_begins_to_require_grad(door):
    call = door()
    out = torch.empty_like(call.first)
    assert torch.equal(call.again(out=out), call.again(out=out))
    with pytest.raises(GradientError):
        call.again(out=out.requires_grad_())
    with torch.no_grad():
        assert torch.equal(call.again(out=out), call.first)


# --- What lies where --------------------------------------------------------------------------------------------------


@with_out
def test_an_out_that_moved_over_an_input(door):
    """The same facts as an out that passed, and memory of q, half of it or all."""
    call = door()
    room = torch.empty(2 * call.first.numel())
    shape, size = call.first.shape, call.first.numel()
    q = call.x["q"] = room[size:].view(shape).copy_(call.x["q"])
    for start, overlaps in ((0, False), (0, False), (16, True), (size - 16, True)):
        out = room[start : start + size].view(shape)
        kept = q.clone()
        if overlaps:
            with pytest.raises(LayoutError, match="overlaps `q`"):
                call.again(out=out)
            assert torch.equal(q, kept), "written before it was refused"
        else:
            assert torch.equal(call.again(out=out), call.first)


@pytest.mark.parametrize("door", [Decode, Pages], ids=["decode", "pages"])
def test_v_that_was_k(door):
    """V in K's memory, then in memory of its own with the same layout, and back."""
    call = door()
    k, v = (next(x for x in names if x in call.x) for names in (("k_cache", "k_pages"), ("v_cache", "v_pages")))
    shared = call.again(**{v: call.x[k]}, softmax_scale=0.1)
    assert torch.equal(call.again(**{v: call.x[k].clone()}, softmax_scale=0.1), shared)
    assert torch.equal(call.again(), call.first)
    assert not torch.equal(shared, call.first)


def test_a_cache_that_moved_over_what_is_read():
    """The same facts as caches that passed, and memory of k, or of the other cache, half of it or all."""
    call = Mha()
    cache, k = call.x["k_cache"], call.x["k"]
    size = cache.numel()
    room = torch.zeros(2 * size)
    k_cache = room[:size].view(cache.shape)
    for start, overlaps in ((size, False), (size, False), (size - 16, True), (size // 2, True)):
        v_cache = room[start : start + size].view(cache.shape)
        if overlaps:
            before = room.clone()
            with pytest.raises(LayoutError, match="overlap"):
                call.again(k_cache=k_cache, v_cache=v_cache)
            assert torch.equal(room, before), "written before it was refused"
        else:
            assert torch.equal(call.again(k_cache=k_cache, v_cache=v_cache), call.first)
    inside = room[16 : 16 + k.numel()].view(k.shape).copy_(k)
    with pytest.raises(LayoutError, match="overlaps `k`"):
        call.again(k_cache=k_cache, k=inside)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [Decode, Pages], ids=["decode", "pages"])
def test_lengths_and_tables_changed_in_place(door):
    call = door()
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    assert torch.equal(call.again(mask=mask), call.again(mask=mask))
    call.x["seq_lens"][0] = 201
    with pytest.raises(MaskShapeError):
        call.again(mask=mask)
    call.x["seq_lens"][0] = 64 * BLOCKS + 1
    with pytest.raises(SequenceLengthError):
        call.again()
    call.x["seq_lens"][0] = 100
    call.x["block_table"][0, 1] = BLOCKS
    with pytest.raises(BlockTableError):
        call.again()


def test_lengths_of_a_prefill_changed_in_place():
    call = Prefill()
    call.x["seq_lens"][0] = PROMPT + 1
    with pytest.raises(SequenceLengthError):
        call.again()


def test_places_of_a_prompt_changed_in_place():
    call = Mha()
    table, starts = call.x["block_table"], call.x["start_pos"]
    starts[1] = -1
    with pytest.raises(SequenceLengthError, match="negative"):
        call.again()
    starts[1] = 64 * BLOCKS - PROMPT + 1
    with pytest.raises(SequenceLengthError):
        call.again()
    starts[1] = 0
    kept = int(table[1, 3])
    table[1, 3] = 2**31 - 1  # not used
    assert torch.equal(call.again(), call.first)
    table[1, 3] = table[1, 0]
    assert torch.equal(call.again(), call.first)
    starts[1] = 64 * BLOCKS - PROMPT
    with pytest.raises(BlockTableError, match="more than once"):
        call.again()
    table[1, 3] = BLOCKS
    with pytest.raises(BlockTableError):
        call.again()
    starts[1], table[1, 3] = 0, kept
    assert torch.equal(call.again(), call.first)


def test_metadata_of_other_shapes():
    call = Decode()
    x = call.x
    shapes = tuple(x["q"].shape), tuple(x["k_cache"].shape)
    right = flash_mla.get_mla_metadata(*shapes, x["block_table"], x["seq_lens"])
    other = flash_mla.get_mla_metadata((B, Hq, S_q + 1, D), shapes[1], x["block_table"], x["seq_lens"])
    assert torch.equal(call.again(metadata=right), call.first)
    with pytest.raises(ShapeError, match="other shapes"):
        call.again(metadata=other)


def test_a_cache_that_is_marked_as_scaled():
    call = Decode()
    x = {name: x.to(FP8) if name in ("q", "k_cache", "v_cache") else x for name, x in call.x.items()}
    assert torch.equal(call.function(**x), call.function(**x))
    mark_scaled(x["k_cache"])
    with pytest.raises(ShapeError, match="k_descale"):
        call.function(**x)


def test_another_door_checks_for_itself():
    """FP8 pages under BF16 queries are decode_over_pages', not the drop-in's, of the same facts."""
    q, pool = torch.randn(B, S_q, Hq, D).bfloat16(), torch.randn(BLOCKS, 64, 1, D).to(FP8)
    named = caches()
    for _ in range(2):
        flash_mla.decode_over_pages(
            q.transpose(1, 2), pool, None, named["block_table"], named["seq_lens"], v_head_dim=D, causal=False,
            check_values=False,
        )  # fmt: skip
        with pytest.raises(DTypeError):
            deepseek.flash_mla_with_kvcache(q, pool, named["block_table"], named["seq_lens"], D)


@pytest.mark.parametrize("door", [Decode, Pages, Prefill], ids=lambda door: door.__name__)
def test_a_descale_that_is_a_number(door):
    """Its value counts in every call."""
    call = door()
    x = {name: x.to(FP8) if name[:1] in "qkv" else x for name, x in call.x.items()}
    for factor in (0.5, 0.5, 2.0, torch.tensor(2.0)):
        once, twice = (call.function(**x, v_descale=f, softmax_scale=0.1).float() for f in (1.0, factor))
        torch.testing.assert_close(twice, float(factor) * once, rtol=0.01, atol=1e-3)


@pytest.mark.skipif(engine.missing() is not None, reason=f"needs a launch by address: {engine.missing()}")
def test_the_drop_in_makes_no_view(monkeypatch):
    """Its query and pool go in themselves where a launch asks only where they begin."""
    call, seen = DropIn(), []
    call.x["causal"] = True
    want = call.again()
    assert torch.equal(call.again(), want)
    monkeypatch.setattr(Plan, "launch", lambda _, args: seen.append(args))
    out = call.again()
    assert seen[0].q is call.x["q"]
    assert seen[0].k is seen[0].v is call.x["k_cache"]
    assert seen[0].out is out
    assert out.shape == want.shape
    assert out.is_contiguous()
