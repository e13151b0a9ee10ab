"""One block of one leaf among many, in the compiler's own terms: the part of `leaves.py` that Pallas has no words for.

A Pallas kernel cannot choose among its refs by a number that it computes. In MLIR a ref is a value like any other, so
it can be the result of a branch. Nor does it know of registers, where small integers become int32 as they are loaded,
and neighbours in a row lie in neighbouring lanes of a warp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from pallas_kernels import mlir
from pallas_kernels.instructions import array


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
        """The dtype in registers: what neighbours share is int32 there."""
        return np.dtype("int32") if self.repeat > 1 else self.dtype


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a thread block finds its leaf.

    Attributes:
      addresses: Of the leaf's arrays, int64.
      size: Of the leaf, in elements.
      first: The first element that is this thread block's.
      number: Of the leaf in its launch, int32.
    """

    addresses: Sequence[ir.Value]
    size: ir.Value
    first: ir.Value
    number: ir.Value

    def words(self) -> list[ir.Value]:
        """The same as int32: an array of jax has no room for addresses."""
        i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
        long = [*self.addresses, *(arith.index_cast(i64, x) for x in (self.size, self.first))]
        halves = [(x, arith.shrui(x, mgpu.c(32, i64))) for x in long]
        return [self.number, *(arith.trunci(i32, x) for pair in halves for x in pair)]

    @staticmethod
    def words_of(arrays: int) -> int:
        """How many there are for a leaf of so many arrays."""
        return 2 * (arrays + 2) + 1

    @classmethod
    def of(cls, words: Sequence[ir.Value]) -> Leaf:
        """From its `words`."""
        i64 = ir.IntegerType.get_signless(64)
        long = []
        for low, high in zip(words[1::2], words[2::2], strict=True):
            upper = arith.shli(arith.extui(i64, high), mgpu.c(32, i64))
            long.append(arith.ori(upper, arith.extui(i64, low)))
        size, first = map(mlir.to_index, long[-2:])
        return cls(long[:-2], size, first, words[0])


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block takes of its leaf's arrays.

    Attributes:
      leaf: It is a block of.
      kinds: What the leaf's arrays hold.
      layout: Of the block over the threads.
      ragged: Whether a leaf may end within a vector.
      zeros: Whether what lies beyond a leaf's end is zero where it is not ragged, or anything.
    """

    leaf: Leaf
    kinds: Sequence[Kind]
    layout: mgpu.WGStridedFragLayout
    ragged: bool
    zeros: bool

    def load(self, which: Sequence[int]) -> list[mgpu.FragmentedArray]:
        """Some of the arrays. All loads are on their way before the first is waited for."""
        places = self._places()
        # What neighbours share is spread over them behind the branch: within, it would be waited for.
        types = [self._element(a) if self._is_shared(a) else self._vector(self._element(a)) for a in which]
        branch = mlir.scf.IfOp(self._is_whole(), [kind for kind in types for _ in places], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            mlir.scf.yield_([self._load_whole(a, at) for a in which for at in places])
        with ir.InsertionPoint(branch.else_block):
            vectors = [self._load_inside(which, types, at) for at in places]
            mlir.scf.yield_([x for column in zip(*vectors, strict=True) for x in column])
        loaded = iter(branch.results)
        return [array([self._widened(a, next(loaded)) for _ in places], self.layout, self.kinds[a].seen) for a in which]

    def _load_inside(self, which: Sequence[int], types: Sequence[ir.Type], at: ir.Value) -> list[ir.Value]:
        """A vector of each array, where the block is not whole."""
        branch = mlir.scf.IfOp(self._has(at), types, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            mlir.scf.yield_([self._load_whole(a, at) for a in which])
        with ir.InsertionPoint(branch.else_block):
            beyond = lambda a, kind: self._load_part(a, at) if self.ragged else self._nothing(kind)
            mlir.scf.yield_(list(map(beyond, which, types)))
        return list(branch.results)

    def _nothing(self, kind: ir.Type) -> ir.Value:
        """For a vector beyond the leaf's end."""
        return _zero(kind) if self.zeros else mlir.llvm.mlir_undef(kind)

    def _load_whole(self, a: int, at: ir.Value) -> ir.Value:
        kind = self._element(a) if self._is_shared(a) else self._vector(self._element(a))
        return mlir.load(kind, self._address(a, at))

    def _load_part(self, a: int, at: ir.Value) -> ir.Value:
        element = self._element(a)

        def one(at: ir.Value) -> ir.Value:
            inside = mlir.less(at, self.leaf.size)
            return mlir.when(inside, lambda: mlir.load(element, self._address(a, at)), mgpu.c(0, element))

        if self._is_shared(a):
            return one(at)
        return vector.from_elements(self._vector(element), [one(mlir.plus(at, j)) for j in range(self.layout.vec_size)])

    def _widened(self, a: int, x: ir.Value) -> ir.Value:
        """A vector in the dtype of registers."""
        if not self._is_shared(a):
            return x
        i32 = ir.IntegerType.get_signless(32)
        extend = arith.extsi if jnp.issubdtype(self.kinds[a].dtype, jnp.signedinteger) else arith.extui
        return vector.broadcast(self._vector(i32), extend(i32, x))

    def store(self, values: Sequence[mgpu.FragmentedArray]) -> None:
        """Writes the first arrays, up to the leaf's end."""
        narrowed = [[self._narrowed(a, x) for x in value.registers.flat] for a, value in enumerate(values)]
        vectors = list(zip(self._places(), *narrowed, strict=True))

        def each(store: Callable[[int, ir.Value, ir.Value], None], at: ir.Value, xs: Sequence[ir.Value]) -> None:
            for a, x in enumerate(xs):
                store(a, at, x)

        def whole() -> None:
            for at, *xs in vectors:
                each(self._store_whole, at, xs)

        def inside() -> None:
            for at, *xs in vectors:
                whole, part = (
                    functools.partial(each, store, at, xs) for store in (self._store_whole, self._store_part)
                )
                mlir.branch(self._has(at), whole, part if self.ragged else None)

        mlir.branch(self._is_whole(), whole, inside)

    def _narrowed(self, a: int, x: ir.Value) -> ir.Value:
        """A vector in the dtype of memory; one number where neighbours share it."""
        if not self._is_shared(a):
            return x
        return arith.trunci(self._element(a), vector.extract(x, [], [0]))

    def _store_whole(self, a: int, at: ir.Value, x: ir.Value) -> None:
        if not self._is_shared(a):
            return mlir.store(x, self._address(a, at))
        first = mlir.equal(arith.remui(at, mlir.index(self.kinds[a].repeat)), 0)
        return mlir.when(first, lambda: mlir.store(x, self._address(a, at)))

    def _store_part(self, a: int, at: ir.Value, x: ir.Value) -> None:
        if self._is_shared(a):
            return mlir.when(mlir.less(at, self.leaf.size), lambda: self._store_whole(a, at, x))
        for j in range(self.layout.vec_size):
            here = mlir.plus(at, j)
            store = lambda j=j, here=here: mlir.store(vector.extract(x, [], [j]), self._address(a, here))
            mlir.when(mlir.less(here, self.leaf.size), store)
        return None

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
            first = mlir.to_int32(at)
            if together:
                registers.append(arith.addi(spread(moved(first, lambda x: x)), steps))
            else:
                registers.append(moved(arith.addi(spread(first), steps), spread))
        return array(registers, self.layout, np.dtype("int32"))

    def _element(self, a: int) -> Any:
        return mgpu.utils.dtype_to_ir_type(self.kinds[a].dtype)

    def _vector(self, element: ir.Type) -> ir.Type:
        return self.layout.registers_element_type(element)

    def _is_shared(self, a: int) -> bool:
        return self.kinds[a].repeat > 1

    def _address(self, a: int, at: ir.Value) -> ir.Value:
        """Of what the array holds for an element of the leaf."""
        kind = self.kinds[a]
        offset = mlir.times(arith.divui(at, mlir.index(kind.repeat)), kind.dtype.itemsize)
        pointer = mlir.llvm.inttoptr(mlir.llvm.PointerType.get(address_space=mlir.GLOBAL), self.leaf.addresses[a])
        return mlir.at(pointer, offset)

    def _places(self) -> list[ir.Value]:
        """Where each of this thread's vectors begins, in elements of the leaf."""
        thread = arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(128))
        first = arith.addi(self.leaf.first, arith.muli(thread, mlir.index(self.layout.vec_size)))
        (vectors,) = self.layout.registers_shape(self.layout.shape)
        return [mlir.plus(first, k * 128 * self.layout.vec_size) for k in range(vectors)]

    def _is_whole(self) -> ir.Value:
        """Whether the leaf has all elements of the block."""
        return mlir.less(mlir.plus(self.leaf.first, self.layout.shape[0] - 1), self.leaf.size)

    def _has(self, at: ir.Value) -> ir.Value:
        """Whether it has all elements of a vector."""
        return mlir.less(mlir.plus(at, self.layout.vec_size - 1), self.leaf.size)


