"""The SGLang backend over its pool, driven by stand-ins of the runner, the batch and the layer.

SGLang's engine does not start without its GPU packages; what of it imports where it is installed is driven below, the
rest is what 0.5.23's own backends read of these objects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_mla.integrations.sglang import PagedMLA, runs_of_equal_length
from flash_mla.quant import quantise

H, RANK, ROPE, PAGE = 4, 64, 16, 64
D = RANK + ROPE
LENGTHS = torch.tensor([130, 64, 1, 70])
REQUESTS = torch.tensor([5, 2, 7, 0])
FP8 = torch.float8_e4m3fn
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture(autouse=True, params=["cpu", GPU])
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test on a CPU and on a GPU: where tensors are made."""
    for name in ("LENGTHS", "REQUESTS"):
        monkeypatch.setattr(sys.modules[__name__], name, globals()[name].to(request.param))
    with torch.device(request.param):
        yield


class Mode:
    """ForwardMode: one of its questions is answered yes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_target_verify(self) -> bool:
        return self.name == "verify"

    def is_draft_extend_v2(self) -> bool:
        return self.name == "draft_extend"

    def is_extend_without_speculative(self) -> bool:
        return self.name == "extend"


class Pool:
    """MLATokenToKVPool: latent rows [slots, 1, D]; free slots hold NaN."""

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        self.rows = torch.full((slots, 1, D), float("nan")).to(dtype)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.rows


class Setup:
    """A runner of 8 requests over shuffled pages, and the rows of LENGTHS tokens."""

    def __init__(self, dtype: torch.dtype = torch.float32, window: int = 0, room: int = 8) -> None:
        torch.manual_seed(2)
        pages = torch.randperm(48)
        table = torch.full((8, 320), 2**31 - 1 - 2**20, dtype=torch.int32)
        self.pool = Pool(48 * PAGE, dtype)
        self.rows = []
        self.k_scale = torch.tensor([0.02]) if dtype == FP8 else None
        taken = 0
        for request, length in zip(REQUESTS.tolist(), (LENGTHS + room).tolist(), strict=True):
            for page in range(-(-length // PAGE)):
                table[request, page * PAGE : (page + 1) * PAGE] = pages[taken] * PAGE + torch.arange(PAGE)
                taken += 1
            rows = torch.randn(length, 1, D)
            stored = quantise(rows, 0.02)[0] if dtype == FP8 else rows.to(dtype)
            self.pool.rows.view(torch.uint8 if dtype == FP8 else dtype)[table[request, :length].long()] = stored.view(
                torch.uint8 if dtype == FP8 else dtype
            )
            self.rows.append(stored.double()[:, 0] * (0.02 if dtype == FP8 else 1))
        config = SimpleNamespace(kv_lora_rank=RANK, qk_rope_head_dim=ROPE, context_len=300)
        runner = SimpleNamespace(
            model_config=config, page_size=PAGE, use_mla_backend=True, token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=table),
        )  # fmt: skip
        self.backend = PagedMLA(runner, window)
        self.layer = SimpleNamespace(
            layer_id=0, head_dim=D, v_head_dim=RANK, tp_q_head_num=H, tp_k_head_num=1, scaling=0.11,
            k_scale=self.k_scale,
        )  # fmt: skip
        self.dtype = torch.bfloat16 if dtype == FP8 else dtype

    def batch(self, mode: str, order: Tensor, **more: Any) -> SimpleNamespace:
        return SimpleNamespace(
            batch_size=len(order), forward_mode=Mode(mode), req_pool_indices=REQUESTS[order], seq_lens=LENGTHS[order],
            **more,
        )  # fmt: skip

    def check(self, out: Tensor, q: Tensor, order: Tensor, counts: list[int], lengths: list[int]) -> None:
        """Each request's counts newest queries, the last of which sees lengths keys, in float64."""
        start = 0
        for b, count, length in zip(order.tolist(), counts, lengths, strict=True):
            part = slice(start, start + count)
            start += count
            x = self.rows[b][:length]
            scores = 0.11 * torch.einsum("shd,td->sht", q[part].view(count, H, D).double(), x)
            hidden = torch.arange(length) > length - count + torch.arange(count)[:, None]
            weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
            expected = weights @ x[:, :RANK]
            budget = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[self.dtype]
            assert (out[part].view(count, H, RANK) - expected).abs().max() <= budget * expected.abs().max()
        assert start == len(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_decode(dtype: torch.dtype) -> None:
    setup, order = Setup(dtype), torch.tensor([1, 3, 0, 2])
    batch = setup.batch("decode", order)
    setup.backend.init_forward_metadata(batch)
    q = torch.randn(4, H * D).to(setup.dtype)
    out = setup.backend.forward_decode(q, None, None, setup.layer, batch)
    setup.check(out, q, order, [1] * 4, LENGTHS[order].tolist())


@pytest.mark.parametrize("mode", ["verify", "draft_extend"])
@pytest.mark.parametrize("captured", [False, True])
def test_draft_tokens(mode: str, captured: bool) -> None:
    """Verify: seq_lens leaves the chain out. Draft extend: a window of 3, of which some requests fill a part."""
    setup, order = Setup(window=3), torch.tensor([0, 1, 3])
    filled = torch.tensor([3, 1, 2])
    batch = setup.batch(mode, order, extend_seq_lens=filled)
    lengths = LENGTHS[order] + 3 if mode == "verify" else LENGTHS[order] - filled + 3
    if captured:
        batch.seq_lens = LENGTHS[order] if mode == "verify" else lengths
        setup.backend.init_cuda_graph_state(4, 12)
        setup.backend.init_forward_metadata_out_graph(batch, in_capture=True)
        setup.backend.init_forward_metadata_in_graph(batch)
    else:
        setup.backend.init_forward_metadata(batch)
    q = torch.randn(9, H * D)
    out = setup.backend.forward_extend(q, None, None, setup.layer, batch)
    setup.check(out, q, order, [3] * 3, lengths.tolist())


@pytest.mark.parametrize("counts", [[100, 64, 1, 7], [5, 5, 1, 1], [2, 2, 1, 70]])
def test_prompts_with_a_prefix_over_the_pages(counts: list[int]) -> None:
    setup, order = Setup(), torch.arange(4)
    batch = setup.batch("extend", order, extend_seq_lens=torch.tensor(counts), extend_seq_lens_cpu=counts)
    setup.backend.init_forward_metadata(batch)
    q = torch.randn(sum(counts), H * D)
    out = setup.backend.forward_extend(q, None, None, setup.layer, batch)
    setup.check(out, q, order, counts, LENGTHS.tolist())


def test_prompts_without_a_prefix_are_expanded() -> None:
    setup, counts = Setup(), [9, 64, 3]
    batch = setup.batch("extend", torch.arange(3), extend_seq_lens=torch.tensor(counts), extend_seq_lens_cpu=counts)
    layer = SimpleNamespace(layer_id=0, head_dim=48, v_head_dim=32, tp_q_head_num=H, tp_k_head_num=H, scaling=0.2)
    setup.backend.init_forward_metadata(batch)
    q, k, v = (torch.randn(76, H, dim) for dim in (48, 48, 32))
    out = setup.backend.forward_extend(q.flatten(1), k.flatten(1), v.flatten(1), layer, batch).view(76, H, 32)
    start = 0
    for count in counts:
        part = slice(start, start + count)
        start += count
        scores = 0.2 * torch.einsum("shd,thd->hst", q[part].double(), k[part].double())
        scores = scores.masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), -torch.inf)
        expected = torch.einsum("hst,thd->shd", scores.softmax(-1), v[part].double())
        assert (out[part] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_graph_keeps_its_tensors() -> None:
    """Replays of other requests, fewer too, fill the table and the lengths that were captured."""
    setup = Setup()
    setup.backend.init_cuda_graph_state(4, 4)
    table, lengths = setup.backend.table, setup.backend.lengths
    for order in (torch.arange(4), torch.tensor([2, 0]), torch.tensor([3])):
        batch = setup.batch("decode", order)
        setup.backend.init_forward_metadata_out_graph(batch)
        assert setup.backend.table is table
        assert setup.backend.lengths is lengths
        q = torch.randn(len(order), H * D)
        out = setup.backend.forward_decode(q, None, None, setup.layer, batch)
        setup.check(out, q, order, [1] * len(order), LENGTHS[order].tolist())
    assert setup.backend.get_cuda_graph_seq_len_fill_value() == 1


def test_what_is_not_served_is_refused() -> None:
    runner = SimpleNamespace(model_config=SimpleNamespace(), page_size=1, use_mla_backend=True)
    with pytest.raises(NotImplementedError, match="--page-size 64"):
        PagedMLA(runner)
    runner.page_size, runner.use_mla_backend = 64, False
    with pytest.raises(NotImplementedError, match="MLA"):
        PagedMLA(runner)


def test_runs() -> None:
    assert runs_of_equal_length([]) == []
    assert runs_of_equal_length([3, 0, 0, 2, 2, 3]) == [(0, 1, 0, 3), (3, 5, 3, 7), (5, 6, 7, 10)]
