"""Which CTA computes what: the work split of a persistent decode, as plain index arithmetic.

The work of a call is a line of integers. Request b contributes `groups` items, one for each group of query rows that
a cluster holds, and an item is `weight` steps long: one step a pair of 64-token blocks, and one step for an empty
request, so that somebody writes its zeros. Where ranges are long, each item has `start` steps more in front, for what
beginning one costs; there is nothing to compute in them. Cluster c of N owns steps `[c * chunk, (c + 1) * chunk)` with
chunk = ceil(total / N): it may start inside one item, run through whole ones, and end inside another. An item that
several clusters share is split: each leaves a partial result in one of its two slots, 0 for the item that its range
starts inside, 1 for the one that its range ends inside. All of it follows from the lengths, so nothing is planned on
the host.

Splitting costs partial results, a second start, and the combine kernel's work. Where handing out whole items takes
little longer than the even split (a uniform batch that fills the machine), every item weighs as much as the heaviest,
so that all ranges end where items end.

Batch-invariant calls are cut elsewhere: an item at multiples of a piece, whose size follows from its own length alone.
A cluster then computes the pieces that begin in its range, and each has a slot of its own: `combine.py` adds the same
pieces in the same order whatever else is in the batch, and however many clusters there are.

Every function takes Python ints (tests) or the DSL's Int32 (the kernels), with `least` and `most` for min and max.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

PAIR = 128
"""Tokens in a step: two blocks."""
SPLIT_COST = 4
"""Steps that splitting costs a call: about 13 us (combine 11, one more start 2), at 3.4 us a step of 128 heads."""
LONG = 8
"""Steps of a range from which on its items have `start` steps in front."""
PATIENCE = 2
"""Steps that fewer parts of one item are worth: one request of 128 heads took 24.7 us in 32 parts of two steps and 27.9
in 64 of one, but 42.2 in 32 parts of eight and 40.5 in 64 of four."""
SLOTS = 2
"""Partial results that one cluster may leave."""
NOTE = 4
"""Words of a cluster's note of its split item."""
MOST_PIECES = 16
"""Of an item."""
TEAMS = (1, 2, 4, 8)
"""CTAs that a team may have: a cluster of more than eight is not portable."""
FEW_ITEMS, SPARE = 8, 32
"""A grid gives up one cluster in SPARE, so that ranges end where items do, where a cluster has FEW_ITEMS at most."""
CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)
"""Of one CTA, of two, .. of eight, one CTA an SM: for so many an H200 has room at once, on SMs of one part of the chip.
A call in teams has no more."""


class Clustered:
    """A variant of a kernel whose clusters share K, or are teams of whose CTAs each takes `team` pairs at most."""

    cluster: int
    team: int

    @property
    def reach(self) -> int:
        """Pairs of blocks that a team has at most."""
        return self.cluster * self.team

    @property
    def sharers(self) -> int:
        """CTAs of a cluster that share K."""
        return 1 if self.team else self.cluster


def scan_words(warps: int) -> int:
    """32-bit words of shared memory in which a CTA's warps find its work: two a warp, and two for what they find."""
    return 2 * warps + 2


def workspace_words(clusters: int, rows: int, columns: int, piece_slots: int = 0) -> int:
    """32-bit words of a call's workspace: partial results of `rows` rows, their lse, notes of split items.

    piece_slots: partial results of a call in pieces (0: it has none).
    """
    return (piece_slots or SLOTS * clusters) * rows * (columns + 1) + NOTE * clusters


def pairs(length: Any) -> Any:
    """Pairs of blocks that hold `length` tokens."""
    return (length + (PAIR - 1)) >> 7


def weight(num_pairs: Any, floor: Any, most: Callable[..., Any] = max, start: Any = 0) -> Any:
    """Steps of one item; `floor` is the plan's smallest weight without the `start` steps in front."""
    return most(num_pairs, floor) + start


class Shares(NamedTuple):
    """Steps that one cluster owns, steps in all, the smallest weight of an item, and the steps in front of each."""

    chunk: Any
    total: Any
    floor: Any
    start: Any


