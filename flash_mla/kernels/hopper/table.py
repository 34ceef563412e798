"""What a kernel reads of the block table and the lengths, forced inside what is there: no value reads outside."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from flash_mla.kernels.hopper.limits import BLOCK


@cute.jit
def length_of(table: cute.Tensor, seq_lens: cute.Tensor, request):
    """The request's length, kept inside what its row of the table covers."""
    return cutlass.max(0, cutlass.min(seq_lens[request], table.shape[1] * BLOCK))


@cute.jit
def block_of(table: cute.Tensor, request, logical, blocks):
    """The physical block behind a logical one that the row holds, kept inside the cache's `blocks`."""
    return kept_inside(table[request, logical], blocks)


def kept_inside(block, blocks):
    """A block id, kept inside the cache's `blocks`."""
    return cutlass.max(0, cutlass.min(block, blocks - 1))


@cute.jit
def prefetch_line(address) -> None:
    """Ask L2 for the line at an address."""
    cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])


@cute.jit
def prefetch_table(table: cute.Tensor, cluster_id, clusters) -> None:
    """Ask L2 for the row of the table that this cluster starts with if all requests are equally long."""
    # NOTE: a short call is a chain of DRAM latencies: lengths, block ids, K; this takes the second out
    request = cluster_id * table.shape[0] // clusters
    first = 32 * cute.arch.lane_idx()
    if first < table.shape[1]:
        prefetch_line((table[request, None].iterator + first).toint())
