"""What only a GPU can show: no wait for it, graph replays after in-place changes, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_mla import deepseek, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.reference import decode_reference, sparse_reference
from flash_mla.testing import (
    DecodeCase,
    MhaCase,
    PrefillCase,
    SparseDecodeCase,
    SparsePrefillCase,
    check,
    library_lse,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

try:
    import triton
    import triton.language as tl

    from flash_mla.kernels.triton.attend import widen
except ImportError:
    pass
else:

    @triton.jit
    def widen_kernel(codes_ptr, out_ptr, WIDEN: tl.constexpr):
        offs = tl.arange(0, 256)
        tl.store(out_ptr + offs, widen(tl.load(codes_ptr + offs), WIDEN))


LENGTHS = (1500, 64, 700)
CASES = {
    "gqa": DecodeCase("gqa", LENGTHS, Hq=8, Hk=2, D=128, spare=4, device="cuda"),
    "mla": DecodeCase("mla", LENGTHS, Hq=16, Hk=1, D=576, Dv=512, alias=True, spare=4, device="cuda"),
    "mla-queries": DecodeCase("mla-queries", LENGTHS, Hq=128, Hk=1, D=576, Dv=512, S_q=2, alias=True, device="cuda"),
}


@pytest.fixture(params=CASES)
def step(request):
    """A decode step's arguments, its metadata, and the case."""
    case = CASES[request.param]
    arguments = {name: x for name, x in case.call().arguments.items() if x is not None}
    shapes = arguments["q"].shape, arguments["k_cache"].shape
    metadata = get_mla_metadata(*shapes, arguments["block_table"], arguments["seq_lens"])
    return case, arguments, metadata


def judge(case: DecodeCase, arguments: dict[str, Tensor], out: Tensor, lse: Tensor | None = None) -> None:
    verdict = check(out, lse, *decode_reference(**arguments), case.dtype)
    assert verdict.passed, verdict.failures


def test_decode_never_waits_for_the_gpu(step):
    case, arguments, metadata = step
    flash_mla_with_kvcache(**arguments, metadata=metadata)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = flash_mla_with_kvcache(**arguments, metadata=metadata)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    judge(case, arguments, out)


