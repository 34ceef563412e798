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
    key past which a row sees none, for each lane of vector t of the state, counted from the block's first; and the
    least and the most of them."""

    k: Value
    k_row: Any
    v: Value
    v_row: Any
    keys: Value
    limit: Callable[[Value], tuple[Value, Value, Value]]
    mask_key: Value
    ahead: tuple[Value, Value] | None


Step = Callable[[Block], None]
"""Attend to a block."""


def walk_pages(item: Item, step: Step) -> None:
    """Blocks [first, stop) of this item's KV head, through the table or one after another."""
    g, a, s, m = item.g, item.a, item.spec, item.m
    head = item.h // a["share"]
    names = ["k", "v", *(["rope"] if s.rope else [])]
    bases = {x: item.pointer(x) + item.b * a[f"{x}_b"] + head * a[f"{x}_h"] for x in names}
    table = item.pointer("table") + item.b * a["table_row"]

    def rows(i: Value) -> dict[str, Value]:
        """The first rows of block i: a page, or 64 rows of a larger one."""
        number, inside = i // (s.page // s.block), i % (s.page // s.block) * s.block
        if s.source == "table":
            number = g.integer(table, number, a["table_wide"]).max(0).min(a["Nblk"] - 1)
        return {x: base + number * a[f"{x}_p"] + inside * a[f"{x}_k"] for x, base in bases.items()}

    with g.loop(item.first, item.stop) as i:
        kept = g.const(True, I1)
        if s.layout:
            kept = (item.row("layout", item.r0 // BLOCK) + i * a["layout_k"]).load(I8).differs(0)
        with g.when(kept):
            here, ahead = rows(i), rows((i + 1).min(item.stop - 1))
            first = i * s.block
            count = (item.n - first).min(s.block)

            def limit(t: Value, first: Value = first) -> tuple[Value, Value, Value]:
                own = (m["limit"] + t * (4 * s.lanes)).load(item.I, 4) - first.index().splat(s.lanes)
                least, most = ((m[name] + t * 8).load(I64, 8) - first for name in ("low", "high"))
                return own, least, most

            if s.staged:
                step(Block(*stage_pages(item, here, count, ahead), count, limit, first, None))
            else:
                following = ahead["k"], ahead["v"]
                step(Block(here["k"], a["k_k"], here["v"], a["v_k"], count, limit, first, following))


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
    g, a, s = item.g, item.a, item.spec
    counts = []
    for n in range(s.sets):
        count = g.variable(a[f"topk{n}"])
        with g.when(a[f"count{n}"].differs(0)):
            given = g.integer(item.pointer(f"count{n}"), item.b, a[f"count{n}_wide"])
            count.set(given.max(0).min(a[f"topk{n}"]))
        counts.append(count.get())
    blocks = [(count + (BLOCK - 1)) // BLOCK for count in counts]
    total = blocks[0] if s.sets == 1 else blocks[0] + blocks[1]
    first, stop = item.part_of(total)
    before = g.const(0)
    for n in range(s.sets):
        with g.loop((first - before).max(0), (stop - before).min(blocks[n])) as i:
            found = gather(item, n, i * BLOCK, (counts[n] - i * BLOCK).min(BLOCK))

            def limit(t: Value, found: Value = found) -> tuple[Value, Value, Value]:
                return found.index().splat(s.lanes), found, found

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
        index = g.integer(indices, j, a[f"wide{n}"])
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
