"""The kernel that copies new rows into their pages: the bytes that torch's ops write, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_mla.backends.cpu import append, engine
from flash_mla.problem import FP8, AppendArgs

GARBAGE = 2**31 - 1


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("layout", ["slab", "pool", "latent"])
@pytest.mark.parametrize(
    ("dtype", "D", "Dv"), [(torch.bfloat16, 72, 8), (FP8, 8, 40), (torch.float32, 64, 64), (FP8, 576, 512)]
)
def test_copied_rows(dtype, D, Dv, layout, index, threads, monkeypatch):
    """Rows of random lengths behind random tokens, NaN around them; those past the table or the cache are dropped."""
    monkeypatch.setattr(append, "TEAM_BYTES", 1 if threads > 1 else 1 << 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    B, Hk, P, blocks = 3, 2, 70, 4
    generator = torch.Generator().manual_seed(D + Dv)
    rows = [torch.randn(B, P, Hk, n, generator=generator).to(dtype).transpose(1, 2) for n in (D, Dv)]
    if layout == "pool":
        caches = [torch.full((B * blocks, 64, Hk, n), float("nan")).to(dtype) for n in (D, Dv)]
        caches = [x.permute(2, 0, 1, 3).expand(B, -1, -1, -1, -1) for x in caches]
        table = torch.randperm(B * blocks, generator=generator).view(B, blocks)
    else:
        caches = [torch.full((B, Hk, blocks, 64, n), float("nan")).to(dtype) for n in (D, Dv)]
        table = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(B)])
    table[1, 2] = GARBAGE
    starts, counts = torch.tensor([0, 100, 250]), torch.tensor([70, 60, 33])
    wanted = [x[0].clone().expand(x.shape) if layout == "pool" else x.clone() for x in caches]
    for b in range(B):
        for i in range(int(counts[b])):
            block, slot = divmod(int(starts[b]) + i, 64)
            if block < blocks and table[b, block] != GARBAGE:
                for new, cache in zip(rows, wanted, strict=True):
                    cache[b, :, table[b, block], slot] = new[b, :, i]
    (k, v), (k_cache, v_cache) = rows, caches
    v, v_cache = (None, None) if layout == "latent" else (v, v_cache)
    assert engine.missing() is None
    for _ in range(2):  # what a call leaves to the next
        append.launch(
            AppendArgs(k, v, k_cache, v_cache, table.to(index), starts.to(index), counts.to(index)[:, None][:, 0])
        )
    assert torch.equal(bits(k_cache), bits(wanted[0]))
    assert v_cache is None or torch.equal(bits(v_cache), bits(wanted[1]))


@pytest.mark.parametrize("apart", [False, True], ids=["together", "columns-apart"])
def test_without_starts_and_counts(apart):
    """All rows from position 0 on, as torch's ops write them; columns that lie apart too."""
    k, v = torch.randn(2, 4, 130, 40).bfloat16(), torch.randn(2, 4, 130, 8).bfloat16()
    if apart:
        k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v))
    table = torch.tensor([[2, 0, 1], [0, 2, 1]])
    written = []
    for write in (append.copy_rows, append.index_rows):
        caches = [torch.zeros(2, 4, 3, 64, x.shape[3]).bfloat16() for x in (k, v)]
        write(AppendArgs(k, v, *caches, table, None, None))
        written.append(caches)
    for ours, theirs in zip(*written, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()
