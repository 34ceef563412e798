"""BlockAllocator: which blocks of a paged cache are free, and how many requests hold each of the others.

Block ids and counts on the host; no tensor, no memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable


class BlockAllocator:
    """The free blocks and reference counts of one pool; ids only, no memory.

    Attributes:
        num_free: blocks that nobody holds.
        holders: [num_blocks], how many requests hold each block; written here only.
    """

    def __init__(self, num_blocks: int) -> None:
        self.holders = array("i", [0]) * num_blocks
        self._free = bytearray(b"\1") * num_blocks
        self.num_free = num_blocks

    def copy(self) -> BlockAllocator:
        """One of the same state."""
        twin = BlockAllocator(0)
        twin.holders, twin._free, twin.num_free = self.holders[:], self._free[:], self.num_free
        return twin

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks (at most num_free), next to each other where that can be.

        They follow block `after` if its successors are free; else they go to the middle of the longest free run, which
        leaves as many blocks to grow into for the request that ends before the run as for this one.
        """
        blocks: list[int] = []
        while len(blocks) < count:
            wanted = count - len(blocks)
            start = len(self._free) if after is None else after + 1
            if start >= len(self._free) or not self._free[start]:
                run = max(re.finditer(b"\1+", self._free), key=lambda run: run.end() - run.start())
                spare = run.end() - run.start() - wanted if run.start() else 0
                start = run.start() + max(spare, 0) // 2
            stop = self._free.find(b"\0", start, start + wanted)
            taken = range(start, min(start + wanted, len(self._free)) if stop < 0 else stop)
            for block in taken:
                self.holders[block] = 1
            self._free[taken.start : taken.stop] = bytes(len(taken))
            self.num_free -= len(taken)
            blocks += taken
            after = blocks[-1]
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block; a free one is taken."""
        for block in blocks:
            if not self.holders[block]:
                self._free[block] = 0
                self.num_free -= 1
            self.holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each block; the last one frees it."""
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                self._free[block] = 1
                self.num_free += 1

    def grow(self, count: int) -> None:
        """`count` more blocks, with the ids after the last one."""
        self.holders.extend([0] * count)
        self._free += b"\1" * count
        self.num_free += count
