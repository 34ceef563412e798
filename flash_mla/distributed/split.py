"""Which rank holds what: plain arithmetic on ranks, without a process group.

A cache is dealt out by blocks: of n ranks, rank r holds blocks r, r + n, r + 2n, ... of every request, in their order,
as blocks 0, 1, 2, ... of its own cache. Interleaved, so that ranks differ by one block at most however long a request
grows; by whole blocks, so that a rank's part is a paged cache again. A rank's keys keep their order: the keys that a
query sees among them, those before some position, are the first ones of the rank.

A prompt is dealt out by chunks, two for each rank, one from either end (rank r of n: chunks r and 2n - 1 - r of 2n), so
that causal attention costs all ranks the same (Llama 3, Dubey et al. 2024, section 3.3.2).
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_mla.errors import DTypeError, HeadGroupingError, MaskShapeError, ShapeError
from flash_mla.kinds import explained
from flash_mla.problem import BLOCK

Lengths = TypeVar("Lengths", int, Tensor)


# --- A cache, by blocks -----------------------------------------------------------------------------------------------


@explained
def local_lengths(seq_lens: Lengths, rank: int, size: int) -> Lengths:
    """Tokens of a request that rank `rank` of `size` holds: an int of an int, or a tensor of a tensor of any shape.

    On a tensor no value is read. Negative lengths count as 0.
    """
    check_rank_of(rank, size)
    kind = seq_lens.dtype if isinstance(seq_lens, Tensor) else type(seq_lens)
    if kind not in (int, torch.int32, torch.int64):
        raise DTypeError(f"seq_lens {kind}", "an int, or an int32 or int64 tensor", "Lengths are integers", "Cast them")
    lengths = seq_lens.clamp(min=0) if isinstance(seq_lens, Tensor) else max(seq_lens, 0)
    blocks, rest = lengths // BLOCK, lengths % BLOCK
    return (blocks + (size - 1 - rank)) // size * BLOCK + rest * (blocks % size == rank)


@explained
def local_positions(tokens: int, rank: int, size: int, device: torch.device | str | None = None) -> Tensor:
    """[tokens] int64: the positions in their request of the first so many tokens that a rank holds."""
    check_rank_of(rank, size)
    check_counts(tokens=tokens)
    own = torch.arange(tokens, device=device)
    return (own // BLOCK * size + rank) * BLOCK + own % BLOCK


@explained
def local_table(block_table: Tensor, rank: int, size: int) -> Tensor:
    """The columns of block_table [B, W] that are the rank's, contiguous: [B, ceil((W - rank) / size)].

    Beside `local_lengths` it makes attention over the rank's part of a whole cache, which stays where it is.
    """
    check_rank_of(rank, size)
    check_dims("block_table", block_table, 2, "[B, W]")
    return block_table[:, rank::size].contiguous()


@explained
def local_cache(cache: Tensor, block_table: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """A copy of the rank's blocks of a whole cache [B, Hk, Nblk, 64, D], in order, and their table.

    Returns:
        (cache [B, Hk, W', 64, D], table [B, W'] int32) with W' = ceil((W - rank) / size) of the table's W columns.
        Entries of the whole table that mean nothing may hold anything: some block is copied for them.
    """
    table = local_table(block_table, rank, size)
    check_dims("cache", cache, 5, "[B, Hk, Nblk, 64, D]")
    B, width = table.shape
    if cache.shape[0] != B:
        raise ShapeError(
            f"cache {list(cache.shape)}, block_table {list(block_table.shape)}", "the same B", "They differ in B"
        )
    request = torch.arange(B, device=table.device)[:, None]
    # an index beside slices puts the indexed dims first: [B, W', Hk, 64, D]
    blocks = cache[request, :, table.long().clamp(0, max(cache.shape[2] - 1, 0))]
    own = torch.arange(width, dtype=torch.int32, device=table.device).expand(B, -1).contiguous()
    return blocks.transpose(1, 2).contiguous(), own


# --- Masks over a rank's keys -----------------------------------------------------------------------------------------


@explained
def local_mask(mask: Tensor, keys: int, rank: int, size: int) -> Tensor:
    """The columns of a mask [.., L] over whole requests at the first `keys` keys of a rank; hidden where past L."""
    check_dims("mask", mask, None, "[.., L]")
    if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.element_size() > 1):
        raise MaskShapeError(
            f"mask {mask.dtype}", "bool, or floating of 16 bits or more", "The mask is neither", "Call mask.bool()"
        )
    hidden = False if mask.dtype == torch.bool else -math.inf
    positions = local_positions(keys, rank, size, mask.device).clamp(max=mask.shape[-1])
    return pad(mask, (0, 1), value=hidden)[..., positions]


def tail_table(block_table: Tensor, old: Tensor, S_q: int) -> Tensor:
    """The columns of a rank's table [B, W] that may hold the last S_q tokens of a request.

    Args:
        old: [B], tokens of the rank before them. The first column is the block in which they end.

    Returns:
        [B, 1 + ceil((S_q - 1) / 64)].
    """
    columns = (old // BLOCK).long()[:, None] + torch.arange(1 + -(-(S_q - 1) // BLOCK), device=old.device)
    return block_table.gather(1, columns.clamp(max=block_table.shape[1] - 1))


def tail_keys(tail_mask: Tensor | None, seq_lens: Tensor, old: Tensor, S_q: int, rank: int, size: int) -> Tensor:
    """Which keys behind `tail_table` each new token sees, [B, Hq|1, S_q, keys]: those among the new tokens alone.

    Args:
        tail_mask: [B|1, Hq|1, S_q, S_q] bool or floating, over the new tokens; None: causal.
        seq_lens: [B], tokens of whole requests; old: [B], the rank's before the new ones.
    """
    if tail_mask is None:
        tail_mask = torch.ones(1, 1, S_q, S_q, dtype=torch.bool, device=old.device).tril()
    own = torch.arange((1 + -(-(S_q - 1) // BLOCK)) * BLOCK, device=old.device)
    blocks = (old // BLOCK).long()[:, None] + own // BLOCK
    # [B, keys]: which of the new tokens a key is
    tokens = (blocks * size + rank) * BLOCK + own % BLOCK - (seq_lens.long()[:, None] - S_q)
    columns = tokens.clamp(0, S_q - 1)[:, None, None, :].expand(-1, tail_mask.shape[1], S_q, -1)
    seen = tail_mask.expand(len(seq_lens), -1, -1, -1).gather(-1, columns)
    hidden = False if tail_mask.dtype == torch.bool else -math.inf
    return seen.masked_fill(((tokens < 0) | (tokens >= S_q))[:, None, None, :], hidden)


# --- A prompt, by chunks ----------------------------------------------------------------------------------------------


@explained
def prompt_chunks(num_tokens: int, rank: int, size: int) -> tuple[slice, slice]:
    """The two chunks of a prompt that a rank computes, in their order; either may be empty.

    Chunks are ceil(num_tokens / (2 size)) tokens, rounded up to whole blocks; the prompt's last ones are shorter.
    """
    check_rank_of(rank, size)
    check_counts(num_tokens=num_tokens)
    length = chunk_length(num_tokens, size)
    first, second = (
        slice(min(chunk * length, num_tokens), min((chunk + 1) * length, num_tokens))
        for chunk in (rank, 2 * size - 1 - rank)
    )
    return first, second


def chunk_length(num_tokens: int, size: int) -> int:
    return -(-num_tokens // (2 * size * BLOCK)) * BLOCK


# --- Heads ------------------------------------------------------------------------------------------------------------


@explained
def head_slices(Hq: int, Hk: int, rank: int, size: int) -> tuple[slice, slice]:
    """The query heads and the KV heads of a rank. Where there are fewer KV heads than ranks, ranks share one.

    Raises:
        HeadGroupingError: Hq or Hk does not divide among the ranks.
    """
    check_rank_of(rank, size)
    if Hq < 1 or Hk < 1 or Hq % size or Hq % Hk or (Hk % size and size % Hk):
        raise HeadGroupingError(
            given=f"Hq = {Hq}, Hk = {Hk} over {size} ranks",
            required="Hq a multiple of Hk and of the ranks; Hk a multiple of the ranks, or the ranks of Hk",
            cause="The heads do not divide among the ranks",
            fix="Use a mesh dim of another size",
        )
    heads = Hq // size
    kv_heads = max(Hk // size, 1)
    first = rank * Hk // size
    return slice(rank * heads, (rank + 1) * heads), slice(first, first + kv_heads)


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_rank_of(rank: int, size: int) -> None:
    """`rank` is one of `size` ranks."""
    if not 0 <= rank < size:
        raise ShapeError(
            f"rank = {rank}, size = {size}", "0 <= rank < size", "There is no such rank", "Count ranks from 0"
        )


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ShapeError(f"{name} = {count}", f"{name} >= 0", f"`{name}` is negative", "Pass a number of tokens")


def check_dims(name: str, x: Tensor, dims: int | None, layout: str) -> None:
    """x has so many dims; None: one at least."""
    if (x.dim() < 1) if dims is None else (x.dim() != dims):
        raise ShapeError(
            f"{name} {list(x.shape)}", f"{name} {layout}", f"`{name}` has {x.dim()} dims", f"Pass {layout}"
        )
