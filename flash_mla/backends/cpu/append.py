"""Write new rows into their pages on the CPU."""

from __future__ import annotations

import torch

from flash_mla.backends.cpu.surroundings import undisturbed
from flash_mla.problem import BLOCK, FP8, AppendArgs


@undisturbed
def launch(args: AppendArgs) -> None:
    """Token i of request b goes to position start_pos[b] + i."""
    B, _, P, _ = args.k.shape
    token = torch.arange(P).expand(B, P)
    position = token if args.start_pos is None else token + args.start_pos[:, None]
    written = torch.ones(B, P, dtype=torch.bool) if args.num_tokens is None else token < args.num_tokens[:, None]
    b, i = written.nonzero(as_tuple=True)
    block = args.block_table[b, position[b, i] // BLOCK].long()
    slot = position[b, i] % BLOCK
    for rows, cache in ((args.k, args.k_cache), (args.v, args.v_cache)):
        if rows is not None and cache is not None:
            if rows.dtype == FP8:
                rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
            rows = rows.transpose(1, 2)[b, i]
            if cache.stride(0) == 0:  # a pool; torch refuses to write to an expanded tensor
                cache[0].transpose(0, 2)[slot, block] = rows
            else:
                cache.transpose(1, 3)[b, slot, block] = rows
