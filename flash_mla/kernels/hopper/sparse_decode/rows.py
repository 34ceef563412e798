"""The keys that a token names: how many, where their rows lie, and how a row's bytes become BF16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.sparse_decode.config import RowLayout
from flash_mla.kernels.hopper.table import prefetch_line

LONGEST = 1 << 24
"""Blocks that a token's keys may fill."""


class Cache(NamedTuple):
    """One cache and the indices into it.

    rows: the first byte; pages of `page` rows, page_bytes apart, `live_rows` in all; rows row_bytes apart in a page;
    indices [B, S_q, topk] int32; lengths [B] int32, of which the leftmost so many indices count if has_lengths.
    """

    rows: Int64
    page_bytes: Int64
    row_bytes: Int64
    page: Int32
    live_rows: Int32
    indices: cute.Tensor
    lengths: cute.Tensor
    has_lengths: Int32

    @staticmethod
    def over(layout: RowLayout, rows: cute.Tensor, indices: cute.Tensor, lengths: cute.Tensor, has_lengths) -> Cache:
        """rows [pages, page, 1, columns] in bytes or BF16."""
        size = rows.element_type.width // 8
        row_bytes = Int64(layout.row_bytes) if layout.apart else Int64(rows.stride[1]) * size
        pages, page = Int64(rows.shape[0]), Int64(rows.shape[1])
        return Cache(
            rows=rows.iterator.toint(),
            page_bytes=Int64(rows.stride[0]) * size,
            row_bytes=row_bytes,
            page=rows.shape[1],
            live_rows=Int32(cutlass.min(pages * page, Int64(0x7FFFFFFF))),
            indices=indices,
            lengths=lengths,
            has_lengths=has_lengths,
        )

    @cute.jit
    def count(self, request):
        """Indices of a request's tokens that count."""
        topk = self.indices.shape[2]
        # NOTE: without lengths `lengths` may be any tensor, and a read of it is one more DRAM latency
        length = load_word(self.lengths.iterator.toint() + 4 * Int64(request), 0, self.has_lengths)
        return cutlass.max(0, cutlass.min(length, topk)) if self.has_lengths != 0 else topk

    @cute.jit
    def blocks(self, request):
        """Blocks of 64 that hold them."""
        return (self.count(request) + (BLOCK - 1)) // BLOCK


class Keys(NamedTuple):
    """A token: its request and query, the indices that count in the first cache, their blocks, and in the second."""

    request: Int32
    query: Int32
    count: Int32
    blocks: Int32
    extra: Int32


class RowPlace(NamedTuple):
    """Where a row lies: its first byte, 0 where no key is named; and how far behind it its scales lie, if apart."""

    row: Int64
    scales: Int32


