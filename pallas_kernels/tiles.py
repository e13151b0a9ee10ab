"""One block of one leaf among many, in the compiler's own terms: the part of `leaves.py` that Pallas has no words for.

A Pallas kernel cannot choose among its refs by a number that it computes. In MLIR a ref is a value like any other, so
it can be the result of a branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
from jax.extend.mlir.dialects import scf as _scf

scf: Any = _scf  # untyped: its stubs are those of a generated class that another one replaces


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of an array of a leaf: `size` elements are the leaf's, this block's begin at `offset`."""

    ref: ir.Value
    offset: ir.Value
    size: ir.Value
    layout: mgpu.WGStridedFragLayout

    def load(self) -> mgpu.FragmentedArray:
        """The block, zero beyond the leaf's end."""
        element = ir.MemRefType(self.ref.type).element_type
        registers = self.layout.registers_element_type(element)
        zero = _constant(element, 0)

        def whole(at: ir.Value) -> ir.Value:
            return vector.load(registers, self.ref, [at], alignment=self._alignment())

        def one_by_one(at: ir.Value) -> ir.Value:
            parts = []
            for j in range(self.layout.vec_size):
                here = _plus(at, j)
                inside = scf.IfOp(_less(here, self.size), [element], has_else=True)
                with ir.InsertionPoint(inside.then_block):
                    scf.yield_([memref.load(self.ref, [here])])
                with ir.InsertionPoint(inside.else_block):
                    scf.yield_([zero])
                parts.append(inside.results[0])
            return vector.from_elements(registers, parts)

        places = self._places()
        branch = self._if_whole([registers] * len(places))
        for block, load in ((branch.then_block, whole), (branch.else_block, one_by_one)):
            with ir.InsertionPoint(block):
                scf.yield_([load(at) for at in places])
        loaded = np.array(list(branch.results), dtype=object)
        signed = None if isinstance(element, ir.FloatType) else False
        return mgpu.FragmentedArray(_registers=loaded, _layout=self.layout, _is_signed=signed)

    def store(self, x: mgpu.FragmentedArray) -> None:
        """Writes the block, up to the leaf's end."""

        def whole(at: ir.Value, register: ir.Value) -> None:
            vector.store(register, self.ref, [at], alignment=self._alignment())

        def one_by_one(at: ir.Value, register: ir.Value) -> None:
            for j in range(self.layout.vec_size):
                here = _plus(at, j)
                inside = scf.IfOp(_less(here, self.size))
                with ir.InsertionPoint(inside.then_block):
                    memref.store(vector.extract(register, [], [j]), self.ref, [here])
                    scf.yield_([])

        places = self._places()
        branch = self._if_whole([])
        for block, store in ((branch.then_block, whole), (branch.else_block, one_by_one)):
            with ir.InsertionPoint(block):
                for at, register in zip(places, x.registers.flat, strict=True):
                    store(at, register)
                scf.yield_([])

    def _alignment(self) -> int:
        """In bytes: XLA aligns arrays to more than any vector."""
        return min(16, self.layout.vec_size * mgpu.bytewidth(ir.MemRefType(self.ref.type).element_type))

    def _places(self) -> list[ir.Value]:
        """Where each of this thread's vectors begins, in elements of the leaf."""
        thread = arith.remui(arith.index_cast(_index(), mgpu.thread_idx()), _constant(_index(), 128))
        first = arith.addi(self.offset, arith.muli(thread, _constant(_index(), self.layout.vec_size)))
        (vectors,) = self.layout.registers_shape(self.layout.shape)
        return [_plus(first, k * 128 * self.layout.vec_size) for k in range(vectors)]

    def _if_whole(self, results: Sequence[ir.Type]) -> Any:
        end = _plus(self.offset, self.layout.shape[0] - 1)
        return scf.IfOp(_less(end, self.size), results, has_else=True)


def select(
    index: Any, leaves: Sequence[Sequence[ir.Value]], starts: Sequence[int], layout: mgpu.WGStridedFragLayout
) -> tuple[list[Tile], ir.Value]:
    """The tiles of block `index` of a launch, and the number of its leaf.

    Args:
      index: int32 scalar.
      leaves: For each leaf its arrays, refs of one dim.
      starts: Number of the first block of each leaf, and at the end that of all blocks.
      layout: Of a block over the threads.
    """
    index = arith.index_cast(_index(), index if isinstance(index, ir.Value) else index.registers.item())
    (block,) = layout.shape
    types = [_any_length(ref) for ref in leaves[0]] + [_index()] * 3

    def pick(low: int, high: int) -> list[ir.Value]:
        if high - low == 1:
            # In global memory, which the compiler cannot tell behind the branches: loads would be generic.
            plain = [memref.cast(_any_length(ref, in_global=False), ref) for ref in leaves[low]]
            refs = [memref.memory_space_cast(_any_length(ref), ref) for ref in plain]
            size = ir.MemRefType(leaves[low][0].type).shape[0]
            return [*refs, *(_constant(_index(), n) for n in (starts[low], size, low))]
        half = (starts[low] + starts[high]) // 2
        middle = min(range(low + 1, high), key=lambda k: abs(starts[k] - half))
        branch = scf.IfOp(_less(index, _constant(_index(), starts[middle])), types, has_else=True)
        for target, bounds in ((branch.then_block, (low, middle)), (branch.else_block, (middle, high))):
            with ir.InsertionPoint(target):
                scf.yield_(pick(*bounds))
        return list(branch.results)

    *refs, start, size, leaf = pick(0, len(leaves))
    offset = arith.muli(arith.subi(index, start), _constant(_index(), block))
    return [Tile(ref, offset, size, layout) for ref in refs], leaf


def splat(ref: ir.Value, row: ir.Value, column: int, width: int, layout: Any) -> mgpu.FragmentedArray:
    """A block filled with one number of a flat [rows, width] array."""
    number = memref.load(ref, [_plus(arith.muli(row, _constant(_index(), width)), column)])
    register = vector.broadcast(layout.registers_element_type(number.type), number)
    registers = np.full(layout.registers_shape(layout.shape), register, dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _any_length(ref: ir.Value, *, in_global: bool = True) -> ir.Type:
    """The type of `ref` without its length; in global memory, or in none in particular, as Mosaic's arguments are."""
    space = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), 1) if in_global else None
    element = ir.MemRefType(ref.type).element_type
    return ir.MemRefType.get([ir.ShapedType.get_dynamic_size()], element, memory_space=space)


def _index() -> ir.Type:
    return ir.IndexType.get()


def _constant(kind: ir.Type, value: int) -> ir.Value:
    return mgpu.c(value, kind)


def _plus(x: ir.Value, n: int) -> ir.Value:
    return arith.addi(x, _constant(_index(), n))


def _less(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)
