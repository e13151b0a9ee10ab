"""One block of one leaf among many, in the compiler's own terms: the part of `leaves.py` that Pallas has no words for.

A Pallas kernel cannot choose among its refs by a number that it computes. In MLIR a ref is a value like any other, so
it can be the result of a branch. Nor does it know of registers, where small integers become int32 as they are loaded,
and neighbours in a row lie in neighbouring lanes of a warp.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from pallas_kernels import mlir


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an array of a leaf holds.

    Attributes:
      dtype: Of its elements, in memory.
      repeat: How many neighbours of the leaf share one; no fewer than a thread's vector has.
    """

    dtype: np.dtype
    repeat: int = 1

    @property
    def seen(self) -> np.dtype:
        """The dtype in registers: integers are int32 there."""
        return self.dtype if jnp.issubdtype(self.dtype, jnp.floating) else np.dtype("int32")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a leaf: `size` elements are the leaf's, this block's begin at `offset`.

    Attributes:
      refs: The leaf's arrays.
      kinds: What they hold.
      layout: Of a block over the threads.
    """

    refs: Sequence[ir.Value]
    kinds: Sequence[Kind]
    offset: ir.Value
    size: ir.Value
    layout: mgpu.WGStridedFragLayout

    def load(self, which: Sequence[int]) -> list[mgpu.FragmentedArray]:
        """Some of the arrays, zero beyond the leaf's end. All loads are on their way before the first is waited for."""
        places = self._places()
        # What neighbours share is spread over them behind the branch: within, it would be waited for.
        kinds = [self._element(a) if self.kinds[a].repeat > 1 else self._vector(self._element(a)) for a in which]
        branch = self._if_whole([kind for kind in kinds for _ in places])
        for block, load in ((branch.then_block, self._load_whole), (branch.else_block, self._load_checked)):
            with ir.InsertionPoint(block):
                mlir.scf.yield_([load(a, at) for a in which for at in places])
        loaded = iter(branch.results)
        return [self._array([self._widened(a, next(loaded)) for _ in places], self.kinds[a]) for a in which]

    def _load_whole(self, a: int, at: ir.Value) -> ir.Value:
        if self.kinds[a].repeat > 1:
            return memref.load(self.refs[a], [self._shared(a, at)])
        return vector.load(self._vector(self._element(a)), self.refs[a], [at], alignment=self._alignment(a))

    def _load_checked(self, a: int, at: ir.Value) -> ir.Value:
        element = self._element(a)

        def one(at: ir.Value, place: ir.Value) -> ir.Value:
            inside = mlir.scf.IfOp(mlir.less(at, self.size), [element], has_else=True)
            with ir.InsertionPoint(inside.then_block):
                mlir.scf.yield_([memref.load(self.refs[a], [place])])
            with ir.InsertionPoint(inside.else_block):
                mlir.scf.yield_([mgpu.c(0, element)])
            return inside.results[0]

        if self.kinds[a].repeat > 1:
            return one(at, self._shared(a, at))
        here = [mlir.plus(at, j) for j in range(self.layout.vec_size)]
        return vector.from_elements(self._vector(element), [one(x, x) for x in here])

    def _widened(self, a: int, x: ir.Value) -> ir.Value:
        """A vector in the dtype of registers."""
        element = self._element(a)
        if self.kinds[a].repeat > 1:
            x = vector.broadcast(self._vector(element), x)
        if isinstance(element, ir.FloatType) or element.width == 32:
            return x
        extend = arith.extsi if jnp.issubdtype(self.kinds[a].dtype, jnp.signedinteger) else arith.extui
        return extend(self._vector(ir.IntegerType.get_signless(32)), x)

    def store(self, values: Sequence[mgpu.FragmentedArray]) -> None:
        """Writes the first arrays, up to the leaf's end."""
        places = self._places()
        registers = [
            [self._narrowed(a, register) for register in value.registers.flat] for a, value in enumerate(values)
        ]
        branch = self._if_whole([])
        for block, store in ((branch.then_block, self._store_whole), (branch.else_block, self._store_checked)):
            with ir.InsertionPoint(block):
                for a, mine in enumerate(registers):
                    for at, register in zip(places, mine, strict=True):
                        store(a, at, register)
                mlir.scf.yield_([])

    def _narrowed(self, a: int, x: ir.Value) -> ir.Value:
        """A vector in the dtype of memory."""
        kind = self.kinds[a]
        return x if kind.seen == kind.dtype else arith.trunci(self._vector(self._element(a)), x)

    def _store_whole(self, a: int, at: ir.Value, register: ir.Value) -> None:
        if self.kinds[a].repeat > 1:
            self._store_checked(a, at, register)
        else:
            vector.store(register, self.refs[a], [at], alignment=self._alignment(a))

    def _store_checked(self, a: int, at: ir.Value, register: ir.Value) -> None:
        def one(condition: ir.Value, j: int, place: ir.Value) -> None:
            chosen = mlir.scf.IfOp(condition)
            with ir.InsertionPoint(chosen.then_block):
                memref.store(vector.extract(register, [], [j]), self.refs[a], [place])
                mlir.scf.yield_([])

        if self.kinds[a].repeat > 1:
            rest = arith.remui(at, mlir.index(self.kinds[a].repeat))
            return one(arith.andi(mlir.equal(rest, 0), mlir.less(at, self.size)), 0, self._shared(a, at))
        for j in range(self.layout.vec_size):
            here = mlir.plus(at, j)
            one(mlir.less(here, self.size), j, here)

    def places(self, cuts: Sequence[Sequence[ir.Value]], *, together: bool) -> mgpu.FragmentedArray:
        """int32: where each element lies in the whole leaf, modulo 2**32, by its `formats.Cut`s.

        Args:
          cuts: Period, stride and offset of each, int32.
          together: Whether neighbours of a vector stay neighbours, so that the first speaks for them.
        """
        i32 = ir.IntegerType.get_signless(32)
        vectors = self._vector(i32)
        steps = vector.from_elements(vectors, [mlir.int32(j) for j in range(self.layout.vec_size)])
        spread = lambda x: vector.broadcast(vectors, x)

        def moved(place: ir.Value, of: Callable[[ir.Value], ir.Value]) -> ir.Value:
            for cut in cuts:
                period, stride, offset = map(of, cut)
                place = arith.addi(place, arith.addi(arith.muli(arith.divui(place, period), stride), offset))
            return place

        registers: list[ir.Value] = []
        for at in self._places():
            first = arith.index_cast(i32, at)
            if together:
                registers.append(arith.addi(spread(moved(first, lambda x: x)), steps))
            else:
                registers.append(moved(arith.addi(spread(first), steps), spread))
        return self._array(registers, Kind(np.dtype("int32")))

    def _array(self, registers: Sequence[ir.Value], kind: Kind) -> mgpu.FragmentedArray:
        array = np.empty(len(registers), dtype=object)
        array[:] = registers
        signed = None if jnp.issubdtype(kind.seen, jnp.floating) else True
        return mgpu.FragmentedArray(_registers=array, _layout=self.layout, _is_signed=signed)

    def _element(self, a: int) -> Any:
        return ir.MemRefType(self.refs[a].type).element_type

    def _vector(self, element: ir.Type) -> ir.Type:
        return self.layout.registers_element_type(element)

    def _shared(self, a: int, at: ir.Value) -> ir.Value:
        """Where the element lies that a vector's neighbours share."""
        return arith.divui(at, mlir.index(self.kinds[a].repeat))

    def _alignment(self, a: int) -> int:
        """In bytes: XLA aligns arrays to more than any vector."""
        return min(16, self.layout.vec_size * mgpu.bytewidth(self._element(a)))

    def _places(self) -> list[ir.Value]:
        """Where each of this thread's vectors begins, in elements of the leaf."""
        thread = arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(128))
        first = arith.addi(self.offset, arith.muli(thread, mlir.index(self.layout.vec_size)))
        (vectors,) = self.layout.registers_shape(self.layout.shape)
        return [mlir.plus(first, k * 128 * self.layout.vec_size) for k in range(vectors)]

    def _if_whole(self, results: Sequence[ir.Type]) -> Any:
        end = mlir.plus(self.offset, self.layout.shape[0] - 1)
        return mlir.scf.IfOp(mlir.less(end, self.size), results, has_else=True)


