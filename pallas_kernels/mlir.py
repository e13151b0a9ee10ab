"""Small words for kernels that are written in MLIR: numbers, conditions, branches, and where a thread is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jax.extend.mlir.dialects import scf as _scf
from jaxlib.mlir.dialects import llvm as _llvm

scf: Any = _scf  # untyped: its stubs are those of a generated class that another one replaces
llvm: Any = _llvm

WARPS = 4  # of a warpgroup
LANES = 32  # of a warp
ANY, GLOBAL, SHARED = 0, 1, 3  # spaces of addresses


def index(n: int) -> ir.Value:
    """A constant of the type of addresses, of 64 bits."""
    return mgpu.c(n, ir.IndexType.get())


def int32(n: int) -> ir.Value:
    """A constant of 32 bits."""
    return mgpu.c(n, ir.IntegerType.get_signless(32))


def scalar(x: Any) -> ir.Value:
    """A value, or that of a scalar argument of `inline_mgpu`."""
    return x if isinstance(x, ir.Value) else x.registers.item()


def to_index(x: Any) -> ir.Value:
    """An integer, or a scalar argument of `inline_mgpu`, as an index."""
    return arith.index_cast(ir.IndexType.get(), scalar(x))


def to_int32(x: ir.Value) -> ir.Value:
    """An index as a number of 32 bits."""
    return arith.index_cast(ir.IntegerType.get_signless(32), x)


def plus(x: ir.Value, n: int) -> ir.Value:
    """x + n."""
    return arith.addi(x, mgpu.c(n, x.type)) if n else x


def times(x: ir.Value, n: int) -> ir.Value:
    """x * n."""
    return arith.muli(x, mgpu.c(n, x.type))


def less(a: ir.Value, b: ir.Value | int) -> ir.Value:
    """Whether a < b."""
    return arith.cmpi(arith.CmpIPredicate.slt, a, b if isinstance(b, ir.Value) else mgpu.c(b, a.type))


def every(*conditions: ir.Value | None) -> ir.Value | None:
    """Whether all hold; None stands for what always does."""
    some = [condition for condition in conditions if condition is not None]
    return functools.reduce(arith.andi, some) if some else None


def either(*conditions: ir.Value | None) -> ir.Value | None:
    """Whether one holds; None stands for what never does."""
    some = [condition for condition in conditions if condition is not None]
    return functools.reduce(arith.ori, some) if some else None


def negate(condition: ir.Value) -> ir.Value:
    """Whether a condition does not hold."""
    return arith.xori(condition, mgpu.c(1, condition.type))


def when(condition: ir.Value | None, then: Callable[[], Any], otherwise: ir.Value | None = None) -> Any:
    """`then()` where the condition holds, or is None; else `otherwise`, a value like what `then` returns."""
    if condition is None:
        return then()
    results = [] if otherwise is None else [otherwise.type]
    branch = scf.IfOp(condition, results, has_else=otherwise is not None)
    with ir.InsertionPoint(branch.then_block):
        value = then()
        scf.yield_([value] if results else [])
    if otherwise is None:
        return None
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([otherwise])
    return branch.results[0]


def branch(condition: ir.Value, then: Callable[[], Any], otherwise: Callable[[], Any] | None) -> None:
    """Where the condition holds, what `then` builds runs, else what `otherwise` builds, if anything."""
    made = scf.IfOp(condition, [], has_else=otherwise is not None)
    sides = [(made.then_block, then), *([(made.else_block, otherwise)] if otherwise else [])]
    for block, build in sides:
        with ir.InsertionPoint(block):
            build()
            scf.yield_([])


def thread() -> tuple[ir.Value, ir.Value]:
    """This thread's warp in its block, and lane in the warp, as indices."""
    here = to_index(mgpu.thread_idx())
    return arith.divui(here, index(LANES)), arith.remui(here, index(LANES))


