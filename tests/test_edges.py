"""docs/contract.md, section 11, on every backend that runs here: empty work, scales, strides, what is written,
and what the caller has set for torch."""

from __future__ import annotations

import ast
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import flash_mla
from flash_mla import (
    BlockTableError,
    DTypeError,
    LayoutError,
    MaskShapeError,
    PagedKVCache,
    ShapeError,
    decode_over_pages,
    deepseek,
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mha_fwd_kvcache,
)
from flash_mla.contract.memory import share_memory
from flash_mla.reference import decode_reference, mha_reference, prefill_reference
from flash_mla.testing import DecodeCase, MhaCase, PrefillCase, check, storage_bytes

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cpu", "triton"] if INTERPRET else ["cpu"]
FP32 = torch.float32

FUNCTIONS = {
    "decode": (flash_mla_with_kvcache, decode_reference, lambda **x: DecodeCase("", (70, 3), **x)),
    "prefill": (flash_mla_prefill, prefill_reference, lambda **x: PrefillCase("", 70, **x)),
    "mha": (mha_fwd_kvcache, mha_reference, lambda **x: MhaCase("", 70, **x)),
}


# --- Scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.125, 3, np.float32(0.1)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_finite_scale(name, scale, dtype, backend):
    function, reference, case = FUNCTIONS[name]
    call = case(dtype=dtype, softmax_scale=scale).call()
    out, lse = function(**call.arguments, backend=backend, return_lse=True)
    verdict = check(out, lse, *reference(**call.reference), dtype)
    assert verdict.passed, verdict.failures


NO_SCALES = [math.nan, math.inf, -math.inf, 1e39, -(10**400), "0.1", True, torch.tensor(0.1), [0.1], 1j]


