"""Which keys an item sees, block after block: pages through a table, plain rows, or rows named by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flash_mla.kernels.cpu.config import BLOCK
from flash_mla.kernels.cpu.formats import ROWS, SIZE, stage_row
from flash_mla.kernels.cpu.ir import I1, I8, I64, POINTER, Value
from flash_mla.kernels.cpu.item import Item


class Block(NamedTuple):
    """The keys of a step: pointers to the first row of K and V, bytes from row to row, how many keys; limit(t) is the
    key of each lane's row of tile t past which it sees none, counted from the block's first, and the least of them."""

    k: Value
    k_row: Any
    v: Value
    v_row: Any
    keys: Value
    limit: Callable[[Value], tuple[Value, Value]]
    mask_key: Value
    ahead: tuple[Value, Value] | None


Step = Callable[[Block], None]
"""Attend to a block."""


def walk_pages(item: Item, step: Step) -> None:
    """Blocks [first, stop) of this item's KV head, through the table or one after another."""
    g, a, s, m = item.g, item.a, item.spec, item.m
    head = item.h // a["share"]
    k, v = (item.pointer(x) + item.b * a[f"{x}_b"] + head * a[f"{x}_h"] for x in "kv")
    table = item.pointer("table") + item.b * a["table_row"]

    def page(i: Value) -> Value:
        if s.source == "rows":
            return i
        return item.integer(table, i, a["table_wide"]).max(0).min(a["Nblk"] - 1)

    with g.loop(item.first, item.stop) as i:
        kept = g.const(True, I1)
        if s.layout:
            kept = (item.row("layout", item.r0 // BLOCK) + i * a["layout_k"]).load(I8).differs(0)
        with g.when(kept):
            here, following = page(i), page((i + 1).min(item.stop - 1))
            pages = k + here * a["k_p"], v + here * a["v_p"]
            ahead = k + following * a["k_p"], v + following * a["v_p"]
            count = (item.n - i * BLOCK).min(BLOCK)

            def limit(t: Value, i: Value = i) -> tuple[Value, Value]:
                own = (m["limit"] + t * (4 * s.lanes)).load(item.I, 4) - (i * BLOCK).index().splat(s.lanes)
                return own, (m["low"] + t * 8).load(I64, 8) - i * BLOCK

            rows: tuple[Value, Any, Value, Any] = (pages[0], a["k_k"], pages[1], a["v_k"])
            if s.staged:
                rows = stage_pages(item, pages, count, ahead)
            step(Block(*rows, count, limit, i * BLOCK, None if s.staged else ahead))


def stage_pages(
    item: Item, pages: tuple[Value, Value], count: Value, ahead: tuple[Value, Value]
) -> tuple[Value, Any, Value, Any]:
    """Decode the rows of a block into the thread's memory; ask for the next block's."""
    g, s, a = item.g, item.spec, item.a
    strides = []
    for name, page, following, columns in zip("kv", pages, ahead, (s.D, s.Dv), strict=True):
        stride = columns * SIZE[s.held]
        strides.append(stride)
        if name == "v" and s.alias:
            return item.m["k"], strides[0], item.m["k"], strides[0]
        with g.loop(0, count) as j:
            for line in range(0, columns * SIZE[s.kv], 64):
                g.prefetch(following + j * a[f"{name}_k"] + line, 2)
            stage_row(g, page + j * a[f"{name}_k"], item.m[name] + j * stride, s.kv, columns, s.lanes)
    return item.m["k"], strides[0], item.m["v"], strides[1]


def walk_named(item: Item, step: Step) -> None:
    """The rows that the query names, 64 indices at a time: those that name one are gathered, and no others."""
    g, a, s = item.g, item.a, item.spec
    counts = []
    for n in range(s.sets):
        count = g.variable(a[f"topk{n}"])
        with g.when(a[f"count{n}"].differs(0)):
            given = item.integer(item.pointer(f"count{n}"), item.b, a[f"count{n}_wide"])
            count.set(given.max(0).min(a[f"topk{n}"]))
        counts.append(count.get())
    blocks = [(count + (BLOCK - 1)) // BLOCK for count in counts]
    total = blocks[0] if s.sets == 1 else blocks[0] + blocks[1]
    first, stop = item.part_of(total)
    before = g.const(0)
    for n in range(s.sets):
        with g.loop((first - before).max(0), (stop - before).min(blocks[n])) as i:
            found = gather(item, n, i * BLOCK, (counts[n] - i * BLOCK).min(BLOCK))

            def limit(t: Value, found: Value = found) -> tuple[Value, Value]:
                return found.index().splat(s.lanes), found

            with g.when(found > 0):
                rows = (item.m["k"], s.D * SIZE[s.held])
                step(Block(*rows, *rows, found, limit, found, None))
        before = before + blocks[n]


def gather(item: Item, n: int, first: Value, named: Value) -> Value:
    """Stage the rows of indices [first, first + named) of cache n; how many name a row."""
    g, a, s = item.g, item.a, item.spec
    form = ROWS.get(s.kv)
    indices = item.pointer(f"indices{n}") + item.b * a[f"i_b{n}"] + item.h * a[f"i_h{n}"]
    rows, scales = item.m["addresses"], item.m["addresses"] + 8 * (BLOCK + 8)
    found = g.variable(g.const(0))
    with g.loop(first, first + named) as j:
        index = item.integer(indices, j, a[f"wide{n}"])
        inside = (index >= 0) & (index < a[f"limit{n}"])
        index = inside.pick(index, 0)
        page, slot = index // a[f"page{n}"], index % a[f"page{n}"]
        here = found.get()
        base = a[f"cache{n}"] + page * a[f"c_p{n}"]
        if form and form.scales_apart:
            (scales + here * 8).store(base + a[f"page{n}"] * form.width + slot * form.scale_bytes, 8)
            (rows + here * 8).store(base + slot * form.width, 8)
        else:
            (rows + here * 8).store(base + slot * a[f"c_k{n}"], 8)
        found.set(here + inside.cast("zext", I64))
    count = found.get()
    stored = form.width if form else s.D * SIZE[s.kv]
    with g.loop(0, count) as j:
        # NOTE: eight rows ahead: the latency of DRAM, and its fill buffers are not all taken
        following = (rows + (j + 8).min(count - 1) * 8).load(POINTER, 8)
        for line in range(0, stored, 64):
            g.prefetch(following + line, 3)
        row = (rows + j * 8).load(POINTER, 8)
        scale = (scales + j * 8).load(POINTER, 8) if form and form.scales_apart else row
        stage_row(g, row, item.m["k"] + j * (s.D * SIZE[s.held]), s.kv, s.D, s.lanes, scale)
    return count
