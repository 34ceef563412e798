"""Models of transformers on the paged cache: the tokens of eager attention, whatever the padding, pages and beams."""

from __future__ import annotations

import copy
import re
from itertools import chain
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from flash_mla import ModelError, SequenceLengthError, ShapeError  # noqa: E402
from flash_mla.errors import DeviceError, DTypeError, GradientError  # noqa: E402
from flash_mla.integrations.transformers import PagedCache, attention, layer, paged_cache  # noqa: E402
from flash_mla.integrations.transformers import cache as cache_module  # noqa: E402
from flash_mla.integrations.transformers.step import call_sizes  # noqa: E402
from flash_mla.integrations.transformers.token import LatentDecode, Shared, TokenDecode  # noqa: E402

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

VOCAB = 264
FP8 = torch.float8_e4m3fn
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
MOE = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
INDEX = {"index_topk": 24, "index_n_heads": 16, "index_head_dim": 24}
SPARSE = {
    "DeepseekV32": LATENT | MOE | INDEX,
    "GlmMoeDsa": LATENT | MOE | INDEX | {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
}
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
FAMILIES = SPARSE | {
    "DeepseekV3": LATENT | MOE | {"first_k_dense_replace": 1},
    "DeepseekV2": LATENT | MOE | {"first_k_dense_replace": 1},
    "Glm4MoeLite": LATENT | MOE | {"mlp_layer_types": ["dense", "sparse"]},
    "MiniCPM3": LATENT,
    "Youtu": LATENT,
    "Llama": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 24},
}


def build(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    if family in SPARSE and VERSION < (5, 19):
        pytest.skip("transformers before 5.19 caches a sparse model's expanded keys")
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**(COMMON | FAMILIES[family]))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():  # NOTE: the row of padding is 0, and a sparse index that sees 0 picks among equals
        model.get_input_embeddings().weight[0].normal_(std=0.1)
    return model


def prompts(lengths: list[int], side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids, padded to the longest, and their attention mask."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), longest), generator=generator)
    place = torch.arange(longest)
    count = torch.tensor(lengths)[:, None]
    mask = place >= longest - count if side == "left" else place < count
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def hostile_cache(model: transformers.PreTrainedModel, batch: int, max_seq_len: int) -> PagedCache:
    """Every other block of the pool is taken, free slots hold NaN, unused table entries 2^31 - 1."""
    blocks = 2 * batch * -(-max_seq_len // 64)
    cache = paged_cache(model, batch, max_seq_len, pool_blocks=blocks)
    allocator = cache.pages._ledger.allocators[0]
    allocator.release(allocator.allocate(blocks)[1::2])
    cache.pages.k_cache[0].fill_(float("nan"))
    cache.pages.v_cache[0].fill_(float("nan"))
    cache.pages.block_table.fill_(2**31 - 1)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_gives_eager_tokens(family: str) -> None:
    model, inputs = build(family), prompts([5, 90, 64])
    expected = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    cache = hostile_cache(model, 3, 120)
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, expected)
    assert len(set(expected[:, 90:].flatten().tolist())) > 20, "the model repeats itself: the test sees little"
    assert cache.pages.lengths == (5 + 29, 90 + 29, 64 + 29), "padding takes no cache"
    blocks = cache.pages.block_table[1, :2]
    assert (blocks.diff() != 1).all(), "the pages lie apart"


@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV32", "Llama"])
def test_beam_search_reorders_tables(family: str) -> None:
    model, inputs = build(family), prompts([60, 33])
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    cache = hostile_cache(model, 6, 80)
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)


def test_a_chunk_goes_through_calls_of_few_sizes() -> None:
    """Of which Triton compiles a kernel each."""
    calls = {tokens: call_sizes(tokens, 128) for tokens in range(1, 400)}
    assert all(sum(sizes) == tokens for tokens, sizes in calls.items())
    assert {*chain(*calls.values())} == {*range(1, 9), 16, 32, 64, 128}
    assert call_sizes(300, 128) == [128, 128, 32, 8, 4]


