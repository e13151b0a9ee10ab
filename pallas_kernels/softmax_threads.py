"""A row over the threads that share it, in the compiler's own terms: loads, folds and stores of vectors of 16 bytes.

A row that does not begin at a multiple of 16 bytes is taken from the last one before it to the first one after it: a
vector may be read whole though it holds elements of the neighbours, which are left out, and is then written one by one.
Vectors go round the threads like cards, so that of a causal row all threads have as many to read, or one more.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
from jaxlib.mlir.dialects import gpu, nvvm

from pallas_kernels import meetings, mlir
from pallas_kernels.mlir import LANES, WARPS

Number = mgpu.FragmentedArray  # one a thread, or a vector
Held = Callable[["Row", int], ir.Value]  # a vector, by its row and piece, from where it is held
_FOLDS: dict[str, tuple[Callable[[Number, Number], Number], float]] = {
    "add": (operator.add, 0.0),
    "max": (Number.max, -math.inf),
    "min": (Number.min, math.inf),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How a row lies over threads.

    Attributes:
      columns: Of a row.
      vector: Elements of 16 bytes.
      threads: That share a row in a block.
      cluster: Blocks that share a row.
      queries: Of a causal call, else None.
    """

    columns: int
    vector: int
    threads: int
    cluster: int
    queries: int | None

    @property
    def ragged(self) -> bool:
        """Whether rows begin within a vector."""
        return self.columns % self.vector != 0

    @property
    def step(self) -> int:
        """Elements from a thread's vector to its next."""
        return self.threads * self.cluster * self.vector

    @property
    def pieces(self) -> int:
        """Vectors of a thread."""
        return math.ceil((self.columns + (self.vector - 1) * self.ragged) / self.step)

    @property
    def parts(self) -> int:
        """Warps that share a row."""
        return self.threads * self.cluster // LANES


@dataclasses.dataclass
class Mask:
    """An array of one dim that broadcasts to the rows.

    Attributes:
      ref: The array.
      terms: Of each group of dims: its row is the sum of row // divisor % size * stride over (divisor, size, stride).
      columns: Of its rows: those of the array, or 1.
    """

    ref: ir.Value
    terms: Sequence[tuple[int, int, int]]
    columns: int

    def __post_init__(self) -> None:
        kind = ir.MemRefType(self.ref.type)
        if isinstance(kind.element_type, ir.IntegerType):  # booleans: a byte each, which MLIR would take for a bit
            self.ref = utils.ptr_as_memref(utils.memref_ptr(self.ref), ir.MemRefType.get(kind.shape, _int8()))


