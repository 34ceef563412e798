"""The warps of an FP8 prefill that transpose V: wgmma takes operands of e4m3 with the keys of a column side by side.

sm_90 has no transposing load of bytes. That of 16-bit elements gives a thread two neighbouring columns of two
neighbouring keys, and of the two 8 keys further on; a byte permutation separates the columns. So 16 keys of a column
lie in the order 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15: that in which a thread holds its scores, whose P is packed
without a shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_mla.kernels.hopper.e4m3 import separate_either
from flash_mla.kernels.hopper.prefill.config import TRANSPOSERS, ZEROS, Config
from flash_mla.kernels.hopper.prefill.shared import Shared, receive
from flash_mla.kernels.hopper.transpose import transpose_load

PIECE = 16
"""Columns, or keys, of 16 bytes."""
KEYS = 32
"""Keys that a warp transposes at a time."""
TOGETHER = 2
"""Pieces of columns whose loads a warp has in flight."""


@dataclass(frozen=True)
class Transposer:
    """One of the warps; `number`: which."""

    config: Config
    shared: Shared
    number: Int32

    @staticmethod
    def over(shared: Shared, number) -> Transposer:
        shared.tasks.read_by("transposers", TRANSPOSERS)
        shared.v.read_by("transposers", TRANSPOSERS)
        shared.turned.written_by("transposers", TRANSPOSERS)
        return Transposer(shared.config, shared, number)

    @cute.jit
    def run(self) -> None:
        """Transpose the blocks of tile after tile."""
        config, v, turned = self.config, self.shared.v, self.shared.turned
        zeros = cute.make_tensor(self.shared.zeros, cute.make_layout(ZEROS // 4))
        if cute.arch.lane_idx() < ZEROS // 4:
            zeros[cute.arch.lane_idx()] = Int32(0)
        count, done = Int32(0), Int32(0)
        _row0, _head, _request, _kv_head, length, _start, blocks, *_ = receive(self.shared, done)
        while blocks != 0:
            for n in cutlass.range(blocks, unroll=1):
                source, target = (count + n) % config.v_stages, (count + n) % config.stages
                v.wait(source, (count + n) // config.v_stages)
                turned.acquire(target, (count + n) // config.stages)
                self.transpose(source, target, length - n * config.tile_n)
                cute.arch.fence_view_async_shared()
                turned.arrive_warp(target)
                v.release(source)
            count, done = count + blocks, done + 1
            _row0, _head, _request, _kv_head, length, _start, blocks, *_ = receive(self.shared, done)

    @cute.jit
    def transpose(self, source, target, valid) -> None:
        """A block, of whose keys `valid` exist; the others are zeros: P is 0 there, but 0 * NaN is NaN."""
        config = self.config
        pieces = config.Dv // PIECE // TRANSPOSERS
        for first in cutlass.range_constexpr(0, pieces, TOGETHER):
            words = []
            for i in cutlass.range_constexpr(TOGETHER):
                piece = pieces * self.number + first + i
                for group in cutlass.range_constexpr(config.tile_n // KEYS):
                    words.append(transpose_load(self.source(source, piece, group, valid)))
            for i in cutlass.range_constexpr(TOGETHER):
                piece = pieces * self.number + first + i
                for group in cutlass.range_constexpr(config.tile_n // KEYS):
                    self.store(target, piece, group, words[i * (config.tile_n // KEYS) + group])

    @cute.jit
    def source(self, stage, piece, group: cutlass.Constexpr, valid):
        """Where this lane's key of a group has a piece of its columns; zeros if there is no such key."""
        config, key = self.config, KEYS * group + cute.arch.lane_idx()
        row_bytes = config.row_bytes(config.Dv)
        across = row_bytes // PIECE
        place = (piece % across) ^ (key // (128 // row_bytes) % across)
        chunk = stage * (config.Dv // row_bytes) + piece // across
        address = self.shared.sV.iterator.toint() + (chunk * config.tile_n + key) * row_bytes + place * PIECE
        return address if key < valid else self.shared.zeros.toint()

    @cute.jit
    def store(self, stage, piece, group: cutlass.Constexpr, matrices) -> None:
        """16 columns of a group of keys."""
        config, lane = self.config, cute.arch.lane_idx()
        row_bytes = config.row_bytes(config.tile_n)
        # NOTE: a matrix has even columns in its rows 0 to 3 and odd ones in 4 to 7, or the other way round: eight even
        # ones would meet in half of the banks
        odd = lane // 16
        words = []
        for half in cutlass.range_constexpr(2):
            words.extend(separate_either(matrices[2 * half], matrices[2 * half + 1], odd))
        column = PIECE * piece + lane % 8 * 2 + ((lane % 8 // 4) ^ (lane // 8 % 2))
        key_piece = KEYS // PIECE * group + lane // 16
        across = row_bytes // PIECE
        place = (key_piece % across) ^ (column // (128 // row_bytes) % across)
        chunk = stage * (config.tile_n // row_bytes) + key_piece // across
        address = self.shared.sVt.iterator.toint() + (chunk * config.Dv + column) * row_bytes + place * PIECE
        cute.arch.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[address, *words],
        )
