"""The worked example of speculative decoding: its tokens, its rollback, and the blocks that it gives back."""

from __future__ import annotations

import pytest
import speculative as example
import torch

PROMPTS = [[1, 2, 3, 4, 5], [*range(62)], [7]]  # the second one's new tokens begin in its first block's last slots


@pytest.mark.parametrize("seed", [0, 3])
def test_tokens_are_those_of_plain_greedy(seed: int) -> None:
    model = example.Model(seed=seed)
    plain = example.greedy(model, PROMPTS, 24)
    fast = example.speculate(model, model.first(2), PROMPTS, 24)
    assert fast.tokens == plain.tokens
    assert len({token for tokens in plain.tokens for token in tokens}) > 20, "a model that repeats itself tests little"
    assert fast.passes < plain.passes


def test_a_draft_that_is_always_wrong_costs_passes_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = example.Model()
    plain = example.greedy(model, PROMPTS, 8)
    monkeypatch.setattr(example, "walk", lambda tree, choices: [0])
    assert example.speculate(model, model.first(1), PROMPTS, 8) == example.Result(plain.tokens, 7)


def test_the_walk_follows_either_branch() -> None:
    tree = [9, 1, 2, 3, 4, 5, 6]
    assert example.walk(tree, [1, 3, 0, 5, 0, 0, 0]) == [0, 1, 3, 5]
    assert example.walk(tree, [2, 0, 4, 0, 7, 0, 0]) == [0, 2, 4]
    assert example.walk(tree, [8, 1, 2, 3, 4, 5, 6]) == [0]


def test_the_rollback_leaves_the_path_and_gives_blocks_back() -> None:
    model = example.Model(layers=1)
    (cache,) = caches = model.caches(3, 128)
    heads, width = 2, 64
    before = torch.randn(3, heads, 60, width)
    cache.append(before, before, [60, 3, 60])
    tree = torch.randn(3, heads, 7, width)
    cache.append(tree, tree)
    free = cache.num_free_blocks
    paths = [[0], [0, 2, 4, 6], [0, 1, 3, 5]]
    example.keep(caches, [(tree, tree)], paths)
    assert cache.lengths == (61, 7, 64)
    assert cache.num_free_blocks == free + 2, "the trees of two requests reached into a block of their own"
    for b, (path, start) in enumerate(zip(paths, (60, 3, 60), strict=True)):
        blocks = cache.block_table[b, : -(-cache.lengths[b] // 64)].long()
        held = cache.k_cache[b][:, blocks].flatten(1, 2)[:, : cache.lengths[b]]
        assert torch.equal(held, torch.cat([before[b, :, :start], tree[b][:, path]], 1))
