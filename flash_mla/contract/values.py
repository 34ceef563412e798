"""What tensors hold: lengths and the ids of a block table. Nothing else of the contract reads a value."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.errors import BlockCountError, BlockTableError, DeviceError, SequenceLengthError
from flash_mla.problem import BLOCK, PrefillProblem

FEW = 64
"""Integers that Python looks at itself: two tensors of one take 2 us so, 9 by torch's ops."""


def extremes(lengths: Tensor, *tables: Tensor) -> list[int]:
    """The least and the greatest length, and id of each table that has one; read at once: a GPU is waited for once."""
    read = [x for x in (lengths, *tables) if x.numel()]
    if all(x.is_cpu and x.numel() <= FEW for x in read):
        return [extreme(x) for x in [x.flatten().tolist() for x in read] for extreme in (min, max)]
    return torch.stack([x for tensor in read for x in torch.aminmax(tensor)]).tolist()


def check_values(block_table: Tensor, seq_lens: Tensor, Nblk: int, name: str = "seq_lens", page: int = BLOCK) -> int:
    """Check lengths and used table entries, reading them once (on a GPU this waits for it).

    Returns the largest length in tokens.
    """
    if not seq_lens.numel():
        return 0
    if seq_lens.is_meta:
        raise DeviceError(
            f"{name} on meta", f"{name} with values", f"`{name}` has none to check", "Pass check_values=False"
        )
    table_blocks = block_table.shape[1]
    low, high, *ids = extremes(seq_lens, block_table)
    if low < 0:
        b = int(seq_lens.argmin())
        raise SequenceLengthError(
            f"{name}[{b}] = {low}", f"{name}[b] >= 0", f"`{name}[b]` is negative", "Pass lengths in tokens, 0 or more"
        )
    if high > Nblk * page:
        b = int(seq_lens.argmax())
        raise SequenceLengthError(
            f"{name}[{b}] = {high} tokens, Nblk = {Nblk} blocks",
            f"{name}[b] <= Nblk*{page} = {Nblk * page}",
        )
    if high > table_blocks * page:
        b = int(seq_lens.argmax())
        raise BlockCountError(
            f"block_table {list(block_table.shape)}, {name}[{b}] = {high}",
            f"at least ceil({high}/{page}) = {-(-high // page)} blocks in a row of block_table",
            "`block_table` has fewer than `ceil(seq_len/64)` blocks",
        )
    if not are_ids(ids, Nblk):
        check_used(block_table, seq_lens, Nblk, name, page)
    return high


def are_ids(ids: list[int], Nblk: int) -> bool:
    """Whether all entries of a table are ids of blocks, by its extremes. Where they are not, the used ones may be.

    NOTE: asked first: it takes 8 us, and `check_used` 50.
    """
    return not ids or (ids[0] >= 0 and ids[1] < Nblk)


def check_used(block_table: Tensor, seq_lens: Tensor, Nblk: int, name: str, page: int) -> None:
    """Entries that lengths inside of the table use are ids of blocks."""
    index = torch.arange(block_table.shape[1], device=block_table.device)
    used = index * page < seq_lens[:, None]
    bad = used & ((block_table < 0) | (block_table >= Nblk))
    if bad.any():
        b, i = (int(x) for x in bad.nonzero()[0])
        raise BlockTableError(
            f"block_table[{b}, {i}] = {int(block_table[b, i])}, which {name}[{b}] = {int(seq_lens[b])} uses; "
            f"Nblk = {Nblk}",
            f"0 <= block_table[b, i] < Nblk = {Nblk} for i < ceil({name}[b]/{page})",
        )


def check_prefill_lengths(seq_lens: Tensor | None, P: int) -> None:
    """Key lengths of a prefill lie in [0, P]; on a GPU they are not read, and kernels clamp them."""
    if seq_lens is None or seq_lens.device.type != "cpu" or not seq_lens.numel():
        return
    low, high = extremes(seq_lens)
    if low < 0 or high > P:
        raise SequenceLengthError(
            f"seq_lens from {low} to {high}, P = {P}",
            f"0 <= seq_lens[b] <= P = {P}",
            "`seq_lens[b]` is negative" if low < 0 else "`seq_lens[b]` > P, the keys that are there",
            "Pass the number of real keys of each request",
        )


def check_prompt_values(
    block_table: Tensor, start_pos: Tensor | None, problem: PrefillProblem, k_cache: Tensor, writes: bool
) -> int:
    """Check the table's entries over each prompt, and start_pos; returns the most keys of a request, in tokens."""
    if not problem.B:
        return 0
    Nblk, P, pool = k_cache.shape[2], problem.P, k_cache.stride(0) == 0
    starts = block_table.new_zeros(problem.B) if start_pos is None else start_pos
    low, high, *ids = extremes(starts, block_table)
    if low < 0:
        raise SequenceLengthError(
            f"start_pos has {low}",
            "start_pos[b] >= 0",
            "`start_pos[b]` is negative",
            "Pass the tokens that the cache holds before this chunk",
        )
    if high + P > min(Nblk, block_table.shape[1]) * BLOCK or not are_ids(ids, Nblk):
        ends = starts.long().clamp(max=2**62) + P
        check_values(block_table, ends, Nblk, "start_pos + P" if start_pos is not None else "P")
    if writes and P and not are_different(block_table, pool):
        starts = starts.long()
        check_written_blocks(block_table, starts, starts + P, Nblk, pool)
    return high + P


def are_different(block_table: Tensor, pool: bool) -> bool:
    """Whether no id stands twice in the table, or in a request's row where each has blocks of its own."""
    ids = block_table.view(1, -1) if pool else block_table
    return ids.shape[1] == 1 or bool(ids.sort().values.diff().all())


def check_written_blocks(block_table: Tensor, starts: Tensor, ends: Tensor, Nblk: int, pool: bool) -> None:
    """No block that a call writes stands anywhere else in the part of the table that it uses."""
    B, columns = block_table.shape
    index = torch.arange(columns, device=block_table.device)
    used = index * BLOCK < ends[:, None]
    written = used & ((index + 1) * BLOCK > starts[:, None])
    ids = block_table.long()
    if not pool:  # each request has blocks of its own
        ids = ids + torch.arange(B, device=ids.device)[:, None] * Nblk
    ids = ids.masked_fill(~used, B * Nblk)
    counts = torch.zeros(B * Nblk + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
    bad = written & (counts[ids] > 1)
    if bad.any():
        b, i = (int(x) for x in bad.nonzero()[0])
        raise BlockTableError(
            f"block_table[{b}, {i}] = {int(block_table[b, i])}, which is written and named more than once",
            "each written block once in the used part of block_table",
            "Two tokens would be written to one place, or one read where another is written",
            "Give each request blocks of its own for its new tokens; copy a shared block before writing to it",
        )
