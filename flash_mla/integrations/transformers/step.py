"""One forward pass over the cache, worked out once for all layers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_mla.cache import PagedKVCache
from flash_mla.errors import ShapeError
from flash_mla.problem import BLOCK
from flash_mla.quant import quantise

if TYPE_CHECKING:
    from flash_mla.integrations.transformers.layer import Layer

MAX_S_Q = 128  # most query tokens of a decode call, as Hopper's kernels have it
FEW_S_Q = 8  # the same over an FP8 cache; and what is left may be any number below
SMALL_MASK = 2**14  # bytes that are sooner copied to the host than summed on a GPU, by two launches


class Tokens:
    """What the mask interface returns in place of a mask; one object a forward pass.

    Attributes:
        batch, count: B and P, the tokens of this pass.
        mask: [B, seen + P] bool, False for padding; None: no padding.
    """

    def __init__(self, batch: int, count: int, mask: Tensor | None) -> None:
        self.batch, self.count, self.mask = batch, count, mask

    def __getitem__(self, index: Any) -> Tokens:
        """Itself: a model that slices its 4-D mask means these tokens."""
        return self

    @cached_property
    def counts(self) -> list[tuple[int, int]] | None:
        """Of each request: tokens before this pass, tokens of this pass; None without a mask. One wait for the GPU."""
        if self.mask is None:
            return None
        mask = self.mask.cpu() if self.mask.numel() <= SMALL_MASK else self.mask
        new = mask[:, -1] if self.count == 1 else mask[:, -self.count :].sum(-1)
        base = self.count + 1  # both numbers in one
        both = [divmod(x, base) for x in torch.add(new, mask.sum(-1), alpha=base).tolist()]
        return [(total - count, count) for total, count in both]


def check_padding(mask: Tensor | None, batch: int, tokens: int) -> None:
    """A padding mask covers the tokens in the cache and the new ones."""
    if mask is not None and mask.shape != (batch, tokens):
        raise ShapeError(
            given=f"attention_mask {list(mask.shape)}",
            required=f"[B, earlier + new tokens] = [{batch}, {tokens}]",
            cause="The attention_mask does not cover the tokens in the cache and the new ones",
            fix="Pass the mask of all of them; call cache.reset() before new prompts",
        )


def admit(pages: PagedKVCache, tokens: Tokens) -> Tensor | None:
    """Give the requests blocks for their new tokens; these tokens' mask [B, P] bool, None without padding."""
    B, P = tokens.batch, tokens.count
    if len(pages.lengths) != B:
        raise ShapeError(
            given=f"a batch of {B}, a cache for {len(pages.lengths)}",
            required="the same number of sequences",
            cause="The cache was made for another batch (beam search: prompts x beams)",
            fix=f"paged_cache(model, batch={B}, ...)",
        )
    counts, keep = [P] * B, None
    if tokens.mask is not None and tokens.counts is not None:
        held, counts = ([*numbers] for numbers in zip(*tokens.counts, strict=True))
        if held != [*pages.lengths]:
            raise ShapeError(
                given=f"an attention_mask that keeps {held} earlier tokens, a cache that holds {[*pages.lengths]}",
                required="the same tokens kept as in the passes before",
                cause="The attention_mask of earlier tokens changed, or the cache holds other prompts",
                fix="Call cache.reset() before new prompts",
            )
        keep = None if min(counts) == P else tokens.mask[:, -P:]
    pages.extend(counts)
    return keep


