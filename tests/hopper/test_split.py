"""The work split of the Hopper decode against brute force: every step once, balanced, split as combine reads it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla.kernels.hopper import split


def line(lengths: list[int], groups: int) -> list[tuple[int, int, int]]:
    """The items in order: (request, group, pairs)."""
    return [(b, g, -(-length // split.PAIR)) for b, length in enumerate(lengths) for g in range(groups)]


def plan(lengths: list[int], groups: int, clusters: int, start: int, most_parts: int = 8) -> Any:
    """The plan that the kernel chooses."""
    pairs = [split.weight(split.pairs(length), 1) for length in lengths]
    even = split.even(groups * sum(pairs), groups * len(pairs), clusters, start)
    whole = split.unsplit(max(pairs), groups * len(pairs), -(-groups * len(pairs) // clusters))
    if not split.pays(even, whole):
        return whole
    longer = split.longer(even.chunk, max(pairs), most_parts)
    return even._replace(chunk=longer) if longer <= even.chunk + split.PATIENCE else even


def walk(lengths: list[int], groups: int, clusters: int, start: int) -> list[list[tuple[Any, Any, int]]]:
    """What each cluster does, as its roles find it: (item, segment, offset in the item) in order."""
    items = line(lengths, groups)
    steps, total, floor, front = plan(lengths, groups, clusters, start)
    starts = [0]
    for _, _, pairs in items:
        starts.append(starts[-1] + split.weight(pairs, floor, start=front))
    assert starts[-1] == total
    result = []
    for cluster in range(clusters):
        here, left, segments = cluster * steps, max(0, min(steps, total - cluster * steps)), []
        i = next((i for i in range(len(items)) if starts[i] <= here < starts[i + 1]), len(items))
        offset = here - starts[i] if i < len(items) else 0
        while left > 0:
            part = split.segment(items[i][2], offset, left, floor, start=front)
            assert part.steps > 0
            if part.last > part.first or part.whole:
                segments.append((items[i], part, offset))
            left, offset, i = left - part.steps, 0, i + 1
        result.append(segments)
    return result


CASES = st.tuples(
    st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2)
)


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_every_pair_once_and_balanced(case: tuple[list[int], int, int, int]) -> None:
    lengths, groups, clusters, start = case
    seen: dict[tuple[int, int, int], list[int]] = {item: [] for item in line(lengths, groups)}
    visits = dict.fromkeys(seen, 0)
    total = sum(split.weight(pairs, 1) for _, _, pairs in seen)
    chunk, _, _, front = plan(lengths, groups, clusters, start)
    for segments in walk(lengths, groups, clusters, start):
        computed = sum(part.last - part.first for _, part, _ in segments)
        if front == 0:
            assert computed <= -(-(total + start * len(seen)) // clusters) + split.SPLIT_COST
        else:
            # a range pays for each item that it begins; of the item that it starts inside, somebody else paid
            assert computed + front * (len(segments) - 1) <= chunk
        for item, part, _ in segments:
            seen[item] += range(part.first, part.last)
            visits[item] += 1
    for item, pairs in seen.items():
        assert visits[item] == 1 or item[2] > 0, "nobody else writes an empty request's zeros"
        assert pairs == list(range(item[2]))
        assert visits[item] >= 1, "an empty request must be visited, to write its zeros"


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_split_items_are_found_by_combine(case: tuple[list[int], int, int, int]) -> None:
    lengths, groups, clusters, start = case
    steps, _, _, front = plan(lengths, groups, clusters, start)
    partials: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    slots = set()
    announced = {}
    for cluster, segments in enumerate(walk(lengths, groups, clusters, start)):
        for item, part, offset in segments:
            if part.whole:
                assert (part.first, part.last) == (0, item[2])
                continue
            partials.setdefault(item, []).append((cluster, part.slot))
            assert (cluster, part.slot) not in slots, "a slot holds one partial result"
            slots.add((cluster, part.slot))
            assert part.last > part.first
            if part.slot == 1:
                begin = (cluster + 1) * steps - part.steps - offset
                announced[item] = (cluster, split.last_cluster(begin, part.num_pairs + front, steps))
    assert announced.keys() == partials.keys()
    for item, (first, last) in announced.items():
        assert partials[item] == [(first, 1)] + [(cluster, 0) for cluster in range(first + 1, last + 1)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, split.PAIR), min_size=1, max_size=300), st.integers(1, 3), st.integers(1, 70))
def test_one_pair_is_never_split(lengths: list[int], groups: int, clusters: int) -> None:
    # the launch leaves combine out then
    assert not split.may_split(split.PAIR // 64)
    for start in range(3):
        assert all(part.whole for segments in walk(lengths, groups, clusters, start) for _, part, _ in segments)
    assert all(part.whole for _, part in walk_pieces(lengths, groups, clusters, 4))


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_clusters_that_are_left_out_have_no_work(case: tuple[list[int], int, int, int]) -> None:
    lengths, groups, clusters, start = case
    useful = split.useful_clusters(clusters, groups * len(lengths), -(-max(lengths) // 64))
    everyone = walk(lengths, groups, clusters, start)
    assert walk(lengths, groups, useful, start) == everyone[:useful]
    assert not any(everyone[useful:])


def test_a_uniform_batch_is_not_split() -> None:
    assert all(part.whole for segments in walk([4096] * 128, 1, 66, 1) for _, part, _ in segments)
    assert all(part.whole for segments in walk([4096] * 128, 1, 132, 1) for _, part, _ in segments)
    assert not all(part.whole for segments in walk([4096], 1, 66, 1) for _, part, _ in segments)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2))
def test_the_host_knows_whether_equal_items_are_split(
    pairs: int, B: int, groups: int, clusters: int, start: int
) -> None:
    segments = [part for row in walk([split.PAIR * pairs] * B, groups, clusters, start) for _, part, _ in row]
    if not split.splits_equal(pairs, B * groups, clusters, start, split.SPLIT_COST):
        assert all(part.whole for part in segments)


@pytest.mark.parametrize(("length", "pairs"), [(0, 0), (1, 1), (128, 1), (129, 2), (4096, 32)])
def test_pairs(length: int, pairs: int) -> None:
    assert split.pairs(length) == pairs


def walk_pieces(lengths: list[int], groups: int, clusters: int, piece: int) -> list[tuple[Any, Any]]:
    """(item, piece) of all clusters, as their roles find them."""
    items = line(lengths, groups)
    starts = [0]
    for _, _, pairs in items:
        starts.append(starts[-1] + split.weight(pairs, 1))
    chunk, found = -(-starts[-1] // clusters), []
    for cluster in range(clusters):
        here = cluster * chunk
        left = max(0, min(chunk, starts[-1] - here))
        i = next((i for i in range(len(items)) if starts[i] <= here < starts[i + 1]), len(items))
        offset = 0
        if i < len(items):
            pairs = items[i][2]
            offset = split.begin_piece(pairs, here - starts[i], split.piece_pairs(pairs, piece))
            left -= offset - (here - starts[i])
            if offset >= max(pairs, 1):
                i, offset = i + 1, 0
        while left > 0:
            pairs = items[i][2]
            part = split.piece(pairs, offset, split.piece_pairs(pairs, piece))
            assert part.steps > 0
            found.append((items[i], part))
            left -= part.steps
            i, offset = (i, part.last) if part.last < pairs else (i + 1, 0)
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([1, 4, 16]),
)
def test_pieces_follow_from_the_length_alone(lengths: list[int], groups: int, clusters: int, piece: int) -> None:
    found = walk_pieces(lengths, groups, clusters, piece)
    slots = split.piece_slots(-(-max(lengths) // 64), piece)
    for item in line(lengths, groups):
        pairs = item[2]
        parts = [part for other, part in found if other == item]
        assert [pair for part in parts for pair in range(part.first, part.last)] == list(range(pairs))
        assert len(parts) == max(1, split.pieces_of(pairs, piece)) <= max(1, split.MOST_PIECES)
        assert parts == [part for _, part in walk_pieces([lengths[item[0]]], 1, 1, piece)]
        assert [part.slot for part in parts] == list(range(len(parts)))
        assert all(part.whole == (len(parts) == 1) for part in parts)
        assert len(parts) <= max(1, slots)
    assert len(found) == sum(max(1, split.pieces_of(pairs, piece)) for _, _, pairs in line(lengths, groups))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 600), st.integers(0, 600), st.integers(1, 8), st.sampled_from([1, 2, 3, 4]))
def test_teams_take_every_pair_once(pairs: int, more: int, members: int, each: int) -> None:
    """more: pairs that the table has room for beside."""
    teams, taken, busy = split.teams(2 * (pairs + more), members * each), [], 0
    for team in range(teams):
        portions = [split.portion(pairs, team, teams, m, members, each) for m in range(members)]
        for m, (first, last, active, needed) in enumerate(portions):
            assert last - first <= each
            assert (first < last) == (m < active)
            assert (active > 0) == (team < needed)
            taken += range(first, last)
            busy += first < last
    assert taken == list(range(pairs))
    # all CTAs, or a pair each
    assert busy == pairs or busy > teams * members // 2


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize(("items", "table_blocks"), [(1, 1), (1, 16), (15, 16), (16, 16), (3, 65), (132, 2), (133, 1)])
def test_teams_are_as_many_as_fit(items: int, table_blocks: int, each: int) -> None:
    members = split.members_of_team(items, table_blocks, each)
    clusters = {n: items * split.teams(table_blocks, n * each) for n in split.TEAMS}
    enough = next((n for n in split.TEAMS if split.teams(table_blocks, n * each) == 1), 8)
    assert members == (enough if clusters[enough] <= split.CLUSTERS[enough - 1] else None)


@pytest.mark.parametrize(
    ("items", "clusters"),
    # 132 SMs: 4 and 8 items each; halves and quarters of items; too many items, and too few SMs left
    [(512, 128), (1024, 128), (64, 128), (32, 128), (130, 130), (2048, 132), (800, 132), (100, 132), (1, 132)],
)
def test_ranges_end_where_items_do(items: int, clusters: int) -> None:
    assert split.even_clusters(132, items) == clusters


def test_a_small_grid_stays() -> None:
    assert all(split.even_clusters(n, n) == n for n in range(1, 140))
