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
from jax.extend.mlir.dialects import arith, math, memref, vector

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

    def tiles(self, elements: int, most: int) -> ir.Value:
        """How many tiles of so many elements there are from `first` on, up to `most`, int32."""
        left = arith.subi(self.size, self.first)
        return mlir.to_int32(arith.minui(arith.ceildivui(left, mlir.index(elements)), mlir.index(most)))

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
class Tile:
    """What a thread block takes at once of a leaf's arrays.

    Attributes:
      leaf: It is a tile of.
      number: Of the tile in the thread block.
      kinds: What the leaf's arrays hold.
      layout: Of the tile over the threads.
      ragged: Whether a leaf may end within a vector.
      zeros: Whether what lies beyond a leaf's end is zero where it is not ragged, or anything.
    """

    leaf: Leaf
    number: ir.Value
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
        return [_array([self._widened(a, next(loaded)) for _ in places], self.layout, self.kinds[a].seen) for a in which]

    def _load_inside(self, which: Sequence[int], types: Sequence[ir.Type], at: ir.Value) -> list[ir.Value]:
        """A vector of each array, where the tile is not whole."""
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

        def inside(at: ir.Value, xs: Sequence[ir.Value]) -> None:
            part = (lambda: each(self._store_part, at, xs)) if self.ragged else (lambda: None)
            _either(self._has(at), lambda: each(self._store_whole, at, xs), part)

        _either(
            self._is_whole(),
            lambda: [each(self._store_whole, at, xs) for at, *xs in vectors],
            lambda: [inside(at, xs) for at, *xs in vectors],
        )

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
        return _array(registers, self.layout, np.dtype("int32"))

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

    def _offset(self) -> ir.Value:
        """Where the tile begins, in elements of the leaf."""
        return arith.addi(self.leaf.first, arith.muli(self.number, mlir.index(self.layout.shape[0])))

    def _places(self) -> list[ir.Value]:
        """Where each of this thread's vectors begins, likewise."""
        thread = arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(128))
        first = arith.addi(self._offset(), arith.muli(thread, mlir.index(self.layout.vec_size)))
        (vectors,) = self.layout.registers_shape(self.layout.shape)
        return [mlir.plus(first, k * 128 * self.layout.vec_size) for k in range(vectors)]

    def _is_whole(self) -> ir.Value:
        """Whether the leaf has all elements of the tile."""
        return mlir.less(mlir.plus(self._offset(), self.layout.shape[0] - 1), self.leaf.size)

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
    """A result of `inline_mgpu`."""
    signed = None if isinstance(value.type, ir.FloatType) else True
    return mgpu.FragmentedArray.splat(value, (), is_signed=signed)


def splat(value: ir.Value, layout: Any) -> mgpu.FragmentedArray:
    """A block filled with an int32."""
    register = vector.broadcast(layout.registers_element_type(value.type), value)
    (vectors,) = layout.registers_shape(layout.shape)
    return _array([register] * vectors, layout, np.dtype("int32"))


