"""What the roles of both kernels share: the global tensors, and which tiles see each other."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.backward.config import TILE_N, TILE_Q
from flash_mla.kernels.hopper.limits import WARP
from flash_mla.kernels.hopper.work import warp_max


class Tensors(NamedTuple):
    """Global memory that TMA does not touch.

    lse2, shift and left [B * Hq, P] FP32, as `prepare_kernel` of the Triton backward writes them; live [B * Hq * query
    tiles] int32: past the last row of each tile that has a gradient; seq_lens and start_pos [B] int32; ds [tiles,
    TILE / 2] int32, two elements of dS each (`place_of`).
    """

    lse2: cute.Tensor
    shift: cute.Tensor
    left: cute.Tensor
    live: cute.Tensor
    seq_lens: cute.Tensor
    start_pos: cute.Tensor
    ds: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); scale; dims; first: the first KV head (request * Hk + head) of this launch; how many it has, and
    how many of them are walked together (`walk`); 0 or 1: is it causal, and which inputs count."""

    scale_log2: Float32
    scale: Float32
    Hq: Int32
    Hk: Int32
    P: Int32
    S_kv: Int32
    first: Int32
    heads: Int32
    group: Int32
    causal: Int32
    has_lens: Int32
    has_start: Int32


class Span(NamedTuple):
    """A request's keys, and the position of its first query."""

    keys: Int32
    start: Int32


class QueryTiles(NamedTuple):
    """Query tiles that see a key tile: from `begin` to `end`; from `whole` on every row sees every key."""

    begin: Int32
    whole: Int32
    end: Int32


@cute.jit
def span_of(tensors: Tensors, scalars: Scalars, request) -> Span:
    """Read a request's length and start, forced inside what is there."""
    keys, start = scalars.S_kv, Int32(0)
    if scalars.has_lens != 0:
        keys = cutlass.max(0, cutlass.min(keys, tensors.seq_lens[request]))
    if scalars.has_start != 0:
        start = cutlass.max(0, cutlass.min(scalars.S_kv, tensors.start_pos[request]))
    return Span(keys, start)


@cute.jit
def live_of(tensors: Tensors, scalars: Scalars, line):
    """Past the last row of a head that has a gradient; by a whole warp. line: request * Hq + head."""
    tiles, live = (scalars.P + (TILE_Q - 1)) // TILE_Q, Int32(0)
    for tile in cutlass.range(cute.arch.lane_idx(), tiles, WARP, unroll=1):
        live = cutlass.max(live, tensors.live[line * tiles + tile])
    return warp_max(live)


@cute.jit
def walk(index, tiles, heads, group):
    """(tile, head) of CTA `index`: group of heads after group, in each all first tiles, then all second ones.

    First tiles have most to do under a causal mask. CTAs start in the order of their index, so that the last ones of a
    group are short: one head after the other would end in one that starts late with its longest (1.26 times the time
    of even work, by simulation, at 16 heads of 4096 tokens).
    """
    number = index // (group * tiles)
    rest = index - number * group * tiles
    size = cutlass.min(group, heads - number * group)
    return rest // size, number * group + rest % size


class KeyTile(NamedTuple):
    """A CTA's tile of the keys' kernel: its number in its KV head, the head, the request."""

    number: Int32
    kv_head: Int32
    request: Int32


@cute.jit
def key_tile_of(scalars: Scalars, index) -> KeyTile:
    """The key tile of CTA `index`: the first ones, which most queries see, come first."""
    tile, head = walk(index, (scalars.S_kv + (TILE_N - 1)) // TILE_N, scalars.heads, scalars.group)
    line = head + scalars.first
    request = line // scalars.Hk
    return KeyTile(tile, line - request * scalars.Hk, request)


@cute.jit
def query_tiles(scalars: Scalars, span: Span, live, key0) -> QueryTiles:
    """The query tiles of the key tile at `key0`, in a head with `live` rows."""
    begin, whole, end = Int32(0), Int32(0), (live + (TILE_Q - 1)) // TILE_Q
    if scalars.causal != 0:
        begin = cutlass.max(0, key0 - span.start) // TILE_Q
        whole = (cutlass.max(0, key0 + (TILE_N - 1) - span.start) + (TILE_Q - 1)) // TILE_Q
    if key0 + TILE_N > span.keys:
        whole = end
    if key0 >= span.keys:
        end = Int32(0)
    return QueryTiles(begin, whole, end)


@cute.jit
def key_tiles(scalars: Scalars, span: Span, live, query_tile):
    """How many key tiles, from the first on, a query tile sees: exactly those of which `query_tiles` names it."""
    keys = span.keys
    if scalars.causal != 0:
        keys = cutlass.min(keys, span.start + (query_tile + 1) * TILE_Q)
    tiles = (keys + (TILE_N - 1)) // TILE_N
    if query_tile * TILE_Q >= live:
        tiles = Int32(0)
    return tiles


@cute.jit
def place_of(scalars: Scalars, head, key_tile, query_tile):
    """The number of a tile of dS in the workspace; head: query head of this launch, from its first on."""
    across, down = (scalars.S_kv + (TILE_N - 1)) // TILE_N, (scalars.P + (TILE_Q - 1)) // TILE_Q
    return (head * across + key_tile) * down + query_tile