def test_graph_replays_what_changed_in_place(step):
    case, arguments, metadata = step
    for _ in range(2):
        flash_mla_with_kvcache(**arguments, metadata=metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(**arguments, metadata=metadata, return_lse=True)
    graph.replay()
    judge(case, arguments, out, lse)

    lengths = arguments["seq_lens"].tolist()
    cache, table = arguments["k_cache"], arguments["block_table"]
    for new in ([0, 63, 699], [1, 0, 650], [lengths[0] - 1, 1, 129]):
        arguments["seq_lens"].copy_(torch.tensor(new, dtype=torch.int32))
        used = -(-min(n for n in new if n) // 64)
        table[0, :used] = table[0, :used].flip(0)
        arguments["q"].copy_(torch.randn_like(arguments["q"]))
        cache[2, :, int(table[2, 0])] = torch.randn_like(cache[2, :, int(table[2, 0])])
        graph.replay()
        judge(case, arguments, out, lse)


def doubled(case: DecodeCase, metadata) -> Callable[[dict[str, Tensor]], Tensor]:
    """A layer that makes V's view of the latent and multiplies the call's result."""

    def layer(arguments):
        k_cache = arguments["k_cache"]
        v_cache = k_cache[..., : case.Dv] if case.alias else arguments["v_cache"]
        rest = {name: x for name, x in arguments.items() if name not in ("k_cache", "v_cache")}
        return 2 * flash_mla_with_kvcache(k_cache=k_cache, v_cache=v_cache, **rest, metadata=metadata)

    return layer


def test_compiled_decode_is_one_graph(step):
    case, arguments, metadata = step
    out = torch.compile(doubled(case, metadata), fullgraph=True)(arguments)
    judge(case, arguments, out / 2)


def test_compiled_decode_in_a_cuda_graph(step):
    """Its warm-up and its capture run in a pool, in which torch suffers nothing that outlives a call."""
    case, arguments, metadata = step
    layer = torch.compile(doubled(case, metadata), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        arguments["q"].copy_(torch.randn_like(arguments["q"]))
        judge(case, arguments, layer(arguments) / 2)


@pytest.mark.parametrize(
    ("function", "case"),
    [
        (flash_mla_prefill, PrefillCase("dense", 200, D=128)),
        (deepseek.flash_mla_sparse_fwd, SparsePrefillCase("sparse", Hq=128)),
    ],
)
def test_compiled_prefill_in_a_cuda_graph(function, case):
    x = replace(case, device="cuda").call().arguments
    attend = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x["q"].copy_(torch.randn_like(x["q"]))
        got, want = attend(**x), function(**x)
        if isinstance(got, Tensor):
            got, want = (got,), (want,)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_many_lengths_are_shared_out(step):
    """64 requests of 0 to 2000 tokens, some of them empty."""
    case, _, _ = step
    lengths = torch.randint(0, 2000, (64,), generator=torch.Generator().manual_seed(1))
    lengths[::9] = 0
    result = run(replace(case, name="many", lengths=tuple(lengths.tolist()), S_q=1))
    assert result.passed, str(result)


def test_paged_prefill_writes_and_reads():
    result = run(MhaCase("mha", 500, device="cuda"))
    assert result.passed, str(result)


@pytest.mark.parametrize("case", [SparseDecodeCase("v3.2", Hq=64, topk=300), SparseDecodeCase("few", extra_topk=33)])
def test_sparse_decode_replays_new_indices(case):
    """One call that never waits for the GPU, then a graph whose indices change in place."""
    case = replace(case, device="cuda")
    call = case.call()
    x = call.arguments
    deepseek.flash_mla_with_kvcache(**x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        deepseek.flash_mla_with_kvcache(**x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = deepseek.flash_mla_with_kvcache(**x)
    x["indices"].copy_(x["indices"].flip(0, 2))
    graph.replay()
    pools = [
        (rows, x["indices"] if i == 0 else indices, n) for i, (rows, indices, n) in enumerate(call.reference["pools"])
    ]
    true_out, true_lse, _ = sparse_reference(**{**call.reference, "pools": pools})
    verdict = check(out.transpose(1, 2), library_lse(lse), true_out, true_lse, case.dtype)
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize("way", ["fp8_once", "fp8_bits_once"])
def test_every_e4m3_code_in_ptx(way):
    """The conversions that Triton's interpreter cannot run: exact, subnormals and signed zeros too (NaN aside)."""
    pytest.importorskip("triton")
    if way == "fp8_once" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that converts e4m3")
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    out = torch.empty(256, dtype=torch.float16, device="cuda")
    widen_kernel[(1,)](codes, out, way)
    real = codes[codes & 0x7F != 0x7F].long()
    assert torch.equal(out[real].view(torch.int16), codes.view(torch.float8_e4m3fn).half()[real].view(torch.int16))


def test_a_remembered_call_runs_on_the_stream_of_the_call(step):
    """q is written late on a stream of its own: a launch on the stream of the calls before would read the old one."""
    case, arguments, metadata = step
    for _ in range(2):
        flash_mla_with_kvcache(**arguments, metadata=metadata)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        arguments["q"].neg_()
        out = flash_mla_with_kvcache(**arguments, metadata=metadata)
    stream.synchronize()
    judge(case, arguments, out)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_comes_after_an_early_combine_reads_all_of_out(batch_invariant):
    """Triton lets combine start beside decode. With nothing to combine, what comes next must wait too."""
    case = DecodeCase("early", (60,), Hq=16, Hk=1, D=576, Dv=512, alias=True, spare=40, device="cuda")
    x = case.call().arguments
    metadata = get_mla_metadata(x["q"].shape, x["k_cache"].shape, x["block_table"], x["seq_lens"])
    options = {"metadata": metadata, "batch_invariant": batch_invariant, "backend": "triton"}
    want = flash_mla_with_kvcache(**x, **options)
    out, copies = torch.empty_like(want), torch.empty((100, *want.shape), dtype=want.dtype, device="cuda")
    torch.cuda._sleep(50_000_000)  # so that launches wait for the GPU, not it for them
    for copy in copies:
        out.fill_(float("nan"))
        flash_mla_with_kvcache(**x, **options, out=out)
        copy.copy_(out)
    assert torch.equal(copies, want.expand_as(copies))


@pytest.mark.parametrize(("B", "blocks", "batch_invariant"), [(8200, 1, False), (520, 512, True)])
def test_more_items_than_a_grid_has_rows(B, blocks, batch_invariant):
    """B * Hk, or with pieces 16 times as many, past 65535: the same bits as in two calls of half as many requests."""
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(B, 8, 1, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    pool = torch.randn(2, 8, 64, 64, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    k, v = (x.expand(B, -1, -1, -1, -1) for x in pool)
    table = torch.randint(0, 64, (B, blocks), generator=generator, device="cuda", dtype=torch.int32)
    lengths = torch.randint(0, 64 * min(blocks, 64) + 1, (B,), generator=generator, device="cuda", dtype=torch.int32)

    def attend(own):
        return flash_mla_with_kvcache(
            q[own], k[own], v[own], table[own], lengths[own], batch_invariant=batch_invariant, backend="triton"
        )

    halves = slice(0, B // 2), slice(B // 2, B)
    assert torch.equal(attend(slice(0, B)), torch.cat([attend(own) for own in halves]))
