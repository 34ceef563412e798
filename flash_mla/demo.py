"""The main job end to end: a ragged batch of prompts, decoded by an MLA model on the paged latent cache, and checked.

The model is random but has DeepSeek-V3's shape in all that attention sees, save the number of heads: its latent rows
are 512 + 64 wide. Nothing is downloaded: the prompts are cut from `demo.txt` beside this file. Needs the extras
`flash-mla[cli,transformers]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

from flash_mla.integrations.transformers import PagedCache, paged_cache
from flash_mla.problem import BLOCK

TEXT = Path(__file__).with_name("demo.txt")
"""What the prompts are cut from by default."""
LONGEST_STEP = 96  # bytes by which each prompt is longer than the one before
DEEPSEEK_V3_HEADS = 128
PAD = 256  # the token after the 256 bytes


@dataclass(frozen=True)
class Run:
    """One timed generation: new tokens [B, T], seconds of the prefill (first token included) and of the rest."""

    tokens: Tensor
    prefill_seconds: float
    decode_seconds: float


class Ticks(BaseStreamer):
    """Notes when each step's tokens arrive, and moves a progress bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.times: list[float] = []
        self._progress, self._task = progress, task

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())
        if len(self.times) > 1:  # the first call brings the prompt
            self._progress.advance(self._task)

    def end(self) -> None:
        pass


def demo(
    text: Path | None = None, device: str = "cpu", tokens: int = 32, batch: int = 4, console: Console | None = None
) -> None:
    """Generate `tokens` tokens for each of `batch` prompts cut from a text (None: TEXT), and print what it took.

    On a GPU each step of decode is one CUDA graph in a first run, and many launches in a second.

    Raises:
        SystemExit: the text is too short, or a token differs from eager attention's (exit status 1).
    """
    console = console or Console()
    inputs = cut_prompts((text or TEXT).read_bytes(), batch, device)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    model: Any = build_model()
    model.to(device)
    caches = {"paged latent cache": paged_cache(model, batch, max(lengths) + tokens)}
    if device == "cuda":
        # the experts that a CUDA graph can hold, in all runs alike
        model.set_experts_implementation("batched_mm")
        graphed = paged_cache(model, batch, max(lengths) + tokens, cuda_graph=True)
        caches = {"paged, CUDA graph": graphed, **caches}
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs: dict[str, Run] = {}
    with Progress(*columns, console=console) as progress:
        for title, cache in caches.items():
            runs[title] = generate(model, inputs, tokens, partial(emptied, cache), progress, title)
        model.set_attn_implementation("eager")
        eager = runs["eager attention"] = generate(model, inputs, tokens, DynamicCache, progress, "eager attention")
    console.print(figures(model, caches["paged latent cache"], lengths, runs))

    for title in caches:
        differing = (runs[title].tokens != eager.tokens).nonzero().tolist()
        if differing:
            request, step = min(differing, key=lambda place: place[1])
            raise SystemExit(f"{len(differing)} tokens differ; the first is token {step} of request {request}: {title}")
    console.print(f"All {eager.tokens.numel()} tokens are those of eager attention.")


def emptied(cache: PagedCache) -> PagedCache:
    """The same cache without tokens."""
    cache.reset()
    return cache


def cut_prompts(data: bytes, batch: int, device: str) -> dict[str, Tensor]:
    """Consecutive pieces of the text, each longer than the one before, as left-padded byte tokens and their mask."""
    step = min(LONGEST_STEP, len(data) // (batch * (batch + 1) // 2))
    if not step:
        raise SystemExit(f"The text has {len(data)} bytes; {batch} prompts need {batch * (batch + 1) // 2} at least")
    ids = torch.full((batch, batch * step), PAD)
    start = 0
    for b in range(batch):
        stop = start + (b + 1) * step
        ids[b, -(stop - start) :] = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.uint8)
        start = stop
    return {"input_ids": ids.to(device), "attention_mask": (ids != PAD).long().to(device)}


def build_model() -> DeepseekV3ForCausalLM:
    """A seeded DeepSeek-V3 of 2 layers and 8 heads: 4.6 M parameters, FP32.

    FP32, because greedy tokens of two orders of summation agree only while rounding is smaller than the gap between the
    two best tokens; in BF16 it often is not.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=264,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,  # never stop early
        initializer_range=0.1,  # wide enough that tokens vary
    )
    return DeepseekV3ForCausalLM(config).eval()


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    tokens: int,
    empty_cache: Callable[[], PagedCache | DynamicCache],
    progress: Progress,
    title: str,
) -> Run:
    """Greedy tokens; a first, short run keeps one-time costs out of the times."""
    task = progress.add_task(title, total=tokens)
    options: dict[str, Any] = {**inputs, "do_sample": False}
    model.generate(**options, past_key_values=empty_cache(), max_new_tokens=2)
    cache = empty_cache()
    ticks = Ticks(progress, task)
    start = perf_counter()
    sequences = model.generate(**options, past_key_values=cache, max_new_tokens=tokens, streamer=ticks)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return Run(new, ticks.times[1] - start, ticks.times[-1] - ticks.times[1])


def figures(model: DeepseekV3ForCausalLM, cache: PagedCache, lengths: list[int], runs: dict[str, Run]) -> Table:
    """Speeds of all runs, the last of which is eager attention's, and bytes of the cache after one."""
    config: Any = model.config
    pages = cache.pages
    *_, eager = runs.values()
    batch, new = eager.tokens.shape
    row = pages.k_cache.shape[1] * pages.k_cache.shape[-1] * pages.k_cache.itemsize  # of one token, all layers
    blocks = sum(-(-length // BLOCK) for length in pages.lengths)
    latent, held = row * sum(pages.lengths), row * blocks * BLOCK
    head_dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    width = config.kv_lora_rank + config.qk_rope_head_dim
    expanded = latent * config.num_attention_heads * head_dims // width

    table = Table(title=f"{batch} requests of {', '.join(map(str, lengths))} tokens, {new} new tokens each")
    table.add_column("")
    for title in runs:
        table.add_column(title, justify="right")
    table.add_row("prefill", *(f"{sum(lengths) / run.prefill_seconds:,.0f} tokens/s" for run in runs.values()))
    if new > 1:
        table.add_row("decode", *(f"{batch * (new - 1) / run.decode_seconds:,.0f} tokens/s" for run in runs.values()))
    same = (f"{int((run.tokens == eager.tokens).sum())} of {eager.tokens.numel()}" for run in [*runs.values()][:-1])
    table.add_row("identical tokens", *same)
    table.add_section()
    table.add_row("cache: latent rows", f"{latent:,} B")
    table.add_row("cache: their 64-token blocks", f"{held:,} B")
    table.add_row(f"as K and V of {config.num_attention_heads} heads", f"{expanded:,} B")
    table.add_row("latent saves", f"{expanded / latent:.1f}x")
    table.add_row(f"with {DEEPSEEK_V3_HEADS} heads", f"{DEEPSEEK_V3_HEADS * head_dims / width:.1f}x")
    return table