def vector_bytes(kind: ir.Type) -> int:
    """In bytes, of a number or a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.VectorType(kind).shape[0] * mgpu.bytewidth(ir.VectorType(kind).element_type)
    return mgpu.bytewidth(kind)


def equal(a: ir.Value, b: ir.Value | int) -> ir.Value:
    """Whether a == b."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b if isinstance(b, ir.Value) else mgpu.c(b, a.type))


def floats(many: int) -> ir.Type:
    """The type of a vector of float32."""
    return ir.VectorType.get((many,), ir.F32Type.get())


def zeros(kind: ir.Type) -> ir.Value:
    """Of a vector type, of floats."""
    return vector.broadcast(kind, mgpu.c(0.0, ir.VectorType(kind).element_type))


def address(ref: ir.Value, space: int) -> ir.Value:
    """Where an array begins, as an address of this space."""
    pointer, kind = utils.memref_ptr(ref), llvm.PointerType.get(address_space=space)
    return pointer if pointer.type == kind else llvm.addrspacecast(kind, pointer)


def at(pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
    """The address so many bytes on."""
    if isinstance(offset, ir.Value):
        offset = arith.index_cast(ir.IntegerType.get_signless(64), offset)
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def load(kind: ir.Type, pointer: ir.Value) -> ir.Value:
    """A number, or a vector, whose bytes divide its address, or 16."""
    return llvm.load(kind, pointer, alignment=min(16, vector_bytes(kind)))


def store(value: ir.Value, pointer: ir.Value) -> None:
    """Likewise."""
    llvm.store(value, pointer, alignment=min(16, vector_bytes(value.type)))


def store_where(condition: ir.Value | None, value: ir.Value, pointer: ir.Value) -> None:
    """Stores a vector of 2 to 16 bytes to global memory where the condition holds, without a branch.

    A branch would part what computes the value from what else is made of its terms, and keep these in registers.
    """
    if condition is None:
        return store(value, pointer)
    size = vector_bytes(value.type)
    width, words = (16, 1) if size == 2 else (32, size // 4)
    kind, letter = ir.IntegerType.get_signless(width), "h" if width == 16 else "r"
    packed = vector.bitcast(ir.VectorType.get((words,), kind), value)
    parts = [vector.extract(packed, [], [k]) for k in range(words)]
    names = ", ".join(f"${2 + k}" for k in range(words))
    how = f".v{words}.b{width} [$1], {{{names}}}" if words > 1 else f".b{width} [$1], {names}"
    flag = arith.extui(ir.IntegerType.get_signless(32), condition)
    llvm.inline_asm(
        None,
        [flag, pointer, *parts],
        "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global" + how + "; }",
        ",".join(["r", "l", *[letter] * words]),
        has_side_effects=True,
    )


def product(a: ir.Value, b: ir.Value) -> ir.Value:
    """a * b of float32, rounded: it is never fused with a sum."""
    return llvm.inline_asm(a.type, [a, b], "mul.rn.f32 $0, $1, $2;", "=f,f,f")


def rolled(
    turns: ir.Value, turn: Callable[..., Sequence[ir.Value]], carry: Sequence[ir.Value] = ()
) -> Sequence[ir.Value]:
    """A loop of turn(i, *carry) -> carry that no compiler unrolls, so that it takes few registers.

    LLVM leaves alone what it cannot count, ptxas what is marked.
    """
    kinds = [turns.type, *[x.type for x in carry]]
    loop = scf.WhileOp(kinds, [mgpu.c(0, turns.type), *carry])
    before, after = (region.blocks.append(*kinds) for region in (loop.before, loop.after))
    with ir.InsertionPoint(before):
        llvm.inline_asm(None, [], '.pragma "nounroll";', "", has_side_effects=True)
        scf.condition(less(before.arguments[0], turns), list(before.arguments))
    with ir.InsertionPoint(after):
        i, *inner = after.arguments
        new = turn(i, *inner)
        scf.yield_([llvm.inline_asm(i.type, [i], "add.s32 $0, $1, 1;", "=r,r"), *new])
    return list(loop.results)[1:]