def even(
    total: Any,
    items: Any,
    clusters: Any,
    start: Any = 0,
    least: Callable[..., Any] = min,
    most: Callable[..., Any] = max,
) -> Shares:
    """Split items wherever a range ends; `total` counts each item with floor 1, and `start` 0."""
    # not in short ranges, where a step is too coarse, nor where ranges begin one item at most, or as many
    start = least(start, least(most(total - LONG * clusters + 1, 0), most(items - clusters, 0)))
    total = total + items * start
    return Shares((total + clusters - 1) // clusters, total, 1, start)


def unsplit(heaviest: Any, items: Any, most_items: Any) -> Shares:
    """Hand out whole items, `most_items` to each cluster until there are no more."""
    return Shares(most_items * heaviest, items * heaviest, heaviest, 0)


def may_split(table_blocks: Any) -> Any:
    """Whether an item can be split at all, whose request has so many blocks in the table: one pair of them cannot."""
    return table_blocks > 2


def useful_clusters(clusters: int, items: int, table_blocks: int) -> int:
    """Clusters of a grid: no more than there are steps to hand out, at most."""
    return min(clusters, items * max(1, pairs(table_blocks * (PAIR // 2))))


def even_clusters(clusters: int, items: int) -> int:
    """Clusters of a grid whose ranges end where items of equal length do, where it need not be much smaller for that.

    128 in place of 132 CTAs read K and V of 64 requests 1 % faster, latents 1.5 %; with 16 items each
    it was 0.5 % slower.
    """
    most_items = -(-items // clusters)
    even = clusters // items * items if items < clusters else -(-items // most_items)
    return even if most_items <= FEW_ITEMS and clusters - even <= clusters // SPARE else clusters


def pays(split: Shares, whole: Shares, cost: Any = SPLIT_COST) -> Any:
    """Whether splitting, which costs a call so many steps, beats whole items."""
    return split.chunk + cost < whole.chunk


def splits_equal(num_pairs: int, items: int, clusters: int, start: int, cost: int) -> bool:
    """Whether a call of items of so many pairs each is split: what every cluster of it finds, for the host."""
    heaviest = weight(num_pairs, 1)
    whole = unsplit(heaviest, items, -(-items // clusters))
    return pays(even(items * heaviest, items, clusters, start), whole, cost)


def longer(chunk: Any, heaviest: Any, most_parts: int, most: Callable[..., Any] = max) -> Any:
    """Steps of a range, at least `chunk`, in which the heaviest item has no more than `most_parts` parts.

    Worth it up to PATIENCE steps more: combine has fewer to add, and SMs to begin on before the last part is there.
    """
    return most(chunk, (heaviest + (most_parts - 1)) // most_parts)


class Segment(NamedTuple):
    """The part of an item that one cluster computes.

    Pairs `[first, last)` of the item's `num_pairs`; `steps` of the line that it takes up; `whole`: nobody else shares
    the item, so the result is final (of an empty request: zeros); otherwise it goes to slot `slot`, if there is any.
    """

    first: Any
    last: Any
    num_pairs: Any
    steps: Any
    whole: Any
    slot: Any


def segment(
    num_pairs: Any,
    offset: Any,
    left: Any,
    floor: Any,
    least: Callable[..., Any] = min,
    most: Callable[..., Any] = max,
    start: Any = 0,
) -> Segment:
    """The segment that starts `offset` steps into an item, in a cluster with `left` steps of its range to go."""
    length = weight(num_pairs, floor, most, start)
    steps = least(length - offset, left)
    first = most(offset - start, 0)
    last = least(most(offset + steps - start, 0), num_pairs)
    whole = first + length - offset - steps == 0
    return Segment(first, last, num_pairs, steps, whole, 1 - least(first, 1))


def last_cluster(item_start: Any, item_weight: Any, chunk_steps: Any) -> Any:
    """The cluster that computes the last step of an item."""
    return (item_start + item_weight - 1) // chunk_steps


# --- Pieces -----------------------------------------------------------------------------------------------------------


def piece_pairs(num_pairs: Any, piece: int, most: Callable[..., Any] = max) -> Any:
    """Pairs of an item's pieces: at least `piece`, and more where there would be more than MOST_PIECES."""
    return most((num_pairs + (MOST_PIECES - 1)) // MOST_PIECES, piece)


def pieces_of(num_pairs: Any, piece: int, most: Callable[..., Any] = max) -> Any:
    """Pieces of an item; an empty one has none."""
    size = piece_pairs(num_pairs, piece, most)
    return (num_pairs + size - 1) // size


def piece_slots(table_blocks: Any, piece: int, least: Callable[..., Any] = min) -> Any:
    """Pieces that an item may have, whose request has so many blocks in the table: their slots lie side by side."""
    return least((table_blocks + (2 * piece - 1)) // (2 * piece), MOST_PIECES)


def begin_piece(num_pairs: Any, offset: Any, size: Any, least: Callable[..., Any] = min, most: Any = max) -> Any:
    """The step at which the first piece of an item begins that begins at step `offset` or later; its end if none."""
    return least((offset + size - 1) // size * size, most(num_pairs, 1))


def piece(num_pairs: Any, offset: Any, size: Any, least: Callable[..., Any] = min, most: Any = max) -> Segment:
    """The piece of `size` pairs that begins at step `offset` of an item; slot: its number among the item's."""
    last = least(offset + size, num_pairs)
    return Segment(offset, last, num_pairs, most(last - offset, 1), num_pairs <= size, offset // size)


# --- Teams ------------------------------------------------------------------------------------------------------------


def teams(table_blocks: Any, reach: int, most: Callable[..., Any] = max) -> Any:
    """Teams of so many pairs each that an item may need."""
    return most((table_blocks + (2 * reach - 1)) // (2 * reach), 1)


def members_of_team(items: int, table_blocks: int, each: int) -> int | None:
    """CTAs of a team, each with so many of the pairs that the table has room for; None: there would be too many."""
    members = next((n for n in TEAMS if 2 * n * each >= table_blocks), TEAMS[-1])
    return members if items * teams(table_blocks, members * each) <= CLUSTERS[members - 1] else None


class Portion(NamedTuple):
    """The pairs `[first, last)` of an item that one CTA takes; CTAs of its team that take some, and teams that do."""

    first: Any
    last: Any
    active: Any
    needed: Any


def portion(
    num_pairs: Any,
    team: Any,
    teams: Any,
    member: Any,
    members: int,
    each: int,
    least: Callable[..., Any] = min,
    most: Callable[..., Any] = max,
) -> Portion:
    """What CTA `member` of team `team` takes of an item that has `teams` teams; the first teams and CTAs take some.

    As few pairs a CTA as can be, at most `each`: where an item is shorter than its row of the table, all are used.
    """
    own = 1
    if each > 1:
        own = most((num_pairs + (teams * members - 1)) // (teams * members), 1)
    begin = team * members * own
    here = most(least(num_pairs - begin, members * own), 0)
    first, last = begin + least(member * own, here), begin + least(member * own + own, here)
    active, needed = here, (num_pairs + (members - 1)) // members
    if each > 1:
        active, needed = (here + own - 1) // own, (num_pairs + (members * own - 1)) // (members * own)
    return Portion(first, last, active, needed)