@dataclass(frozen=True)
class Lengths:
    """Stands where dense decode has seq_lens, and its table: the tokens' keys, in whole blocks.

    A token is a request here: one row of indices. Its keys in the second cache follow those in the first.
    """

    caches: tuple[Cache, ...]
    tokens: Int32
    S_q: Int32

    @property
    def shape(self):
        return (self.tokens, LONGEST)

    def __getitem__(self, token):
        return self.of(token)

    @cute.jit
    def of(self, token):
        """Keys of a token, counting whole blocks."""
        request = token // self.S_q
        blocks = self.caches[0].blocks(request)
        if const_expr(len(self.caches) == 2):
            blocks = blocks + self.caches[1].blocks(request)
        return BLOCK * blocks

    @cute.jit
    def prefetch_first(self, groups, cluster, clusters) -> None:
        """Ask L2 for the indices that a cluster starts with if all tokens have as many."""
        token = cluster // groups if self.tokens * groups <= clusters else cluster * self.tokens // clusters
        if token < self.tokens:
            self.prefetch(token, 0)

    @cute.jit
    def prefetch(self, token, first) -> None:
        """Ask L2, a warp, for 1024 indices of a token, from number `first` on.

        A short call is a chain of DRAM latencies: counts, indices, rows; this takes the second out.
        """
        indices, first = self.caches[0].indices, first + 32 * cute.arch.lane_idx()
        if first < indices.shape[2]:
            row = indices[token // self.S_q, token % self.S_q, None]
            prefetch_line((row.iterator + first).toint())

    @cute.jit
    def keys(self, token) -> Keys:
        """What is to know of a token before its indices are read."""
        request = token // self.S_q
        count = self.caches[0].count(request)
        extra = Int32(0)
        if const_expr(len(self.caches) == 2):
            extra = self.caches[1].count(request)
        return Keys(request, token % self.S_q, count, self.caches[0].blocks(request), extra)

    @cute.jit
    def index(self, keys: Keys, block, row):
        """Index number `row` of a block of the token, -1 where none counts."""
        key, found = BLOCK * block + row, Int32(-1)
        if key < keys.count:
            found = self.caches[0].indices[keys.request, keys.query, key]
        if const_expr(len(self.caches) == 2):
            extra = key - BLOCK * keys.blocks
            if extra >= 0 and extra < keys.extra:
                found = self.caches[1].indices[keys.request, keys.query, extra]
        return found

    @cute.jit
    def place(self, layout: cutlass.Constexpr, keys: Keys, block, index) -> RowPlace:
        """Where the row of an index of a block of the token lies."""
        place = place_in(layout, self.caches[0], index)
        if const_expr(len(self.caches) == 2):  # noqa: SIM102
            if block >= keys.blocks:
                place = place_in(layout, self.caches[1], index)
        return place


@cute.jit
def place_in(layout: cutlass.Constexpr, cache: Cache, index) -> RowPlace:
    """Where the row of an index lies; nowhere if the cache has no such row."""
    page = Int32(Uint32(index) // Uint32(cache.page))
    offset = index - page * cache.page
    row = cache.rows + Int64(page) * cache.page_bytes + Int64(offset) * cache.row_bytes
    scales = Int32(0)
    if const_expr(layout.apart):
        scales = cache.page * layout.row_bytes + layout.apart * offset - Int32(offset * layout.row_bytes)
    # NOTE: as unsigned numbers, so that negative ones are past the end too
    live = Uint32(index) < Uint32(cache.live_rows)
    return RowPlace(row if live else Int64(0), scales)


def load_vector(address, offset: int, live):
    """16 bytes, as four words; zeros unless `live`."""
    # NOTE: kept in L1: the rest of the lines that a row's 64 bytes touch are read next
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; "
        "mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0; "
        f"@p ld.global.nc.L1::evict_last.v4.b32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}} + {offset}]; }}",
        write_only_types=[Int32] * 4,
        read_only_args=[address, live],
    )


def load_word(address, offset: int, live):
    """4 bytes; zeros unless `live`."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; "
        f"@p ld.global.nc.b32 {{$w0}}, [{{$r0}} + {offset}]; }}",
        write_only_types=[Int32],
        read_only_args=[address, live],
    )


def store_vector(address, offset: int, words) -> None:
    """Four words to 16 bytes of shared memory."""
    cute.arch.inline_ptx(
        f"st.shared.v4.b32 [{{$r0}} + {offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
        read_only_args=[address, *words],
    )


def four_values(codes, scale):
    """Four e4m3 times a scale, as two words of BF16: exact but for one rounding."""
    # NOTE: FP16 holds every e4m3, FP32 the product
    if scale is None:
        scale = Float32(1.0)
    return cute.arch.inline_ptx(
        "{ .reg .b16 l, h, a, b, c, d; .reg .b32 x, y; .reg .f32 p, q, r, s; "
        "mov.b32 {l, h}, {$r0}; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; "
        "mov.b32 {a, b}, x; mov.b32 {c, d}, y; "
        "cvt.f32.f16 p, a; cvt.f32.f16 q, b; cvt.f32.f16 r, c; cvt.f32.f16 s, d; "
        "mul.f32 p, p, {$r1}; mul.f32 q, q, {$r1}; mul.f32 r, r, {$r1}; mul.f32 s, s, {$r1}; "
        "cvt.rn.bf16x2.f32 {$w0}, q, p; cvt.rn.bf16x2.f32 {$w1}, s, r; }",
        write_only_types=[Int32, Int32],
        read_only_args=[codes, scale],
    )


def fp32_of(word):
    """The FP32 number of these bits."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[word])


def e8m0_value(word, place):
    """The value of byte `place` of a word of e8m0: 2^(byte - 127)."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 e, b; .reg .pred p; shr.u32 e, {$r0}, {$r1}; and.b32 e, e, 255; shl.b32 b, e, 23; "
        # 2^-127 is subnormal, and 255 is NaN
        "setp.eq.u32 p, e, 0; @p mov.b32 b, 0x00400000; setp.eq.u32 p, e, 255; @p mov.b32 b, 0x7fffffff; "
        "mov.b32 {$w0}, b; }",
        write_only_types=[Float32],
        read_only_args=[word, 8 * place],
    )