@pytest.mark.parametrize("scale", NO_SCALES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_scales_are_refused_before_anything_is_written(name, scale):
    function, _, case = FUNCTIONS[name]
    x = case().call().arguments
    before = {key: storage_bytes(value) for key, value in x.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ShapeError, match="softmax_scale"):
        function(**{**x, "softmax_scale": scale})
    assert all(torch.equal(content, storage_bytes(x[key])) for key, content in before.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", [1.0]])
@pytest.mark.parametrize("which", ["q_descale", "k_descale", "v_descale"])
def test_a_descale_is_a_factor(which, value):
    with pytest.raises(ShapeError, match=which):
        flash_mla_with_kvcache(**{**DecodeCase("", (70,)).call().arguments, which: value})


# --- Empty work -------------------------------------------------------------------------------------------------------


def empty_calls():
    ints = lambda *shape: torch.zeros(shape, dtype=torch.int32)  # noqa: E731

    def decode(B=2, S_q=1, Nblk=3, columns=3):
        cache = torch.randn(B, 1, Nblk, 64, 16)
        return torch.randn(B, 2, S_q, 16), cache, cache.clone(), ints(B, columns), ints(B)

    def mha(B=2, P=70):
        cache = torch.randn(B, 1, 3, 64, 16)
        return torch.randn(B, 1, P, 16), cache, cache.clone(), ints(B, 3)

    def pages(B=2, num_blocks=3):
        return torch.randn(B, 2, 1, 16), torch.randn(num_blocks, 16, 1, 16), None, ints(B, 3), ints(B)

    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    return {
        "decode/batch": (flash_mla_with_kvcache, decode(B=0)),
        "decode/queries": (flash_mla_with_kvcache, decode(S_q=0)),
        "decode/columns": (flash_mla_with_kvcache, decode(columns=0)),
        "decode/blocks": (flash_mla_with_kvcache, decode(Nblk=0)),
        "prefill/batch": (flash_mla_prefill, (*[torch.randn(0, 2, 70, 16)] * 3, blocks)),
        "prefill/tokens": (flash_mla_prefill, [torch.randn(2, 2, 0, 16)] * 3),
        "mha/batch": (mha_fwd_kvcache, mha(B=0)),
        "mha/tokens": (mha_fwd_kvcache, mha(P=0)),
        "pages/batch": (decode_over_pages, pages(B=0)),
        "pages/pool": (decode_over_pages, pages(num_blocks=0)),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", empty_calls())
def test_empty_work(name, backend, compiled):
    """An empty result of the right shape, or rows of 0 and -inf, written into an out that held NaN."""
    function, arguments = empty_calls()[name]
    call = torch.compile(function, backend="aot_eager") if compiled else function
    q = arguments[0]
    given = torch.full(q.shape, math.nan)
    out, lse = call(*arguments, backend=backend, return_lse=True, out=given)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert (given == 0).all()
    assert (lse == -math.inf).all()


def test_empty_rows_of_a_chunk_write_nothing():
    """P = 0 with start_pos and rows of no token."""
    cache = torch.randn(2, 1, 3, 64, 16)
    before = cache.clone()
    rows = torch.randn(2, 1, 0, 16)
    table = torch.arange(3, dtype=torch.int32).expand(2, 3).contiguous()
    start = torch.tensor([5, 0], dtype=torch.int32)
    v = torch.randn_like(cache)
    out = mha_fwd_kvcache(rows, cache, v, table, k=rows, v=rows, start_pos=start)
    assert out.shape == (2, 1, 0, 16)
    assert torch.equal(cache, before)


# --- Strides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_lengths_and_sinks(backend):
    """A column of a table of lengths, and every other sink: kernels read them without a stride."""
    x = DecodeCase("", (70, 3), sink=True).call().arguments
    want = flash_mla_with_kvcache(**x, backend=backend)
    lens = torch.full((2, 3), 9, dtype=torch.int32)
    lens[:, 1] = x["seq_lens"]
    sinks = torch.randn(2 * len(x["attn_sink"]))
    sinks[::2] = x["attn_sink"]
    got = flash_mla_with_kvcache(**{**x, "seq_lens": lens[:, 1], "attn_sink": sinks[::2]}, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_misaligned_tensors(name, backend):
    """Storage offsets of 3 elements are legal, and every backend that does not refuse is right."""
    function, reference, case = FUNCTIONS[name]
    call = case().call()
    x = dict(call.arguments)
    for key in ("q", "k_cache", "v_cache") if name != "prefill" else ("q", "k", "v"):
        whole = x[key].new_empty(x[key].numel() + 3)[3:].view(x[key].shape)
        x[key] = whole.copy_(x[key])
    want = reference(**call.reference)
    out, lse = function(**x, backend=backend, return_lse=True)
    verdict = check(out, lse, *want, torch.bfloat16)
    assert verdict.passed, verdict.failures


# --- What is written --------------------------------------------------------------------------------------------------


def out_inside(tensor, shape, dtype):
    """A copy of the tensor, and an out of that shape whose memory begins where the copy's does."""
    numel = math.prod(shape)
    if tensor.dtype == dtype:  # views of one base, as a compiled graph can express them
        storage = torch.zeros(max(numel, tensor.numel()), dtype=dtype)
        return storage[: tensor.numel()].view(tensor.shape).copy_(tensor), storage[:numel].view(shape)
    storage = torch.zeros(numel + tensor.numel() * 8, dtype=dtype)
    inside = storage.view(torch.uint8)[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
    return inside.copy_(tensor), storage[:numel].view(shape)


OVERLAPS = {
    "decode": ("q", "block_table", "seq_lens", "mask", "k_descale", "attn_sink", "k_cache"),
    "prefill": ("q", "k", "attn_mask", "seq_lens", "q_descale", "attn_sink", "sparse_layout"),
    "mha": ("q", "k", "v", "v_cache", "block_table", "start_pos", "attn_mask"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("name", "other"), [(n, x) for n, others in OVERLAPS.items() for x in others])
def test_out_shares_memory_with_nothing(name, other, compiled):
    x = {
        "decode": DecodeCase("", (70, 3), mask="bool", descale="tensor", sink=True),
        "prefill": PrefillCase("", 70, mask="bool", descale="tensor", sink=True, lengths=(70, 9), sparse="tensor"),
        "mha": MhaCase("", 70, starts=(64, 3), mask="bool"),
    }[name].call().arguments  # fmt: skip
    v = x["v"] if name == "prefill" else x["v_cache"]
    shape = (*x["q"].shape[:3], v.shape[-1])
    x[other], out = out_inside(x[other].contiguous(), shape, torch.bfloat16)
    before = {key: storage_bytes(value) for key, value in x.items() if isinstance(value, torch.Tensor)}
    error, words = LayoutError, f"`out` overlaps `{other}`"
    function = FUNCTIONS[name][0]
    if compiled:
        torch.compiler.reset()  # a call that falls back to eager mode after many compiles proves nothing
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
        if x[other].dtype != torch.bfloat16:  # torch itself refuses what is written and has a view of another dtype
            error, words = torch._dynamo.exc.BackendCompilerFailed, r"aot_autograd\(\) does not yet handle"
    with pytest.raises(error, match=words):
        function(**x, out=out)
    assert all(torch.equal(content, storage_bytes(x[key])) for key, content in before.items())


def mha_arguments(layout="slab"):
    return MhaCase("", 70, layout=layout, starts=(64, 3)).call().arguments


def refused(x, error, words):
    before = {key: storage_bytes(x[key]) for key in ("k_cache", "v_cache")}
    with pytest.raises(error, match=words):
        mha_fwd_kvcache(**x)
    assert all(torch.equal(content, storage_bytes(x[key])) for key, content in before.items())


def test_no_written_block_is_named_twice():
    x = mha_arguments()
    x["block_table"][0, 1] = x["block_table"][0, 0]
    refused(x, BlockTableError, "named more than once")
    x = mha_arguments("pool")
    x["block_table"][1, 0] = x["block_table"][0, 1]
    refused(x, BlockTableError, "named more than once")


def test_a_shared_prefix_is_legal():
    """Requests of a pool may share blocks that the call only reads."""
    pool = torch.randn(2, 8, 64, 16)
    k_cache, v_cache = (x.expand(2, 2, 8, 64, 16) for x in (pool, torch.randn(2, 8, 64, 16)))
    table = torch.tensor([[5, 1], [5, 2]], dtype=torch.int32)
    rows = torch.randn(2, 2, 10, 16)
    out = mha_fwd_kvcache(rows, k_cache, v_cache, table, k=rows, v=rows, start_pos=torch.tensor([64, 64]))
    assert out.isfinite().all()


def test_written_caches_lie_apart():
    x = mha_arguments()
    x["v_cache"] = x["k_cache"].clone()[:, :1].expand_as(x["k_cache"])
    refused(x, LayoutError, "several names")
    x = mha_arguments()
    memory = torch.zeros(x["k_cache"].numel() + 64 * 64, dtype=torch.bfloat16)
    x["k_cache"], x["v_cache"] = (
        memory[start : start + x["k_cache"].numel()].view(x["k_cache"].shape) for start in (0, 64 * 64)
    )
    refused(x, LayoutError, "overlap")


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_caches_interleaved_in_one_tensor_are_legal(dim):
    """K and V as halves of one tensor, request by request, head by head or block by block."""
    x = mha_arguments()
    want = mha_fwd_kvcache(**{**x, "k_cache": x["k_cache"].clone(), "v_cache": x["v_cache"].clone()})
    both = torch.stack([x["k_cache"], x["v_cache"]], dim)
    x["k_cache"], x["v_cache"] = both.unbind(dim)
    assert torch.equal(mha_fwd_kvcache(**x), want)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_out_between_rows_of_q_is_apart(backend, by_token):
    """q and out as columns of one tensor share no byte; one column more, and they do."""
    B, Hq, S_q, D = 2, 4, 2, 64
    pools = [torch.randn(3, 64, 2, D, dtype=torch.bfloat16) for _ in range(2)]
    table, lengths = torch.tensor([[2], [0]], dtype=torch.int32), torch.tensor([50, 64], dtype=torch.int32)
    both = torch.randn((B, S_q, Hq, 2 * D) if by_token else (B, Hq, S_q, 2 * D), dtype=torch.bfloat16)
    both = both.transpose(1, 2) if by_token else both
    q, out = both[..., :D], both[..., D:].fill_(math.nan)
    before = q.clone()
    want = decode_over_pages(before, *pools, table, lengths, backend=backend)
    assert decode_over_pages(q, *pools, table, lengths, out=out, backend=backend) is out
    assert torch.equal(out, want)
    assert torch.equal(q, before)
    with pytest.raises(LayoutError, match="`out` overlaps `q`"):
        decode_over_pages(q, *pools, table, lengths, out=both[..., D - 1 : -1], backend=backend)


def part(draw, whole):
    """A part of a tensor: some dims narrowed, two swapped."""
    for dim, size in enumerate(whole.shape):
        if draw.random() < 0.4:
            first = draw.randrange(size)
            whole = whole.narrow(dim, first, draw.randint(1, size - first))
    return whole.transpose(0, 1) if draw.random() < 0.3 else whole


def test_what_shares_a_byte_is_never_taken_to_be_apart():
    draw = random.Random(0)
    exact = 0
    for _ in range(1000):
        whole = torch.zeros(*(draw.randint(1, 4) for _ in range(3)), draw.choice((4, 8)), dtype=torch.int16)
        one, other = part(draw, whole), part(draw, whole)
        whole.zero_()
        one.fill_(1)
        truth = bool(other.any())
        assert share_memory(one, other) or not truth
        exact += share_memory(one, other) == truth
    assert exact > 900


# --- Surroundings -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["autocast", "default-device", "default-dtype", "inference", "no-grad"])
def surroundings(request):
    """Contexts of the caller's, entered around a call."""
    if request.param == "autocast":
        yield lambda: torch.autocast("cpu", torch.bfloat16)
    elif request.param == "default-device":
        yield lambda: torch.device("meta")
    elif request.param == "inference":
        yield torch.inference_mode
    elif request.param == "no-grad":
        yield torch.no_grad
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield torch.no_grad
        torch.set_default_dtype(before)


MAKERS = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "scalar_tensor",
    "tensor",
    "zeros",
}


@pytest.mark.parametrize(
    "folder", ["backends/hopper", "backends/triton", "cache", "contract", "deepseek", "distributed"]
)
def test_tensors_name_their_device(folder):
    """A caller's default device would decide otherwise; the CPU backend sets its own."""
    for path in (Path(flash_mla.__file__).parent / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
                assert any(word.arg == "device" for word in node.keywords), f"{path}:{node.lineno}: no device"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_surroundings_change_no_result(name, backend, surroundings):
    function, _, case = FUNCTIONS[name]
    made = {"decode": {"mask": "float"}, "prefill": {"mask": "float", "sink": True}, "mha": {"starts": (64, 3)}}[name]
    made |= {"dtype": FP32, "descale": "float"}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    x, y = case(**made).call().arguments, case(**made).call().arguments
    want = function(**x, backend=backend, return_lse=True)
    torch.set_default_dtype(default)
    with surroundings():
        got = function(**y, backend=backend, return_lse=True)
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype and a.device == b.device for a, b in zip(got, want, strict=True)
    )


def test_a_cache_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        x = MhaCase("", 70).call().arguments
    y = MhaCase("", 70).call().arguments
    assert torch.equal(mha_fwd_kvcache(**x), mha_fwd_kvcache(**y))
    assert torch.equal(storage_bytes(x["k_cache"]), storage_bytes(y["k_cache"]))


def test_compiled_mha_over_a_pool_writes_it():
    """A pool cannot be declared written: the graph breaks there, and the rows land where they should."""

    def made():
        torch.manual_seed(0)
        cache = PagedKVCache(2, 2, 16, max_seq_len=128, dtype=FP32, pool_blocks=6)
        cache.extend(70)
        cache.k_cache[0].zero_()
        return cache, [torch.randn(2, 2, 70, 16) for _ in range(3)]

    def step(cache, q, k, v):
        return mha_fwd_kvcache(q * 2, cache.k_cache, cache.v_cache, cache.block_table, k=k, v=v) + 1

    (cache, rows), (other, more) = made(), made()
    want = step(cache, *rows)
    assert torch.equal(torch.compile(step, backend="aot_eager")(other, *more), want)
    assert torch.equal(cache.k_cache, other.k_cache)


def test_a_whole_graph_over_a_pool_is_told_why():
    cache = PagedKVCache(2, 2, 16, max_seq_len=128, dtype=FP32, pool_blocks=6)
    cache.extend(70)
    rows = torch.randn(2, 2, 70, 16)
    call = torch.compile(mha_fwd_kvcache, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="without fullgraph=True"):
        call(rows, cache.k_cache, cache.v_cache, cache.block_table, k=rows, v=rows)


# --- Raw errors -------------------------------------------------------------------------------------------------------

JUNK = {"none": None, "text": "abc", "list": [1, 2], "number": 3, "scalar": torch.tensor(1.0), "empty": torch.empty(0)}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_junk_is_refused_with_our_errors(name, junk):
    """Every argument in turn is no tensor, or a tensor of no such shape."""
    function, _, case = FUNCTIONS[name]
    x = case(descale="tensor").call().arguments
    optional = {"attn_mask", "mask", "attn_sink", "seq_lens", "start_pos", "sparse_layout", "softmax_scale", "causal"}
    optional |= {"q_descale", "k_descale", "v_descale", "tail_mask"}
    if name == "decode":
        optional -= {"seq_lens"}
    for key in x:
        if JUNK[junk] is None and key in optional:
            continue
        if junk in ("number", "scalar") and ("descale" in key or key == "softmax_scale"):
            continue
        masks = {"mask", "attn_mask", "sparse_layout", "tail_mask"}
        with pytest.raises(MaskShapeError if key in masks and isinstance(JUNK[junk], torch.Tensor) else ShapeError):
            function(**{**x, key: JUNK[junk]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("q_shape", "abcd"),
        ("q_shape", (2.0, 4, 1, 64)),
        ("q_shape", (-1, 4, 1, 64)),
        ("q_shape", 3),
        ("kv_shape", (2, 2, 4, 64)),
        ("kv_shape", [2, 2, 4, None, 64]),
        ("v_head_dim", 64.0),
        ("block_table", [[0]]),
        ("seq_lens", torch.tensor(3)),
    ],
)
def test_metadata_junk(key, value):
    x = DecodeCase("", (70, 3)).call().arguments
    arguments = dict(
        q_shape=x["q"].shape, kv_shape=x["k_cache"].shape, block_table=x["block_table"], seq_lens=x["seq_lens"]
    )
    with pytest.raises(ShapeError):
        get_mla_metadata(**{**arguments, key: value})


def test_an_int32_q_is_a_dtype_error():
    x = DecodeCase("", (70, 3)).call().arguments
    with pytest.raises(DTypeError) as caught:
        flash_mla_with_kvcache(**{**x, "q": x["q"].to(torch.int32)})
    assert "deepseek" not in str(caught.value).lower()


def test_metadata_that_is_a_tensor_is_named():
    x = DecodeCase("", (70, 3)).call().arguments
    with pytest.raises(ShapeError, match="get_mla_metadata") as caught:
        flash_mla_with_kvcache(**x, metadata=torch.zeros(3))
    assert "deepseek" not in str(caught.value).lower()


def test_an_unabsorbed_q_is_told_what_to_do():
    x = DecodeCase("", (70, 3), Hq=4, Hk=1, D=576, Dv=512, alias=True).call().arguments
    with pytest.raises(ShapeError, match="absorb W_UK"):
        flash_mla_with_kvcache(**{**x, "q": torch.randn(2, 4, 1, 192, dtype=torch.bfloat16)})


def test_tokens_before_heads_are_recognised():
    q, k = torch.randn(2, 70, 8, 64), torch.randn(2, 70, 2, 64)
    with pytest.raises(ShapeError, match="transpose"):
        flash_mla_prefill(q, k, k)


@pytest.mark.parametrize("value", ["64", 64.0, None, [64]])
def test_head_dim_v_of_the_drop_in_is_an_int(value):
    q, pool = torch.randn(2, 1, 4, 64), torch.randn(3, 64, 1, 64)
    ints = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"Dv|head_dim_v"):
        deepseek.flash_mla_with_kvcache(q, pool, ints, ints[:, 0], value)


@pytest.mark.parametrize("causal", [True, False])
def test_the_drop_in_takes_no_request(causal):
    ints = torch.zeros(0, 2, dtype=torch.int32)
    out, lse = deepseek.flash_mla_with_kvcache(
        torch.randn(0, 2, 4, 64), torch.randn(3, 64, 1, 64), ints, ints[:, 0], 64, causal=causal
    )
    assert out.shape == (0, 2, 4, 64)
    assert lse.shape == (0, 4, 2)
