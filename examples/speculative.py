"""Speculative decoding with a tree: a draft guesses, one call verifies all guesses, the cache rolls back.

    python examples/speculative.py

The model is a small random decoder; its draft is its own first layers. A round, for requests of any lengths:

    draft    two branches of 3 tokens behind each request's last token: the branch point is shared by `fork`
    verify   the last token and the 6 guesses in one decode call, S_q = 7, under a mask that is the tree
    accept   walk the tree as long as a guess is the model's own greedy choice; its last choice comes on top
    roll     `truncate` each request to what is right in place, and append the rest of the accepted path's rows

so a round gives 1 to 4 tokens for one pass of the model, and they are those of plain greedy decoding. (Verifying a
tree: SpecInfer, Miao et al. 2023; a draft of early layers: LayerSkip, Elhoushi et al. 2024.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from flash_mla import PagedKVCache, flash_mla_with_kvcache

DEPTH = 3  # guesses of a branch
# the tree: node 0 is the last token; nodes 1, 3, 5 are one branch and 2, 4, 6 the other
PARENTS = (-1, 0, 0, 1, 2, 3, 4)
DEPTHS = torch.tensor((0, 1, 1, 2, 2, 3, 3))


def tree_mask() -> Tensor:
    """[7, 7] bool: a node sees itself and the nodes above it."""
    mask = torch.eye(len(PARENTS), dtype=torch.bool)
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


# --- Model ------------------------------------------------------------------------------------------------------------

VOCAB, WIDTH, HQ, HK, D = 97, 128, 4, 2, 64
ROWS = list[tuple[Tensor, Tensor]]  # K and V of new tokens [B, HK, T, D], a layer each


class Model:
    """A decoder of grouped-query attention with rotary positions, random and FP32; later layers change less."""

    def __init__(self, layers: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

        self.embedding = weight(VOCAB, WIDTH) * WIDTH**0.5
        self.head = weight(VOCAB, WIDTH)
        self.layers = [
            (
                weight((HQ + 2 * HK) * D, WIDTH),  # q, k, v
                weight(WIDTH, HQ * D, 1 / (1 + 3 * i)),
                weight(2 * WIDTH, WIDTH),  # gate, value
                weight(WIDTH, WIDTH, 1 / (1 + 3 * i)),
            )
            for i in range(layers)
        ]

    def first(self, layers: int) -> Model:
        """The draft: the first layers, with the same embedding and head."""
        draft = object.__new__(Model)
        draft.embedding, draft.head, draft.layers = self.embedding, self.head, self.layers[:layers]
        return draft

    def caches(self, batch: int, max_seq_len: int) -> list[PagedKVCache]:
        """One a layer; a pool, so that a fork shares its blocks."""
        blocks = batch * (max_seq_len // 64 + 1)
        options = {"max_seq_len": max_seq_len, "pool_blocks": blocks, "dtype": torch.float32}
        return [PagedKVCache(batch, HK, D, **options) for _ in self.layers]

    def __call__(
        self,
        tokens: Tensor,
        caches: list[PagedKVCache],
        *,
        tail: Tensor | None = None,
        depths: Tensor | None = None,
        counts: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
    ) -> tuple[Tensor, ROWS]:
        """Append tokens [R, T] to requests' caches and attend.

        Args:
            tail: [T, T] bool, which new tokens each one sees; causal if omitted. Earlier tokens are all seen.
            depths: [T], positions behind the request's end; 0, 1, .. T - 1 if omitted.
            counts: [R], how many of the T tokens are meant; the others are neither kept nor right.
            requests: the R requests; all if omitted.

        Returns:
            (logits [R, T, VOCAB], the new rows).
        """
        R, T = tokens.shape
        rows = [*range(len(caches[0].lengths))] if requests is None else [*requests]
        starts = torch.tensor([caches[0].lengths[b] for b in rows])
        tail = torch.ones(T, T, dtype=torch.bool).tril() if tail is None else tail
        positions = starts[:, None] + (torch.arange(T) if depths is None else depths)
        x, made = self.embedding[tokens], []
        for (qkv, out, up, down), cache in zip(self.layers, caches, strict=True):
            q, k, v = (rms_norm(x, (WIDTH,)) @ qkv.T).view(R, T, -1, D).transpose(1, 2).split([HQ, HK, HK], 1)
            q, k = rotate(q, positions), rotate(k, positions)
            cache.append(k, v, counts, rows)
            attended = flash_mla_with_kvcache(
                q.contiguous(), cache.k_cache[:R], cache.v_cache[:R],  # of a pool: any R requests' memory
                cache.block_table[rows], cache.seq_lens[rows], visible(starts, tail, max(cache.lengths)),
            )  # fmt: skip
            x = x + attended.transpose(1, 2).flatten(2) @ out.T
            gate, value = (rms_norm(x, (WIDTH,)) @ up.T).chunk(2, -1)
            x = x + (silu(gate) * value) @ down.T
            made.append((k, v))
        return rms_norm(x, (WIDTH,)) @ self.head.T, made


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions [R, T] on x [R, H, T, D]."""
    angles = positions[:, None, :, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def visible(starts: Tensor, tail: Tensor, keys: int) -> Tensor:
    """[R, 1, T, keys] bool: all tokens before starts [R], and new ones by tail [T, T]."""
    T = len(tail)
    new = torch.arange(keys) - starts[:, None]  # [R, keys]: which new token a key is
    seen = tail[:, new.clamp(0, T - 1)].transpose(0, 1)  # [R, T, keys]
    return torch.where((new < 0)[:, None], True, seen)[:, None]


# --- Decoding ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """tokens: of each request, the new ones; passes of the model over the batch, its prompts' aside."""

    tokens: list[list[int]]
    passes: int


def prefill(model: Model, caches: list[PagedKVCache], prompts: list[list[int]]) -> list[int]:
    """Each prompt, a few tokens at a time; returns the first new token of each."""
    first = []
    for b, prompt in enumerate(prompts):
        for start in range(0, len(prompt), 8):
            logits, _ = model(torch.tensor([prompt[start : start + 8]]), caches, requests=[b])
        first.append(int(logits[0, -1].argmax()))
    return first


def greedy(model: Model, prompts: list[list[int]], new_tokens: int) -> Result:
    """Plain decoding: one token a request and pass."""
    caches = model.caches(len(prompts), max(map(len, prompts)) + new_tokens)
    last = torch.tensor(prefill(model, caches, prompts))
    tokens = [last]
    for _ in range(new_tokens - 1):
        logits, _ = model(last[:, None], caches)
        last = logits[:, -1].argmax(-1)
        tokens.append(last)
    return Result(torch.stack(tokens, 1).tolist(), new_tokens - 1)


def speculate(model: Model, draft: Model, prompts: list[list[int]], new_tokens: int) -> Result:
    """The same tokens in fewer passes of the model."""
    # a request that is done goes on until all are: room for one whose every guess is right
    B, most = len(prompts), max(map(len, prompts)) + (DEPTH + 1) * new_tokens + len(PARENTS)
    caches, guesses = model.caches(B, most), draft.caches(2 * B, most)
    tokens = [[first] for first in prefill(model, caches, prompts)]
    prefill(draft, guesses, prompts)
    passes = 0
    while min(map(len, tokens)) < new_tokens:
        known = [len(prompt) + len(new) for prompt, new in zip(prompts, tokens, strict=True)]
        # accepted tokens that the draft has not seen, then its guesses
        pending = [tokens[b][guesses[0].lengths[b] - len(prompts[b]) :] for b in range(B)]
        branches = guess(draft, guesses, pending)
        tree = torch.cat([torch.tensor([[new[-1]] for new in tokens]), branches], 1)  # [B, 7]
        logits, made = model(tree, caches, tail=tree_mask(), depths=DEPTHS)
        passes += 1
        choices = logits.argmax(-1)
        paths = [walk(tree[b].tolist(), choices[b].tolist()) for b in range(B)]
        for b, path in enumerate(paths):
            tokens[b] += [*tree[b, path[1:]].tolist(), int(choices[b, path[-1]])]
        keep(caches, made, paths)
        # the draft keeps what was known before the round, and drops its guesses
        for cache in guesses:
            cache.truncate(known, range(B))
    return Result([new[:new_tokens] for new in tokens], passes)


def guess(draft: Model, caches: list[PagedKVCache], pending: list[list[int]]) -> Tensor:
    """Two branches of DEPTH tokens behind each request, in the tree's order: [B, 6].

    Request b of the draft goes on as b and as its fork B + b.
    """
    B = len(pending)
    counts = [len(tokens) for tokens in pending]
    padded = torch.tensor([tokens + [0] * (max(counts) - len(tokens)) for tokens in pending])
    logits, _ = draft(padded, caches, counts=counts, requests=range(B))
    last = logits[torch.arange(B), torch.tensor(counts) - 1].topk(2).indices.T.flatten()  # [2B]: best, second best
    levels = [last]
    for cache in caches:
        for b in range(B):
            cache.fork(b, B + b)
    for _ in range(DEPTH - 1):
        logits, _ = draft(last[:, None], caches)
        last = logits[:, -1].argmax(-1)
        levels.append(last)
    for cache in caches:
        cache.free(range(B, 2 * B))
    return torch.stack(levels).view(DEPTH, 2, B).permute(2, 0, 1).flatten(1)


def walk(tree: list[int], choices: list[int]) -> list[int]:
    """The nodes from the root on whose tokens are what the model chose at their parents."""
    path = [0]
    while True:
        node = path[-1]
        agreed = [child for child, parent in enumerate(PARENTS) if parent == node and tree[child] == choices[node]]
        if not agreed:
            return path
        path.append(agreed[0])


def keep(caches: list[PagedKVCache], made: ROWS, paths: list[list[int]]) -> None:
    """Leave of the tree's rows in the caches those of each request's path, side by side."""
    B, T = len(paths), len(PARENTS)
    right = [next((i for i, node in enumerate(path) if node != i), len(path)) for path in paths]  # already in place
    rest = [path[n:] for path, n in zip(paths, right, strict=True)]
    counts = [len(nodes) for nodes in rest]
    index = torch.tensor([nodes + [0] * (max(counts) - len(nodes)) for nodes in rest], dtype=torch.int64).view(B, -1)
    for cache, (k, v) in zip(caches, made, strict=True):
        cache.truncate([length - T + n for length, n in zip(cache.lengths, right, strict=True)])
        if max(counts):
            moved = [x[torch.arange(B)[:, None], :, index].transpose(1, 2) for x in (k, v)]
            cache.append(*moved, counts)


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (5, 70, 33)]
    model, new_tokens = Model(), 64
    plain = greedy(model, prompts, new_tokens)
    fast = speculate(model, model.first(2), prompts, new_tokens)
    if fast.tokens != plain.tokens:
        raise SystemExit("speculative decoding gave other tokens")
    per_pass = (new_tokens - 1) / fast.passes
    print(f"{new_tokens} tokens for each of {len(prompts)} requests: {plain.passes} passes of the model one by one,")
    print(f"{fast.passes} with a draft of 2 of its 4 layers ({per_pass:.2f} tokens a pass). The tokens are the same.")


if __name__ == "__main__":
    main()
