"""One tile of one leaf among many, in the compiler's own terms: the part of `leaves.py` that Pallas has no words for.

A Pallas kernel cannot choose among its refs by a number that it computes. In MLIR a ref is a value like any other, so
it can be the result of a branch. Nor can its threads copy to shared memory each for itself, which needs no barrier; nor
does it know of registers, where neighbours of a leaf share one number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
from jaxlib.mlir.dialects import nvvm as _nvvm

from pallas_kernels import mlir
from pallas_kernels.instructions import array

nvvm: Any = _nvvm  # untyped, as in mlir.py
THREADS = mlir.WARPS * mlir.LANES


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
      first: The first element that is this thread block's,
      end: and the first that is no more.
      number: Of the leaf in its launch, int32.
    """

    addresses: Sequence[ir.Value]
    first: ir.Value
    end: ir.Value
    number: ir.Value

    def words(self) -> list[ir.Value]:
        """The same as int32: an array of jax has no room for addresses."""
        i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
        long = [*self.addresses, *(arith.index_cast(i64, x) for x in (self.first, self.end))]
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
        first, end = map(mlir.to_index, long[-2:])
        return cls(long[:-2], first, end, words[0])

    def tiles(self, elements: int) -> ir.Value:
        """How many tiles of so many elements are this thread block's, int32."""
        many = mlir.plus(arith.subi(self.end, self.first), elements - 1)
        return mlir.to_int32(arith.divui(many, mlir.index(elements)))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Shared memory where tiles arrive before they are worked on: a slot for each tile, and in it one for each thread.

    A thread copies what it loads itself, so none waits for another.

    Attributes:
      kinds: What the leaf's arrays hold.
      loaded: Numbers of those that are copied.
      layout: Of a tile over the threads.
      stages: Slots.
    """

    kinds: Sequence[Kind]
    loaded: Sequence[int]
    layout: mgpu.WGStridedFragLayout
    stages: int

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        return self.stages * self._offset(len(self.loaded), 0)

    def copies(self, a: int) -> tuple[int, int]:
        """In how many copies, of how many bytes, a thread gets an array's vector."""
        kind = self.kinds[a]
        if kind.repeat > 1:
            return 1, 4  # no copy is smaller
        size = self.layout.vec_size * kind.dtype.itemsize
        return max(1, size // 16), min(16, size)

    def place(self, start: ir.Value, tile: ir.Value, a: int, vector: int, copy: int) -> ir.Value:
        """Where one copy of this thread goes, for a tile of this number."""
        size = self.copies(a)[1]
        stage = arith.remui(tile, mlir.index(self.stages))
        here = arith.addi(mlir.times(stage, self._offset(len(self.loaded), 0)), mlir.times(_thread(), size))
        return mlir.at(start, mlir.plus(here, self._offset(self.loaded.index(a), vector) + copy * THREADS * size))

    def _offset(self, array: int, vector: int) -> int:
        """Of the so many-th of the copied arrays in a slot."""
        (vectors,) = self.layout.registers_shape(self.layout.shape)
        of = lambda a: math.prod(self.copies(a)) * THREADS
        before = sum(vectors * of(a) for a in self.loaded[:array])
        return before + (vector * of(self.loaded[array]) if vector else 0)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a thread block takes at once of its leaf's arrays.

    Attributes:
      leaf: It is a tile of.
      number: Of the tile in the thread block.
      kinds: What the leaf's arrays hold.
      layout: Of the tile over the threads.
      ragged: Whether a leaf may end within a vector.
    """

    leaf: Leaf
    number: ir.Value
    kinds: Sequence[Kind]
    layout: mgpu.WGStridedFragLayout
    ragged: bool

    def fetch(self, ring: Ring, start: ir.Value) -> None:
        """Begins to copy to the ring, which starts there; zeros of what lies beyond the end."""

        def copy(*, whole: bool) -> None:
            for a in ring.loaded:
                many, size = ring.copies(a)
                # What one copy has half of a sector of stays in the L1 for the other.
                modifier = nvvm.LoadCacheModifierKind.CG if (many, size) == (1, 16) else nvvm.LoadCacheModifierKind.CA
                for v, at in enumerate(self._places()):
                    offset, left = self._offset(a, at), None
                    if self._is_shared(a):
                        offset = arith.andi(offset, mlir.index(-4))
                    for k in range(many):
                        here = mlir.plus(offset, k * size)
                        if not whole:
                            beyond = arith.subi(
                                self._offset(a, mlir.plus(self.leaf.end, self.kinds[a].repeat - 1)), here
                            )
                            left = mlir.to_int32(arith.minsi(arith.maxsi(beyond, mlir.index(0)), mlir.index(size)))
                        target, source = ring.place(start, self.number, a, v, k), self._address(a, here)
                        nvvm.cp_async_shared_global(target, source, size, modifier, cp_size=left)

        mlir.branch(self._is_whole(), lambda: copy(whole=True), lambda: copy(whole=False))
        nvvm.cp_async_commit_group()

    def load(self, ring: Ring, start: ir.Value) -> list[mgpu.FragmentedArray]:
        """The arrays from the ring, where the tile is by now."""
        nvvm.cp_async_wait_group(ring.stages - 2)
        loaded = []
        for a in ring.loaded:
            registers = [self._loaded(a, ring, start, v, at) for v, at in enumerate(self._places())]
            loaded.append(array(registers, self.layout, self.kinds[a].seen))
        return loaded

    def _loaded(self, a: int, ring: Ring, start: ir.Value, v: int, at: ir.Value) -> ir.Value:
        element, (many, size) = self._element(a), ring.copies(a)
        places = [ring.place(start, self.number, a, v, k) for k in range(many)]
        if self._is_shared(a):
            which = arith.andi(self._offset(a, at), mlir.index(3))
            return self._widened(a, mlir.load(element, mlir.at(places[0], which)))
        part = ir.VectorType.get((size // self.kinds[a].dtype.itemsize,), element)
        parts = [mlir.load(part, place) for place in places]
        if many == 1:
            return parts[0]
        elements = [vector.extract(x, [], [j]) for x in parts for j in range(part.shape[0])]
        return vector.from_elements(self._vector(element), elements)

    def _widened(self, a: int, x: ir.Value) -> ir.Value:
        """A vector of what neighbours share."""
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
            return mlir.store(x, self._address(a, self._offset(a, at)))
        first = mlir.equal(arith.remui(at, mlir.index(self.kinds[a].repeat)), 0)
        return mlir.when(first, lambda: mlir.store(x, self._address(a, self._offset(a, at))))

    def _store_part(self, a: int, at: ir.Value, x: ir.Value) -> None:
        if self._is_shared(a):
            return mlir.when(mlir.less(at, self.leaf.end), lambda: self._store_whole(a, at, x))
        for j in range(self.layout.vec_size):
            here = mlir.plus(at, j)
            store = lambda j=j, here=here: mlir.store(
                vector.extract(x, [], [j]), self._address(a, self._offset(a, here))
            )
            mlir.when(mlir.less(here, self.leaf.end), store)
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

    def _offset(self, a: int, at: ir.Value) -> ir.Value:
        """Of what the array holds for an element of the leaf, in bytes."""
        kind = self.kinds[a]
        return mlir.times(arith.divui(at, mlir.index(kind.repeat)), kind.dtype.itemsize)

    def _address(self, a: int, offset: ir.Value) -> ir.Value:
        pointer = mlir.llvm.inttoptr(mlir.llvm.PointerType.get(address_space=mlir.GLOBAL), self.leaf.addresses[a])
        return mlir.at(pointer, offset)

    def _places(self) -> list[ir.Value]:
        """Where each of this thread's vectors begins, in elements of the leaf."""
        first = arith.addi(self._first(), mlir.times(_thread(), self.layout.vec_size))
        (vectors,) = self.layout.registers_shape(self.layout.shape)
        return [mlir.plus(first, k * THREADS * self.layout.vec_size) for k in range(vectors)]

    def _first(self) -> ir.Value:
        return arith.addi(self.leaf.first, mlir.times(self.number, self.layout.shape[0]))

    def _is_whole(self) -> ir.Value:
        """Whether the leaf has all elements of the tile."""
        return mlir.less(mlir.plus(self._first(), self.layout.shape[0] - 1), self.leaf.end)

    def _has(self, at: ir.Value) -> ir.Value:
        """Whether it has all elements of a vector."""
        return mlir.less(mlir.plus(at, self.layout.vec_size - 1), self.leaf.end)


def _thread() -> ir.Value:
    return arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(THREADS))


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
            # A side effect, of its own: else the compiler makes rows of selections of the tree, which wait for all.
            mlir.llvm.inline_asm(None, [], f"// leaf {low}", "", has_side_effects=True)
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
    first = mlir.times(arith.subi(here, start), elements)
    return Leaf(addresses, first, arith.minsi(size, mlir.plus(first, elements)), number)


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
