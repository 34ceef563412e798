"""A decode loop: requests of different lengths, two layers, one pool of blocks, metadata once a step.

    python examples/decode_loop.py

The model is as small as can be: random embeddings, layers of grouped-query attention, greedy choice. The loop is a
server's: prompts go in padded and take no cache for their padding; each step appends one row a request and layer,
checks shapes once, and attends in every layer; a request that has its tokens gives its blocks back at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla import PagedKVCache, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata

LAYERS, HQ, HK, D, VOCAB = 2, 8, 2, 64, 101
WIDTH = HQ * D


class Model:
    """x + attention(x), a layer; weights drawn once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * shape[-2] ** -0.5

        self.embedding, self.head = draw(VOCAB, WIDTH), draw(WIDTH, VOCAB)
        self.qkv = [draw(WIDTH, (HQ + 2 * HK) * D) for _ in range(LAYERS)]
        self.out = [draw(WIDTH, WIDTH) for _ in range(LAYERS)]

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        """q [B, HQ, T, D], k and v [B, HK, T, D] of x [B, T, WIDTH], contiguous."""
        rows = (x @ self.qkv[layer]).unflatten(-1, (-1, D)).transpose(1, 2)
        return tuple(part.contiguous() for part in rows.split((HQ, HK, HK), dim=1))

    def add(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        return x + attended.transpose(1, 2).flatten(2) @ self.out[layer]

    def choose(self, x: Tensor) -> Tensor:
        """The next token of each row [B, WIDTH]."""
        return (x @ self.head).argmax(-1)


def generate(model: Model, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Greedy tokens: counts[b] of them behind prompt b."""
    B, lengths = len(prompts), [len(prompt) for prompt in prompts]
    caches = [PagedKVCache(B, HK, D, max_seq_len=256, pool_blocks=2 * B, dtype=torch.float32) for _ in range(LAYERS)]

    # prefill: padded to the longest; what is padding is neither seen nor kept
    padded = torch.zeros(B, max(lengths), dtype=torch.long)
    for b, prompt in enumerate(prompts):
        padded[b, : lengths[b]] = torch.tensor(prompt)
    x = model.embedding[padded]
    for layer, cache in enumerate(caches):
        q, k, v = model.heads(layer, x)
        cache.append(k, v, num_tokens=lengths)
        x = model.add(layer, x, flash_mla_prefill(q, k, v, seq_lens=cache.seq_lens))
    tokens = model.choose(x[torch.arange(B), torch.tensor(lengths) - 1])
    results = [[int(token)] for token in tokens]

    # decode: one token a request and step
    while active := [b for b in range(B) if len(results[b]) < counts[b]]:
        x = model.embedding[tokens].unsqueeze(1)  # [B, 1, WIDTH]; a finished request's row is attended to by nobody
        metadata = None
        for layer, cache in enumerate(caches):
            q, k, v = model.heads(layer, x)
            cache.append(k[active], v[active], requests=active)
            if metadata is None:  # all layers have the same lengths and shapes
                metadata = get_mla_metadata(q.shape, cache.k_cache.shape, cache.block_table, cache.seq_lens)
            out = flash_mla_with_kvcache(
                q, cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens, None, metadata
            )
            x = model.add(layer, x, out)
        tokens = model.choose(x[:, 0])
        for b in active:
            results[b].append(int(tokens[b]))
            if len(results[b]) == counts[b]:
                for cache in caches:
                    cache.free([b])
    assert all(cache.num_free_blocks == 2 * B for cache in caches)
    return results


def recompute(model: Model, prompt: list[int], count: int) -> list[int]:
    """The same without a cache: torch's attention over all tokens, for each new one."""
    tokens = list(prompt)
    for _ in range(count):
        x = model.embedding[torch.tensor([tokens])]
        for layer in range(LAYERS):
            q, k, v = model.heads(layer, x)
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = model.add(layer, x, attended)
        tokens.append(int(model.choose(x[:, -1])[0]))
    return tokens[len(prompt) :]


def main() -> bool:
    model = Model()
    prompts, counts = [[5, 17, 3], [*range(70)], [99]], [12, 5, 8]
    results = generate(model, prompts, counts)
    for prompt, result in zip(prompts, results, strict=True):
        print(f"{len(prompt):3} tokens of prompt -> {result}")
    same = results == [recompute(model, p, n) for p, n in zip(prompts, counts, strict=True)]
    print("the tokens of attention without a cache:", same)
    return same


if __name__ == "__main__":
    main()
