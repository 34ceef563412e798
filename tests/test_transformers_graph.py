"""A step of decode under a graph: on the CPU a tape that replays tensor operations stands in for the CUDA graph.

The tape keeps what a graph keeps: the operations and launches of the captured step with the tensors that they read and
wrote. A number that the host worked out is baked in, and a read of a value on the host is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

from flash_mla import ModelError, ShapeError  # noqa: E402
from flash_mla.demo import PAD, build_model  # noqa: E402
from flash_mla.integrations.transformers import PagedCache, graph, paged_cache  # noqa: E402
from flash_mla.integrations.transformers.switch import wrap  # noqa: E402
from flash_mla.plan import Plan  # noqa: E402

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
FP8 = torch.float8_e4m3fn


class Tape(TorchDispatchMode):
    """Records while it is active; `replay` runs the record again, into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.record: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and not self.paused:
            raise RuntimeError("a value is read on the host")
        out = func(*args, **kwargs)
        if not self.paused:
            self.record.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.record:
            held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in held:
                    old.copy_(new)


def capture_on_tape(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    launch = Plan.launch

    def noted(plan: Plan, args: Any) -> None:
        tape.paused = True
        launch(plan, args)
        tape.paused = False
        tape.record.append((launch, (plan, args), {}, None))

    for _ in range(graph.WARM_UPS):
        run()
    tape = Tape()
    with pytest.MonkeyPatch.context() as patch, tape:
        patch.setattr(Plan, "launch", noted)
        logits = run()
    return tape.replay, logits


def graphed(model: Any, batch: int, max_seq_len: int, **options: Any) -> PagedCache:
    """paged_cache(cuda_graph=True); on a CPU what it does, with the tape."""
    cuda = model.device.type == "cuda"
    cache = paged_cache(model, batch, max_seq_len, cuda_graph=cuda, **options)
    if not cuda:
        cache.graph = graph.DecodeGraph(cache, capture_on_tape)
        wrap(model, "forward", graph.replay_or_run)
    cache.pages.k_cache[0].fill_(float("nan"))
    return cache


def prompts(lengths: list[int], device: str, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 250, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.where(mask, PAD).to(device), "attention_mask": mask.long().to(device)}


def model_on(device: str, kind: str = "mla") -> Any:
    if kind == "mla":
        model = build_model()
    else:
        torch.manual_seed(5)
        config = transformers.LlamaConfig(
            vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, eos_token_id=None, pad_token_id=PAD, initializer_range=0.1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    if kind == "mla":
        model.set_experts_implementation("batched_mm")
    return model.to(device)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_replays_give_eager_tokens(kind: str, device: str) -> None:
    """Over a block's end, for two batches of prompts, with one capture."""
    model = model_on(device, kind)
    cache = None
    for seed, lengths in enumerate([[50, 7, 20], [11, 62, 63]]):
        inputs, options = prompts(lengths, device, seed), {"max_new_tokens": 16, "do_sample": False}
        model.set_attn_implementation("eager")
        expected = model.generate(**inputs, **options)
        if cache is None:
            cache = graphed(model, 3, 128)
        model.set_attn_implementation("paged_kv_cache")
        cache.reset()
        assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
        assert cache.pages.lengths == tuple(length + 15 for length in lengths)
    assert cache.graph.captures == 1


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_beams_chunks_and_growth(device: str) -> None:
    """Tables that move, prompts in chunks, and a cache that grows: captured again for its new tensors."""
    model, inputs = model_on(device), prompts([40, 33], device)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    expected = model.generate(**inputs, **options)
    cache = graphed(model, 4, 64, pool_blocks=9)
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
    cache.reset()
    cache.pages.grow(2)
    tokens = model.generate(**inputs, **options, past_key_values=cache, prefill_chunk_size=15)
    assert torch.equal(tokens, expected)
    assert cache.graph.captures == 2


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_fp8_under_a_graph(device: str) -> None:
    model, inputs = model_on(device).bfloat16(), prompts([40, 33], device)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = paged_cache(model, 2, 64, dtype=FP8, k_descale=0.03)
    expected = model.generate(**inputs, **options, past_key_values=plain)
    cache = graphed(model, 2, 64, dtype=FP8, k_descale=0.03)
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
    assert cache.graph.captures == 1


def test_what_is_no_decode_step_runs_without_the_graph() -> None:
    model, inputs = model_on("cpu", "gqa"), prompts([12, 12], "cpu")
    ids = inputs["input_ids"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
        cache = graphed(model, 2, 64)
        model(ids[:, :8], past_key_values=cache)
        several = model(ids[:, 8:10], past_key_values=cache).logits
        hidden = model(ids[:, 10:11], past_key_values=cache, output_hidden_states=True)
        assert cache.graph.captures == 0
        assert hidden.hidden_states is not None
        last = model(ids[:, 11:], past_key_values=cache).logits  # no mask, no positions
        assert cache.graph.captures == 1
        torch.testing.assert_close(torch.cat([several, hidden.logits, last], 1), expected[:, 8:], atol=2e-5, rtol=1e-4)
        with pytest.raises(ShapeError, match=r"attention_mask \[2, 5\]"):
            model(ids[:, :1], attention_mask=torch.ones(2, 5), past_key_values=cache)


def test_a_model_that_reads_values_on_the_host_is_refused() -> None:
    model, inputs = model_on("cpu"), prompts([12], "cpu")
    model.set_experts_implementation("eager")
    cache = graphed(model, 1, 64)
    with pytest.raises(ModelError, match="batched_mm"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert cache.graph.step is None


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_bf16_steps_are_as_close_as_eager_bf16(kind: str, device: str) -> None:
    """Given tokens, one at a time, over a block's end: on a GPU by calls bound once, with a graph and without."""
    model, inputs = model_on(device, kind).bfloat16(), prompts([60, 41], device)
    exact = model_on(device, kind)
    exact.load_state_dict(model.state_dict())
    steps = torch.randint(3, 250, (8, 2, 1), generator=torch.Generator().manual_seed(3)).to(device)

    def logits(model: Any, cache: PagedCache | None) -> Tensor:
        mask, found = inputs["attention_mask"], []
        with torch.no_grad():
            for ids in (inputs["input_ids"], *steps):
                mask = mask if not found else torch.cat([mask, mask.new_ones(2, 1)], 1)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits[:, -1].float())
        return torch.stack(found)

    for each in (exact, model):
        each.set_attn_implementation("eager")
    expected, eager = logits(exact, None), logits(model, None)
    baseline = (eager - expected).square().mean().sqrt()
    for cache in (paged_cache(model, 2, 80), graphed(model, 2, 80)):
        assert (logits(model, cache) - expected).square().mean().sqrt() <= 1.5 * baseline