def by_instruction(instruction: str, *operands: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """An instruction of PTX on each element of float32 blocks; `instruction` names operands $1 and on, the result $0."""
    constraints = ",".join(["=f", *["f"] * len(operands)])
    registers = []
    for vectors in zip(*(x.registers.flat for x in operands), strict=True):
        kind = ir.VectorType(vectors[0].type)
        elements: list[Any] = [[vector.extract(x, [], [j]) for x in vectors] for j in range(kind.shape[0])]
        results = [mlir.llvm.inline_asm(kind.element_type, e, f"{instruction};", constraints) for e in elements]
        registers.append(vector.from_elements(kind, results))
    return _array(registers, operands[0].layout, np.dtype("float32"))


def floor(x: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
    """The integer below as int32 modulo 256 and as float32, by an addition, rounded down, that leaves no fraction."""
    shifted = by_instruction("add.rm.f32 $0, $1, 0f4B400000", x)  # 1.5 * 2**23
    i32 = ir.IntegerType.get_signless(32)
    bits = [vector.bitcast(ir.VectorType.get(ir.VectorType(r.type).shape, i32), r) for r in shifted.registers.flat]
    return [_array(bits, x.layout, np.dtype("int32")), shifted - 12582912.0]


def unpack(x: mgpu.FragmentedArray, scale: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """8-bit integers times powers of two, float32: each becomes the last byte of 2**23, which is subtracted again."""
    words = ir.IntegerType.get_signless(32)
    registers, shift = [], 2.0**23 + (128.0 if x.is_signed else 0.0)
    for register in x.registers.flat:
        (many,) = ir.VectorType(register.type).shape
        packed = vector.bitcast(ir.VectorType.get((many // 4,), words), register)
        elements = []
        for k in range(many // 4):
            word = vector.extract(packed, [], [k])
            word = arith.xori(word, mlir.int32(-0x7F7F7F80)) if x.is_signed else word  # from 0 on
            elements += [_bytes(word, mlir.int32(0x4B000000), 0x7440 + j) for j in range(4)]
        bits = vector.from_elements(ir.VectorType.get((many,), words), elements)
        registers.append(vector.bitcast(mlir.floats(many), bits))
    return _array(registers, x.layout, np.dtype("float32")) * scale - scale * shift


def pack(x: mgpu.FragmentedArray, dtype: np.dtype) -> mgpu.FragmentedArray:
    """8-bit integers of int32 modulo 256."""
    i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
    registers = []
    for register in x.registers.flat:
        (many,) = ir.VectorType(register.type).shape
        e = [vector.extract(register, [], [k]) for k in range(many)]
        pairs = [_bytes(e[k], e[k + 1], 0x0040) for k in range(0, many, 2)]
        words = [_bytes(pairs[k], pairs[k + 1], 0x5410) for k in range(0, many // 2, 2)]
        packed = vector.from_elements(ir.VectorType.get((many // 4,), i32), words)
        registers.append(vector.bitcast(ir.VectorType.get((many,), i8), packed))
    return _array(registers, x.layout, dtype)


def join(high: mgpu.FragmentedArray, low: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """float32 of its upper and its lower 16 bits."""
    i32 = ir.IntegerType.get_signless(32)
    registers = []
    for upper, lower in zip(high.registers.flat, low.registers.flat, strict=True):
        (many,) = ir.VectorType(upper.type).shape
        pairs = [vector.bitcast(ir.VectorType.get((many // 2,), i32), x) for x in (lower, upper)]
        words = [[vector.extract(x, [], [k]) for x in pairs] for k in range(many // 2)]
        bits = [_bytes(a, b, which) for a, b in words for which in (0x5410, 0x7632)]
        registers.append(vector.bitcast(mlir.floats(many), vector.from_elements(ir.VectorType.get((many,), i32), bits)))
    return _array(registers, high.layout, np.dtype("float32"))


def halves(x: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
    """The upper 16 bits of float32, which are a bfloat16 number, and the lower."""
    i16, i32 = (ir.IntegerType.get_signless(width) for width in (16, 32))
    upper, lower = [], []
    for register in x.registers.flat:
        (many,) = ir.VectorType(register.type).shape
        bits = vector.bitcast(ir.VectorType.get((many,), i32), register)
        e = [vector.extract(bits, [], [k]) for k in range(many)]
        for half, which, kind in ((upper, 0x7632, ir.BF16Type.get()), (lower, 0x5410, i16)):
            words = [_bytes(e[k], e[k + 1], which) for k in range(0, many, 2)]
            packed = vector.from_elements(ir.VectorType.get((many // 2,), i32), words)
            half.append(vector.bitcast(ir.VectorType.get((many,), kind), packed))
    return [_array(upper, x.layout, np.dtype(jnp.bfloat16)), _array(lower, x.layout, np.dtype("uint16"))]


def _bytes(a: ir.Value, b: ir.Value, which: int) -> ir.Value:
    """An int32 of four of the bytes of two: each digit of `which`, the last first, is that of one, 0 to 3 in a."""
    i32 = ir.IntegerType.get_signless(32)
    return mlir.llvm.inline_asm(i32, [a, b], f"prmt.b32 $0, $1, $2, {which:#06x};", "=r,r,r")


def _array(registers: Sequence[ir.Value], layout: Any, dtype: np.dtype) -> mgpu.FragmentedArray:
    """A block of a thread's vectors."""
    array = np.empty(len(registers), dtype=object)
    array[:] = registers
    signed = None if jnp.issubdtype(dtype, jnp.floating) else jnp.issubdtype(dtype, jnp.signedinteger)
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)


def group_max(x: mgpu.FragmentedArray, group: int) -> mgpu.FragmentedArray:
    """The largest magnitude of each `group` neighbours of a float32 block, to each of them; they lie in one warp."""
    registers = []
    for register in x.registers.flat:
        kind = ir.VectorType(register.type)
        largest = vector.reduction(kind.element_type, vector.CombiningKind.MAXNUMF, math.absf(register))
        largest = arith.maxnumf(largest, mgpu.c(0.0, kind.element_type))  # of nothing but NaN
        lanes = group // kind.shape[0]
        while lanes > 1:
            lanes //= 2
            largest = arith.maxnumf(largest, mgpu.utils.shfl_bfly(largest, lanes))
        registers.append(vector.broadcast(kind, largest))
    return _array(registers, x.layout, np.dtype("float32"))


def _either(condition: ir.Value, then: Callable[[], Any], otherwise: Callable[[], Any]) -> None:
    """What is built by one or by the other runs."""
    branch = mlir.scf.IfOp(condition, [], has_else=True)
    for block, build in ((branch.then_block, then), (branch.else_block, otherwise)):
        with ir.InsertionPoint(block):
            build()
            mlir.scf.yield_([])


def _zero(kind: ir.Type) -> ir.Value:
    return vector.broadcast(kind, mgpu.c(0, kind.element_type)) if isinstance(kind, ir.VectorType) else mgpu.c(0, kind)
