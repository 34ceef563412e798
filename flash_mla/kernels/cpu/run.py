"""What every kernel is: `run(args)`, a function of 8-byte arguments, whose threads claim numbered work by a counter.

A kernel names its arguments, `next` (the counter) among them, and `slot` and `memory` where its threads need memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from flash_mla.kernels.cpu.ir import I64, POINTER, Code, Value


class Run:
    """The function that is being written. `a` are its arguments by name, `at` where they lie."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.module = ir.Module("flash_mla")
        self.g = g = Code(self.module, "run", [POINTER])
        self.at = {name: g.args[0] + 8 * i for i, name in enumerate(arguments)}
        self.a = {name: at.load(I64, 8) for name, at in self.at.items()}

    def pointer(self, name: str) -> Value:
        """An argument that is an address."""
        return self.a[name].cast("inttoptr", POINTER)

    def own_memory(self, size: int | Value) -> Value:
        """Where this thread's memory starts, `size` bytes."""
        return self.pointer("memory") + self.at["slot"].add_atomic(1, "monotonic") * size

    def given(self, name: str, i: Value, otherwise: Value, most: Value | None = None) -> Value:
        """Integer i of an array, inside [0, most] if there is a most; `otherwise` where no array is given."""
        x = self.g.variable(otherwise)
        with self.g.when(self.a[name].differs(0)):
            integer = self.g.integer(self.pointer(name), i, self.a[f"{name}_wide"])
            x.set(integer if most is None else integer.max(0).min(most))
        return x.get()

    @contextmanager
    def claimed(self, count: str) -> Iterator[tuple[Value, ir.Block]]:
        """The block for each number below the argument `count` that this thread claims, and the label at which it
        claims the next. The function ends behind the block."""
        g = self.g
        claim, work, done = g.label("claim"), g.label("work"), g.label("done")
        g.place(claim)
        number = self.at["next"].add_atomic(1, "monotonic")
        g.b.cbranch((number < self.a[count]).v, work, done)
        g.b.position_at_end(work)
        yield number, claim
        g.goto(claim)
        g.b.position_at_end(done)
