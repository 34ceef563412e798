"""How a role goes through a cluster's range: the one loop over its segments."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

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
def segment_at(place: Place, work: Work, table: cute.Tensor, seq_lens: cute.Tensor, piece: cutlass.Constexpr = 0):
    """The request's length, and the segment that begins at a place."""
    length = length_of(table, seq_lens, place.request)
    pairs = split.pairs(length)
    if const_expr(piece > 0):
        size = split.piece_pairs(pairs, piece, cutlass.max)
        part = split.piece(pairs, place.offset, size, cutlass.min, cutlass.max)
    else:
        part = split.segment(pairs, place.offset, place.left, work.floor, cutlass.min, cutlass.max, work.start)
    return length, part


@cute.jit
def block_range(part: split.Segment, length):
    """The blocks [first, last) of a segment: its pairs, without an odd block past the end."""
    return 2 * part.first, cutlass.min(2 * part.last, (length + (BLOCK - 1)) // BLOCK)


@cute.jit
def place_after(place: Place, part: split.Segment, groups, piece: cutlass.Constexpr = 0) -> Place:
    """The place behind a segment: the next piece, the next group of query rows, or the next request."""
    request, group, offset = place.request, place.group + 1, Int32(0)
    if group == groups:
        request, group = request + 1, Int32(0)
    if const_expr(piece > 0):  # noqa: SIM102
        if part.last < part.num_pairs:
            request, group, offset = place.request, place.group, part.last
    return Place(request, group, offset, place.left - part.steps)


@cute.jit
def first_piece(place: Place, table: cute.Tensor, seq_lens: cute.Tensor, groups, piece: cutlass.Constexpr) -> Place:
    """The place of the first piece that begins in a range: the one that it begins inside is another cluster's."""
    request, group = place.request, place.group
    pairs = split.pairs(length_of(table, seq_lens, request))
    size = split.piece_pairs(pairs, piece, cutlass.max)
    offset = split.begin_piece(pairs, place.offset, size, cutlass.min, cutlass.max)
    left = place.left - (offset - place.offset)
    if offset >= cutlass.max(pairs, 1):
        group, offset = group + 1, Int32(0)
        if group == groups:
            request, group = request + 1, Int32(0)
    return Place(request, group, offset, left)


@cute.jit
def walk(
    work: Work,
    table: cute.Tensor,  # [B, table_blocks] int32
    seq_lens: cute.Tensor,  # [B] int32
    groups,
    visit: cutlass.Constexpr,
    state: NamedTuple,
    piece: cutlass.Constexpr = 0,
):
    """Call `state = visit(place, length, part, state)` for each segment in order; return the last state.

    An empty part (part.first == part.last) stands for an empty request, or for steps in which nothing is computed.
    piece: pairs of a piece, at least: segments are then the pieces that begin in the range. 0: its parts of items.
    """
    place = Place(work.request, work.group, work.offset, work.steps)
    if const_expr(piece > 0):
        place = first_piece(place, table, seq_lens, groups, piece)
    while place.left > 0:
        length, part = segment_at(place, work, table, seq_lens, piece)
        state = visit(place, length, part, state)
        place = place_after(place, part, groups, piece)
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
