"""BlockSparseLayout: every constructor against the element mask of its pattern."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flash_mla.errors import MaskShapeError, ShapeError
from flash_mla.layout import BlockSparseLayout

lengths = st.integers(1, 400)


def kept_blocks(mask: torch.Tensor) -> list[list[bool]]:
    """Which 64x64 blocks of mask [P, S] hold a True, one by one."""
    P, S = mask.shape
    return [[bool(mask[i : i + 64, j : j + 64].any()) for j in range(0, S, 64)] for i in range(0, P, 64)]


def query_minus_key(P: int) -> torch.Tensor:
    return torch.arange(P)[:, None] - torch.arange(P)[None, :]


@settings(deadline=None, max_examples=50)
@given(P=lengths)
def test_causal_keeps_the_blocks_of_the_lower_triangle(P: int) -> None:
    layout = BlockSparseLayout.causal(P)
    assert layout.shape == (1, 1, -(-P // 64), -(-P // 64))
    assert layout.blocks[0, 0].tolist() == kept_blocks(query_minus_key(P) >= 0)


@settings(deadline=None, max_examples=50)
@given(P=lengths, window=st.integers(1, 450), causal=st.booleans())
def test_sliding_window_keeps_every_block_that_it_touches(P: int, window: int, causal: bool) -> None:
    distance = query_minus_key(P)
    mask = (distance < window) & (distance >= (0 if causal else 1 - window))
    assert BlockSparseLayout.sliding_window(P, window, causal=causal).blocks[0, 0].tolist() == kept_blocks(mask)


@settings(deadline=None, max_examples=50)
@given(P=lengths, window=st.integers(1, 450), global_tokens=st.integers(1, 450), causal=st.booleans())
def test_local_global_adds_rows_and_columns(P: int, window: int, global_tokens: int, causal: bool) -> None:
    distance = query_minus_key(P)
    mask = distance.abs() < window
    mask[:, :global_tokens] = True
    mask[:global_tokens] = True
    layout = BlockSparseLayout.local_global(P, window, global_tokens, causal=causal)
    assert layout.blocks[0, 0].tolist() == kept_blocks(mask & (distance >= 0) if causal else mask)


@settings(deadline=None, max_examples=50)
@given(P=lengths, S=lengths, seed=st.integers(0, 99), leading=st.sampled_from([(), (2,), (1, 2), (3, 1)]))
def test_a_dense_mask_keeps_a_block_with_any_element(P: int, S: int, seed: int, leading: tuple[int, ...]) -> None:
    mask = torch.zeros(*leading, P, S, dtype=torch.bool)
    points = torch.randint(0, mask.numel(), (5,), generator=torch.Generator().manual_seed(seed))
    mask.view(-1)[points] = True
    layout = BlockSparseLayout.from_dense_mask(mask)
    assert layout.shape == (*(1,) * (2 - len(leading)), *leading, -(-P // 64), -(-S // 64))
    for blocks, one in zip(layout.blocks.flatten(0, 1), mask.view(-1, P, S), strict=True):
        assert blocks.tolist() == kept_blocks(one)


def windowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal, with a window of 200 (a full block now and then), wider for the second head."""
    return (q >= k) & (q - k < 200 + 100 * h)


@pytest.mark.parametrize("P", [64, 300, 1000])
def test_a_block_mask_of_64_is_the_dense_masks_layout(P: int) -> None:
    block_mask = create_block_mask(windowed, 1, 2, P, P, device="cpu", BLOCK_SIZE=64)
    distance = query_minus_key(P)
    dense = torch.stack([(distance >= 0) & (distance < 200), (distance >= 0) & (distance < 300)])
    layout = BlockSparseLayout.from_block_mask(block_mask)
    assert torch.equal(layout.blocks, BlockSparseLayout.from_dense_mask(dense).blocks)
    if P >= 300:  # full blocks count too
        assert int(block_mask.full_kv_num_blocks.sum()) > 0