class Row:
    """A row, or this thread's vectors of it: in registers, or in shared memory where there is a `stage`."""

    def __init__(self, spread: Spread, row: ir.Value, element: ir.Type, slots: Any, stage: Any, where: Mask | None):
        """A row, by its number, of an array of `element`s.

        In shared memory, or None: `slots` of float32, two for each warp that shares the row, and `stage`, where each
        thread puts what it has of the arrays.
        """
        self.spread, self.row, self.element = spread, row, element
        self.slots, self.stage, self.where = slots, stage, where
        turn = arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(spread.threads))
        if spread.cluster > 1:
            block = gpu.cluster_block_id(gpu.Dimension.x)
            turn = arith.addi(turn, mlir.times(block, spread.threads))
        self.part = arith.divui(turn, mlir.index(LANES))
        begin, column = mlir.times(row, spread.columns), mlir.times(turn, spread.vector)
        self.address = arith.addi(begin, column)  # of our first vector
        if spread.ragged:
            before = arith.remui(begin, mlir.index(spread.vector))
            self.address, column = arith.subi(self.address, before), arith.subi(column, before)
        self.column = mlir.to_int32(column)  # of our first element; below zero where it is the neighbour's
        self.room = arith.subi(mlir.int32(spread.columns), self.column)  # elements of the row from our first on
        self.kept = self.room
        if spread.queries is not None:
            query = mlir.to_int32(arith.remui(row, mlir.index(spread.queries)))
            self.kept = arith.subi(mlir.plus(query, 1 + spread.columns - spread.queries), self.column)
        thread = arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(spread.threads))
        self.place = mlir.times(thread, spread.vector)  # of our first vector in shared memory
        self.moved = False  # whether pieces are counted from a later one than the row's first

    def _moved(self, pieces: ir.Value) -> Row:
        """The row without its first pieces."""
        row = copy.copy(self)
        columns = mlir.times(pieces, self.spread.step)
        row.address = arith.addi(self.address, mlir.to_index(columns))
        row.column = arith.addi(self.column, columns)
        row.room, row.kept = arith.subi(self.room, columns), arith.subi(self.kept, columns)
        row.place = arith.addi(self.place, mlir.to_index(mlir.times(pieces, self.spread.threads * self.spread.vector)))
        row.moved = True
        return row

    def _walk(
        self, step: Callable[[Row, int, Any], Any], total: ir.Value | None = None, *, masked: bool = False
    ) -> ir.Value | None:
        """Calls step(row, piece, total) -> total for each piece; those that have nothing kept may be left out.

        From registers this is straight code. From shared memory it is a loop, of few registers, so that more blocks
        fit a processor, whose loads and arithmetic overlap.
        """
        if self.stage is None:
            for piece in range(self.spread.pieces):
                total = step(self, piece, total)
            return total
        end = self.room if masked else self.kept
        ahead = arith.maxsi(mlir.plus(end, self.spread.step - 1), mlir.int32(0))

        def turn(i: ir.Value, *inner: ir.Value) -> list[ir.Value]:
            new = step(self._moved(i), 0, *(inner or (None,)))
            return [] if new is None else [new]

        results = mlir.rolled(arith.divsi(ahead, mlir.int32(self.spread.step)), turn, [] if total is None else [total])
        return results[0] if results else None

    def load(self, sources: Sequence[ir.Value | Mask], fills: Sequence[float]) -> list[Held]:
        """Our vectors of each array; what is not of the row, or not kept, is the array's fill, and may not be read."""
        filled = [self._filled(source, fill) for source, fill in zip(sources, fills, strict=True)]
        if self.stage is not None:
            return self._load_staged(sources, filled)
        pieces = range(self.spread.pieces)
        loaded = [[self._load(x, k, fill) for k in pieces] for x, fill in zip(sources, filled, strict=True)]
        keep = [self._load_where(k) for k in pieces]
        held: list[Held] = []
        for vectors, fill in zip(loaded, filled, strict=True):
            masked = [self._masked(k, x, fill, keep[k]) for k, x in enumerate(vectors)]
            held.append(functools.partial(_in_registers, masked))
        return held

    def _load_staged(self, sources: Sequence[ir.Value | Mask], filled: Sequence[ir.Value]) -> list[Held]:
        own = [x for x in sources if not isinstance(x, Mask)]

        def begin(row: Row, piece: int, _: None) -> None:
            for i, source in enumerate(own):
                mlir.when(row._kept(piece), functools.partial(row._begin_copy, source, i, piece))

        def mask(row: Row, piece: int, _: None) -> None:
            keep = row._load_where(piece)
            touched = mlir.every(row._kept(piece), row._partial(piece, masked=True) if keep is None else None)
            for i, fill in enumerate(filled[: len(own)]):

                def write(i: int = i, fill: ir.Value = fill) -> None:
                    x = row._masked(piece, row._staged(piece, i, fill.type), fill, keep)
                    vector.store(x, self.stage, [row._place(i, piece)], alignment=16)

                mlir.when(touched, write)

        self._walk(begin)
        nvvm.cp_async_commit_group()
        nvvm.cp_async_wait_group(0)
        if self.where is not None or self._partial(0, masked=True) is not None:
            self._walk(mask)
        held: list[Held] = []
        for i, (source, fill) in enumerate(zip(sources, filled, strict=True)):
            if isinstance(source, Mask):
                held.append(functools.partial(Row._loaded_again, source=source, fill=fill))
            else:
                held.append(functools.partial(Row._staged, i=i, kind=fill.type))
        return held

    def _masked(self, piece: int, x: ir.Value, fill: ir.Value, keep: ir.Value | None) -> ir.Value:
        partial = self._partial(piece, masked=True)
        inside = x
        if partial is not None:
            inside = mlir.when(partial, lambda: arith.select(self._inside(piece, self.kept), x, fill), x)
        return inside if keep is None else arith.select(keep, inside, fill)

    def _place(self, i: int, piece: int) -> ir.Value:
        """Of a vector of the i-th array in shared memory."""
        size = self.spread.threads * self.spread.vector
        return mlir.plus(self.place, (i * self.spread.pieces + piece) * size)

    def _begin_copy(self, ref: ir.Value, i: int, piece: int) -> None:
        itemsize = 16 // self.spread.vector
        target = mlir.at(mlir.address(self.stage, mlir.SHARED), mlir.times(self._place(i, piece), itemsize))
        source = mlir.at(mlir.address(ref, mlir.GLOBAL), mlir.times(self.address, itemsize))
        source = mlir.at(source, piece * self.spread.step * itemsize)
        nvvm.cp_async_shared_global(target, source, 16, nvvm.LoadCacheModifierKind.CG)

    def _staged(self, piece: int, i: int, kind: ir.Type) -> ir.Value:
        return vector.load(kind, self.stage, [self._place(i, piece)], alignment=16)

    def _loaded_again(self, piece: int, source: Mask, fill: ir.Value) -> ir.Value:
        return self._masked(piece, self._load(source, piece, fill), fill, self._load_where(piece))

    def _filled(self, source: ir.Value | Mask, fill: float) -> ir.Value:
        element = ir.MemRefType((source.ref if isinstance(source, Mask) else source).type).element_type
        return vector.broadcast(self._vector_of(element), mgpu.c(fill, element))

    def _load_where(self, piece: int) -> ir.Value | None:
        """Which elements of a vector `where` keeps; None where there is none."""
        if self.where is None:
            return None
        nothing = vector.broadcast(self._vector_of(_int8()), mgpu.c(0, _int8()))
        return _is_true(self._load(self.where, piece, nothing))

    def fold(self, how: str, term: Callable[..., Number] | None, *held: Held) -> Number:
        """Of a term of each kept element that this warp has: all lanes have the same.

        Without a term it is of the elements themselves, 16-bit ones two at a time.
        """
        combine, neutral = _FOLDS[how]

        def step(row: Row, piece: int, total: ir.Value | None) -> ir.Value:
            def folded() -> ir.Value:
                vectors = [x(row, piece) for x in held]
                new = term(*map(_float32, vectors)) if term else _number(vectors[0])
                return (new if total is None else combine(_number(total), new)).registers.item()

            return mlir.when(row._kept(piece), folded, total)

        total: Any = None
        if self.stage is not None or self._kept(0) is not None:
            element = ir.F32Type.get() if term else self.element
            total = vector.broadcast(self._vector_of(element), mgpu.c(neutral, element))
        total = self._walk(step, total)
        each = [_number(vector.extract(total, [], [i])) for i in range(self.spread.vector)]
        while len(each) > 1:
            each = [combine(a, b) for a, b in zip(each[::2], each[1::2], strict=True)]
        return self._over_lanes(how, each[0].astype(ir.F32Type.get()), LANES)

    @staticmethod
    def either(how: str, x: Number, y: float) -> Number:
        """Of two numbers."""
        return _FOLDS[how][0](x, _number(mgpu.c(y, x.mlir_dtype)))

    @staticmethod
    def exp2(x: Number) -> Number:
        """By the hardware's instruction, right to 2 in the last place."""
        return x.exp2(approx=True)

    def meet(self, *numbers: Number) -> list[list[Number]]:
        """Of each number, which every warp has one of: those of all warps of the row, some of them in every lane."""
        spread = self.spread
        if spread.parts == 1:
            return [[number] for number in numbers]
        assert self.slots is not None
        lane = arith.remui(mlir.to_index(mgpu.thread_idx()), mlir.index(LANES))

        places = [mlir.plus(self.part, k * spread.parts) for k in range(len(numbers))]
        if spread.cluster > 1:
            self._tell_blocks(numbers, places, lane)
        else:

            def tell() -> None:
                for number, place in zip(numbers, places, strict=True):
                    memref.store(number.registers.item(), self.slots, [place])

            mlir.when(mlir.equal(lane, 0), tell)
            gpu.barrier()
        first = arith.remui(lane, mlir.index(min(spread.parts, LANES)))
        return [
            [
                _number(memref.load(self.slots, [mlir.plus(first, k * spread.parts + i)]))
                for i in range(0, spread.parts, LANES)
            ]
            for k in range(len(numbers))
        ]

    def _tell_blocks(self, numbers: Sequence[Number], places: Sequence[ir.Value], lane: ir.Value) -> None:
        """A lane for each block that is to hear it."""
        assert self.slots is not None
        slots = mlir.address(self.slots, mlir.SHARED)
        size = ir.MemRefType(self.slots.type).shape[0] * 4 - meetings.BARRIER_BYTES
        meeting = meetings.Meeting(mlir.at(slots, size), mlir.index(0))

        def tell() -> None:
            for number, place in zip(numbers, places, strict=True):
                meeting.tell(number.registers.item(), mlir.at(slots, mlir.times(place, 4)), lane)

        meeting.expect(size // 2 * len(numbers))
        mlir.when(mlir.less(lane, self.spread.cluster), tell)
        meeting.wait()

    def over_warps(self, how: str, heard: Sequence[Number]) -> Number:
        """Of the numbers of all warps that `meet` has told."""
        combine, _ = _FOLDS[how]
        return self._over_lanes(how, functools.reduce(combine, heard), min(self.spread.parts, LANES))

    def store(self, ref: ir.Value, value: Callable[..., Number], *held: Held, sound: Number | None = None) -> None:
        """Writes a value of each element. What is not kept is zero, also where `sound` is not finite."""

        def write(*, select: bool) -> None:
            def step(row: Row, piece: int, _: None) -> None:
                write = lambda: row._write(ref, piece, row._value(ref, value, piece, held, select))
                mlir.when(row._kept(piece), write)

            self._walk(step)

        if self.where is None and self.spread.queries is None:
            write(select=False)
            return
        assert sound is not None
        zero = (sound - sound).registers.item()
        finite = arith.cmpf(arith.CmpFPredicate.OEQ, zero, mgpu.c(0.0, zero.type))
        mlir.when(finite, functools.partial(write, select=False))
        mlir.when(mlir.negate(finite), functools.partial(write, select=True))

    def clear(self, ref: ir.Value) -> None:
        """Writes the zeros of the vectors that causality masks."""
        if self.spread.queries is None:
            return
        element = ir.MemRefType(ref.type).element_type
        zeros = vector.broadcast(self._vector_of(element), mgpu.c(0.0, element))

        def step(row: Row, piece: int, _: None) -> None:
            kept = row._kept(piece)
            assert kept is not None
            masked = mlir.negate(kept)
            mlir.when(mlir.every(masked, row._there(piece)), functools.partial(row._write, ref, piece, zeros))

        self._walk(step, masked=True)

    def _value(
        self, ref: ir.Value, value: Callable[..., Number], piece: int, held: Sequence[Held], select: bool
    ) -> ir.Value:
        element = ir.MemRefType(ref.type).element_type
        x = value(*(_float32(x(self, piece)) for x in held)).astype(element).registers.item()
        if select:
            zeros = vector.broadcast(x.type, mgpu.c(0.0, element))
            x = arith.select(self._inside(piece, self.kept), x, zeros)
            keep = self._load_where(piece)
            x = x if keep is None else arith.select(keep, x, zeros)
        return x

    def _write(self, ref: ir.Value, piece: int, x: ir.Value) -> None:
        at = mlir.plus(self.address, piece * self.spread.step)
        partial = self._partial(piece)

        def one_by_one() -> None:
            inside = self._inside(piece, self.room)
            for i in range(self.spread.vector):
                write = lambda i=i: memref.store(vector.extract(x, [], [i]), ref, [mlir.plus(at, i)])
                mlir.when(vector.extract(inside, [], [i]), write)

        if partial is not None:
            mlir.when(partial, one_by_one)
        whole = None if partial is None else mlir.negate(partial)
        mlir.when(whole, lambda: vector.store(x, ref, [at], alignment=16))

    def _load(self, source: ir.Value | Mask, piece: int, filled: ir.Value) -> ir.Value:
        """A vector, or what it is filled with where none of it is kept."""

        def load() -> ir.Value:
            if isinstance(source, Mask):
                return self._load_mask(source, piece, filled.type)
            at = mlir.plus(self.address, piece * self.spread.step)
            return vector.load(filled.type, source, [at], alignment=16)

        return mlir.when(self._kept(piece), load, filled)

    def _load_mask(self, mask: Mask, piece: int, kind: ir.Type) -> ir.Value:
        place: ir.Value = mlir.index(0)
        for divisor, size, stride in mask.terms:
            digit = arith.remui(arith.divui(self.row, mlir.index(divisor)), mlir.index(size))
            place = arith.addi(place, mlir.times(digit, stride))
        if mask.columns == 1:
            return vector.broadcast(kind, memref.load(mask.ref, [place]))
        begin = mlir.times(place, mask.columns)
        column = mlir.plus(self.column, piece * self.spread.step)
        if not self.spread.ragged:
            alignment = min(16, mlir.vector_bytes(kind))
            return vector.load(kind, mask.ref, [arith.addi(begin, mlir.to_index(column))], alignment=alignment)
        each = []
        for i in range(self.spread.vector):
            inside = arith.minsi(mlir.plus(column, i), mlir.int32(mask.columns - 1))
            there = mlir.to_index(arith.maxsi(inside, mlir.int32(0)))
            each.append(memref.load(mask.ref, [arith.addi(begin, there)]))
        return vector.from_elements(kind, each)

    def _there(self, piece: int) -> ir.Value | None:
        """Whether a vector has an element of the row; None where all threads' have."""
        return mlir.less(mlir.int32(piece * self.spread.step), self.room) if self._overhangs(piece) else None

    def _overhangs(self, piece: int) -> bool:
        """Whether some thread may have less than a vector of a piece."""
        spread = self.spread
        if self.moved:  # by we do not know how much
            return spread.columns % spread.step != 0
        return (piece + 1) * spread.step > spread.columns

    def _kept(self, piece: int) -> ir.Value | None:
        """Whether it has one that causality keeps."""
        if self.spread.queries is None:
            return self._there(piece)
        return mlir.less(mlir.int32(piece * self.spread.step), self.kept)

    def _partial(self, piece: int, *, masked: bool = False) -> ir.Value | None:
        """Whether a vector has elements of a neighbour, or masked by causality; None where none has."""
        ragged, causal = self.spread.ragged, masked and self.spread.queries is not None
        before = mlir.less(self.column, 0) if ragged and piece == 0 else None
        ends = causal or (ragged and (self._overhangs(piece) or self.stage is not None))
        end = self.kept if causal else self.room
        after = mlir.less(end, piece * self.spread.step + self.spread.vector) if ends else None
        return mlir.either(before, after)

    def _inside(self, piece: int, end: ir.Value) -> ir.Value:
        """Which elements of a vector are of the row, and less than `end` after our first."""
        kind = self._vector_of(self.column.type)
        steps = [mlir.int32(piece * self.spread.step + i) for i in range(self.spread.vector)]
        each = vector.from_elements(kind, steps)
        inside = arith.cmpi(arith.CmpIPredicate.slt, each, vector.broadcast(kind, end))
        if self.spread.ragged and piece == 0:
            before = arith.subi(mlir.int32(0), self.column)
            of_row = arith.cmpi(arith.CmpIPredicate.sge, each, vector.broadcast(kind, before))
            inside = arith.andi(inside, of_row)
        return inside

    def _vector_of(self, element: ir.Type) -> ir.Type:
        return ir.VectorType.get((self.spread.vector,), element)

    @staticmethod
    def _over_lanes(how: str, x: Number, lanes: int) -> Number:
        combine, _ = _FOLDS[how]
        while lanes > 1:
            lanes //= 2
            x = combine(x, _number(utils.shfl_bfly(x.registers.item(), lanes)))
        return x


def _in_registers(vectors: Sequence[ir.Value], _: Row, piece: int) -> ir.Value:
    return vectors[piece]


def _int8() -> ir.Type:
    return ir.IntegerType.get_signless(8)


def _is_true(x: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ne, x, vector.broadcast(x.type, mgpu.c(0, _int8())))


def _number(x: ir.Value) -> Number:
    """One number, or a vector of them, as arithmetic takes it."""
    if not isinstance(x.type, ir.VectorType):
        return Number.splat(x, ())
    size = ir.VectorType(x.type).shape[0]
    layout = mgpu.WGStridedFragLayout((size * LANES * WARPS,), size)
    return Number(_registers=np.array([x], dtype=object), _layout=layout, _is_signed=None)


def _float32(x: ir.Value) -> Number:
    return _number(x).astype(ir.F32Type.get())
