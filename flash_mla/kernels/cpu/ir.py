"""A small language over llvmlite's IR: values with operators, loops, conditions, named arguments.

A kernel is a Python function that runs once and leaves LLVM IR behind. `Value` is a value of the kernel that is being
written: a number, a vector, a pointer. Operators on it write instructions; Python numbers beside it become constants
of its type (every lane, for a vector); Python's own `if` and `for` decide what is written (unrolling, variants), and
`Code.loop`, `Code.when` write control flow:

    with g.loop(0, n) as i:
        total.set(x.fma(y, total.get()))

Memory is bytes: a pointer plus n is n bytes on, and a type is named where memory is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir


class BrainType(ir.Type):
    """LLVM's bfloat, which llvmlite does not name: what instructions on pairs of BF16 take."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BrainType)

    def __hash__(self) -> int:
        return hash(BrainType)


I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
BF16, F16, F32, F64 = BrainType(), ir.HalfType(), ir.FloatType(), ir.DoubleType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
FLOATS = (ir.HalfType, ir.FloatType, ir.DoubleType)


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """The type of `lanes` elements."""
    return ir.VectorType(element, lanes)


def constant(kind: ir.Type, x: Any) -> ir.Constant:
    """The constant x of a type; in every lane of a vector."""
    return ir.Constant(kind, [x] * kind.count if isinstance(kind, ir.VectorType) else x)