class Step:
    """One forward pass; making it gives the requests their blocks. `starts` goes to the tensor that is given for it.

    Attributes:
        is_first: no request held a token before.
        position: [B, P], where in its request a token lies; for padding any number.
        keep: [B, P] bool, False for padding; None: no padding.
        is_token: each request has one new token, and had others before.
        starts: [B] int32, the tokens before that one.
        slots: [tokens kept], where in a layer's pool, seen as [Nblk * 64, D], their rows go.
        longest: tokens of the longest request.
    """

    def __init__(self, pages: PagedKVCache, tokens: Tokens, starts: Tensor) -> None:
        self._starts: Tensor | None = starts
        self.is_first = not any(pages.lengths)
        self.keep = admit(pages, tokens)
        self.longest = max(pages.lengths)
        self._pages, self._tokens = pages, tokens.count
        self._kept: Tensor | None = None
        self.is_token = tokens.count == 1 and self.keep is None and not self.is_first
        if not self.is_token:
            self._locate()

    @classmethod
    def of_last_tokens(cls, pages: PagedKVCache) -> Step:
        """The pass of every request's last token, which has its block; all that it is comes from the device."""
        step = cls.__new__(cls)
        step.is_first, step.keep, step.is_token, step.longest = False, None, True, max(pages.lengths)
        step._pages, step._tokens, step._kept, step._starts = pages, 1, None, None
        return step

    @cached_property
    def starts(self) -> Tensor:
        return torch.sub(self._pages.seq_lens, 1, out=self._starts)

    @cached_property
    def position(self) -> Tensor:
        return self.starts.long().unsqueeze(1)

    @cached_property
    def slots(self) -> Tensor:
        block = self.position // BLOCK
        return torch.add(self.position, self._pages.block_table.gather(1, block) - block, alpha=BLOCK).flatten()

    def _locate(self) -> None:
        """Position and slots of all new tokens, which follow those before; how `align` orders them."""
        pages, P, keep = self._pages, self._tokens, self.keep
        B, device = len(pages.lengths), pages.seq_lens.device
        starts = pages.seq_lens - (P if keep is None else keep.sum(-1))
        arrival = torch.arange(P, device=device).expand(B, P) if keep is None else (keep.cumsum(-1) - 1).clamp(min=0)
        request = torch.arange(B, device=device)[:, None].expand(B, P).flatten()
        self.position = starts[:, None] + arrival
        position = self.position.flatten()
        if keep is not None:
            # prefill is causal from the first row of a tile on, decode from the last one backwards
            self._order = keep.to(torch.int8).argsort(dim=-1, stable=True, descending=self.is_first)
            rank = arrival if self.is_first else arrival + P - keep.sum(-1, keepdim=True)
            self._rank = rank.clamp(max=P - 1)
            self._request = torch.arange(B, device=device)[:, None]
            self._kept = keep.flatten().nonzero().squeeze(1)
            request, position = request[self._kept], position[self._kept]
        blocks = pages.block_table[request, position // BLOCK].long()
        self.slots = blocks * BLOCK + position % BLOCK

    @property
    def lengths(self) -> Tensor | None:
        """[B] int32, tokens of each request; None where all of them are as many as the step's tokens."""
        return None if self.keep is None else self._pages.seq_lens

    @cached_property
    def places(self) -> Tensor:
        """[B, longest] int64: the row of each request's token t in a layer's pool; past its last one any row."""
        token = torch.arange(self.longest, device=self._pages.seq_lens.device)
        blocks = self._pages.block_table[:, token // BLOCK].long()
        rows = blocks * BLOCK + token % BLOCK
        return rows.where(token < self._pages.seq_lens[:, None], 0)

    def write(self, rows: Tensor, target: Tensor, descale: Tensor | None = None) -> None:
        """Write new rows [B, Hk, P, D], those of padding aside, into a layer's pool, seen as [Hk, Nblk * 64, D]."""
        if rows.requires_grad:
            rows = rows.detach()
        if descale is not None:
            rows = quantise(rows, descale)[0].view(torch.uint8)
        rows = rows.transpose(0, 1).flatten(1, 2)  # [Hk, B * P, D]
        target.index_copy_(1, self.slots, rows if self._kept is None else rows[:, self._kept])

    def align(self, rows: Tensor) -> Tensor:
        """[B, H, P, D] with a request's tokens side by side: first in the step's prefill, last in its decode."""
        if self.keep is None:
            return rows.contiguous()
        # NOTE: for [4, 8, 384, 192] FP32 on a CPU thread, take_along_dim took 22 ms and this takes 4 ms.
        return rows[self._request, :, self._order].transpose(1, 2).contiguous()

    def restore(self, out: Tensor) -> Tensor:
        """Undo `align` and put heads behind tokens: [B, H, P, Dv] -> [B, P, H, Dv]; padding gets 0."""
        if self.keep is None:
            return out.transpose(1, 2)
        return out[self._request, :, self._rank].masked_fill_(~self.keep[:, :, None, None], 0)

    @cached_property
    def _calls(self) -> tuple[list[int], list[Tensor]]:
        """Of each decode call of the step its query tokens, and [B] tokens of the requests up to the last of them."""
        pages = self._pages
        sizes = call_sizes(self._tokens, MAX_S_Q if pages.k_descale is None else FEW_S_Q)
        later = [self._tokens - sum(sizes[: i + 1]) for i in range(len(sizes))]
        return sizes, [(pages.seq_lens - n).clamp(min=0) if n else pages.seq_lens for n in later]

    def decode(self, q: Tensor, layer: Layer, scale: float) -> Tensor:
        """Attention of q [B, Hq, P, D] over a layer's pages, in as many calls as `call_sizes` says."""
        table, (sizes, lengths) = self._pages.block_table, self._calls
        if len(sizes) == 1:
            return layer.decode(q, table, lengths[0], scale)
        parts = zip(q.split(sizes, dim=2), lengths, strict=True)
        return torch.cat([layer.decode(part, table, own, scale) for part, own in parts], 2)


def call_sizes(tokens: int, most: int) -> list[int]:
    """Query tokens of each decode call for so many: powers of two, at most `most`, then what is left of less than 8.

    NOTE: Triton compiles a kernel for each number, so that any number up to 128 would cost a server 128 compiles.
    """
    sizes = []
    while tokens >= FEW_S_Q:
        sizes.append(min(1 << (tokens.bit_length() - 1), most))
        tokens -= sizes[-1]
    return [*sizes, tokens] if tokens else sizes
