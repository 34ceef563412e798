"""PagedKVCache: the keys and values of a batch of requests in blocks of 64 tokens, and the tables that find them.

Two storages stand behind one set of operations. Per-request slabs, the reference's own layout: request b owns the Nblk
blocks of `k_cache[b]`. One pool: every `k_cache[b]` is the same memory (batch stride 0), blocks go to whoever needs
them, and requests share the blocks of a common prefix.

Lengths, block lists and reference counts are plain Python on the host (`ledger`), so no operation reads the device;
`block_table` and `seq_lens` are written in place, so a captured graph that reads them stays valid until `grow`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from threading import Lock
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flash_mla.api import flash_mla_with_kvcache, get_mla_metadata
from flash_mla.cache.checks import batch_indices, check_rows, head_factors, integers
from flash_mla.cache.ledger import Change, Ledger
from flash_mla.cache.rows import more_blocks, staged, upload, write_rows
from flash_mla.contract import MLAMetadata, check_mask_length
from flash_mla.errors import DTypeError, ShapeError
from flash_mla.kinds import explained_class
from flash_mla.problem import BLOCK, DTYPES, FP8
from flash_mla.quant import mark_scaled

MADE = {"_lock", "_k_rows", "_v_rows", "_head_rows", "_slab_rows", "_metadata", "k_cache", "v_cache"}
"""Attributes of a PagedKVCache that are made anew of the others: no view is pickled, nor who holds the lock."""


@explained_class
class PagedKVCache:
    """Keys and values of B requests in 64-token blocks, ready for `flash_mla_with_kvcache`.

        cache = PagedKVCache(B, Hk, D, max_seq_len=4096)    # K and V
        cache = PagedKVCache.mla(B, max_seq_len=4096)       # one latent array; V is its first 512 columns
        cache.append(k, v)
        out = cache.decode(q)                               # table, lengths and descales passed along

    Args:
        batch: B, the number of requests; each starts empty.
        num_kv_heads: Hk.
        head_dim: D of K.
        max_seq_len: tokens that one request may hold; rounded up to blocks.
        v_head_dim: Dv. Default: D.
        latent: keep no V: `v_cache` is `k_cache[..., :Dv]`. Default False.
        pool_blocks: blocks of one pool that all requests share. Default: each request owns `max_seq_len` tokens.
        dtype: BF16 (default), FP16, FP32, or float8_e4m3fn, whose rows are quantised on append.
        device: where the caches and tables live. Default: torch's.
        k_descale, v_descale: FP8 only: a float or [Hk], the factors that rows are stored with (a latent's V has K's).
            Default 1.

    Attributes:
        k_cache: [B, Hk, Nblk, 64, D], batch stride 0 for a pool; slots that hold no token are uninitialised.
        v_cache: [B, Hk, Nblk, 64, Dv], likewise, or the first Dv columns of k_cache.
        block_table: [B, ceil(max_seq_len/64)] int32; entries past a request's blocks mean nothing.
        seq_lens: [B] int32.
        k_descale, v_descale: [1, Hk] FP32, or None if the dtype is not FP8: `decode` passes them; so must a direct call
            of an attention function, which refuses caches stored with factors other than 1 where they are left out.

    The tensors are updated in place and stay the same objects until `grow`. An operation that raises leaves lengths,
    table and rows as they were: one that cannot be done raises a FlashMLAError before anything is changed, and one
    that runs out of memory, or is interrupted, is undone. A pickled or copied cache, `copy.copy` too, has memory of its
    own. Operations of several threads on one cache come one after another. Requests are named by their batch index.
    """

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    _ledger: Ledger
    _k: Tensor
    _v: Tensor
    _k_rows: Tensor
    _v_rows: Tensor
    _head_rows: Tensor
    _slab_rows: int
    _metadata: dict[torch.Size, MLAMetadata]

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_seq_len: int,
        v_head_dim: int | None = None,
        latent: bool = False,
        pool_blocks: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        k_descale: float | Tensor = 1.0,
        v_descale: float | Tensor = 1.0,
    ) -> None:
        v_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = (batch, num_kv_heads, head_dim, v_dim, max_seq_len, 1 if pool_blocks is None else pool_blocks)
        if any(type(n) is not int or not 1 <= n < 2**31 for n in sizes) or (latent and v_dim > head_dim):
            raise ShapeError(
                given=f"{batch=}, {num_kv_heads=}, {head_dim=}, v_head_dim={v_dim}, {latent=}, "
                f"{max_seq_len=}, {pool_blocks=}",
                required="each an integer from 1 to 2^31 - 1; a latent's v_head_dim at most its head_dim",
                cause="These sizes make no cache",
                fix="Pass sizes in requests, heads, columns, tokens and blocks; pool_blocks=None for slabs",
            )
        if dtype not in DTYPES:
            raise DTypeError(
                given=f"{dtype=}",
                required=" | ".join(map(str, DTYPES)),
                cause="No backend reads a cache of this dtype",
                fix="Make it in the model's dtype, or in float8_e4m3fn",
            )
        table_blocks = -(-max_seq_len // BLOCK)
        num_blocks, slabs = (table_blocks, batch) if pool_blocks is None else (pool_blocks, 1)
        self._latent = latent
        shape = (slabs, num_kv_heads, num_blocks, BLOCK)
        # NOTE: tensors made in inference mode could never be written outside of it; first, so that what memory cannot
        # hold fails here and not in lists of as many blocks
        with torch.inference_mode(False):
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
            self.k_descale, self.v_descale = None, None
            self._is_scaled = dtype == FP8 and any(isinstance(x, Tensor) or x != 1 for x in (k_descale, v_descale))
            if dtype == FP8:
                self.k_descale = head_factors("k_descale", k_descale, num_kv_heads, self.seq_lens.device)
                self.v_descale = self.k_descale
                if not latent:
                    self.v_descale = head_factors("v_descale", v_descale, num_kv_heads, self.seq_lens.device)
            table = torch.zeros(batch, table_blocks, dtype=torch.int32, device=device)
            k = torch.empty(*shape, head_dim, dtype=dtype, device=device)
            v = k[..., :v_dim] if latent else torch.empty(*shape, v_dim, dtype=dtype, device=device)
        self._lock = Lock()
        with torch.inference_mode(False):
            self._bind(Ledger(batch, num_blocks, is_slabs=pool_blocks is None), table, k, v)

    @classmethod
    def mla(cls, batch: int, head_dim: int = 576, v_head_dim: int = 512, **storage: Any) -> PagedKVCache:
        """A latent cache of one KV head, DeepSeek's dims by default; `storage` takes the constructor's keywords."""
        return cls(batch, 1, head_dim, v_head_dim=v_head_dim, latent=True, **storage)

    # Sizes

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each request: seq_lens, known to the host."""
        return tuple(self._ledger.lengths)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, over the pool or over all slabs."""
        return self._ledger.num_free

    @property
    def nbytes(self) -> int:
        """Bytes of the caches and tables in device memory."""
        values = 0 if self._latent else self._v.nbytes
        return self._k.nbytes + values + self.block_table.nbytes + self.seq_lens.nbytes

    def __repr__(self) -> str:
        B, Hk, Nblk, _, D = self.k_cache.shape
        storage = f"{B} slabs of {Nblk}" if self._ledger.is_slabs else f"a pool of {Nblk}"
        return (
            f"PagedKVCache(B={B}, Hk={Hk}, D={D}, Dv={self.v_cache.shape[-1]}{' inside K' if self._latent else ''}, "
            f"{self._k.dtype}, {self._k.device}, {storage} blocks, {self.num_free_blocks} free, "
            f"{sum(self._ledger.lengths)} tokens, {self.nbytes / 2**20:.1f} MiB)"
        )

    def append(
        self,
        k: Tensor,
        v: Tensor | None = None,
        num_tokens: Sequence[int] | Tensor | None = None,
        requests: Sequence[int] | None = None,
    ) -> None:
        """Write new tokens behind those that the requests hold.

        A block that requests share is copied before one of them writes into it.

        Args:
            k: [R, Hk, T, D] in the cache's dtype; an FP8 cache takes BF16, FP16 and FP32 too, and quantises them.
            v: [R, Hk, T, Dv] likewise; None for a latent cache.
            num_tokens: [R], how many of the T tokens each request takes, from the first; omitted, all T. A tensor on
                the GPU is read back, which waits; numbers are free.
            requests: the R different batch indices; omitted, all B.

        Raises:
            CacheFullError: the pool has too few free blocks.
            SequenceLengthError: a request would hold more than max_seq_len tokens.
            ShapeError, DTypeError, DeviceError: k, v, num_tokens or requests do not fit the cache.
        """
        rows = batch_indices(requests, len(self._ledger.lengths))
        if (v is None) != self._latent:
            raise ShapeError(
                given="append(k)" if v is None else "append(k, v)",
                required="append(k) for a latent cache, append(k, v) for one that keeps V",
                cause="V lies inside the latent" if self._latent else "The cache keeps V beside K",
                fix="Concatenate latent and rope to one k" if self._latent else "Pass v [R, Hk, T, Dv]",
            )
        T = k.shape[2] if isinstance(k, Tensor) and k.dim() == 4 else 0
        check_rows("k", k, self._k, len(rows), T)
        if v is not None:
            check_rows("v", v, self._v, len(rows), T)
        counts = [T] * len(rows) if num_tokens is None else self._counts(num_tokens, len(rows), T)

        def write(change: Change) -> None:
            slots = change.slots(rows, counts, self._slab_rows)
            if len(slots) == len(rows) * T:
                index = self._upload(slots, torch.int64).view(len(rows), 1, T) + self._head_rows  # [R, Hk, T]
                kept = None
            else:
                index = self._upload(slots, torch.int64)[:, None] + self._head_rows.view(-1)  # [n, Hk]
                tokens = chain.from_iterable(range(r * T, r * T + count) for r, count in enumerate(counts))
                kept = self._upload([*tokens], torch.int64)
            write_rows(self._k_rows, index, k, kept, self.k_descale)
            if v is not None:
                write_rows(self._v_rows, index, v, kept, self.v_descale)

        self._extend(rows, counts, write)

    def extend(self, num_tokens: int | Sequence[int] | Tensor, requests: Sequence[int] | None = None) -> None:
        """Lengthen requests by tokens whose rows the caller then writes, as `mha_fwd_kvcache(k=, v=)` does.

        Args:
            num_tokens: one number for all or [R]; otherwise as in `append`, which raises the same errors.
            requests: the R different batch indices; omitted, all B.
        """
        rows = batch_indices(requests, len(self._ledger.lengths))
        self._extend(rows, self._counts(num_tokens, len(rows)))

    @overload
    def decode(
        self, q: Tensor, mask: Tensor | None = ..., *, softmax_scale: float | None = ...,
        q_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: Literal[False] = False, out: Tensor | None = ..., tail_mask: Tensor | None = ...,
        batch_invariant: bool = ..., backend: str | None = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def decode(
        self, q: Tensor, mask: Tensor | None = ..., *, softmax_scale: float | None = ...,
        q_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: Literal[True], out: Tensor | None = ..., tail_mask: Tensor | None = ...,
        batch_invariant: bool = ..., backend: str | None = ...,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def decode(
        self, q: Tensor, mask: Tensor | None = ..., *, softmax_scale: float | None = ...,
        q_descale: float | Tensor | None = ..., attn_sink: Tensor | None = ...,
        return_lse: bool, out: Tensor | None = ..., tail_mask: Tensor | None = ...,
        batch_invariant: bool = ..., backend: str | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    def decode(
        self,
        q: Tensor,
        mask: Tensor | None = None,
        *,
        softmax_scale: float | None = None,
        q_descale: float | Tensor | None = None,
        attn_sink: Tensor | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
        tail_mask: Tensor | None = None,
        batch_invariant: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the newest S_q tokens of every request, whose rows were appended, over all of its tokens.

        `flash_mla_with_kvcache` over this cache: its tables, lengths and descales go along, and metadata is made once
        for a shape of q. The host knows the lengths, so nothing waits for a GPU, and a CUDA graph may capture it.

        Args:
            q: [B, Hq, S_q, D] contiguous, in the cache's dtype, or BF16 or FP16 over an FP8 cache.
            mask, softmax_scale, q_descale, attn_sink, return_lse, out, tail_mask, batch_invariant, backend: as in
                `flash_mla_with_kvcache`.

        Returns:
            out [B, Hq, S_q, Dv] in q's dtype (BF16 for FP8), or (out, lse [B, Hq, S_q] FP32).

        Raises:
            FlashMLAError's subclasses, as `flash_mla_with_kvcache`.
        """
        shape = q.shape if isinstance(q, Tensor) else torch.Size()
        metadata = self._metadata.get(shape)
        if metadata is None and len(shape) == 4:
            metadata = self._metadata[shape] = get_mla_metadata(
                shape, self.k_cache.shape, self.block_table, self.seq_lens, v_head_dim=self.v_cache.shape[-1],
                check_values=False,
            )  # fmt: skip
        if isinstance(mask, Tensor) and mask.dim():
            check_mask_length("mask", mask, max(self._ledger.lengths))
        return flash_mla_with_kvcache(
            q, self.k_cache, self.v_cache, self.block_table, self.seq_lens, mask, metadata,
            softmax_scale=softmax_scale, q_descale=q_descale, k_descale=self.k_descale, v_descale=self.v_descale,
            attn_sink=attn_sink, return_lse=return_lse, out=out, tail_mask=tail_mask, batch_invariant=batch_invariant,
            backend=backend,
        )  # fmt: skip

    def fork(self, source: int, target: int) -> None:
        """Make the empty request `target` a copy of `source`.

        In a pool they share the full blocks, and the partly filled one is copied; between slabs all are copied.

        Raises:
            SequenceLengthError: target holds tokens.
            CacheFullError: no free block for the partly filled one.
        """
        source, target = batch_indices([source, target], len(self._ledger.lengths))

        def share(change: Change) -> None:
            change.fork(source, target)
            self._copy_blocks(change)

        with self._lock:
            self._ledger.check_fork(source, target)
            self._change(partial(self._move, {target: source}) if self._ledger.is_slabs else share)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Request i becomes what request index[i] was (beam search); indices may repeat, or be left out.

        In a pool no token is copied and no block is needed: requests share their blocks, the partly filled one too,
        until one of them appends. Between slabs the tokens are copied.

        Args:
            index: [B]; a tensor on the GPU is read back, which waits.
        """
        batch = len(self._ledger.lengths)
        order = integers("index", index, batch, length=batch, most=batch - 1)
        moves = {b: source for b, source in enumerate(order) if b != source}
        if moves:
            with self._lock:
                self._change(partial(self._move, moves))

    def truncate(self, lengths: Sequence[int] | Tensor, requests: Sequence[int] | None = None) -> None:
        """Shorten requests: tokens past the new lengths are dropped, and blocks that then hold none are given back.

        What speculative decoding calls after a rejected draft. Blocks that are shared stay as they are: who appends to
        one copies it first.

        Args:
            lengths: [R], tokens that each request keeps, at most those that it holds. A tensor on the GPU is read back,
                which waits.
            requests: the R different batch indices; omitted, all B.

        Raises:
            SequenceLengthError: a request holds fewer tokens than it should keep.
            ShapeError: lengths or requests do not fit the cache.
        """
        rows = batch_indices(requests, len(self._ledger.lengths))
        kept = integers("lengths", lengths, len(self._ledger.lengths), length=len(rows))
        with self._lock:
            self._ledger.check_kept(rows, kept)
            self._change(lambda change: change.truncate(rows, kept))

    def free(self, requests: Sequence[int]) -> None:
        """Empty these requests; a block returns to the free ones when its last holder leaves it."""
        self.truncate([0] * len(requests), requests)

    def clear(self) -> None:
        """Empty all requests."""
        self.free(range(len(self._ledger.lengths)))

    def grow(self, blocks: int) -> None:
        """Add blocks to the pool, or to every request's slab; a request may then hold so many more.

        Tokens stay in their blocks. The caches and the table are new tensors, so capture graphs again.
        """
        if type(blocks) is not int or not 1 <= blocks < 2**31:
            raise ShapeError(
                given=f"grow({blocks!r})",
                required="blocks, an integer from 1 to 2^31 - 1",
                cause="grow only adds blocks",
                fix="free(requests) gives blocks back",
            )
        with self._lock, torch.inference_mode(False):
            change = Change(self._ledger)
            change.grow(blocks)
            table = torch.nn.functional.pad(self.block_table, (0, blocks))
            k = more_blocks(self._k, blocks)
            v = k[..., : self._v.shape[-1]] if self._latent else more_blocks(self._v, blocks)
            self._bind(change.after, table, k, v)

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """Each tensor once, as bytes (torch cannot pickle FP8), without the views that `_bind` makes of them.

        A pickled view would come back as memory of its own.
        """
        own = {name: x for name, x in vars(self).items() if name not in MADE}
        v = self._v.shape[-1] if self._latent else self._v.view(torch.uint8)
        return own | {"_k": (self._k.view(torch.uint8), self._k.dtype), "_v": v}

    def __setstate__(self, state: dict[str, Any]) -> None:
        (k_bytes, dtype), v = state["_k"], state["_v"]
        vars(self).update(state, _lock=Lock())
        k = k_bytes.view(dtype)
        self._bind(self._ledger, self.block_table, k, k[..., :v] if self._latent else v.view(dtype))

    def __copy__(self) -> PagedKVCache:
        return copy.deepcopy(self)

    # Bookkeeping

    def _bind(self, ledger: Ledger, table: Tensor, k: Tensor, v: Tensor) -> None:
        """Take k [B or 1, Hk, Nblk, 64, D], v likewise, the table and what is known of them, in one store."""
        batch, (_, Hk, Nblk, _, D) = len(ledger.lengths), k.shape
        k_rows = k.view(-1, D)
        k_cache, v_cache = (t.expand(batch, -1, -1, -1, -1) for t in (k, v))
        if self._is_scaled:
            mark_scaled(k_cache)
            mark_scaled(v_cache)
        vars(self).update(
            _ledger=ledger,
            _k=k,
            _v=v,
            _k_rows=k_rows,
            _v_rows=k_rows if self._latent else v.view(-1, v.shape[-1]),
            _head_rows=torch.arange(Hk, device=k.device)[:, None] * (Nblk * BLOCK),
            _slab_rows=Hk * Nblk * BLOCK if ledger.is_slabs else 0,
            _metadata={},
            k_cache=k_cache,
            v_cache=v_cache,
            block_table=table,
        )

    def _change(self, fill: Callable[[Change], None]) -> None:
        """An operation: `fill` fills a Change and writes rows; then table and lengths follow, then the host's state.

        Where anything raises, the device is told again what the host knows. The lock is held.
        """
        change = Change(self._ledger)
        try:
            fill(change)
            self._publish(change)
            self._ledger = change.after
        except BaseException:
            if self._ledger is not change.after:
                self._undo(change)
            raise

    def _undo(self, change: Change) -> None:
        for put_back in change.put_back:
            put_back()
        for b, blocks in enumerate(self._ledger.blocks):
            if blocks and blocks is not change.after.blocks[b]:
                self.block_table[b, : len(blocks)] = self._upload(blocks, torch.int32)
        self._tell(self._ledger.lengths)

    def _publish(self, change: Change) -> None:
        """Write the table's entries and the lengths to the device."""
        if change.entries:
            width = self.block_table.shape[1]
            index = self._upload([b * width + i for b, i in change.entries], torch.int64)
            blocks = self._upload([change.after.blocks[b][i] for b, i in change.entries], torch.int32)
            self.block_table.view(-1).index_copy_(0, index, blocks)
        grown = {new - old for new, old in zip(change.after.lengths, self._ledger.lengths, strict=True)}
        if len(grown) == 1:  # as in a step of decode: one launch, and nothing goes from the host to the device
            self.seq_lens.add_(grown.pop())
        else:
            self._tell(change.after.lengths)

    def _tell(self, lengths: Sequence[int]) -> None:
        """Write the lengths to the device."""
        self.seq_lens.copy_(staged(lengths, torch.int32, self.seq_lens.device), non_blocking=True)

    def _extend(self, rows: list[int], counts: list[int], write: Callable[[Change], None] | None = None) -> None:
        """Give the requests the blocks for so many more tokens, whose rows `write` writes."""

        def fill(change: Change) -> None:
            change.extend(rows, counts, room)
            self._copy_blocks(change)
            if write is not None:
                write(change)

        with self._lock:
            room = self._ledger.find_room(rows, counts, self.block_table.shape[1] * BLOCK)
            self._change(fill)

    def _copy_blocks(self, change: Change) -> None:
        """Fill the pool's blocks that are to be copies."""
        if change.copies:
            new, old = (self._upload([*x], torch.int64) for x in (change.copies, change.copies.values()))
            for storage in self._storages():
                storage[:, :, new] = storage[:, :, old]

    def _move(self, moves: dict[int, int], change: Change) -> None:
        """Each request b of the moves becomes what moves[b] was, all at once."""
        change.move(moves)
        new, old = self._upload([*moves], torch.int64), self._upload([*moves.values()], torch.int64)
        most = max(len(change.after.blocks[b]) for b in moves)
        if change.after.is_slabs and most:
            slabs = [storage[:, :, :most] for storage in self._storages()]
            sources = [slab[old] for slab in slabs]
            change.put_back = [partial(slab.__setitem__, new, slab[new]) for slab in slabs]
            for slab, rows in zip(slabs, sources, strict=True):
                slab[new] = rows
        self.block_table[new] = self.block_table[old]

    def _storages(self) -> tuple[Tensor, ...]:
        """The arrays that hold the rows, each once."""
        return (self._k,) if self._latent else (self._k, self._v)

    def _upload(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return upload(values, dtype, self.seq_lens.device)

    # Checks

    def _counts(self, num_tokens: int | Sequence[int] | Tensor, length: int, most: int | None = None) -> list[int]:
        values = [num_tokens] * length if isinstance(num_tokens, int) else num_tokens
        return integers("num_tokens", values, len(self._ledger.lengths), length=length, most=most)
