"""Which keys an item sees, block after block: pages through a table, plain rows, or rows named by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flash_mla.kernels.cpu.config import BLOCK
from flash_mla.kernels.cpu.formats import ROWS, SIZE, stage_row
from flash_mla.kernels.cpu.ir import I1, I8, I64, POINTER, Value
from flash_mla.kernels.cpu.item import Item, Place


class Block(NamedTuple):
    """The keys of a step: pointers to the first row of K and V, bytes from row to row, how many keys; limit(t) is the
    key past which a row sees none, for each lane of vector t of the state, counted from the block's first; and the
    least and the most of them; and where rows of K and V of the block after it start, which are asked for meanwhile."""

    k: Value
    k_row: Any
    v: Value
    v_row: Any
    keys: Value
    limit: Callable[[Value], tuple[Value, Value, Value]]
    mask_key: Value
    ahead: tuple[Row, Row] | None


Row = Callable[[Value], Value]
"""Where row j starts."""
Step = Callable[[Block], None]
"""Attend to a block."""


def walk_pages(item: Item, step: Step) -> None:
    """Blocks [first, stop) of this item's KV head, through the table or one after another."""
    g, a, s, m = item.g, item.a, item.spec, item.m
    names = ["k", "v", *(["rope"] if s.rope else [])]

    def rows(b: Value, h: Value, i: Value) -> dict[str, Value]:
        """The first rows of block i of a request and item head: a page, or 64 rows of a larger one."""
        number, inside = i // (s.page // s.block), i % (s.page // s.block) * s.block
        if s.source == "table":
            table = item.pointer("table") + b * a["table_row"]
            number = g.integer(table, number, a["table_wide"]).max(0).min(a["Nblk"] - 1)
        bases = {x: item.pointer(x) + b * a[f"{x}_b"] + h // a["share"] * a[f"{x}_h"] for x in names}
        return {x: base + number * a[f"{x}_p"] + inside * a[f"{x}_k"] for x, base in bases.items()}

    with g.loop(item.place.first, item.place.stop) as i:
        kept = g.const(True, I1)
        if s.layout:
            kept = (item.row("layout", item.r0 // BLOCK) + i * a["layout_k"]).load(I8).differs(0)
        with g.when(kept):
            b, h, ahead = (g.variable(x) for x in (item.b, item.h, i + 1))
            with g.when(i + 1 >= item.place.stop):
                following = item.following()
                b.set(following.b)
                h.set(following.h)
                ahead.set(following.first.min((following.n - 1) // s.block).max(0))
            here, next_rows = rows(item.b, item.h, i), rows(b.get(), h.get(), ahead.get())
            first = i * s.block
            count = (item.n - first).min(s.block)

            def limit(t: Value, first: Value = first) -> tuple[Value, Value, Value]:
                own = (m["limit"] + t * (4 * s.lanes)).load(item.I, 4) - first.index().splat(s.lanes)
                least, most = ((m[name] + t * 8).load(I64, 8) - first for name in ("low", "high"))
                return own, least, most

            if s.staged:
                step(Block(*stage_pages(item, here, count, next_rows), count, limit, first, None))
            else:
                k, v = (lambda j, x=x, of=next_rows: of[x] + j * a[f"{x}_k"] for x in ("k", "v"))
                step(Block(here["k"], a["k_k"], here["v"], a["v_k"], count, limit, first, (k, v)))


def stage_pages(
    item: Item, here: dict[str, Value], count: Value, ahead: dict[str, Value]
) -> tuple[Value, int, Value, int]:
    """Decode the rows of a block into the thread's memory; ask for the next block's. Gives K, V and their strides."""
    g, s, m = item.g, item.spec, item.m
    size = SIZE[s.held]

    def stage(name: str, to: Value, columns: int, stride: int) -> None:
        step = item.a[f"{name}_k"]
        with g.loop(0, count) as j:
            for line in range(0, columns * SIZE[s.kv], 64):
                g.prefetch(ahead[name] + j * step + line, 2)
            stage_row(g, here[name] + j * step, to + j * stride, s.kv, columns, s.lanes)

    stage("k", m["k"], s.D - s.rope, s.D * size)
    if s.rope:
        stage("rope", m["k"] + (s.D - s.rope) * size, s.rope, s.D * size)
    if s.alias:
        return m["k"], s.D * size, m["k"], s.D * size
    stage("v", m["v"], s.Dv, s.Dv * size)
    return m["k"], s.D * size, m["v"], s.Dv * size


def walk_named(item: Item, step: Step) -> None:
    """The rows that the query names, 64 indices at a time: those that name one are gathered, and no others."""
    g, s, m = item.g, item.spec, item.m
    first, stop = item.place.first, item.place.stop
    found = g.variable(find(item, item.place, first))
    with g.loop(first, stop) as i:
        count = found.get()
        gather(item, count)
        with g.either(i + 1 < stop) as (more, last):
            with more:
                found.set(find(item, item.place, i + 1))
            with last:
                following = item.following()
                found.set(find(item, following, following.first))

        def limit(t: Value, count: Value = count) -> tuple[Value, Value, Value]:
            return count.index().splat(s.lanes), count, count

        def ahead(j: Value) -> Value:
            return (m["addresses"] + j * 8).load(POINTER, 8)

        with g.when(count > 0):
            rows = (m["k"], s.D * SIZE[s.held])
            step(Block(*rows, *rows, count, limit, count, (ahead, ahead)))


def find(item: Item, of: Place, i: Value) -> Value:
    """Write the addresses of the rows that block i of an item names, and of their scales; how many there are."""
    g, s = item.g, item.spec
    form = ROWS.get(s.kv)
    rows, scales = item.m["addresses"], item.m["addresses"] + 8 * (BLOCK + 8)
    counts = [item.count(n, of.b) for n in range(s.sets)]
    a, first, count = item.a, i * BLOCK, counts[0]
    names = ("cache", "indices", "wide", "limit", "page", "c_p", "c_k", "i_b", "i_h")
    own = {name: a[f"{name}0"] for name in names}
    if s.sets == 2:
        before = (counts[0] + (BLOCK - 1)) // BLOCK
        second = i >= before
        first, count = second.pick((i - before) * BLOCK, first), second.pick(counts[1], count)
        own = {name: second.pick(a[f"{name}1"], x) for name, x in own.items()}
    indices = own["indices"].cast("inttoptr", POINTER) + of.b * own["i_b"] + of.h * own["i_h"]
    base = own["cache"].cast("inttoptr", POINTER)
    found = g.variable(g.const(0))
    with g.loop(first, (first + BLOCK).min(count)) as j:
        index = g.integer(indices, j, own["wide"])
        inside = (index >= 0) & (index < own["limit"])
        index = inside.pick(index, 0)
        slot, page = index % own["page"], base + index // own["page"] * own["c_p"]
        here = found.get()
        if form and form.scales_apart:
            (scales + here * 8).store(page + own["page"] * form.width + slot * form.scale_bytes, 8)
            (rows + here * 8).store(page + slot * form.width, 8)
        else:
            (rows + here * 8).store(page + slot * own["c_k"], 8)
        found.set(here + inside.cast("zext", I64))
    return found.get()


def gather(item: Item, count: Value) -> None:
    """Stage the rows that were found."""
    g, s = item.g, item.spec
    form = ROWS.get(s.kv)
    rows, scales = item.m["addresses"], item.m["addresses"] + 8 * (BLOCK + 8)
    with g.loop(0, count) as j:
        row = (rows + j * 8).load(POINTER, 8)
        scale = (scales + j * 8).load(POINTER, 8) if form and form.scales_apart else row
        stage_row(g, row, item.m["k"] + j * (s.D * SIZE[s.held]), s.kv, s.D, s.lanes, scale)