@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV32", "Llama"])
def test_chunked_prefill_with_padding_in_two_chunks(family: str) -> None:
    model, inputs = build(family), prompts([3, 41, 26])
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    cache = hostile_cache(model, 3, 64)
    # chunks of 19: the first request has no token in two of them, the second's begin is inside the first
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False, past_key_values=cache, prefill_chunk_size=19)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV32", "Llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_two_passes(family: str, side: str) -> None:
    """A prompt, then several tokens at once, against one eager pass; logits where there is a token."""
    model, inputs = build(family), prompts([7, 70], side)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = hostile_cache(model, 2, 70)
        parts = [
            model(
                ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=positions[:, first:last],
                past_key_values=cache,
            ).logits
            for first, last in ((0, 58), (58, 69), (69, 70))
        ]
    error = (torch.cat(parts, 1) - expected)[mask.bool()].abs().max()
    assert error <= 2e-5 * expected.abs().max()
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("family", ["DeepseekV3", "Llama"])
def test_bf16_is_as_close_as_eager_bf16(family: str) -> None:
    exact, model = build(family), build(family, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    inputs = prompts([40, 66])
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def logits(model: transformers.PreTrainedModel, cache: PagedCache | None) -> torch.Tensor:
        common = {"past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            first = model(ids[:, :60], attention_mask=mask[:, :60], position_ids=positions[:, :60], **common)
            common["past_key_values"] = first.past_key_values
            rest = model(ids[:, 60:], attention_mask=mask, position_ids=positions[:, 60:], **common)
        return rest.logits.float()

    expected, eager = logits(exact, None), logits(model, None)
    paged = logits(model, hostile_cache(model, 2, 66))
    baseline = (eager - expected).square().mean().sqrt()
    assert (paged - expected).square().mean().sqrt() <= 1.5 * baseline


def test_reset_serves_the_next_batch() -> None:
    model = build("DeepseekV3")
    cache = hostile_cache(model, 2, 70)
    for seed, lengths in enumerate([[20, 50], [64, 9]]):
        inputs = prompts(lengths, seed=seed)
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache)
        cache.reset()
        model.set_attn_implementation("eager")
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        model.set_attn_implementation("paged_kv_cache")
        assert torch.equal(tokens, expected)
        assert cache.pages.lengths == (0, 0)


@pytest.mark.parametrize("family", ["DeepseekV3", "Llama"])
def test_a_call_is_checked_once_a_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps follow; and again in a cache that grew, whose tensors are others."""
    made: list[layer.PoolCall] = []
    original = layer.bind
    monkeypatch.setattr(layer, "bind", lambda call, out: made.append(call) or original(call, out))
    model, options = build(family), {"max_new_tokens": 6, "do_sample": False}
    cache = paged_cache(model, 2, 20)
    expected = model.generate(**prompts([8, 12]), **options, past_key_values=cache)
    assert len(made) == 2
    cache.reset()
    cache.pages.grow(1)
    assert torch.equal(model.generate(**prompts([8, 12]), **options, past_key_values=cache), expected)
    assert len(made) == 4


@pytest.mark.parametrize(
    ("family", "graphs", "device"),
    [
        ("DeepseekV3", False, "cpu"),
        ("DeepseekV3", True, "cpu"),
        pytest.param("DeepseekV3", True, "cuda", marks=GPU),
        ("Youtu", True, "cpu"),
        ("Llama", False, "cpu"),
        pytest.param("Llama", False, "cuda", marks=GPU),
        ("Qwen3", False, "cpu"),
    ],
)
def test_bound_steps_of_one_token(family: str, graphs: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: over a block's end, ragged, in chunks with padding before, under beams, and with other weights.

    On the CPU launches are run again where a graph would be replayed.
    """
    bound: list[TokenDecode | LatentDecode] = []
    for kind in (TokenDecode, LatentDecode):
        made = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, made=made: bound.append(self) or made(self, *a))
    if device == "cpu":
        monkeypatch.setattr(attention, "launches_bind", attention.is_plain)
        monkeypatch.setattr(cache_module, "is_captured", lambda q: graphs)
        monkeypatch.setattr(Shared, "capture", lambda self, run: run)
    model, options = build(family).to(device), {"max_new_tokens": 12, "do_sample": False}
    cache = None
    for seed, beams in enumerate([1, 2, 1]):
        inputs = {k: x.to(device) for k, x in prompts([60, 44] if beams == 1 else [61], seed=seed).items()}
        model.set_attn_implementation("eager")
        expected = model.generate(**inputs, **options, num_beams=beams)
        cache = cache or hostile_cache(model, 2, 72)
        cache.reset()
        model.set_attn_implementation("paged_kv_cache")
        chunks = {"prefill_chunk_size": 30 + seed}
        tokens = model.generate(**inputs, **options, num_beams=beams, past_key_values=cache, **chunks)
        assert torch.equal(tokens, expected)
        assert len(bound) == 2, "one a layer, whatever the step"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter * 1.5  # other memory
    model.set_attn_implementation("eager")
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("paged_kv_cache")
    for inference in (True, False):  # what was made inside of inference mode is written outside of it
        cache.reset()
        cache.pages.grow(1)
        with torch.inference_mode(inference):
            assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)


