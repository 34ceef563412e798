"""Attention over several ranks: processes that talk over gloo on the loopback interface, against float64."""

from __future__ import annotations

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla import HeadGroupingError
from flash_mla.distributed import (
    head_slices,
    local_cache,
    local_lengths,
    local_mask,
    local_positions,
    local_table,
    prompt_chunks,
)

# --- Who holds what ---------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 9)
TOKENS = st.integers(0, 3000)


@given(TOKENS, SIZES)
def test_ranks_hold_every_token_once(tokens, size):
    held = [local_positions(local_lengths(tokens, rank, size), rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(tokens))
    assert all((x.diff() > 0).all() for x in held), "a rank's keys keep their order"
    assert max(map(len, held)) - min(map(len, held)) <= 64


@given(st.lists(st.integers(-70, 3000), max_size=5), SIZES)
def test_lengths_of_a_tensor_are_those_of_its_numbers(lengths, size):
    for dtype in (torch.int32, torch.int64):
        for rank in range(size):
            got = local_lengths(torch.tensor(lengths, dtype=dtype), rank, size)
            assert got.dtype == dtype
            assert got.tolist() == [local_lengths(length, rank, size) for length in lengths]


@given(TOKENS, SIZES)
def test_chunks_hold_every_token_once(tokens, size):
    chunks = [chunk for rank in range(size) for chunk in prompt_chunks(tokens, rank, size)]
    assert sorted(i for chunk in chunks for i in range(chunk.start, chunk.stop)) == [*range(tokens)]


def test_chunks_cost_the_same():
    """Of a prompt of 2 size blocks, every rank's queries see as many keys."""
    size = 4
    work = [sum(sum(range(c.start + 1, c.stop + 1)) for c in prompt_chunks(512, rank, size)) for rank in range(size)]
    assert len(set(work)) == 1


def test_local_cache_is_the_blocks_in_order():
    cache, table = torch.randn(2, 3, 5, 64, 8), torch.tensor([[4, 0, 2], [1, 3, 2**31 - 1]], dtype=torch.int32)
    own, own_table = local_cache(cache, table, 1, 2)
    assert torch.equal(own, torch.stack([cache[0, :, [0]], cache[1, :, [3]]]))
    assert own_table.tolist() == [[0], [0]]
    own, _ = local_cache(cache, table, 0, 2)
    assert torch.equal(own[0], cache[0, :, [4, 2]])
    assert local_table(table, 0, 2).tolist() == [[4, 2], [1, 2**31 - 1]]


def test_local_mask_hides_what_no_column_covers():
    mask = torch.ones(1, 1, 1, 130, dtype=torch.bool)
    assert local_mask(mask, 192, 0, 2)[0, 0, 0].nonzero().flatten().tolist() == [*range(66)]
    bias = local_mask(torch.zeros(1, 1, 1, 0), 64, 1, 2)
    assert bool((bias == -torch.inf).all())


@pytest.mark.parametrize(
    ("heads", "want"),
    [
        ((128, 1, 3, 8), (slice(48, 64), slice(0, 1))),
        ((32, 8, 1, 4), (slice(8, 16), slice(2, 4))),
        ((32, 2, 3, 4), (slice(24, 32), slice(1, 2))),
    ],
)
def test_heads_of_a_rank(heads, want):
    assert head_slices(*heads) == want


@pytest.mark.parametrize("heads", [(6, 6, 0, 4), (12, 3, 0, 4), (6, 4, 0, 2)])
def test_heads_that_do_not_divide(heads):
    with pytest.raises(HeadGroupingError, match="do not divide among the ranks"):
        head_slices(*heads)


# --- Processes --------------------------------------------------------------------------------------------------------

SETS = {2: ranks.context_only, 4: ranks.context_and_heads}


@pytest.fixture(scope="module", params=SETS, ids="{}-ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list:
    size = request.param
    return ranks.run(size, SETS[size], tmp_path_factory.mktemp(f"ranks{size}"))


def test_every_case_on_every_rank(found):
    assert None not in found, "a rank ended without a result: see its traceback above"
    wrong = {(rank, name): failures for rank, cases in enumerate(found) for name, failures in cases.items() if failures}
    assert not wrong
    assert {*ranks.DECODE, *ranks.PREFILL} <= found[0].keys()
    assert all(cases.keys() == found[0].keys() for cases in found)


def test_a_lost_rank_is_an_error_of_the_others(tmp_path):
    found, lost = ranks.run(2, ranks.lose_a_rank, tmp_path)
    assert found == {"late": [], "late step": [], "dead": []}
    assert lost is None


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_every_case_over_nccl(size, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, has {torch.cuda.device_count()}")
    found = ranks.run(size, SETS[size], tmp_path, "cuda")
    assert None not in found
    assert not {(rank, name): x for rank, cases in enumerate(found) for name, x in cases.items() if x}