def select(
    index: Any,
    leaves: Sequence[Sequence[ir.Value]],
    kinds: Sequence[Kind],
    starts: Sequence[int],
    layout: mgpu.WGStridedFragLayout,
) -> tuple[Block, ir.Value]:
    """What is block `index` of a launch, and the number of its leaf.

    Args:
      index: int32 scalar.
      leaves: For each leaf its arrays, refs of one dim; the first has all elements of the leaf.
      kinds: Of the arrays.
      starts: Number of the first block of each leaf, and at the end that of all blocks.
      layout: Of a block over the threads.
    """
    here = mlir.to_index(index)
    (block,) = layout.shape
    types = [_any_length(ref) for ref in leaves[0]] + [ir.IndexType.get()] * 3

    def pick(low: int, high: int) -> list[ir.Value]:
        if high - low == 1:
            # In global memory, which the compiler cannot tell behind the branches: loads would be generic.
            plain = [memref.cast(_any_length(ref, in_global=False), ref) for ref in leaves[low]]
            refs = [memref.memory_space_cast(_any_length(ref), ref) for ref in plain]
            size = ir.MemRefType(leaves[low][0].type).shape[0]
            return [*refs, *(mlir.index(n) for n in (starts[low], size, low))]
        half = (starts[low] + starts[high]) // 2
        middle = min(range(low + 1, high), key=lambda k: abs(starts[k] - half))
        branch = mlir.scf.IfOp(mlir.less(here, starts[middle]), types, has_else=True)
        for target, bounds in ((branch.then_block, (low, middle)), (branch.else_block, (middle, high))):
            with ir.InsertionPoint(target):
                mlir.scf.yield_(pick(*bounds))
        return list(branch.results)

    *refs, start, size, leaf = pick(0, len(leaves))
    offset = arith.muli(arith.subi(here, start), mlir.index(block))
    return Block(refs, kinds, offset, size, layout), leaf


