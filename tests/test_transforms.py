"""What torch wraps around a call: fake tensors, torch.func, forward-mode derivatives, tensors of other kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import flash_mla
from flash_mla import DeviceError, FlashMLAError, GradientError, LayoutError, ShapeError, deepseek

LENGTHS = (5, 130)


def table() -> torch.Tensor:
    return torch.arange(6, dtype=torch.int32).view(2, 3)


def lengths() -> torch.Tensor:
    return torch.tensor(LENGTHS, dtype=torch.int32)


def decode(q: torch.Tensor, **more: object) -> torch.Tensor:
    k = torch.ones(2, 2, 6, 64, 64)
    return flash_mla.flash_mla_with_kvcache(q, k, k.clone(), table(), lengths(), **more)


def pages(q: torch.Tensor) -> torch.Tensor:
    k = torch.ones(6, 64, 2, 64)
    return flash_mla.decode_over_pages(q, k, k.clone(), table(), lengths())


def prefill(q: torch.Tensor) -> torch.Tensor:
    k = torch.arange(2 * 2 * 70 * 64).view(2, 2, 70, 64).sin()
    return flash_mla.flash_mla_prefill(q, k, k.cos())


def mha(q: torch.Tensor) -> torch.Tensor:
    k = torch.ones(2, 2, 6, 64, 64)
    return flash_mla.mha_fwd_kvcache(q, k, k.clone(), table())


def dense(q: torch.Tensor) -> torch.Tensor:
    return deepseek.flash_mla_with_kvcache(q, torch.ones(6, 64, 1, 576), table(), lengths(), 512, softmax_scale=0.1)[0]


def rows(q: torch.Tensor) -> torch.Tensor:
    pool, indices = torch.ones(6, 64, 1, 576), torch.arange(128, dtype=torch.int32).view(2, 1, 64)
    return deepseek.flash_mla_with_kvcache(q, pool, None, None, 512, softmax_scale=0.1, indices=indices)[0]


def sparse(q: torch.Tensor) -> torch.Tensor:
    indices = torch.arange(192, dtype=torch.int32).view(3, 1, 64) % 100
    return deepseek.flash_mla_sparse_fwd(q, torch.arange(57600).view(100, 1, 576).sin(), indices, 0.1)[0]


def varlen(q: torch.Tensor) -> torch.Tensor:
    k, starts = torch.ones(10, 2, 64), torch.tensor([0, 4, 10], dtype=torch.int32)
    return deepseek.flash_attn_varlen_func(q, k, k, starts, starts, 6, 6, causal=True)[0]


FORWARD_ONLY: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "decode": (decode, (2, 4, 1, 64)),
    "pages": (pages, (2, 4, 1, 64)),
    "mha": (mha, (2, 2, 70, 64)),
    "dense": (dense, (2, 1, 16, 576)),
    "rows": (rows, (2, 1, 16, 576)),
}
LEARNING: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "prefill": (prefill, (2, 4, 70, 64)),
    "sparse": (sparse, (3, 16, 576)),
    "varlen": (varlen, (10, 4, 64)),
}
ALL = FORWARD_ONLY | LEARNING


@pytest.mark.parametrize("name", ALL)
def test_a_forward_mode_derivative_is_not_dropped(name: str) -> None:
    function, shape = ALL[name]
    q = torch.randn(shape)
    with forward_ad.dual_level():
        function(q)  # without a tangent nothing is lost
        with pytest.raises(GradientError, match="forward-mode"):
            function(forward_ad.make_dual(q, torch.ones_like(q)))
    with pytest.raises(GradientError):
        jvp(function, (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_transforms_of_what_has_no_backward_are_refused(name: str) -> None:
    function, shape = FORWARD_ONLY[name]
    with pytest.raises(GradientError, match=r"torch\.func"):
        grad(lambda q: function(q).sum())(torch.randn(shape))
    with pytest.raises(GradientError, match=r"torch\.func"):
        vmap(function)(torch.randn(2, *shape))


@pytest.mark.parametrize("name", LEARNING)
def test_vmap_is_call_after_call(name: str) -> None:
    function, shape = LEARNING[name]
    q = torch.randn(2, *shape)
    assert torch.equal(vmap(function)(q), torch.stack([function(x) for x in q]))


@pytest.mark.parametrize("name", LEARNING)
def test_a_batch_of_gradients_is_refused_or_mapped(name: str) -> None:
    function, shape = LEARNING[name]
    q = torch.randn(shape, requires_grad=True)
    out = function(q)
    gradients = torch.randn(2, *out.shape)
    with pytest.raises(GradientError, match="is_grads_batched"):
        torch.autograd.grad(out, q, gradients, is_grads_batched=True, retain_graph=True)
    _, pull = vjp(function, q.detach())
    want = [torch.autograd.grad(out, q, gradient, retain_graph=True)[0] for gradient in gradients]
    assert torch.equal(vmap(pull)(gradients)[0], torch.stack(want))


@pytest.mark.parametrize("name", ALL)
def test_fake_tensors_have_shapes_alone(name: str) -> None:
    function, shape = ALL[name]
    want = function(torch.randn(shape))
    with FakeTensorMode():
        got = function(torch.randn(shape))
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)


def test_tensors_without_memory_or_with_a_lazy_sign_are_refused() -> None:
    q = torch.randn(2, 4, 1, 64)
    with pytest.raises(ShapeError):
        decode(torch.nested.nested_tensor([q[0], q[1]]))
    with pytest.raises(ShapeError):
        decode(torch.masked.masked_tensor(q, q > 0))
    mask = torch.randn(2, 1, 1, 200, dtype=torch.complex64).conj().imag
    assert mask.is_neg()
    with pytest.raises(LayoutError, match="resolve_neg"):
        decode(q, mask=mask)
    assert torch.equal(decode(q, mask=mask.resolve_neg()), decode(q, mask=mask.clone().resolve_neg()))


def test_metadata_of_tensors_without_values() -> None:
    shapes, meta = ((2, 4, 1, 64), (2, 2, 6, 64, 64)), (table().to("meta"), lengths().to("meta"))
    with pytest.raises(DeviceError, match="check_values"):
        flash_mla.get_mla_metadata(*shapes, *meta)
    assert flash_mla.get_mla_metadata(*shapes, *meta, check_values=False).B == 2
    assert issubclass(DeviceError, FlashMLAError)