def select(index: Any, leaves: Sequence[Sequence[ir.Value]], starts: Sequence[int], elements: int) -> Leaf:
    """The leaf of thread block `index` of a launch.

    Args:
      index: int32 scalar.
      leaves: For each leaf its arrays, refs of one dim; the first has all elements of the leaf.
      starts: Number of the first thread block of each leaf, and at the end that of all.
      elements: That a thread block takes of a leaf.
    """
    here = mlir.to_index(index)
    i64 = ir.IntegerType.get_signless(64)
    types = [i64] * len(leaves[0]) + [ir.IndexType.get()] * 2 + [ir.IntegerType.get_signless(32)]

    def pick(low: int, high: int) -> list[ir.Value]:
        if high - low == 1:
            addresses = [mlir.llvm.ptrtoint(i64, mlir.address(ref, mlir.GLOBAL)) for ref in leaves[low]]
            size = ir.MemRefType(leaves[low][0].type).shape[0]
            return [*addresses, mlir.index(starts[low]), mlir.index(size), mlir.int32(low)]
        half = (starts[low] + starts[high]) // 2
        middle = min(range(low + 1, high), key=lambda k: abs(starts[k] - half))
        branch = mlir.scf.IfOp(mlir.less(here, starts[middle]), types, has_else=True)
        for target, bounds in ((branch.then_block, (low, middle)), (branch.else_block, (middle, high))):
            with ir.InsertionPoint(target):
                mlir.scf.yield_(pick(*bounds))
        return list(branch.results)

    *addresses, start, size, number = pick(0, len(leaves))
    return Leaf(addresses, size, mlir.times(arith.subi(here, start), elements), number)