@contextlib.contextmanager
def where_positive(scalar: Any) -> Iterator[None]:
    """What is built within runs where a float32 scalar is positive."""
    value = scalar if isinstance(scalar, ir.Value) else scalar.registers.item()
    branch = mlir.scf.IfOp(arith.cmpf(arith.CmpFPredicate.OGT, value, mgpu.c(0.0, value.type)))
    with ir.InsertionPoint(branch.then_block):
        yield
        mlir.scf.yield_([])


def number(ref: ir.Value, row: ir.Value, column: int, width: int) -> ir.Value:
    """One number of a flat [rows, width] array."""
    return memref.load(ref, [mlir.plus(arith.muli(row, mlir.index(width)), column)])


def splat(value: ir.Value, layout: Any) -> mgpu.FragmentedArray:
    """A block filled with one number."""
    register = vector.broadcast(layout.registers_element_type(value.type), value)
    registers = np.full(layout.registers_shape(layout.shape), register, dtype=object)
    signed = None if isinstance(value.type, ir.FloatType) else True
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def by_instruction(instruction: str, *operands: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """An instruction of PTX on each element of float32 blocks."""
    registers = np.empty_like(operands[0].registers)
    constraints = ",".join(["=f", *["f"] * len(operands)])
    places = ", ".join(f"${k}" for k in range(len(operands) + 1))
    for k, vectors in enumerate(zip(*(x.registers.flat for x in operands), strict=True)):
        kind = ir.VectorType(vectors[0].type)
        elements: list[Any] = [
            mlir.llvm.inline_asm(
                kind.element_type,
                [vector.extract(x, [], [j]) for x in vectors],
                f"{instruction} {places};",
                constraints,
            )
            for j in range(kind.shape[0])
        ]
        registers[k] = vector.from_elements(kind, elements)
    return mgpu.FragmentedArray(_registers=registers, _layout=operands[0].layout, _is_signed=None)


def group_max(x: mgpu.FragmentedArray, group: int) -> mgpu.FragmentedArray:
    """The largest of each `group` neighbours of a float32 block, to each of them; they lie in one warp."""
    registers = np.empty_like(x.registers)
    for k, register in enumerate(x.registers.flat):
        kind = ir.VectorType(register.type)
        largest = vector.reduction(kind.element_type, vector.CombiningKind.MAXNUMF, register)
        lanes = group // kind.shape[0]
        while lanes > 1:
            lanes //= 2
            largest = arith.maxnumf(largest, mgpu.utils.shfl_bfly(largest, lanes))
        registers[k] = vector.broadcast(kind, largest)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def _any_length(ref: ir.Value, *, in_global: bool = True) -> ir.Type:
    """The type of `ref` without its length; in global memory, or in none in particular, as Mosaic's arguments are."""
    space = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), 1) if in_global else None
    element = ir.MemRefType(ref.type).element_type
    return ir.MemRefType.get([ir.ShapedType.get_dynamic_size()], element, memory_space=space)
