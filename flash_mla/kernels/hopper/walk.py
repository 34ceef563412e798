"""How a role goes through a cluster's range: the one loop over its segments."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.table import length_of
from flash_mla.kernels.hopper.work import Work


class Place(NamedTuple):
    """Where a cluster stands in its range: `left` steps to go, from `offset` steps into item (request, group) on."""

    request: Int32
    group: Int32
    offset: Int32
    left: Int32


@cute.jit
def segment_at(place: Place, work: Work, table: cute.Tensor, seq_lens: cute.Tensor):
    """The request's length, and the segment that begins at a place."""
    length = length_of(table, seq_lens, place.request)
    pairs = split.pairs(length)
    return length, split.segment(pairs, place.offset, place.left, work.floor, cutlass.min, cutlass.max, work.start)


@cute.jit
def block_range(part: split.Segment, length):
    """The blocks [first, last) of a segment: its pairs, without an odd block past the end."""
    return 2 * part.first, cutlass.min(2 * part.last, (length + (BLOCK - 1)) // BLOCK)


@cute.jit
def place_after(place: Place, part: split.Segment, groups) -> Place:
    """The place behind a segment: the next group of query rows, or the next request."""
    request, group = place.request, place.group + 1
    if group == groups:
        request, group = request + 1, Int32(0)
    return Place(request, group, Int32(0), place.left - part.steps)


@cute.jit
def walk(
    work: Work,
    table: cute.Tensor,  # [B, table_blocks] int32
    seq_lens: cute.Tensor,  # [B] int32
    groups,
    visit: cutlass.Constexpr,
    state: NamedTuple,
):
    """Call `state = visit(place, length, part, state)` for each segment in order; return the last state.

    An empty part (part.first == part.last) stands for an empty request, or for steps in which nothing is computed.
    """
    place = Place(work.request, work.group, work.offset, work.steps)
    while place.left > 0:
        length, part = segment_at(place, work, table, seq_lens)
        state = visit(place, length, part, state)
        place = place_after(place, part, groups)
    return state


class Done(NamedTuple):
    """What a role has behind it: segments that it computed, and their items in its channels (pairs, blocks)."""

    segments: Int32
    items: Int32

    @staticmethod
    def nothing() -> Done:
        return Done(Int32(0), Int32(0))

    def plus(self, items) -> Done:
        """One more segment, of so many items."""
        return Done(self.segments + 1, self.items + items)