class FixedAttention(transformers.LlamaForCausalLM):
    """A model that calls no AttentionInterface, as GPT-J before transformers 5.24."""

    _supports_attention_backend = False


def test_errors_say_what_to_do() -> None:
    model, inputs = build("DeepseekV3"), prompts([8, 12])
    options = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ShapeError, match="a batch of 2, a cache for 3"):
        model.generate(**inputs, **options, past_key_values=paged_cache(model, 3, 32))
    with pytest.raises(SequenceLengthError, match="at most 64 tokens"):
        model.generate(**prompts([8, 62]), **options, past_key_values=paged_cache(model, 2, 60))
    with pytest.raises(ModelError, match="set_attn_implementation"):
        model.generate(**inputs, **options)
    cache = paged_cache(model, 2, 32)
    model.generate(**inputs, **options, past_key_values=cache)
    with pytest.raises(ShapeError, match=r"attention_mask \[2, 30\]"):
        model(**prompts([30, 30]), past_key_values=cache)
    other = {"attention_mask": prompts([15, 16])["attention_mask"]}
    with pytest.raises(ShapeError, match=r"keeps \[14, 15\] earlier tokens, a cache that holds \[11, 15\]"):
        model(torch.ones(2, 1, dtype=torch.long), **other, past_key_values=cache)
    with pytest.raises(ShapeError, match="crop"):
        cache.crop(-17)
    with pytest.raises(ModelError, match="cannot be switched"):
        paged_cache(FixedAttention(transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1)), 1, 64)
    falcon = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="cannot be switched"):
        paged_cache(transformers.FalconForCausalLM(falcon), 1, 64)
    with torch.device("meta"):
        config = transformers.DeepseekV4Config(num_hidden_layers=4)
        v4 = transformers.DeepseekV4ForCausalLM(config)
    with pytest.raises(ModelError, match=r"compressed_sparse_attention.*\n.*full attention"):
        paged_cache(v4, 1, 64)
    with pytest.raises(DeviceError, match="cuda_graph=True, a model on cpu"):
        paged_cache(model, 1, 64, cuda_graph=True)
    windowed = transformers.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=16)
    mistral = transformers.MistralForCausalLM(windowed).eval()
    cache = paged_cache(mistral, 2, 32)
    with pytest.raises(ModelError, match="window"):
        mistral.generate(**inputs, **options, past_key_values=cache)


