"""Continuous batching on transformers: requests arrive and leave at any pass, all on one pool of blocks.

    python examples/serve.py                      # the recorded trace, checked against one request at a time

Every pass of the model is a batch of a fixed number of slots. A slot whose prompt is not in the cache yet takes a chunk
of it, one that decodes takes its last token, and an empty one takes padding, which costs no cache:

    arrive    a waiting request takes a free slot; where a running one begins with the same tokens, `fork` shares
              their full blocks and only the rest of the prompt is computed
    pass      chunks of prompts beside single tokens, under one attention_mask
    leave     a finished request's blocks are free at once, those that others share aside
    no room   CacheFullError is raised before anything is written: the request that came last goes back to the queue
              with the tokens it has, and is computed again later

The model is random but of DeepSeek-V3's shape (`flash_mla.demo`), its tokens are bytes, and time is counted in passes,
so that a trace means the same on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache

from flash_mla import CacheFullError
from flash_mla.demo import TEXT, build_model
from flash_mla.integrations.transformers import paged_cache

BLOCK = 64
HERE = Path(__file__).parent


@dataclass
class Request:
    """A prompt, how many tokens it wants, and those that it has.

    Attributes:
        arrival: the pass at which it comes.
        prompt: token ids.
        wanted: new tokens, at least 1.
        tokens: new tokens so far.
        shared: prompt tokens that it never computed, since another request had.
        finished: the pass at which it left.
    """

    arrival: int
    prompt: list[int]
    wanted: int
    tokens: list[int] = field(default_factory=list)
    shared: int = 0
    finished: int = -1

    @property
    def known(self) -> list[int]:
        """All tokens so far; the cache lacks at least the last one."""
        return self.prompt + self.tokens

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.wanted


@dataclass
class Use:
    """What serving a trace took.

    Attributes:
        passes: of the model; computed: tokens that went through it, padding aside.
        most_blocks: held at a time; most_saved: blocks that requests would hold beyond these without sharing.
        sent_back: how often a request left its slot for want of a block.
    """

    passes: int = 0
    computed: int = 0
    most_blocks: int = 0
    most_saved: int = 0
    sent_back: int = 0
    seconds: float = 0.0


class Server:
    """Slots over one paged cache.

    Args:
        model: a causal language model of transformers that `paged_cache` serves; its attention is switched.
        slots: B, requests at a time.
        max_seq_len: tokens that a request may hold, prompt and new ones.
        blocks: 64-token blocks of the pool; at least what one full request needs.
        chunk: prompt tokens that a request computes in one pass.
    """

    def __init__(self, model: Any, slots: int, max_seq_len: int, blocks: int, chunk: int = 32) -> None:
        if blocks * BLOCK < max_seq_len:
            raise SystemExit(f"{blocks} blocks of {BLOCK} tokens do not hold one request of {max_seq_len}")
        self.model, self.blocks, self.chunk = model, blocks, chunk
        self.cache = paged_cache(model, slots, max_seq_len, pool_blocks=blocks)
        self.running: dict[int, Request] = {}  # slot -> request, in order of admission
        self.waiting: deque[Request] = deque()

    def run(self, requests: list[Request]) -> Use:
        """Serve requests that arrive at their passes, until all are done."""
        use, coming, start = Use(), deque(sorted(requests, key=lambda r: r.arrival)), perf_counter()
        while coming or self.waiting or self.running:
            while coming and coming[0].arrival <= use.passes:
                self.waiting.append(coming.popleft())
            self._admit()
            if self.running:
                self._one_pass(use)
            use.passes += 1
        use.seconds = perf_counter() - start
        return use

    def _admit(self) -> None:
        """Give waiting requests the free slots, in their order."""
        pages = self.cache.pages
        free = [slot for slot in range(len(pages.lengths)) if slot not in self.running]
        for slot in free:
            if not self.waiting:
                return
            request = self.waiting[0]
            source, common = self._longest_prefix(request)
            if common:
                try:
                    pages.fork(source, slot)
                except CacheFullError:  # the copy of a partly filled block
                    return
                pages.truncate([common], [slot])
                request.shared += common
            self.running[slot] = self.waiting.popleft()

    def _longest_prefix(self, request: Request) -> tuple[int, int]:
        """(slot, tokens): who holds most of the request's tokens, in full blocks; its last one is always computed."""
        best = (-1, 0)
        for slot, other in self.running.items():
            held = other.known[: self.cache.pages.lengths[slot]]
            pairs = zip(held, request.known[:-1], strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(request.known) - 1))
            best = max(best, (slot, common // BLOCK * BLOCK), key=lambda pair: pair[1])
        return best

    def _one_pass(self, use: Use) -> None:
        """A chunk or a token of every running request; those that are done leave."""
        pages = self.cache.pages
        while True:
            new = {
                slot: request.known[(held := pages.lengths[slot]) : held + self.chunk]
                for slot, request in self.running.items()
            }
            try:
                logits = self._forward(new)
                break
            except CacheFullError:
                slot, request = self.running.popitem()  # the last one admitted
                pages.free([slot])
                self.waiting.appendleft(request)
                use.sent_back += 1
        use.computed += sum(map(len, new.values()))
        held = self.blocks - pages.num_free_blocks
        use.most_blocks = max(use.most_blocks, held)
        use.most_saved = max(use.most_saved, sum(-(-length // BLOCK) for length in pages.lengths) - held)
        for slot, request in [*self.running.items()]:
            if pages.lengths[slot] == len(request.known):
                request.tokens.append(int(logits[slot, len(new[slot]) - 1].argmax()))
            if request.done:
                request.finished = use.passes
                pages.free([slot])
                del self.running[slot]

    @torch.no_grad()
    def _forward(self, new: dict[int, list[int]]) -> torch.Tensor:
        """Logits [B, P, vocabulary] of each slot's new tokens, which come first in its row; padding behind them."""
        lengths, device = self.cache.pages.lengths, self.model.device
        P, seen = max(map(len, new.values())), max(lengths)
        ids = torch.zeros(len(lengths), P, dtype=torch.int64)
        mask = torch.zeros(len(lengths), seen + P, dtype=torch.int64)
        for slot, length in enumerate(lengths):
            tokens = new.get(slot, [])
            ids[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[slot, :length] = 1
            mask[slot, seen : seen + len(tokens)] = 1
        positions = torch.tensor(lengths)[:, None] + torch.arange(P)
        self.cache.seen = seen
        result = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
        )
        return result.logits


def one_by_one(model: Any, requests: list[Request]) -> list[list[int]]:
    """Each request's tokens by transformers alone, in a batch of its own: eager attention, its own cache."""
    model.set_attn_implementation("eager")
    tokens = []
    for request in requests:
        ids = torch.tensor([request.prompt], device=model.device)
        options = {"max_new_tokens": request.wanted, "do_sample": False, "past_key_values": DynamicCache()}
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist())
    return tokens


def read_trace(trace: Path, text: Path) -> list[Request]:
    """Requests of a trace, one a line: {"pass": arrival, "prompt": [[start, stop], ..] of text, "tokens": wanted}."""
    data = text.read_bytes()
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    return [
        Request(line["pass"], [byte for start, stop in line["prompt"] for byte in data[start:stop]], line["tokens"])
        for line in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a trace of requests with continuous batching.")
    parser.add_argument("--trace", type=Path, default=HERE / "arrivals.jsonl")
    parser.add_argument("--slots", type=int, default=4, help="requests at a time")
    parser.add_argument("--blocks", type=int, default=16, help="64-token blocks of the pool")
    parser.add_argument("--chunk", type=int, default=32, help="prompt tokens of a request in one pass")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    requests = read_trace(options.trace, TEXT)
    model: Any = build_model().to(options.device)
    longest = max(len(request.prompt) + request.wanted for request in requests)
    use = Server(model, options.slots, longest, options.blocks, options.chunk).run(requests)
    new = sum(len(request.tokens) for request in requests)
    prompts = sum(len(request.prompt) for request in requests)
    waits = sorted(request.finished - request.arrival for request in requests)
    print(
        f"{len(requests)} requests in {use.passes} passes, {use.seconds:.1f} s: {new / use.seconds:.0f} new tokens/s,"
    )
    shared = sum(request.shared for request in requests)
    print(f"{use.computed} tokens computed, of {prompts} of prompts and {new} new ones; {shared} shared;")
    print(f"cache: at most {use.most_blocks} of {options.blocks} blocks held, {use.most_saved} more saved by sharing;")
    print(
        f"{use.sent_back} requests sent back for want of a block; passes in the server: median {waits[len(waits) // 2]}"
    )
    if [request.tokens for request in requests] != one_by_one(model, requests):
        raise SystemExit("A request's tokens are not those that it gets alone")
    print("Every request's tokens are those that it gets alone.")


if __name__ == "__main__":
    main()
