"""Pack a bool mask to bits, and say of each 64 x 64 block whether it is needed: what a sparse prefill reads.

Grid [key blocks / 4, row blocks, requests * heads]: a warp packs one block, 64 rows of 64 keys, 32 keys a ballot.
Bound: it reads the mask once, a byte a key, and writes an eighth of that.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint8

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.limits import BLOCK

WARPS = 4
"""Blocks of a CTA."""
SKIP, TAKE, MASK = 0, 1, 2
"""Values of the block map: no key counts; all do; the bits decide."""


@cute.kernel
def pack_mask_kernel(
    mask: cute.Tensor,  # [B or 1, Hq or 1, P, keys] uint8, 0 or 1
    blocks: cute.Tensor,  # [B or 1, Hq or 1, row blocks, key blocks] uint8, 0 or 1: a layout to combine with
    has_blocks: Int32,
    block_map: cute.Tensor,  # [B or 1, Hq or 1, row blocks, key blocks] uint8
    bits: cute.Tensor,  # [B or 1, Hq or 1, P, 2 * key blocks] int32: of the mask's own requests and heads
):
    group, row_block, item = cute.arch.block_idx()
    lane = cute.arch.lane_idx()
    key_block = group * WARPS + cute.arch.warp_idx()
    request, head = item // block_map.shape[1], item % block_map.shape[1]
    mask_request = cutlass.min(request, mask.shape[0] - 1)
    mask_head = cutlass.min(head, mask.shape[1] - 1)
    P, keys = mask.shape[2], mask.shape[3]
    if key_block < block_map.shape[3]:
        taken = Int32(1)
        if has_blocks != 0:
            request_, head_ = cutlass.min(request, blocks.shape[0] - 1), cutlass.min(head, blocks.shape[1] - 1)
            taken = Int32(blocks[request_, head_, row_block, key_block])
        seen, hidden = Int32(0), Int32(0)
        for half in cutlass.range_constexpr(2):
            key = key_block * BLOCK + 32 * half + lane
            for first in cutlass.range_constexpr(0, BLOCK, 32):
                own = Int32(0)
                for i in cutlass.range_constexpr(32):
                    row = row_block * BLOCK + first + i
                    byte = Int32(0)
                    if row < P and key < keys:
                        byte = Int32(mask[mask_request, mask_head, row, key])
                        hidden = hidden | (1 - byte)
                    word = Int32(cute.arch.vote_ballot_sync(byte != 0))
                    own = word if lane == i else own
                    seen = seen | word
                if row_block * BLOCK + first + lane < P:
                    bits[mask_request, mask_head, row_block * BLOCK + first + lane, 2 * key_block + half] = own
        hidden = Int32(cute.arch.vote_ballot_sync(hidden != 0))
        if lane == 0:
            kind = Int32(TAKE) if hidden == 0 else Int32(MASK)
            block_map[request, head, row_block, key_block] = Uint8(kind if seen != 0 and taken != 0 else SKIP)


@cute.jit
def pack_mask(
    mask: cute.Tensor, blocks: cute.Tensor, has_blocks: Int32, block_map: cute.Tensor, bits: cute.Tensor, stream
):
    """Launch the kernel."""
    requests, heads, row_blocks, key_blocks = block_map.shape
    pack_mask_kernel(mask, blocks, has_blocks, block_map, bits).launch(
        grid=((key_blocks + (WARPS - 1)) // WARPS, row_blocks, requests * heads),
        block=(32 * WARPS, 1, 1),
        stream=stream,
    )


def build(config: None, options: str = ""):
    """Compile the kernel for sm_90a, without a GPU; it has one config."""

    mask, blocks, block_map = (symbolic.tensor(Uint8, [None] * 4) for _ in range(3))
    bits = symbolic.tensor(Int32, [None] * 4)
    return symbolic.compiled(pack_mask, (mask, blocks, Int32(0), block_map, bits), options)