def test_a_sparse_index_takes_no_fp8_cache() -> None:
    with pytest.raises(DTypeError, match="sparse index"):
        paged_cache(build("DeepseekV32"), 1, 64, dtype=FP8)


@pytest.mark.skipif(VERSION >= (5, 19), reason="served from 5.19 on")
def test_sparse_models_are_refused_before_their_latents_are_cached() -> None:
    config = transformers.DeepseekV32Config(**(COMMON | SPARSE["DeepseekV32"]))
    with pytest.raises(ModelError, match="full attention in every layer"):
        paged_cache(transformers.DeepseekV32ForCausalLM(config), 1, 64)


def test_switching_back_gives_the_model_back() -> None:
    model, inputs = build("DeepseekV3"), prompts([8, 12])
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    paged_cache(model, 2, 32)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


def test_the_documented_example_prints_what_the_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "integrations.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", page, re.DOTALL).groups()
    monkeypatch.chdir(root)
    exec(code, {})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("draft", ["lookup", "assistant"])
@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV32", "Llama"])
def test_assisted_decoding_crops(family: str, draft: str) -> None:
    model, inputs = build(family), prompts([30])
    inputs["input_ids"][:, 15:] = inputs["input_ids"][:, :15]
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **options)
    how = {"prompt_lookup_num_tokens": 4} if draft == "lookup" else {"assistant_model": build(family)}
    cache = paged_cache(model, 1, 96)
    assert torch.equal(model.generate(**inputs, **options, **how, past_key_values=cache), expected)


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "OPT"])
def test_mha_models(family: str) -> None:
    dims = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCAB}
    more = {"OPT": {"ffn_dim": 64, "word_embed_proj_dim": 64}, "GPTNeoX": {"intermediate_size": 64}, "GPT2": {}}
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**dims, **more[family], eos_token_id=None, pad_token_id=0)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    inputs, options = prompts([17, 17]), {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, past_key_values=paged_cache(model, 2, 64)), expected)


@pytest.mark.parametrize("family", ["DeepseekV3", "Llama"])
def test_autocast_keeps_the_tokens(family: str) -> None:
    model, inputs = build(family), prompts([30, 30])
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(**inputs, **options)
        tokens = model.generate(**inputs, **options, past_key_values=paged_cache(model, 2, 64))
    assert torch.equal(tokens[:, :31], expected[:, :31])