class Value:
    """A value of the kernel that is being written; v is llvmlite's, b the builder that appends to the kernel."""

    def __init__(self, b: ir.IRBuilder, v: Any) -> None:
        self.b, self.v = b, v

    @property
    def type(self) -> ir.Type:
        return self.v.type

    @property
    def element(self) -> ir.Type:
        """The type, or a vector's lane type."""
        return getattr(self.v.type, "element", self.v.type)

    def lift(self, x: Any) -> Any:
        """llvmlite's value of x: a Value, or a number as a constant of this type (an offset, beside a pointer)."""
        if isinstance(x, Value):
            return x.v
        return constant(I64 if isinstance(self.type, ir.PointerType) else self.type, x)

    def op(self, x: Any, integer: str, floating: str) -> Value:
        name = floating if isinstance(self.element, FLOATS) else integer
        return Value(self.b, getattr(self.b, name)(self.v, self.lift(x)))

    # --- Arithmetic ---------------------------------------------------------------------------------------------------

    def __add__(self, x: Any) -> Value:
        if isinstance(self.type, ir.PointerType):
            return Value(self.b, self.b.gep(self.v, [self.lift(x)], source_etype=I8))
        return self.op(x, "add", "fadd")

    def __sub__(self, x: Any) -> Value:
        return self.op(x, "sub", "fsub")

    def __mul__(self, x: Any) -> Value:
        return self.op(x, "mul", "fmul")

    def __truediv__(self, x: Any) -> Value:
        return self.op(x, "", "fdiv")

    def __floordiv__(self, x: Any) -> Value:
        """Rounds toward zero: the kernels divide what is not negative."""
        return self.op(x, "sdiv", "")

    def __mod__(self, x: Any) -> Value:
        return self.op(x, "srem", "")

    def __and__(self, x: Any) -> Value:
        return self.op(x, "and_", "")

    def __or__(self, x: Any) -> Value:
        return self.op(x, "or_", "")

    def __lshift__(self, x: Any) -> Value:
        return self.op(x, "shl", "")

    def __rshift__(self, x: Any) -> Value:
        """Logical: zeros come in."""
        return self.op(x, "lshr", "")

    def fma(self, x: Any, y: Any) -> Value:
        """self * x + y, rounded once."""
        return self.intrinsic("fma", x, y)

    # --- Comparison ---------------------------------------------------------------------------------------------------

    def compare(self, operator: str, x: Any) -> Value:
        """Signed, or ordered: false where a side is NaN (`uno`: true there)."""
        if operator == "uno":
            return Value(self.b, self.b.fcmp_unordered("uno", self.v, self.lift(x)))
        compare = self.b.fcmp_ordered if isinstance(self.element, FLOATS) else self.b.icmp_signed
        return Value(self.b, compare(operator, self.v, self.lift(x)))

    def __lt__(self, x: Any) -> Value:
        return self.compare("<", x)

    def __le__(self, x: Any) -> Value:
        return self.compare("<=", x)

    def __gt__(self, x: Any) -> Value:
        return self.compare(">", x)

    def __ge__(self, x: Any) -> Value:
        return self.compare(">=", x)

    def equals(self, x: Any) -> Value:
        return self.compare("==", x)

    def differs(self, x: Any) -> Value:
        return self.compare("!=", x)

    def pick(self, x: Any, y: Any) -> Value:
        """x where this condition holds, else y; one of them is a Value."""
        of = x if isinstance(x, Value) else y
        return Value(self.b, self.b.select(self.v, of.lift(x), of.lift(y)))

    def min(self, x: Any) -> Value:
        return (self < x).pick(self, x)

    def max(self, x: Any) -> Value:
        return (self < x).pick(x, self)

    # --- Memory -------------------------------------------------------------------------------------------------------

    def load(self, kind: ir.Type, align: int = 1) -> Value:
        return Value(self.b, self.b.load(self.v, typ=kind, align=align))

    def store(self, x: Value, align: int = 1) -> None:
        self.b.store(x.v, self.v, align=align)

    def load_atomic(self, kind: ir.Type, order: str) -> Value:
        return Value(self.b, self.b.load_atomic(self.v, order, 8, typ=kind))

    def add_atomic(self, x: int, order: str) -> Value:
        """Add to the I64 at this pointer; the value before."""
        return Value(self.b, self.b.atomic_rmw("add", self.v, constant(I64, x), order))

    # --- Types and lanes ----------------------------------------------------------------------------------------------

    def cast(self, name: str, kind: ir.Type) -> Value:
        """One of LLVM's conversions: zext, sext, trunc, fpext, fptrunc, fptosi, bitcast, inttoptr."""
        return Value(self.b, getattr(self.b, name)(self.v, kind))

    def bits(self, kind: ir.Type) -> Value:
        return self.cast("bitcast", kind)

    def index(self) -> Value:
        """An I64 as the I32 that lanes count in."""
        return self.cast("trunc", I32)

    def shuffle(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """The lanes of this vector, and of `other` numbered on from them."""
        pattern = ir.Constant(vector(I32, len(lanes)), list(lanes))
        return Value(self.b, self.b.shuffle_vector(self.v, (other or self).v, pattern))

    def splat(self, lanes: int) -> Value:
        """This number in every lane."""
        empty = ir.Constant(vector(self.type, lanes), ir.Undefined)
        return Value(self.b, self.b.insert_element(empty, self.v, constant(I32, 0))).shuffle([0] * lanes)

    def intrinsic(self, name: str, *args: Any) -> Value:
        """LLVM's function llvm.<name> for this type."""
        kind, element = self.type, self.element
        suffix = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
        suffix += {F16: "f16", F32: "f32", F64: "f64"}.get(element) or f"i{element.width}"
        return self.call(f"llvm.{name}.{suffix}", kind, *args)

    def call(self, name: str, result: ir.Type, *args: Any) -> Value:
        """An external function of this value and args."""
        return invoke(self.b, name, result, [self.v, *(self.lift(x) for x in args)])


def invoke(b: ir.IRBuilder, name: str, result: ir.Type, values: Sequence[Any]) -> Value:
    """Call an external function, declared at its first call."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [x.type for x in values]), name)
    return Value(b, b.call(function, values))


class Variable:
    """A place for one value that loops may change; LLVM keeps it in a register."""

    def __init__(self, place: Value, kind: ir.Type) -> None:
        self.place, self.kind = place, kind

    def get(self) -> Value:
        return self.place.load(self.kind, 4)

    def set(self, x: Value) -> None:
        self.place.store(x, 4)


class Code:
    """A function that is being written: control flow, constants, variables."""

    def __init__(self, module: ir.Module, name: str, params: Sequence[ir.Type]) -> None:
        self.function = ir.Function(module, ir.FunctionType(VOID, list(params)), name)
        self.entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.function.append_basic_block("body"))
        self.args = [Value(self.b, x) for x in self.function.args]

    def const(self, x: Any, kind: ir.Type = I64) -> Value:
        return Value(self.b, constant(kind, x))

    def lanes(self, xs: Sequence[int], kind: ir.Type = I32) -> Value:
        return Value(self.b, ir.Constant(vector(kind, len(xs)), list(xs)))

    def wide(self, x: Any) -> Value:
        """A number or a Value as an I64."""
        return x if isinstance(x, Value) else self.const(x)

    def integer(self, base: Value, i: Value, wide: Value) -> Value:
        """Element i of an array of int32, or of int64 where wide, as I64."""
        x = self.variable(self.const(0))
        with self.either(wide.differs(0)) as (yes, no):
            with yes:
                x.set((base + i * 8).load(I64))
            with no:
                x.set((base + i * 4).load(I32).cast("sext", I64))
        return x.get()

    def call(self, name: str, *args: Value) -> None:
        """An external function that gives nothing."""
        invoke(self.b, name, VOID, [x.v for x in args])

    def variable(self, x: Value) -> Variable:
        with self.b.goto_block(self.entry):
            place = self.b.alloca(x.type)
            place.type = POINTER
        variable = Variable(Value(self.b, place), x.type)
        variable.set(x)
        return variable

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Value]:
        """The block for i = start, start + step, .. below stop."""
        b = self.b
        start, stop = self.wide(start), self.wide(stop)
        before, body, end = b.block, b.append_basic_block("loop"), b.append_basic_block("end")
        b.cbranch((start < stop).v, body, end)
        b.position_at_end(body)
        i = b.phi(I64)
        i.add_incoming(start.v, before)
        yield Value(b, i)
        following = Value(b, i) + step
        i.add_incoming(following.v, b.block)
        b.cbranch((following < stop).v, body, end)
        b.position_at_end(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """The block if the condition holds."""
        with self.b.if_then(condition.v):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Two blocks, each a context manager: if the condition holds, and if not."""
        with self.b.if_else(condition.v) as blocks:
            yield blocks

    def label(self, name: str) -> ir.Block:
        return self.b.append_basic_block(name)

    def place(self, label: ir.Block) -> None:
        """Go on at a label, from here too."""
        self.goto(label)
        self.b.position_at_end(label)

    def goto(self, label: ir.Block) -> None:
        if not self.b.block.is_terminated:
            self.b.branch(label)

    def unknown(self, pointer: Value) -> Value:
        """The same pointer, which LLVM cannot tell: what is loaded through it is not merged with other loads."""
        kind = ir.FunctionType(POINTER, [POINTER])
        return Value(self.b, self.b.asm(kind, "", "=r,0", [pointer.v], False))

    def prefetch(self, pointer: Value, level: int) -> None:
        """Ask for a cache line; level 3 is L1, 2 is L2."""
        pointer.call("llvm.prefetch.p0", VOID, *(Value(self.b, constant(I32, x)) for x in (0, level, 1)))

    def finish(self) -> None:
        self.b.ret_void()
        with self.b.goto_block(self.entry):
            self.b.branch(self.function.blocks[1])
