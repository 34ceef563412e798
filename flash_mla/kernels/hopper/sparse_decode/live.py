"""Which keys of a pair of blocks are there: a bit a key in shared memory, from the producers to the consumers."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32


def live_words(sLive: cute.Tensor) -> cute.Tensor:
    """The bits as four words: keys 0 to 31 and 32 to 63 of the even block, then of the odd one."""
    return cute.make_tensor(cute.recast_ptr(sLive.iterator, dtype=Int32), cute.make_layout(4))