def test_no_gradient_is_dropped() -> None:
    """A model that trains is refused; one in evaluation mode has gradients of its prompt, and raises after it."""
    model, ids = build("Llama"), prompts([9])["input_ids"]
    cache = paged_cache(model, 1, 64)
    weight = model.get_input_embeddings().weight
    (got,) = torch.autograd.grad(model(input_ids=ids, past_key_values=cache).logits.square().sum(), weight)
    loss = model(input_ids=ids[:, :1], past_key_values=cache).logits.sum()
    with pytest.raises(GradientError):
        loss.backward()
    plain = build("Llama")
    plain.set_attn_implementation("sdpa")
    (want,) = torch.autograd.grad(plain(input_ids=ids).logits.square().sum(), plain.get_input_embeddings().weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    model.train()
    with pytest.raises(GradientError, match=r"model\.eval"):
        model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("family", SPARSE)
def test_a_sparse_model_reads_what_its_indexer_picks(family: str) -> None:
    """Other tokens than a model that picks all; and a prompt no longer than the pick attends densely."""
    model, inputs = build(family), prompts([70, 40])
    options = {"max_new_tokens": 20, "do_sample": False}
    tokens = model.generate(**inputs, **options, past_key_values=hostile_cache(model, 2, 100))
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 200
    every = model.generate(**inputs, **options, past_key_values=hostile_cache(model, 2, 100))
    assert not torch.equal(tokens[:, 70:], every[:, 70:])
    model.set_attn_implementation("eager")
    assert torch.equal(every, model.generate(**inputs, **options))


@pytest.mark.parametrize("family", ["DeepseekV3", "Llama", "OPT"])
def test_fp8_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of steps over stored e4m3 against those over exact rows: what rounding the rows costs, and half the bytes.

    Factors other than 1, of each layer and head its own, must be passed along: without one the error is that of noise.
    """
    if family == "OPT":
        torch.manual_seed(3)
        dims = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCAB}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**dims, ffn_dim=64, word_embed_proj_dim=64)).eval()
    else:
        model = build(family)
    model.to(torch.bfloat16)
    inputs = prompts([70, 33])
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def logits(cache: PagedCache) -> torch.Tensor:
        cache.pages.k_cache[0].fill_(float("nan"))
        cache.pages.v_cache[0].fill_(float("nan"))
        with torch.no_grad():
            for part in (slice(0, 60), slice(60, 69), slice(69, 70)):
                last = model(
                    ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache,
                    **({} if family == "OPT" else {"position_ids": positions[:, part]}),
                )  # fmt: skip
        return last.logits[:, -1].float()

    exact = paged_cache(model, 2, 70)
    expected = logits(exact)
    heads = exact.pages.k_cache.shape[1]
    factors = torch.linspace(0.01, 0.02, heads)
    values = {} if exact.pages._latent else {"v_descale": factors.flip(0)}
    cache = paged_cache(model, 2, 70, dtype=FP8, k_descale=factors, **values)
    assert cache.pages.k_cache.itemsize == 1
    assert (logits(cache) - expected).norm() <= 0.06 * expected.norm()
    with monkeypatch.context() as patch:
        ones = (None, torch.ones(1, 1), torch.ones(1, 1))
        patch.setattr(layer, "bind", lambda call, out, bind=layer.bind: bind(call._replace(descales=ones), out))
        cache = paged_cache(model, 2, 70, dtype=FP8, k_descale=factors, **values)
        assert (logits(cache) - expected).norm() > 0.06 * expected.norm(), "the test would not see a lost descale"


@pytest.mark.parametrize("family", ["DeepseekV3", "GPT2"])
def test_a_cache_with_another_prompt_is_refused(family: str) -> None:
    if family == "GPT2":
        torch.manual_seed(3)
        dims = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB}
        config = transformers.GPT2Config(**dims, eos_token_id=None, bos_token_id=None, pad_token_id=0)
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        model = build(family)
    options = {"max_new_tokens": 6, "do_sample": False}
    first, other = prompts([20, 33]), prompts([40, 50], seed=5)
    expected = model.generate(**first, **options)
    cache = paged_cache(model, 2, 120)
    tokens = model.generate(**first, **options, past_key_values=cache)
    assert torch.equal(tokens, expected)
    for inputs in (other, prompts([20, 33], seed=9), {"input_ids": other["input_ids"]}):
        with pytest.raises(ModelError, match=r"holds 38 tokens of other ones.*[\s\S]*cache\.reset\(\)"):
            model.generate(**inputs, **options, past_key_values=cache)
    assert cache.pages.lengths == (25, 38), "a refused call leaves the cache as it was"

    # the same conversation goes on: all tokens so far, and more
    more = torch.cat([tokens, prompts([4, 4], seed=8)["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 10, dtype=torch.long)], 1)
    again = model.generate(more, attention_mask=mask, **options, past_key_values=cache)
    model.set_attn_implementation("eager")
    assert torch.equal(again, model.generate(more, attention_mask=mask, **options))


def test_a_switched_model_is_copied_and_pickled(tmp_path: Path) -> None:
    """What is put in the place of a model's methods belongs to the copy's modules, not to the original's."""
    model, inputs = build("DeepseekV3"), prompts([8, 12])
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    paged_cache(model, 2, 32)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(float("nan"))
        assert torch.equal(twin.generate(**inputs, **options, past_key_values=paged_cache(twin, 2, 32)), expected)
