"""The producer warps of sparse decode with few heads and FP8 rows: raw rows on their way while others are converted.

A warp has a ring of its own in shared memory, of granules of 4 rows as they lie in the cache. Rows arrive by
`cp.async`, 16 bytes a lane, lanes along the rows; so bytes on their way take no registers. A granule is read to
registers, its place is given to the granule `config.ring` further on, and then it is converted.

Lane l converts pieces of row l / 8 of a granule: in step i the 16 codes from 128 i + 16 (l % 8), two 16-byte pieces of
BF16. Lanes 4 to 7 of 8, which have the next chunk, store their second piece first: so 8 lanes write 128 different bytes
of the banks.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_mla.kernels.hopper import split
from flash_mla.kernels.hopper.limits import ROW_BYTES, WARP
from flash_mla.kernels.hopper.mla_decode.config import K_CHUNKS
from flash_mla.kernels.hopper.sparse_decode.config import CHUNK_BYTES, GRANULE, GRANULES, Config
from flash_mla.kernels.hopper.sparse_decode.producer import Producer
from flash_mla.kernels.hopper.sparse_decode.rows import e8m0_value, four_values, fp32_of, store_vector
from flash_mla.kernels.hopper.walk import Done, Place


@dataclass(frozen=True)
class RingProducer(Producer):
    """One of the warps that fill the K buffers; a granule is number 0 to 3 of a pair of blocks.

    Registers of a thread, beside its keys: where the granule at hand lies in the ring, and what was read of it.
    """

    slot: cute.Tensor

    @staticmethod
    def rows_at_hand(config: Config) -> dict[str, cute.Tensor]:
        """Registers for a granule that was read, and where the one at hand lies in the ring."""
        return {
            "words": cute.make_rmem_tensor((4, config.code_steps + config.layout.wide), Int32),
            "scales": cute.make_rmem_tensor(4, Int32),
            "slot": cute.make_rmem_tensor(1, Int32),
        }

    @property
    def ring(self):
        """The first byte of the warp's ring."""
        return self.shared.raw + self.warp * (self.config.ring * self.config.granule_bytes)

    # rows on their way

    @cute.jit
    def copy(self, granule: cutlass.Constexpr, slot: cutlass.Constexpr, target) -> None:
        """Start to copy a granule of the pair whose places lie in `slot`; rows that are not there arrive as zeros."""
        layout, pieces = self.config.layout, self.config.row_pieces
        first = GRANULE * granule
        for step in cutlass.range_constexpr(-(-GRANULE * pieces // WARP)):
            # the rows that begin in this step's 32 pieces: at most one
            row = WARP * step // pieces
            start = pieces * (row + 1) - WARP * step
            behind = Int32(1) if self.lane >= start else Int32(0)
            address = cute.arch.shuffle_sync(self.row[slot], offset=first + row + behind)
            if WARP * step + self.lane < GRANULE * pieces:
                piece = WARP * step + self.lane - pieces * (row + behind)
                copy_async(target + 16 * (WARP * step + self.lane), address + 16 * piece, 16, address != 0)
        if const_expr(layout.apart):
            address = cute.arch.shuffle_sync(self.row[slot], offset=first + self.lane % GRANULE)
            apart = cute.arch.shuffle_sync(self.apart[slot], offset=first + self.lane % GRANULE)
            if self.lane < GRANULE:
                copy_async(
                    target + 16 * GRANULE * pieces + layout.apart * self.lane,
                    address + apart,
                    layout.apart,
                    address != 0,
                )
        cute.arch.cp_async_commit_group()

    # rows that are there

    @cute.jit
    def read(self, source) -> None:
        """A granule from the ring to registers."""
        layout, row = self.config.layout, self.lane // 8
        base = source + row * (16 * self.config.row_pieces)
        scales = base + layout.scale_at
        if const_expr(layout.apart):
            scales = source + 16 * GRANULE * self.config.row_pieces + layout.apart * row
        if const_expr(layout.scale is not None):
            for i in cutlass.range_constexpr(layout.apart // 4 or 4):
                self.scales[i] = read_word(scales + 4 * i)
        for i in cutlass.range_constexpr(self.config.code_steps):
            words = read_vector(base + 16 * (self.lane % 8), 128 * i)
            for w in cutlass.range_constexpr(4):
                self.words[w, i] = words[w]
        if const_expr(layout.wide == 1):
            words = read_vector(base + 16 * (self.lane % 8), layout.wide_at)
            for w in cutlass.range_constexpr(4):
                self.words[w, self.config.code_steps] = words[w]

    @cute.jit
    def scale_of(self, i: cutlass.Constexpr):
        """The scale of the thread's codes in step i; None: there is none."""
        layout = self.config.layout
        if const_expr(layout.scale is None):
            return None
        if const_expr(layout.scale == "fp32"):
            word = self.scales[layout.scale_word(2 * i)]
            return fp32_of(word)
        if const_expr(layout.group == 64):
            return e8m0_value(self.scales[i // 2], 2 * (i % 2) + self.lane % 8 // 4)
        return e8m0_value(self.scales[i], self.lane % 8 // 2)

    @cute.jit
    def convert(self, granule: cutlass.Constexpr) -> None:
        """The granule in registers, as BF16, to its rows of the K buffers."""
        layout = self.config.layout
        row = GRANULE * (granule % 2) + self.lane // 8
        upper = self.lane % 8 // 4
        swapped = upper != 0
        buffer = CHUNK_BYTES * (granule // 2 * K_CHUNKS)
        base = self.shared.k_buffers.toint() + (8 * self.warp + row) * ROW_BYTES
        # lanes of the upper chunk of a step store their second piece first
        place = (2 * (self.lane % 4) + upper) ^ row
        first, second = base + CHUNK_BYTES * upper + 16 * place, base + CHUNK_BYTES * upper + 16 * (place ^ 1)
        for i in cutlass.range_constexpr(self.config.code_steps):
            scale = self.scale_of(i)
            words = [self.words[j, i] for j in range(4)]
            near = (words[2] if swapped else words[0], words[3] if swapped else words[1])
            far = (words[0] if swapped else words[2], words[1] if swapped else words[3])
            stored = (*four_values(near[0], scale), *four_values(near[1], scale))
            behind = (*four_values(far[0], scale), *four_values(far[1], scale))
            offset = buffer + CHUNK_BYTES * 2 * i
            if const_expr(2 * i + 1 < layout.codes):  # noqa: SIM114
                store_vector(first, offset, stored)
                store_vector(second, offset, behind)
            elif upper == 0:
                store_vector(first, offset, stored)
                store_vector(second, offset, behind)
        if const_expr(layout.wide == 1):
            words = tuple(self.words[j, self.config.code_steps] for j in range(4))
            store_vector(base + 16 * ((self.lane % 8) ^ row), buffer + CHUNK_BYTES * layout.codes, words)

    # segments

    @cute.jit
    def load_segment(self, place: Place, length, part: split.Segment, done: Done) -> Done:
        """Q, and every pair of a segment, granule by granule."""
        token, first, last = place.request, part.first, part.last
        if last > first:
            keys = self.lengths.keys(token)
            self.find_first(keys, first, last)
            for granule in cutlass.range_constexpr(self.config.ring):
                self.copy(granule, 0, self.ring + granule * self.config.granule_bytes)
            if self.warp == 0:
                self.load_q(keys, place.group, done.segments)
            self.rewind()
            for pair in cutlass.range(first, last, unroll=1):
                self.find_row(keys, pair + 1, 1)
                self.read_index(keys, pair + 2, last)
                self.fill_pair(done.items + pair - first)
                self.go_on()
            # the ring's places are free
            cute.arch.cp_async_wait_group(0)
            done = done.plus(last - first)
        return done

    @cute.jit
    def rewind(self) -> None:
        """To the first place of the ring."""
        self.slot[0] = Int32(0)

    @cute.jit
    def advance(self) -> None:
        """To the next place of the ring."""
        size = self.config.granule_bytes
        following = self.slot[0] + size
        self.slot[0] = following if following < self.config.ring * size else 0

    @cute.jit
    def fill_pair(self, turn) -> None:
        """Convert a pair of blocks, while later granules are on their way."""
        k = self.shared.k
        for granule in cutlass.range_constexpr(GRANULES):
            cute.arch.cp_async_wait_group(self.config.ring - 1)
            cute.arch.sync_warp()
            source = self.ring + self.slot[0]
            self.read(source)
            cute.arch.sync_warp()
            following = granule + self.config.ring
            self.copy(following % GRANULES, following // GRANULES, source)
            self.advance()
            stage = granule // 2 * 2
            if const_expr(granule % 2 == 0):
                k.acquire(stage, turn)
                k.acquire(stage + 1, turn)
                self.tell_live(stage)
            self.convert(granule)
            if const_expr(granule % 2 == 1):
                cute.arch.fence_view_async_shared()
                k.arrive_warp(stage)
                k.arrive_warp(stage + 1)


@cute.jit
def copy_async(target, source, num_bytes: cutlass.Constexpr, live) -> None:
    """Start to copy 4, 8 or 16 bytes to shared memory; zeros unless `live`."""
    size = Int32(num_bytes) if live else Int32(0)
    cute.arch.inline_ptx(
        f"cp.async.{'cg' if num_bytes == 16 else 'ca'}.shared.global [{{$r0}}], [{{$r1}}], {num_bytes}, {{$r2}};",
        read_only_args=[target, source, size],
    )


def read_vector(address, offset: int):
    """16 bytes of shared memory, as four words."""
    return cute.arch.inline_ptx(
        f"ld.shared.v4.b32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}} + {offset}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )


def read_word(address):
    """4 bytes of shared memory."""
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])
