"""Gradients of prefill against autograd through the float64 reference, on every backend that runs here, and on edges
that the listed cases leave out."""

from __future__ import annotations

import math
import os

import pytest
import torch

from flash_mla import GradientError, deepseek, flash_mla_prefill
from flash_mla.reference import prefill_reference, sparse_reference
from flash_mla.testing import BUDGETS, PrefillCase, gradient_cases, run

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cpu", "triton"] if INTERPRET else ["cpu"]
FP32 = torch.float32
# NOTE: the interpreter takes half a minute a case of several tiles
MOST_TOKENS = 150 if INTERPRET else 1000


def rows(*shapes, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(function, leaves, d_out, **options):
    """Of (function(q, k, v, ..) d_out).sum() to each leaf."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = function(**leaves, **options)
    return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, list(leaves.values()), d_out.to(out[0].dtype))


def close(got, want, dtype=FP32):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).abs().max()
        assert error <= BUDGETS[dtype].out * other.abs().max(), error


@pytest.mark.parametrize(
    "case", [c for c in gradient_cases() if getattr(c, "P", 0) <= MOST_TOKENS], ids=lambda case: case.name
)
def test_case(case):
    result = run(case)
    assert result.passed, str(result)


def test_the_reference_is_differentiable():
    """gradcheck in float64: two requests, one of length 0, a mask that hides a row, blocks, a sink, lse."""
    q, k, v = (x.double().requires_grad_() for x in rows((2, 2, 3, 8), (2, 1, 3, 8), (2, 1, 3, 16)))
    sink = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)[None, None]
    bias = torch.randn(1, 1, 3, 3).masked_fill(~mask, -math.inf)
    for hidden in (mask, bias):

        def call(q, k, v, sink, hidden=hidden):
            out, lse = prefill_reference(
                q, k, v, None, hidden, causal=True, seq_lens=torch.tensor([3, 0]), attn_sink=sink
            )
            return out, lse.masked_fill(lse == -math.inf, 0.0)

        assert torch.autograd.gradcheck(call, (q, k, v, sink), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [math.inf, -math.inf, 200.0, -200.0])
def test_sinks_at_the_ends(sink, backend):
    """A sink that takes all weight, or none: no NaN, in rows without keys either."""
    q, k, v, d_out = rows((1, 2, 70, 16), (1, 1, 70, 16), (1, 1, 70, 16), (1, 2, 70, 16))
    leaves = {"q": q, "k": k, "v": v, "attn_sink": torch.tensor([sink, 0.1])}
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    mask[..., 5, :] = False
    got = gradients(flash_mla_prefill, leaves, d_out, attn_mask=mask, backend=backend)
    want = gradients(
        prefill_reference, {name: x.double() for name, x in leaves.items()}, d_out, attn_mask=mask, causal=False
    )
    close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_that_takes_little(backend):
    """Its gradient is as right as that of one that takes half: of 1 minus what is left, no digit would be."""
    q, k, v, d_out = rows((1, 2, 40, 16), (1, 1, 40, 16), (1, 1, 40, 16), (1, 2, 40, 16))
    leaves = {"q": q, "k": k, "v": v, "attn_sink": torch.tensor([-14.0, -12.0])}
    got = gradients(flash_mla_prefill, leaves, d_out, backend=backend)
    want = gradients(prefill_reference, {name: x.double() for name, x in leaves.items()}, d_out, causal=True)
    torch.testing.assert_close(got[-1].double(), want[-1], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend, causal):
    """NaN in q, k and v past a request's tokens, where the loss has no gradient: none reaches the others."""
    shapes = ((2, 4, 100, 32), (2, 2, 100, 32), (2, 2, 100, 16))
    q, k, v, d_out = rows(*shapes, (2, 4, 100, 16))
    lengths = torch.tensor([70, 3])
    for b, length in enumerate(lengths):
        d_out[b, :, length:] = 0
    clean = gradients(
        prefill_reference, {"q": q.double(), "k": k.double(), "v": v.double()}, d_out, causal=causal, seq_lens=lengths
    )
    for x in (q, k, v):
        for b, length in enumerate(lengths):
            x[b, :, length:] = math.nan
    leaves = {"q": q, "k": k, "v": v}
    got = gradients(flash_mla_prefill, leaves, d_out, causal=causal, seq_lens=lengths, backend=backend)
    close(got, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["q", "k", "v", "attn_sink"])
def test_only_one_input_learns(wanted, backend):
    leaves = dict(zip("qkv", rows((1, 2, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16)), strict=True))
    leaves["attn_sink"] = torch.tensor([0.5, -0.5])
    (d_out,) = rows((1, 2, 40, 16), seed=1)
    whole = gradients(flash_mla_prefill, leaves, d_out, backend=backend)
    fixed = {name: x for name, x in leaves.items() if name != wanted}
    (one,) = gradients(flash_mla_prefill, {wanted: leaves[wanted]}, d_out, **fixed, backend=backend)
    assert torch.equal(one, whole[list(leaves).index(wanted)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_used_twice(backend):
    """q = k = v = x, and two calls on one graph: contributions add up; x is not contiguous."""
    x = rows((1, 3, 40, 24))[0][:, 1:, 5:35, :16].requires_grad_()
    wide = x.detach().double().requires_grad_()
    out = flash_mla_prefill(x, x, x, backend=backend) + flash_mla_prefill(x, x, x, causal=False, backend=backend)
    true = sum(prefill_reference(wide, wide, wide, causal=causal)[0] for causal in (True, False))
    close(torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(true.square().sum(), wide))


def test_surroundings_change_no_gradient():
    """Autocast, a default device and a default dtype around forward and backward."""
    leaves = dict(zip("qkv", rows((1, 2, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16)), strict=True))
    (d_out,) = rows((1, 2, 40, 16), seed=1)
    want = gradients(flash_mla_prefill, leaves, d_out)
    for around in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with around:
            got = gradients(flash_mla_prefill, leaves, d_out)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    torch.set_default_dtype(torch.float64)
    got = gradients(flash_mla_prefill, leaves, d_out)
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [{}, {"sink": True, "mask": "bool"}, {"sparse": "heads", "lengths": (70, 9)}])
def test_compiled(options):
    """One graph; the same bits as in eager mode."""
    x = PrefillCase("", 70, dtype=FP32, **options).call().arguments
    leaves = {name: x.pop(name) for name in (("q", "k", "v", "attn_sink") if options.get("sink") else "qkv")}
    (d_out,) = rows((2, 4, 70, 64))
    torch.compiler.reset()
    compiled = torch.compile(flash_mla_prefill, backend="aot_eager", fullgraph=True)
    want = gradients(flash_mla_prefill, leaves, d_out, **x)
    got = gradients(compiled, leaves, d_out, **x)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_transforms():
    """torch.func: grad, vjp, and the gradient of every sample by vmap."""
    q, k, v = rows((3, 1, 2, 20, 16), (3, 1, 2, 20, 16), (3, 1, 2, 20, 16))

    def loss(q, k, v):
        out, lse = flash_mla_prefill(q, k, v, return_lse=True)
        return out.square().sum() + lse.sum()

    def eager(*leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(loss(*leaves), leaves)

    want = [eager(q[i], k[i], v[i]) for i in range(3)]
    for one, other in zip(torch.func.grad(loss, (0, 1, 2))(q[0], k[0], v[0]), want[0], strict=True):
        assert torch.equal(one, other)
    _, pull = torch.func.vjp(loss, q[0], k[0], v[0])
    assert torch.equal(pull(torch.ones(()))[1], want[0][1])
    samples = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    for i in range(3):
        assert all(torch.equal(one[i], other) for one, other in zip(samples, want[i], strict=True))


def test_out_that_is_given_has_the_gradient():
    leaves = dict(zip("qkv", rows((1, 2, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16)), strict=True))
    (d_out,) = rows((1, 2, 40, 16), seed=1)
    want = gradients(flash_mla_prefill, leaves, d_out)
    got = gradients(flash_mla_prefill, leaves, d_out, out=torch.full((1, 2, 40, 16), math.nan))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    with pytest.raises(GradientError, match="written in place"):
        flash_mla_prefill(
            **leaves | {"q": leaves["q"].requires_grad_()}, out=torch.zeros(1, 2, 40, 16).requires_grad_()
        )


def test_a_second_backward_is_refused():
    x = rows((1, 2, 40, 16))[0].requires_grad_()
    (first,) = torch.autograd.grad(flash_mla_prefill(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(GradientError, match="no backward of its own"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)])
def test_nothing_gives_nothing(shape):
    x = torch.randn(shape, requires_grad=True)
    sink = torch.zeros(2, requires_grad=True)
    flash_mla_prefill(x, x, x, attn_sink=sink).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(sink.grad, torch.zeros(2))


# --- Sequences laid end to end ----------------------------------------------------------------------------------------


def varlen_reference(q, k, v, lengths_q, lengths_kv, causal):
    """Sequence by sequence through prefill_reference, whose queries begin where the last one sees all keys."""
    outs, a, b = [], 0, 0
    for S_q, S_kv in zip(lengths_q, lengths_kv, strict=True):
        own = [x[start : start + n].transpose(0, 1)[None] for x, start, n in ((q, a, S_q), (k, b, S_kv), (v, b, S_kv))]
        outs.append(prefill_reference(*own, causal=causal, start=S_kv - S_q)[0][0].transpose(0, 1))
        a, b = a + S_q, b + S_kv
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen(backend, causal):
    """Sequences without queries or keys, with more queries than keys, alike ones together; one tensor for k and v."""
    lengths_q, lengths_kv = (3, 3, 0, 7, 70, 2), (5, 5, 4, 2, 80, 0)
    q, kv = rows((sum(lengths_q), 4, 16), (sum(lengths_kv), 2, 32))
    (d_out,) = rows((sum(lengths_q), 4, 16), seed=1)
    cu = [torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (lengths_q, lengths_kv)]

    def ours(q, kv):
        return deepseek.flash_attn_varlen_func(
            q, kv[..., :16], kv[..., 16:], *cu, 70, 80, causal=causal, backend=backend
        )

    def truth(q, kv):
        return varlen_reference(q, kv[..., :16], kv[..., 16:], lengths_q, lengths_kv, causal)

    got = gradients(ours, {"q": q, "kv": kv}, d_out)
    close(got, gradients(truth, {"q": q.double(), "kv": kv.double()}, d_out))


def test_varlen_compiled_and_transformed():
    (x,) = rows((9, 2, 16))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)

    def loss(x):
        out, lse = deepseek.flash_attn_varlen_func(x, x, x, cu, cu, 5, 5, causal=True)
        return out.square().sum() + lse.sum()

    torch.compiler.reset()
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf), leaf)
    assert torch.equal(got, want)
    assert torch.equal(torch.func.grad(loss)(x), want)
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(GradientError, match="no backward of its own"):
        first.sum().backward()