@pytest.mark.parametrize("block_size", [(128, 64), (64, 128), (128, 256)])
def test_a_coarser_block_mask_is_cut_into_blocks_of_64(block_size: tuple[int, int]) -> None:
    P, S = 300, 500
    block_mask = create_block_mask(windowed, 1, 2, P, S, device="cpu", BLOCK_SIZE=block_size)
    blocks = BlockSparseLayout.from_block_mask(block_mask).blocks
    assert blocks.shape == (1, 2, 5, 8)
    coarse = block_mask.to_dense()
    for h in range(2):
        for i in range(5):
            for j in range(8):
                assert blocks[0, h, i, j] == coarse[0, h, i * 64 // block_size[0], j * 64 // block_size[1]]


def test_what_a_block_mask_leaves_undefined_is_not_read() -> None:
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 2**31 - 1], [7, -5]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=64, seq_lengths=(128, 128), compute_q_blocks=False
    )
    assert BlockSparseLayout.from_block_mask(block_mask).blocks.tolist() == [[[[False, True], [False, False]]]]


def test_block_sizes_that_cut_a_block_are_refused() -> None:
    block_mask = create_block_mask(windowed, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=(64, 32))
    with pytest.raises(ShapeError, match=r"\(64, 32\)"):
        BlockSparseLayout.from_block_mask(block_mask)


def test_and_keeps_what_both_keep_and_broadcasts() -> None:
    window = BlockSparseLayout.sliding_window(640, 100, causal=False)
    heads = BlockSparseLayout(torch.rand(1, 3, 10, 10) > 0.5)
    batch = BlockSparseLayout(torch.rand(2, 1, 10, 10) > 0.5)
    both = window & heads & batch
    assert torch.equal(both.blocks, window.blocks & heads.blocks & batch.blocks)
    assert both.shape == (2, 3, 10, 10)
    for other in (BlockSparseLayout.causal(64), BlockSparseLayout(torch.ones(1, 2, 10, 10, dtype=torch.bool))):
        with pytest.raises(MaskShapeError):
            heads & other


def test_a_layout_is_immutable() -> None:
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    layout = BlockSparseLayout(blocks)
    blocks.zero_()
    assert layout.density == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.blocks = blocks  # type: ignore[misc]


def test_a_layout_of_nothing_has_no_picture() -> None:
    for blocks in (torch.zeros(1, 1, 0, 0), torch.zeros(0, 1, 2, 2), torch.zeros(1, 1, 2, 2, device="meta")):
        layout = BlockSparseLayout(blocks.bool())
        assert repr(layout) == f"BlockSparseLayout({list(blocks.shape)} blocks of 64x64)"


def test_only_layouts_combine() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        BlockSparseLayout.causal(64) & [True]  # type: ignore[operator]


def test_repr_draws_the_blocks() -> None:
    assert repr(BlockSparseLayout.causal(129)) == (
        "BlockSparseLayout([1, 1, 3, 3] blocks of 64x64, density 66.7%)\n  ■··\n  ■■·\n  ■■■"
    )
    large = repr(BlockSparseLayout.causal(64 * 100)).splitlines()
    assert len(large) == 33
    assert {len(line) for line in large[1:]} == {34}
    assert BlockSparseLayout.causal(128).to("meta").blocks.device.type == "meta"


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda: BlockSparseLayout(torch.ones(2, 2, dtype=torch.bool)), MaskShapeError),
        (lambda: BlockSparseLayout(torch.ones(1, 1, 2, 2)), MaskShapeError),
        (lambda: BlockSparseLayout(torch.ones(1, 1, 2, 2, dtype=torch.bool).to_sparse()), MaskShapeError),
        (lambda: BlockSparseLayout.from_dense_mask(torch.ones(64, 64)), MaskShapeError),
        (lambda: BlockSparseLayout.from_dense_mask(torch.ones(64, dtype=torch.bool)), MaskShapeError),
        (lambda: BlockSparseLayout.causal(0), ShapeError),
        (lambda: BlockSparseLayout.sliding_window(64, 0), ShapeError),
        (lambda: BlockSparseLayout.local_global(64, 64, 0), ShapeError),
    ],
)
def test_what_is_no_layout_is_refused(bad, error) -> None:
    with pytest.raises(error, match=r"(?s)given:.*required:.*cause:.*fix:"):
        bad()
