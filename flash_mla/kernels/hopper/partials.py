"""Partial results of split items: where they lie in the workspace, and the note that tells `combine.py` of them.

Of items that are cut into pieces there is no note: what pieces they have follows from the lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.split import NOTE, SLOTS
from flash_mla.kernels.hopper.walk import Place, walk
from flash_mla.kernels.hopper.work import Work


class Partials(NamedTuple):
    """What clusters leave for combine: views of one FP32 workspace of `split.workspace_words` words.

    out [slots, rows, columns] and lse [slots, rows] FP32, base 2: two slots a cluster of `rows` rows, or as many for an
    item as it may have pieces; split_of [clusters, 4] int32: the split item that begins in a cluster (request, group,
    last cluster; -1: none).
    """

    out: cute.Tensor
    lse: cute.Tensor
    split_of: cute.Tensor

    @staticmethod
    def over(workspace: cute.Pointer, clusters, rows: int, columns: int, piece_slots=None) -> Partials:
        """workspace: its first word; piece_slots: partial results of a call in pieces; None: it has none."""
        # NOTE: pieces grow with the batch: their offsets do not fit 32 bits
        slots, row = (SLOTS * clusters, columns) if piece_slots is None else (piece_slots, Int64(columns))
        values = slots * rows * row
        out, lse, notes = workspace, workspace + values, workspace + (values + slots * rows)
        return Partials(
            cute.make_tensor(out, cute.make_layout((slots, rows, columns), stride=(rows * row, columns, 1))),
            cute.make_tensor(lse, cute.make_layout((slots, rows), stride=(rows, 1))),
            cute.make_tensor(cute.recast_ptr(notes, dtype=Int32), cute.make_layout((clusters, NOTE), stride=(NOTE, 1))),
        )


def piece_slots(table: cute.Tensor, groups, piece: int):
    """Partial results of a call in pieces of at least `piece` pairs; None where 0 says that it is none."""
    return table.shape[0] * groups * split.piece_slots(table.shape[1], piece, cutlass.min) if piece else None


def slot_of(place: Place, part: split.Segment, cluster_id, groups, table: cute.Tensor, piece: int):
    """The slot of a segment's partial result."""
    if piece == 0:
        return SLOTS * cluster_id + part.slot
    return (place.request * groups + place.group) * split.piece_slots(table.shape[1], piece, cutlass.min) + part.slot


class Note(NamedTuple):
    """A split item and the last cluster that computes some of it; request -1: there is none."""

    request: Int32
    group: Int32
    last: Int32


@cute.jit
def note_split(partials: Partials, work: Work, table: cute.Tensor, seq_lens: cute.Tensor, groups, cluster_id) -> None:
    """Tell combine which split item begins in this cluster, and the last cluster that computes some of it."""

    @cute.jit
    def visit(place: Place, length, part: split.Segment, note: Note) -> Note:
        request, group, last = note
        if part.slot == 1 and not part.whole and part.last > part.first:
            begin = (cluster_id + 1) * work.chunk - part.steps - place.offset
            request, group = place.request, place.group
            last = split.last_cluster(begin, part.num_pairs + work.start, work.chunk)
        return Note(request, group, last)

    note = walk(work, table, seq_lens, groups, visit, Note(Int32(-1), Int32(0), Int32(0)))
    split_of = partials.split_of
    with cute.arch.elect_one():
        split_of[cluster_id, 0] = note.request
        split_of[cluster_id, 1] = note.group
        split_of[cluster_id, 2] = note.last
