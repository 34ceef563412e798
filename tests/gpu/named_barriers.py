"""What compute-sanitizer makes of named barriers at which two warpgroups of three wait: see docs/design/gqa-decode.md.

    compute-sanitizer --tool synccheck python tests/gpu/named_barriers.py {same|apart}
    compute-sanitizer --tool racecheck --racecheck-report all python tests/gpu/named_barriers.py {even|uneven}

same: both wait at one instruction. apart: each in code of its own, as the warpgroups of MLA decode do. even, uneven:
three exchanges, before each of which a warpgroup waits at a barrier of its own twice; or one twice, the other three
times, as those of GQA decode do that have different numbers of blocks.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import torch
from cutlass import Int32, const_expr
from cutlass.cute.runtime import from_dlpack

from flash_mla.kernels.hopper.barriers import sync

ROUNDS = 3
"""Exchanges of even and uneven."""


class Exchange:
    """Two warpgroups of 128 threads give each other a word through shared memory; a third takes no part."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    @cute.kernel
    def kernel(self, x: cute.Tensor, waits: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        words = utils.SmemAllocator().allocate_tensor(Int32, cute.make_layout(256), 16)
        if const_expr(self.mode == "apart"):
            if warp_id < 4:
                words[tid] = x[tid] + 1
                sync(5, 256)
                x[tid] = words[tid + 128]
            elif warp_id < 8:
                words[tid] = x[tid] * 3
                sync(5, 256)
                x[tid] = words[tid - 128]
        elif warp_id < 8:
            side = warp_id // 4
            for _ in cutlass.range(waits[2], unroll=1):
                for _ in cutlass.range(waits[side], unroll=1):
                    sync(1 + side, 128)
                words[tid] = x[tid] + 1
                sync(3, 256)
                x[tid] = words[(tid + 128) % 256]
                sync(3, 256)

    @cute.jit
    def __call__(self, x: cute.Tensor, waits: cute.Tensor):
        self.kernel(x, waits).launch(grid=(1, 1, 1), block=(384, 1, 1))


if __name__ == "__main__":
    mode = sys.argv[1]
    given = torch.arange(256, dtype=torch.int32, device="cuda")
    x = given.clone()
    # waits of each warpgroup at its own barrier before an exchange; exchanges
    counts = {"same": (0, 0, 1), "apart": (0, 0, 1), "even": (2, 2, ROUNDS), "uneven": (3, 2, ROUNDS)}[mode]
    arguments = from_dlpack(x), from_dlpack(torch.tensor(counts, dtype=torch.int32, device="cuda"))
    exchange = Exchange(mode)
    cute.compile(exchange, *arguments)(*arguments)
    left, right = given[:128] + counts[2], given[128:] * 3 if mode == "apart" else given[128:] + counts[2]
    assert torch.equal(x, torch.cat((right, left)))
    print("right")
