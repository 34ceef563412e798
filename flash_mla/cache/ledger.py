"""Ledger: which blocks each request of a PagedKVCache holds, and how many tokens. Plain Python on the host, no tensor.

An operation is a Change: it works on a draft of this state, which then takes the ledger's place in one store. So one
that raises, or is interrupted in any line, has changed nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from flash_mla.blocks import BlockAllocator
from flash_mla.errors import CacheFullError, SequenceLengthError
from flash_mla.problem import BLOCK

FREE_BLOCKS = "Call grow(blocks), or free(requests) that are done"


class Room(NamedTuple):
    """missing: the blocks that each request lacks; shared: requests that write into a block that others hold too."""

    missing: dict[int, int]
    shared: set[int]


class Ledger:
    """The blocks and lengths of `batch` requests.

    Attributes:
        is_slabs: each request has `num_blocks` of its own; otherwise all share one pool of as many.
        allocators: one for each slab, or the pool's.
        blocks: the blocks of each request, in the order of its tokens; a request whose blocks change gets a new list.
        lengths: the tokens of each request.
    """

    def __init__(self, batch: int, num_blocks: int, is_slabs: bool) -> None:
        self.is_slabs = is_slabs
        self.allocators = [BlockAllocator(num_blocks) for _ in range(batch if is_slabs else 1)]
        self.blocks: list[list[int]] = [[] for _ in range(batch)]
        self.lengths = [0] * batch

    def draft(self) -> Ledger:
        """A ledger of lists of its own, but of the same allocators."""
        # NOTE: copy.copy takes 4 us more, in every step of decode
        draft = object.__new__(Ledger)
        draft.is_slabs = self.is_slabs
        draft.allocators, draft.blocks, draft.lengths = [*self.allocators], [*self.blocks], [*self.lengths]
        return draft

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return sum(allocator.num_free for allocator in self.allocators)

    # Checks, before anything is taken

    def find_room(self, rows: list[int], counts: list[int], limit: int) -> Room:
        """What these requests need for so many more tokens each; `limit`: tokens that a request may hold."""
        holders = None if self.is_slabs else self.allocators[0].holders
        missing: dict[int, int] = {}
        shared: set[int] = set()
        for b, count in zip(rows, counts, strict=True):
            length, blocks = self.lengths[b], self.blocks[b]
            if length + count > limit:
                raise SequenceLengthError(
                    given=f"request {b}: {length} tokens and {count} more",
                    required=f"at most {limit} tokens a request",
                    cause=f"The block table has {limit // BLOCK} blocks a request",
                    fix="grow(blocks), truncate(lengths), or make the cache with a larger max_seq_len",
                )
            missing[b] = max(-(-(length + count) // BLOCK) - len(blocks), 0)
            if holders and count and length % BLOCK and holders[blocks[-1]] > 1:
                shared.add(b)
        needed = sum(missing.values())
        if holders and shared:  # the last holder of a block writes into it in place
            writers = Counter(self.blocks[b][-1] for b in shared)
            needed += sum(min(n, holders[block] - 1) for block, n in writers.items())
        if needed and needed > self.num_free:
            raise CacheFullError(
                given=f"{sum(counts)} more tokens for {len(rows)} requests, {self.num_free} blocks free",
                required=f"{needed} free blocks",
                fix=FREE_BLOCKS,
            )
        return Room(missing, shared)

    def check_fork(self, source: int, target: int) -> None:
        """The target is empty, and there is a block for a partly filled one's copy."""
        if self.lengths[target]:
            raise SequenceLengthError(
                given=f"fork({source}, {target}); request {target} holds {self.lengths[target]} tokens",
                required="an empty target",
                cause="The fork would drop the target's tokens",
                fix=f"free([{target}]) first",
            )
        if not self.is_slabs and self.lengths[source] % BLOCK and not self.num_free:
            raise CacheFullError(
                given=f"fork({source}, {target}) with no free block", required="1 free block", fix=FREE_BLOCKS
            )

    def check_kept(self, rows: list[int], kept: list[int]) -> None:
        """No request keeps more tokens than it holds."""
        for b, length in zip(rows, kept, strict=True):
            if length > self.lengths[b]:
                raise SequenceLengthError(
                    given=f"request {b}: {length} tokens to keep, {self.lengths[b]} held",
                    required=f"lengths from 0 to {self.lengths[b]}",
                    cause="truncate only drops tokens",
                    fix="Append tokens with append(), or lengthen with extend()",
                )


