"""What the Hopper sparse decode takes and refuses, and which variant it chooses: no GPU needed."""

from __future__ import annotations

import pytest
import torch

from flash_mla.backends import hopper
from flash_mla.backends.hopper import sparse_decode
from flash_mla.problem import SparseProblem, SparseSet

KEYS = SparseSet(
    topk=2048, pages=100, page=64, cache_strides=(64 * 656, 656), index_strides=(4096, 2048), lengths=False
)


def problem(keys: dict | None = None, **changes: object) -> SparseProblem:
    """V3.2's decode: 128 heads, two tokens a request, 2048 keys each."""
    base = SparseProblem(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        B=4,
        S_q=2,
        Hq=128,
        D=576,
        Dv=512,
        format="fp8_ds_mla",
        sets=(KEYS._replace(**keys or {}),),
        q_strides=(2 * 128 * 576, 128 * 576, 576, 1),
        sink=False,
        max_logits=False,
    )
    return base._replace(**changes)  # type: ignore[arg-type]


MODEL1 = {"page": 53, "cache_strides": (31104, 584)}
BF16 = {"cache_strides": (64 * 576, 576)}


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({}, {}),
        ({}, {"S_q": 9, "sink": True}),
        ({}, {"Hq": 1}),
        # pages at a pitch of their own, and of any length
        ({"page": 7, "cache_strides": (8192, 656)}, {}),
        ({"pages": 1, "cache_strides": (3, 656)}, {}),
        ({"page": 2}, {"format": "flat"}),
        (MODEL1, {"format": "model1", "D": 512}),
        ({"cache_strides": (64 * 644, 644)}, {"format": "fp8_token"}),
        ({"cache_strides": (64 * 528, 528)}, {"format": "v4.1", "D": 512}),
        (BF16, {"format": None}),
        ({"cache_strides": (64 * 520, 520)}, {"format": None, "D": 512}),
    ],
)
def test_takes(keys: dict, changes: dict) -> None:
    assert sparse_decode.refuse(problem(keys, **changes)) is None
    assert hopper.phase(problem(keys, **changes)) is sparse_decode


@pytest.mark.parametrize(
    ("keys", "changes", "words"),
    [
        ({}, {"dtype": torch.float16, "format": None}, "BF16"),
        ({}, {"D": 128, "Dv": 128}, "576/512 or 512/512"),
        ({}, {"Dv": 256}, "576/512 or 512/512"),
        ({"pages": 0}, {}, "empty"),
        ({"cache_strides": (64 * 644 + 8, 644)}, {"format": "fp8_token"}, "page stride of 41224 bytes"),
        ({}, {"q_strides": (0, 0, 2, 2)}, "rows must be contiguous"),
        ({}, {"q_strides": (2 * 128 * 580, 128 * 580, 580, 1)}, "q head stride of 580"),
        ({"cache_strides": (64 * 656 + 8, 656)}, {}, "page stride of 41992 bytes"),
        ({"cache_strides": (64 * 580, 580)}, {"format": None}, "row stride of 1160 bytes"),
    ],
)
def test_refuses_with_a_reason(keys: dict, changes: dict, words: str) -> None:
    reason = sparse_decode.refuse(problem(keys, **changes))
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("heads", "tile", "cluster"),
    [(1, 8, 1), (8, 8, 1), (9, 16, 1), (16, 16, 1), (17, 64, 1), (33, 64, 1), (64, 64, 1), (65, 64, 2), (200, 64, 2)],
)
def test_config_holds_the_heads(heads: int, tile: int, cluster: int) -> None:
    config = sparse_decode.config(problem(Hq=heads, B=40))
    assert (config.tile_heads, config.cluster, config.team) == (tile, cluster, False)


@pytest.mark.parametrize(
    ("changes", "topk", "shape"),
    [
        # heads of a CTA, pairs of blocks of one at most, CTAs of a team, teams of an item
        ({"B": 1, "S_q": 1, "Hq": 8}, 2048, (8, 1, 8, 2)),
        ({"B": 1, "S_q": 1, "Hq": 64}, 2048, (16, 1, 8, 2)),
        ({"B": 1, "S_q": 1}, 2048, (16, 2, 8, 1)),
        ({"B": 8, "S_q": 1, "Hq": 16}, 2048, (16, 2, 8, 1)),
        ({"B": 8, "S_q": 1, "Hq": 32}, 2048, (16, 3, 6, 1)),
        ({"B": 8, "S_q": 1, "Hq": 64}, 2048, (16, 4, 2, 2)),
        ({"B": 8, "S_q": 1}, 512, (16, 2, 2, 1)),
        ({"B": 100, "S_q": 1, "Hq": 16}, 100, (16, 1, 1, 1)),
        ({"B": 1, "S_q": 1, "Hq": 16}, 0, (16, 1, 1, 1)),
        ({"B": 8, "S_q": 1}, 2048, (16, 8, 2, 1)),
        ({"B": 9, "S_q": 1}, 2048, None),
        # where producers convert or copy rows a CTA has fewer pairs
        ({"B": 2, "Hq": 64, "format": "model1", "D": 512}, 640, (16, 1, 5, 1)),
        ({"B": 2, "format": "model1", "D": 512}, 1152, None),
        ({"B": 8, "S_q": 1, "format": None}, 2048, None),
    ],
)
def test_short_calls_are_computed_by_teams(changes: dict, topk: int, shape: tuple | None) -> None:
    call = problem({"topk": topk}, **changes)
    team, config = sparse_decode.team(call), sparse_decode.config(call)
    assert team == shape
    assert config.team == (team is not None)
    if team is not None:
        assert (config.tile_heads, config.cluster, config.tile_rows) == (team.tile_heads, team.members, team.tile_heads)
        assert team.each * team.members * team.teams >= -(-topk // 128)


@pytest.mark.parametrize(
    ("changes", "halves"),
    [
        ({"B": 128, "S_q": 1, "Hq": 64}, True),
        ({"B": 17, "Hq": 17}, True),
        # a CTA has less than four pairs of blocks; two CTAs; few heads; rows of other scales
        ({"B": 15, "Hq": 64}, False),
        ({"B": 128, "Hq": 65}, False),
        ({"B": 128, "Hq": 16}, False),
        ({"B": 128, "Hq": 64, "format": "fp8_token"}, False),
    ],
)
def test_config_reads_raw_rows_in_long_calls_of_64_heads(changes: dict, halves: bool) -> None:
    assert sparse_decode.config(problem(**changes)).halves is halves