@contextlib.contextmanager
def where_positive(scalar: Any) -> Iterator[None]:
    """What is built within runs where a float32 scalar is positive."""
    value = mlir.scalar(scalar)
    branch = mlir.scf.IfOp(arith.cmpf(arith.CmpFPredicate.OGT, value, mgpu.c(0.0, value.type)))
    with ir.InsertionPoint(branch.then_block):
        yield
        mlir.scf.yield_([])


def number(ref: ir.Value, row: ir.Value, column: int, width: int) -> ir.Value:
    """One number of a flat [rows, width] array."""
    return memref.load(ref, [mlir.plus(mlir.times(mlir.to_index(row), width), column)])


def scalar(value: ir.Value) -> mgpu.FragmentedArray:
    """A number as a result of `inline_mgpu`."""
    signed = None if isinstance(value.type, ir.FloatType) else True
    return mgpu.FragmentedArray.splat(value, (), is_signed=signed)


def splat(value: ir.Value, layout: Any) -> mgpu.FragmentedArray:
    """A block filled with an int32."""
    register = vector.broadcast(layout.registers_element_type(value.type), value)
    (vectors,) = layout.registers_shape(layout.shape)
    return array([register] * vectors, layout, np.dtype("int32"))


def _zero(kind: ir.Type) -> ir.Value:
    return vector.broadcast(kind, mgpu.c(0, kind.element_type)) if isinstance(kind, ir.VectorType) else mgpu.c(0, kind)
