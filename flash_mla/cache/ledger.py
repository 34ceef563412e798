"""Ledger: which blocks each request of a PagedKVCache holds, and how many tokens. Plain Python on the host, no tensor.

An operation fills a Change with what it will make of this state; `commit` makes it so, `give_back` drops it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from flash_mla.blocks import BlockAllocator
from flash_mla.errors import CacheFullError, SequenceLengthError
from flash_mla.problem import BLOCK

FREE_BLOCKS = "Call grow(blocks), or free(requests) that are done"


@dataclass
class Change:
    """What an operation will make of the ledger, and what it has taken for it so far.

    Attributes:
        requests: request -> (its blocks, its length) afterwards.
        taken: blocks allocated for them, with the request whose allocator gave them.
        copies: block -> the block that it is a copy of.
        entries: (request, i) of the table's entries that change.
        put_back: what restores rows that were written over.
    """

    requests: dict[int, tuple[list[int], int]] = field(default_factory=dict)
    taken: list[tuple[int, list[int]]] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)
    entries: list[tuple[int, int]] = field(default_factory=list)
    put_back: list[Callable[[], object]] = field(default_factory=list)


class Room(NamedTuple):
    """missing: the blocks that each request lacks; shared: requests that write into a block that others hold too."""

    missing: dict[int, int]
    shared: set[int]


class Ledger:
    """The blocks and lengths of `batch` requests.

    Attributes:
        is_slabs: each request has `num_blocks` of its own; otherwise all share one pool of as many.
        allocators: one for each slab, or the pool's.
        blocks: the blocks of each request, in the order of its tokens.
        lengths: the tokens of each request.
    """

    def __init__(self, batch: int, num_blocks: int, is_slabs: bool) -> None:
        self.is_slabs = is_slabs
        self.allocators = [BlockAllocator(num_blocks) for _ in range(batch if is_slabs else 1)]
        self.blocks: list[list[int]] = [[] for _ in range(batch)]
        self.lengths = [0] * batch

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return sum(allocator.num_free for allocator in self.allocators)

    def allocator(self, b: int) -> BlockAllocator:
        """The one that serves request b."""
        return self.allocators[b if self.is_slabs else 0]

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

    # Changes

    def extend(self, change: Change, rows: list[int], counts: list[int], room: Room) -> None:
        """Give the requests the blocks for so many more tokens."""
        holders = self.allocators[0].holders
        left: Counter[int] = Counter()  # holders that a shared block loses
        for b, count in zip(rows, counts, strict=True):
            held = blocks = self.blocks[b]
            if b in room.shared and holders[blocks[-1]] - left[blocks[-1]] > 1:
                own = self._take(change, b, 1, blocks[-1])
                left[blocks[-1]] += 1
                change.copies[own[0]] = blocks[-1]
                change.entries.append((b, len(blocks) - 1))
                blocks = [*blocks[:-1], *own]
            if room.missing[b]:
                new = self._take(change, b, room.missing[b], blocks[-1] if blocks else None)
                change.entries += [(b, len(held) + i) for i in range(room.missing[b])]
                blocks = [*blocks, *new]
            change.requests[b] = (blocks, self.lengths[b] + count)

    def fork(self, change: Change, source: int, target: int) -> None:
        """Share the source's full blocks of a pool with the target, and copy the partly filled one."""
        blocks, length = self.blocks[source], self.lengths[source]
        copied = 1 if length % BLOCK else 0
        own = self._take(change, target, copied, blocks[-1]) if copied else []
        change.requests[target] = ([*blocks[: len(blocks) - copied], *own], length)
        change.copies = dict(zip(own, blocks[-1:], strict=False))
        change.entries = [(target, i) for i in range(len(blocks))]

    def move(self, change: Change, moves: dict[int, int]) -> None:
        """Each request b of the moves becomes what moves[b] was, all at once."""
        change.requests = {b: ([*self.blocks[source]], self.lengths[source]) for b, source in moves.items()}

    def truncate(self, change: Change, rows: list[int], kept: list[int]) -> None:
        """Keep the first tokens of each request."""
        for b, length in zip(rows, kept, strict=True):
            change.requests[b] = (self.blocks[b][: -(-length // BLOCK)], length)

    def _take(self, change: Change, b: int, count: int, after: int | None) -> list[int]:
        """Blocks for request b, given back if the operation raises."""
        blocks = self.allocator(b).allocate(count, after)
        change.taken.append((b, blocks))
        return blocks

    # Their end

    def commit(self, change: Change) -> None:
        """Make it so: blocks that a request leaves lose a holder, those that it joins gain one."""
        own: dict[int, set[int]] = {}
        for b, taken in change.taken:
            own.setdefault(b, set()).update(taken)
        moved = [b for b, (blocks, _) in change.requests.items() if blocks is not self.blocks[b]]
        for b in moved:
            self.allocator(b).share(n for n in change.requests[b][0] if n not in own.get(b, ()))
        for b in moved:
            self.allocator(b).release(self.blocks[b])
        for b, (blocks, length) in change.requests.items():
            self.blocks[b], self.lengths[b] = blocks, length

    def give_back(self, change: Change) -> None:
        """Free what the change took."""
        for b, blocks in change.taken:
            self.allocator(b).release(blocks)

    def slots(self, rows: list[int], counts: list[int], change: Change, slab_rows: int) -> list[int]:
        """Where the new tokens lie: rows of head 0 in the storage seen as [rows, D], `slab_rows` of them a slab."""
        slots: list[int] = []
        for b, count in zip(rows, counts, strict=True):
            start, slab, blocks = self.lengths[b], b * slab_rows, change.requests[b][0]
            while count:
                i, offset = divmod(start, BLOCK)
                row, run = slab + blocks[i] * BLOCK + offset, min(count, BLOCK - offset)
                slots += range(row, row + run)
                start, count = start + run, count - run
        return slots