class Change:
    """What an operation makes of a ledger, and what the device has to be told.

    Attributes:
        after: a draft of the ledger.
        copies: block -> the block that it is a copy of.
        entries: (request, i) of the table's entries that change.
        put_back: what restores rows that were written over.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.after = ledger.draft()
        self.copies: dict[int, int] = {}
        self.entries: list[tuple[int, int]] = []
        self.put_back: list[Callable[[], object]] = []
        self._own: set[int] = set()  # of allocators that are the draft's alone

    def _allocator(self, b: int) -> BlockAllocator:
        """The draft's own of request b."""
        i = b if self.after.is_slabs else 0
        if i not in self._own:
            self.after.allocators[i] = self.after.allocators[i].copy()
            self._own.add(i)
        return self.after.allocators[i]

    def extend(self, rows: list[int], counts: list[int], room: Room) -> None:
        """Give the requests the blocks for so many more tokens."""
        after = self.after
        for b, count in zip(rows, counts, strict=True):
            blocks, missing = after.blocks[b], room.missing[b]
            if missing or b in room.shared:
                allocator = self._allocator(b)
                if b in room.shared and allocator.holders[last := blocks[-1]] > 1:
                    own = allocator.allocate(1, last)
                    allocator.release([last])
                    self.copies[own[0]] = last
                    self.entries.append((b, len(blocks) - 1))
                    blocks = [*blocks[:-1], *own]
                self.entries += [(b, len(blocks) + i) for i in range(missing)]
                after.blocks[b] = [*blocks, *allocator.allocate(missing, blocks[-1] if blocks else None)]
            after.lengths[b] += count

    def fork(self, source: int, target: int) -> None:
        """Share the source's full blocks of a pool with the target, and copy the partly filled one."""
        after = self.after
        blocks, length = after.blocks[source], after.lengths[source]
        allocator = self._allocator(target)
        full = length // BLOCK
        own = allocator.allocate(len(blocks) - full, blocks[-1]) if full < len(blocks) else []
        allocator.share(blocks[:full])
        after.blocks[target], after.lengths[target] = [*blocks[:full], *own], length
        self.copies = dict(zip(own, blocks[full:], strict=True))
        self.entries = [(target, i) for i in range(len(blocks))]

    def move(self, moves: dict[int, int]) -> None:
        """Each request b of the moves becomes what moves[b] was, all at once."""
        after = self.after
        new = {b: (after.blocks[source], after.lengths[source]) for b, source in moves.items()}
        for b, (blocks, _) in new.items():
            self._allocator(b).share(blocks)
        for b, (blocks, length) in new.items():
            self._allocator(b).release(after.blocks[b])
            after.blocks[b], after.lengths[b] = [*blocks], length

    def truncate(self, rows: list[int], kept: list[int]) -> None:
        """Keep the first tokens of each request."""
        after = self.after
        for b, length in zip(rows, kept, strict=True):
            blocks, count = after.blocks[b], -(-length // BLOCK)
            if count < len(blocks):
                self._allocator(b).release(blocks[count:])
                after.blocks[b] = blocks[:count]
            after.lengths[b] = length

    def grow(self, count: int) -> None:
        """`count` more blocks in the pool, or in each slab."""
        for b in range(len(self.after.allocators)):
            self._allocator(b).grow(count)

    def slots(self, rows: list[int], counts: list[int], slab_rows: int) -> list[int]:
        """Where the last so many tokens of requests lie: rows of head 0 in the storage seen as [rows, D].

        slab_rows: how many of them a slab has; 0 of a pool.
        """
        after = self.after
        slots: list[int] = []
        for b, count in zip(rows, counts, strict=True):
            start, slab, blocks = after.lengths[b] - count, b * slab_rows, after.blocks[b]
            while count:
                i, offset = divmod(start, BLOCK)
                row, run = slab + blocks[i] * BLOCK + offset, min(count, BLOCK - offset)
                slots += range(row, row + run)
                start, count = start + run, count - run
        return slots
