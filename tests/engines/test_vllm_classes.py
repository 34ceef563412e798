"""The plugin's classes with layers and metadata of our own in place of vLLM's engine.

    make engines                              # inside an installed vLLM
    pytest -m gpu tests/engines               # on a GPU: decode in a CUDA graph too

Where vLLM is not installed its base classes are stand-ins, so that our own methods run and nothing of vLLM's does.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from standins import standing_in
from torch import Tensor

from flash_mla.integrations.vllm import register
from flash_mla.quant import FORMATS, quantise
from flash_mla.testing import BUDGETS

with standing_in("vllm") as missing:
    from flash_mla.integrations.vllm import gqa, mla, sparse

FP8 = torch.float8_e4m3fn
H, RANK, ROPE = 16, 512, 64
D = RANK + ROPE
LENGTHS = [130, 0, 64, 1, 300]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
SCALE = 0.04


def decode_only(cls: type) -> object:
    """The implementation without its constructor, which asks for an engine's configuration."""
    made = cls.__new__(cls)
    made.kv_lora_rank, made.scale, made.need_to_return_lse_for_decode = RANK, SCALE, True
    return made


class Pool:
    """Latents of LENGTHS tokens in shuffled pages; free slots hold NaN, unused table entries 2^31 - 1."""

    def __init__(self, dtype: torch.dtype, page: int, device: str) -> None:
        torch.manual_seed(4)
        blocks = 40 * 64 // page
        order = torch.randperm(blocks).tolist()
        real = torch.full((blocks, page, D), float("nan"))
        self.table = torch.full((len(LENGTHS), 384 // page), 2**31 - 1, dtype=torch.int32)
        for b, length in enumerate(LENGTHS):
            for i in range(-(-length // page)):
                self.table[b, i] = block = order.pop()
                held = min(page, length - i * page)
                real[block, :held] = torch.randn(held, D)
        self.k_scale = torch.tensor(0.013)
        self.cache = quantise(real[None], self.k_scale)[0][0] if dtype == FP8 else real.to(dtype)
        self.real = self.cache.double() * (self.k_scale if dtype == FP8 else 1)
        self.seq_lens = torch.tensor(LENGTHS, dtype=torch.int32)
        self.cache, self.table, self.seq_lens = (x.to(device) for x in (self.cache, self.table, self.seq_lens))

    def rows(self, b: int, length: int) -> Tensor:
        """[length, D] float64."""
        page = self.cache.shape[1]
        return self.real[self.table[b, : -(-length // page)].cpu().long()].flatten(0, 1)[:length]


def step(made: object, pool: Pool, q: Tensor, requests: list[int]) -> tuple[Tensor, Tensor | None]:
    """A decode of some of the pool's requests."""
    decode = SimpleNamespace(block_table=pool.table[requests], seq_lens=pool.seq_lens[requests])
    metadata = SimpleNamespace(decode=decode, num_decodes=len(requests), causal=True)
    layer = SimpleNamespace(_q_scale=None, _k_scale=pool.k_scale.to(q.device))
    return mla.Decode.forward_mqa(made, q, pool.cache, metadata, layer)


def expected(q: Tensor, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """out [H, RANK] and lse [H] of one query [H, D] over the rows that it sees, in float64."""
    scores = (SCALE * q.double() @ rows.mT).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ rows[:, :RANK], scores.logsumexp(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("page", [16, 64, 128])
def test_decode(page: int, dtype: torch.dtype, s_q: int, device: str) -> None:
    """MTP steps, FP8 caches with their scale, and -inf where a rank of context parallelism holds no key."""
    if device == "cuda" and (page == 16 or dtype == torch.float32):
        pytest.skip("a GPU's pages are multiples of 64, its latents BF16 or FP8")
    pool = Pool(dtype, page, device)
    q_dtype = torch.bfloat16 if dtype == FP8 else dtype
    q = torch.randn(len(LENGTHS) * s_q, H, D).to(q_dtype).to(device)
    metadata = SimpleNamespace(
        decode=SimpleNamespace(block_table=pool.table, seq_lens=pool.seq_lens), num_decodes=len(LENGTHS), causal=True
    )
    layer = SimpleNamespace(_q_scale=None, _k_scale=pool.k_scale.to(device))
    out, lse = mla.Decode.forward_mqa(
        decode_only(mla.Decode), (q[..., :RANK], q[..., RANK:]), pool.cache, metadata, layer
    )
    assert out.shape == (len(q), H, RANK)
    assert lse.shape == (len(q), H)
    # Hopper keeps some 14 bits of a sum of e4m3 products: an lse of 5 was off by 1.3e-3
    lse_budget = BUDGETS[FP8].lse if dtype == FP8 and device == "cuda" else 1e-4
    error, largest = 0.0, 0.0
    for b, length in enumerate(LENGTHS):
        rows = pool.rows(b, length)
        for i in range(s_q):
            seen = torch.arange(length) <= length - s_q + i
            want, want_lse = expected(q[b * s_q + i].cpu(), rows, seen)
            error = max(error, float((out[b * s_q + i].cpu() - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
            torch.testing.assert_close(lse[b * s_q + i].cpu().double(), want_lse, atol=lse_budget, rtol=0)
    assert error <= (1e-5 if dtype == torch.float32 else 1.6e-2) * largest


def test_lse_is_made_for_who_asks() -> None:
    pool = Pool(torch.float32, 64, "cpu")
    made = decode_only(mla.Decode)
    made.need_to_return_lse_for_decode = False
    q = torch.randn(len(LENGTHS), H, D)
    assert step(made, pool, q, [*range(len(LENGTHS))])[1] is None


def test_a_pool_that_moves() -> None:
    """A layer's calls are bound to its pool: another pool of the same shape, or a scale elsewhere, is not the last."""
    made = decode_only(mla.Decode)
    q = torch.randn(len(LENGTHS), H, D).bfloat16()
    everyone = [*range(len(LENGTHS))]
    first = Pool(FP8, 64, "cpu")
    seen = [step(made, first, q, everyone)[0]]
    second = Pool(FP8, 64, "cpu")
    second.cache.view(torch.uint8)[:] = first.cache.view(torch.uint8).flip(0)
    second.table = torch.where(first.table < 40, 39 - first.table, first.table)
    seen.append(step(made, second, q, everyone)[0])
    assert torch.equal(*seen), "the same latents in other pages"
    second.k_scale = second.k_scale * 2
    louder = step(made, second, q, everyone)[0]
    assert not torch.equal(louder, seen[0])
    assert torch.equal(louder, step(decode_only(mla.Decode), second, q, everyone)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("s_q", [1, 2])
def test_the_same_bits_in_every_batch(
    s_q: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM_BATCH_INVARIANT: a request's rows of out and lse alone, and beside others in another order."""
    monkeypatch.setattr(mla.envs, "VLLM_BATCH_INVARIANT", True)
    pool = Pool(dtype, 64, device)
    q = torch.randn(len(LENGTHS) * s_q, H, D).bfloat16().to(device)
    made = decode_only(mla.Decode)
    rows = torch.arange(len(q)).view(-1, s_q)
    together = step(made, pool, q, [*range(len(LENGTHS))])
    for some in ([0], [4], [4, 2, 0], [3, *[4] * 20]):
        mine = rows[some].flatten()
        for alone, wanted in zip(step(made, pool, q[mine], some), together, strict=True):
            assert torch.equal(alone, wanted[mine])


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_is_the_same_in_every_batch(device: str) -> None:
    counts = [200, 7, 130, 1]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(sum(counts), H, dim, device=device).to(dtype) for dim in (192, 192, 128))
    backend = mla.FlashMLAPrefillBackend.__new__(mla.FlashMLAPrefillBackend)
    backend.scale = SCALE
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    out, lse = backend.attend(q, k, v, starts, starts, True, None)
    for first, last in pairwise(starts.tolist()):
        own = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        mine, own_lse = backend.attend(*(x[first:last] for x in (q, k, v)), own, own, True, None)
        assert torch.equal(mine, out[first:last])
        assert torch.equal(own_lse, lse[:, first:last])


def test_queries_that_vllm_quantised() -> None:
    pool = Pool(FP8, 64, "cpu")
    q = torch.randn(len(LENGTHS), H, D)
    q8, q_scale = quantise(q[None])
    metadata = SimpleNamespace(
        decode=SimpleNamespace(block_table=pool.table, seq_lens=pool.seq_lens), num_decodes=len(LENGTHS), causal=True
    )
    layer = SimpleNamespace(_q_scale=q_scale, _k_scale=pool.k_scale)
    out, _ = mla.Decode.forward_mqa(decode_only(mla.Decode), q8[0], pool.cache, metadata, layer)
    for b, length in enumerate(LENGTHS):
        want, _ = expected(q8[0][b].double() * q_scale, pool.rows(b, length), torch.ones(length, dtype=torch.bool))
        assert (out[b] - want).abs().max() <= 6e-2 * want.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ["bfloat16", "fp8_ds_mla"])
def test_sparse(rows: str, device: str) -> None:
    """Token numbers of each request, -1 past the last, to rows of the pool; decode and prompts in one batch."""
    pool = Pool(torch.bfloat16, 64, device)
    cache = pool.cache.cpu()
    if rows == "fp8_ds_mla":
        fmt = FORMATS[rows]
        stored = fmt.quantise(cache.nan_to_num(0).unsqueeze(2))
        pool.real = fmt.dequantise(stored).double().squeeze(2)
        cache = stored.squeeze(2)
    requests = torch.tensor([0, 2, 2, 2, 3, 4, 4], dtype=torch.int32)
    picked = torch.full((16, 40), -1, dtype=torch.int32)
    for i, b in enumerate(requests.tolist()):
        some = torch.randperm(LENGTHS[b])[:40]
        picked[i, : len(some)] = some.int()
    made = sparse.FlashMLASparseImpl.__new__(sparse.FlashMLASparseImpl)
    made.kv_lora_rank, made.softmax_scale, made.kv_cache_dtype = RANK, SCALE, rows
    made.topk_indices_buffer = picked.to(device)
    q = torch.randn(len(requests), H, D).bfloat16()
    metadata = SimpleNamespace(block_table=pool.table, req_id_per_token=requests.to(device))
    out, lse = made.forward_mqa(q.to(device), cache.to(device), metadata, None)
    assert lse is None
    for i, b in enumerate(requests.tolist()):
        seen = torch.zeros(LENGTHS[b], dtype=torch.bool)
        seen[picked[i][picked[i] >= 0].long()] = True
        want, _ = expected(q[i], pool.rows(b, LENGTHS[b]), seen)
        assert (out[i].cpu() - want).abs().max() <= 1.6e-2 * want.abs().max()


@pytest.mark.skipif("vllm" in missing, reason="vLLM is not installed")
def test_sparse_metadata_keeps_its_tensors() -> None:
    """What the builder declares to be fit for a CUDA graph: each step's metadata lies where the captured one's does."""
    builder = sparse.FlashMLASparseMetadataBuilder.__new__(sparse.FlashMLASparseMetadataBuilder)
    builder.req_id_per_token_buffer = torch.empty(32, dtype=torch.int32)
    builder.kv_cache_spec, builder.topk_tokens = SimpleNamespace(block_size=64), 40
    table = torch.zeros(4, 6, dtype=torch.int32)
    places = set()
    for counts in ([2, 2, 2, 2], [2, 2, 2, 0]):  # the second is padded, as a replay may be
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        step = SimpleNamespace(
            num_actual_tokens=8, num_reqs=4, max_query_len=2, max_seq_len=300, query_start_loc=starts,
            query_start_loc_cpu=starts, slot_mapping=torch.zeros(8, dtype=torch.int64), block_table_tensor=table,
        )  # fmt: skip
        made = builder.build(0, step)
        requests = [b for b, count in enumerate(counts) for _ in range(count)]
        assert made.req_id_per_token.tolist() == requests + [0] * (8 - len(requests))
        assert (made.num_decode_tokens, made.num_prefills) == (8, 0), "every token goes to forward_mqa"
        places.add((made.req_id_per_token.data_ptr(), made.block_table.data_ptr()))
    assert len(places) == 1


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("page", [16, 64])
def test_gqa_step(page: int, padding: int) -> None:
    """Rows are written where the step says, padding's nowhere; prompts, chunks and decodes attend in one step."""
    torch.manual_seed(2)
    Hq, Hk, dim, held, new = 6, 2, 64, [129, 64, 0, 30, 5], [1, 1, 40, 1, 7]
    totals = [a + b for a, b in zip(held, new, strict=True)]
    cache = torch.full((60, Hk, page, 2 * dim), float("nan"))
    table = torch.full((len(new), 12), 2**31 - 1, dtype=torch.int32)
    order, rows, slots = torch.randperm(60).tolist(), [], []
    for b, total in enumerate(totals):
        places = []
        for i in range(-(-total // page)):
            table[b, i] = block = order.pop()
            places += [block * page + slot for slot in range(page)]
        rows.append(torch.randn(total, Hk, 2 * dim))
        for t in range(held[b]):
            cache[places[t] // page, :, places[t] % page] = rows[b][t]
        slots += places[held[b] : total]
    tokens = sum(new)
    fresh = torch.cat([x[h:] for x, h in zip(rows, held, strict=True)])
    fresh = torch.cat([fresh, torch.full((padding, Hk, 2 * dim), float("nan"))])
    q = torch.randn(tokens + padding, Hq, dim)
    common = SimpleNamespace(
        causal=True, query_start_loc=torch.tensor([0, *new]).cumsum(0).int(), num_actual_tokens=tokens + padding,
        slot_mapping=torch.tensor(slots + [-1] * padding), max_query_len=40, max_seq_len=max(totals),
        seq_lens=torch.tensor(totals, dtype=torch.int32), block_table_tensor=table,
    )  # fmt: skip
    builder = gqa.FlashMLAGQAMetadataBuilder.__new__(gqa.FlashMLAGQAMetadataBuilder)
    builder.block_size = page
    with pytest.MonkeyPatch.context() as patch:
        if "vllm" in missing:  # nothing of vLLM's metadata is there to be a base
            patch.setattr(gqa, "StepMetadata", SimpleNamespace)
        step = builder.build(0, common)
    assert [(run.requests, run.rows) for run in step.runs] == [
        (2, slice(0, 2)), (1, slice(2, 42)), (1, slice(42, 43)), (1, slice(43, 50)),
    ]  # fmt: skip
    made = gqa.FlashMLAGQAImpl.__new__(gqa.FlashMLAGQAImpl)
    made.scale, made.sinks, made.kv_sharing_target_layer_name = SCALE, None, None
    out = torch.full((tokens + padding, Hq * dim), float("nan"))
    made.forward(None, q, fresh[..., :dim], fresh[..., dim:], cache, step, out)
    first = 0
    for b, total in enumerate(totals):
        mine = slice(first, first + new[b])
        first = mine.stop
        k, v = (x.double().repeat_interleave(Hq // Hk, 1) for x in rows[b].split(dim, -1))
        hidden = torch.arange(total) > torch.arange(held[b], total)[:, None]
        scores = SCALE * torch.einsum("shd,thd->hst", q[mine].double(), k)
        want = torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        assert (out[mine].view(-1, Hq, dim) - want).abs().max() <= 1e-5 * want.abs().max()
    assert cache.isnan().any(-1).sum() == Hk * (60 * page - sum(totals)), "nothing else is written"


@pytest.mark.parametrize("device", DEVICES)
def test_prefill_of_new_tokens_and_of_a_chunk_of_context(device: str) -> None:
    """lse as [heads, tokens], and out where the caller wants it."""
    torch.manual_seed(8)
    counts, context = [7, 64, 1], [100, 0, 65]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(sum(counts), H, dim, device=device).to(dtype) for dim in (192, 192, 128))
    k_old, v_old = (torch.randn(sum(context), H, dim, device=device).to(dtype) for dim in (192, 128))
    starts, old = (torch.tensor([0, *counts]).cumsum(0).int().to(device) for counts in (counts, context))
    backend = mla.FlashMLAPrefillBackend.__new__(mla.FlashMLAPrefillBackend)
    backend.scale, backend._prefill_metadata = SCALE, SimpleNamespace(query_start_loc=starts)
    new = backend.run_prefill_new_tokens(q, k, v, True)
    chunk = SimpleNamespace(query_start_loc=starts, cu_seq_lens=old)
    out = torch.full_like(new[0], float("nan"))
    earlier = backend.run_prefill_context_chunk(chunk, q, k_old, v_old, out)
    assert earlier[0] is out
    assert torch.equal(backend.run_prefill_new_tokens(q, k, v, False), new[0])
    for b in range(3):
        mine = slice(starts[b], starts[b + 1])
        for (x, lse), keys, values, span, causal in (
            (new, k, v, mine, True), (earlier, k_old, v_old, slice(old[b], old[b + 1]), False),
        ):  # fmt: skip
            scores = SCALE * torch.einsum("shd,thd->hst", q[mine].double(), keys[span].double())
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
            want = torch.einsum("hst,thd->shd", scores.softmax(-1), values[span].double())
            budget = 1e-5 if dtype == torch.float32 else 1.6e-2
            assert (x[mine] - want).abs().max() <= budget * want.abs().max().clamp(min=1e-9)
            torch.testing.assert_close(lse[:, mine].double(), scores.logsumexp(-1), atol=1e-4, rtol=0)


@pytest.mark.skipif("vllm" in missing, reason="vLLM is not installed")
def test_what_is_registered() -> None:
    """Twice, as vLLM may; and vLLM's own question finds nothing against the classes."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    register()
    assert AttentionBackendEnum.CUSTOM.get_class() is mla.FlashMLABackend
    assert AttentionBackendEnum["CUSTOM_SPARSE"].get_class() is sparse.FlashMLASparseBackend
    question = {
        "head_size": D, "dtype": torch.bfloat16, "block_size": 64, "use_mla": True, "has_sink": False,
        "use_mm_prefix": False, "use_per_head_quant_scales": False, "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }  # fmt: skip
    for backend, is_sparse, dtypes in (
        (mla.FlashMLABackend, False, ("auto", "fp8")),
        (sparse.FlashMLASparseBackend, True, ("auto", "fp8_ds_mla")),
    ):
        for dtype in dtypes:
            assert backend.validate_configuration(**question, kv_cache_dtype=dtype, use_sparse=is_sparse) == []
        refused = backend.validate_configuration(
            **question, kv_cache_dtype="auto", use_sparse=is_sparse, use_batch_invariant=True
        )
        # how sparse decode splits the tokens of a query depends on how many queries there are
        assert refused == (["batch invariance not supported"] if is_sparse else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("s_q", [1, 2])
def test_decode_in_a_cuda_graph(dtype: torch.dtype, s_q: int) -> None:
    """A replay after lengths and latents changed in place gives what a call gives."""
    pool = Pool(dtype, 64, "cuda")
    q = torch.randn(len(LENGTHS) * s_q, H, D, device="cuda").bfloat16()
    decode = SimpleNamespace(block_table=pool.table, seq_lens=pool.seq_lens)
    metadata = SimpleNamespace(decode=decode, num_decodes=len(LENGTHS), causal=True)
    layer = SimpleNamespace(_q_scale=None, _k_scale=pool.k_scale.cuda())
    made = decode_only(mla.Decode)

    def call() -> tuple[Tensor, Tensor]:
        return mla.Decode.forward_mqa(made, q, pool.cache, metadata, layer)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    pool.seq_lens.copy_(torch.tensor([100, 0, 7, 1, 257]))
    q.copy_(torch.randn_like(q.float()).bfloat16())
    graph.replay()
    want, want_lse = call()
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