def test_varlen_fp8_is_refused():
    x = torch.randn(4, 1, 16).to(torch.float8_e4m3fn).requires_grad_()
    cu = torch.tensor([0, 4], dtype=torch.int32)
    out, _ = deepseek.flash_attn_varlen_func(x, x, x, cu, cu, 4, 4)
    with pytest.raises(GradientError, match="FP8"):
        out.float().sum().backward()


# --- Sparse -----------------------------------------------------------------------------------------------------------


def sparse_call(dtype=FP32, tokens=9, Hq=4, D=32, Dv=16, S_kv=20, topk=7, seed=0):
    """(leaves, d_out, d_lse, indices, lengths): rows named twice, by many and by none, which hold NaN."""
    q, kv, d_out, d_lse = rows((tokens, Hq, D), (S_kv, 1, D), (tokens, Hq, Dv), (tokens, Hq), dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, S_kv - 8, (tokens, 1, topk), generator=generator, dtype=torch.int32)
    indices[3] = -1
    indices[4, 0, :2] = 5
    indices[5, 0, 0] = S_kv + 9
    lengths = torch.randint(0, topk + 1, (tokens,), generator=generator)
    lengths[1], lengths[2] = topk, 0
    kv[S_kv - 8 :] = math.nan
    sink = torch.tensor([math.inf, -math.inf, 0.3, -0.3]).repeat(-(-Hq // 4))[:Hq]
    return [q, kv, sink], d_out, d_lse, indices, lengths


def sparse_gradients(call, leaves, d_out, d_lse):
    """d_lse is NaN in rows without keys."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = call(*leaves)
    d = [d_out.to(out.dtype), d_lse.to(lse.dtype).masked_fill(lse.isinf(), math.nan)]
    return torch.autograd.grad((out, lse), leaves, d)


def sparse_functions(Dv, indices, lengths, backend="cpu"):
    """(ours, the truth) of (q, kv, sink)."""

    def ours(q, kv, sink):
        out, _, lse = deepseek.flash_mla_sparse_fwd(q, kv, indices, 0.2, Dv, sink, lengths, backend=backend)
        return out, lse

    def truth(q, kv, sink):
        out, lse, _ = sparse_reference(q[:, None], [(kv[:, 0], indices, lengths)], Dv, 0.2, sink)
        return out[:, :, 0], lse[:, :, 0]

    return ours, truth


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_sparse(dtype, backend):
    """Rows named twice, by many and by none, a query without keys, a sink at either end, d_lse; the same bits twice."""
    leaves, d_out, d_lse, indices, lengths = sparse_call(dtype)
    ours, truth = sparse_functions(16, indices, lengths, backend)
    got = sparse_gradients(ours, leaves, d_out, d_lse)
    close(got, sparse_gradients(truth, [x.double() for x in leaves], d_out, d_lse), dtype)
    again = sparse_gradients(ours, leaves, d_out, d_lse)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_sink_that_takes_little(backend):
    (q, kv, sink), d_out, d_lse, indices, lengths = sparse_call(FP32)
    leaves = [q, kv, torch.full_like(sink, -14.0)]
    ours, truth = sparse_functions(16, indices, lengths, backend)
    got = sparse_gradients(ours, leaves, d_out, d_lse)[-1]
    want = sparse_gradients(truth, [x.double() for x in leaves], d_out, d_lse)[-1]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)


@pytest.mark.skipif(not INTERPRET, reason="a chunk is Triton's")
@pytest.mark.parametrize(("Hq", "D", "Dv"), [(20, 72, 32), (130, 24, 24)])
def test_sparse_in_chunks(Hq, D, Dv, monkeypatch):
    """Chunks of 16 tokens, the last one short; heads in two tiles, of which the last is short; K in two."""
    from flash_mla.backends.triton import sparse_backward

    monkeypatch.setattr(sparse_backward, "WORKSPACE", 0)
    leaves, d_out, d_lse, indices, lengths = sparse_call(tokens=20, Hq=Hq, D=D, Dv=Dv, S_kv=60, topk=20)
    ours, truth = sparse_functions(Dv, indices, lengths, "triton")
    got = sparse_gradients(ours, leaves, d_out, d_lse)
    close(got, sparse_gradients(truth, [x.double() for x in leaves], d_out, d_lse))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_of_views(backend):
    """q, kv and the sink are slices; d_out is one number, as a sum gives it; lse has no gradient."""
    leaves, _, _, indices, _ = sparse_call(S_kv=40)
    leaves[1].nan_to_num_(0.5)
    ours, truth = sparse_functions(16, indices, None, backend)
    wide = [torch.stack([x, x], -1).flatten(-2) for x in leaves]
    views = [wide[0][..., :32], wide[1][..., 32:], wide[2][::2]]
    got = [x.detach().requires_grad_() for x in views]
    want = [x.detach().double().requires_grad_() for x in views]
    close(torch.autograd.grad(ours(*got)[0].sum(), got), torch.autograd.grad(truth(*want)[0].sum(), want))


def test_sparse_compiled_and_transformed():
    leaves, _, _, indices, lengths = sparse_call()
    leaves = [x.nan_to_num(0.0) for x in leaves[:2]]

    def loss(q, kv):
        out, _, lse = deepseek.flash_mla_sparse_fwd(q, kv, indices, 0.2, 16, topk_length=lengths)
        return out.square().sum() + lse[0].sum()

    learned = [x.clone().requires_grad_() for x in leaves]
    want = torch.autograd.grad(loss(*learned), learned)
    torch.compiler.reset()
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*learned), learned)
    transformed = torch.func.grad(loss, (0, 1))(*leaves)
    for one, two, other in zip(got, transformed, want, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(two, other)
    (first, _) = torch.autograd.grad(loss(*learned), learned, create_graph=True)
    with pytest.raises(GradientError, match="no backward of its own"):
        first.sum().backward()


def test_the_greatest_logit_has_no_gradient():
    q, kv = rows((2, 2, 16), (3, 1, 16))
    q.requires_grad_()
    _, max_logits, _ = deepseek.flash_mla_sparse_fwd(q, kv, torch.zeros(2, 1, 1, dtype=torch.int32), 1.0, 16)
    with pytest.raises(GradientError, match="max_logits"):
        max_logits.sum().backward()


@pytest.mark.parametrize("sparse", [True, False])
def test_decode_in_deepseeks_names_refuses(sparse):
    q, cache = rows((1, 1, 2, 576), (2, 64, 1, 576))
    q.requires_grad_()
    indices = torch.zeros(1, 1, 3, dtype=torch.int32) if sparse else None
    table, lens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    out, lse = deepseek.flash_mla_with_kvcache(
        q, cache, table, lens, 512, deepseek.get_mla_metadata()[0], indices=indices, softmax_scale=0.1
    )
    for result in (out, lse):
        with pytest.raises(GradientError):
            result.sum().backward(retain_graph=True)
