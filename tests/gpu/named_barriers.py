"""What synccheck makes of a named barrier at which two warpgroups of three wait: see docs/design/gqa-decode.md.

    compute-sanitizer --tool synccheck python tests/gpu/named_barriers.py {same|apart}

same: both wait at one instruction. apart: each in code of its own, as the warpgroups of MLA decode do.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import cutlass.cute as cute
import cutlass.utils as utils
import torch
from cutlass import Int32, const_expr
from cutlass.cute.runtime import from_dlpack

from flash_mla.kernels.hopper.barriers import sync


class Exchange:
    """Two warpgroups of 128 threads give each other a word through shared memory; a third takes no part."""

    def __init__(self, apart: bool) -> None:
        self.apart = apart

    @cute.kernel
    def kernel(self, x: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        words = utils.SmemAllocator().allocate_tensor(Int32, cute.make_layout(256), 16)
        if const_expr(self.apart):
            if warp_id < 4:
                words[tid] = x[tid] + 1
                sync(5, 256)
                x[tid] = words[tid + 128]
            elif warp_id < 8:
                words[tid] = x[tid] * 3
                sync(5, 256)
                x[tid] = words[tid - 128]
        elif warp_id < 8:
            words[tid] = x[tid] + 1
            sync(5, 256)
            x[tid] = words[(tid + 128) % 256]

    @cute.jit
    def __call__(self, x: cute.Tensor):
        self.kernel(x).launch(grid=(1, 1, 1), block=(384, 1, 1))


if __name__ == "__main__":
    apart = sys.argv[1] == "apart"
    given = torch.arange(256, dtype=torch.int32, device="cuda")
    x = given.clone()
    tensor = from_dlpack(x)
    exchange = Exchange(apart)
    cute.compile(exchange, tensor)(tensor)
    left, right = given[:128] + 1, given[128:] * 3 if apart else given[128:] + 1
    assert torch.equal(x, torch.cat((right, left)))
    print("right")
