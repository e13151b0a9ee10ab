"""What formats of fewer bytes are made with on a GPU: `formats.Tools` by single instructions.

An element of 8-bit moments and a split weight is 14 bytes of memory. In the time that an H200 takes for them it issues
about 100 instructions, and a step of Adam on one is 65; so each counts. Conversions between integers and floats run at
an eighth of the pace of additions: integers are made the last bits of a large float, by which an addition converts
them, and bytes are moved four at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, vector

from pallas_kernels import formats, mlir
from pallas_kernels.dispatch import plgpu


def tools(layout: Any, block: int, *, fast: bool) -> formats.Tools:
    """Of a kernel whose blocks are of this layout; `fast` ones take numbers below 2**-126 for zero."""
    tile = lambda dtype: plgpu.ShapeDtypeStruct((block,), dtype, layout=layout)

    def inline(run: Callable[..., Any], operands: int, *dtypes: Any) -> Callable[..., Any]:
        results = tuple(map(tile, dtypes)) if len(dtypes) > 1 else tile(*dtypes)
        wrap = plgpu.inline_mgpu(arg_types=(layout,) * operands, return_type=results)
        return wrap(lambda _, *x: tuple(run(*x)) if len(dtypes) > 1 else run(*x))

    f32 = jnp.float32
    instruction = lambda text: inline(functools.partial(_by_instruction, text), 1, f32)
    reciprocal = instruction("rcp.approx.ftz.f32 $0, $1")
    return formats.Tools(
        sqrt=instruction("sqrt.approx.ftz.f32 $0, $1") if fast else jnp.sqrt,
        divide=(lambda a, b: a * reciprocal(b)) if fast else jnp.divide,
        square=instruction("mul.rn.f32 $0, $1, $1"),
        floor=inline(_floor, 1, jnp.int32, f32),
        at_most=lambda x, limit: instruction(f"min.f32 $0, $1, 0f{np.float32(limit).view(np.uint32):08X}")(x),
        group_max=inline(lambda x: _group_max(x, formats.GROUP), 1, f32),
        unpack=inline(_unpack, 1, f32),
        pack=lambda x, dtype: inline(lambda x: _pack(x, np.dtype(dtype)), 1, dtype)(x),
        join=inline(_join, 2, f32),
        halves=inline(_halves, 1, jnp.bfloat16, jnp.uint16),
        once=lambda x: x,
    )


def _by_instruction(instruction: str, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """An instruction of PTX on each element of a float32 block, $1 in `instruction`; $0 is its result."""
    f32, registers = ir.F32Type.get(), []
    for register in x.registers.flat:
        elements = [vector.extract(register, [], [j]) for j in range(_many(register))]
        results = [mlir.llvm.inline_asm(f32, [e], f"{instruction};", "=f,f") for e in elements]
        registers.append(vector.from_elements(register.type, results))
    return array(registers, x.layout, np.dtype("float32"))


def _floor(x: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
    """The integer below as int32 modulo 256 and as float32, by an addition, rounded down, that leaves no fraction."""
    shifted = _by_instruction("add.rm.f32 $0, $1, 0f4B400000", x)  # 1.5 * 2**23
    i32 = ir.IntegerType.get_signless(32)
    bits = [vector.bitcast(ir.VectorType.get((_many(r),), i32), r) for r in shifted.registers.flat]
    return [array(bits, x.layout, np.dtype("int32")), shifted - 12582912.0]


def _unpack(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """float32 of 8-bit integers: each becomes the last byte of 2**23, which is subtracted again."""
    words = ir.IntegerType.get_signless(32)
    registers, shift = [], 2.0**23 + (128.0 if x.is_signed else 0.0)
    for register in x.registers.flat:
        many = _many(register)
        packed = vector.bitcast(ir.VectorType.get((many // 4,), words), register)
        elements = []
        for k in range(many // 4):
            word = vector.extract(packed, [], [k])
            word = arith.xori(word, mlir.int32(-0x7F7F7F80)) if x.is_signed else word  # from 0 on
            elements += [_bytes(word, mlir.int32(0x4B000000), 0x7440 + j) for j in range(4)]
        bits = vector.from_elements(ir.VectorType.get((many,), words), elements)
        registers.append(vector.bitcast(mlir.floats(many), bits))
    return array(registers, x.layout, np.dtype("float32")) - shift


def _pack(x: mgpu.FragmentedArray, dtype: np.dtype) -> mgpu.FragmentedArray:
    """8-bit integers of int32 modulo 256."""
    i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
    registers = []
    for register in x.registers.flat:
        many = _many(register)
        e = [vector.extract(register, [], [k]) for k in range(many)]
        pairs = [_bytes(e[k], e[k + 1], 0x0040) for k in range(0, many, 2)]
        words = [_bytes(pairs[k], pairs[k + 1], 0x5410) for k in range(0, many // 2, 2)]
        packed = vector.from_elements(ir.VectorType.get((many // 4,), i32), words)
        registers.append(vector.bitcast(ir.VectorType.get((many,), i8), packed))
    return array(registers, x.layout, dtype)


def _join(high: mgpu.FragmentedArray, low: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """float32 of its upper and its lower 16 bits."""
    i32 = ir.IntegerType.get_signless(32)
    registers = []
    for upper, lower in zip(high.registers.flat, low.registers.flat, strict=True):
        many = _many(upper)
        pairs = [vector.bitcast(ir.VectorType.get((many // 2,), i32), x) for x in (lower, upper)]
        words = [[vector.extract(x, [], [k]) for x in pairs] for k in range(many // 2)]
        bits = [_bytes(a, b, which) for a, b in words for which in (0x5410, 0x7632)]
        registers.append(vector.bitcast(mlir.floats(many), vector.from_elements(ir.VectorType.get((many,), i32), bits)))
    return array(registers, high.layout, np.dtype("float32"))


def _halves(x: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
    """The upper 16 bits of float32, which are a bfloat16 number, and the lower."""
    i16, i32 = (ir.IntegerType.get_signless(width) for width in (16, 32))
    upper: list[ir.Value] = []
    lower: list[ir.Value] = []
    for register in x.registers.flat:
        many = _many(register)
        bits = vector.bitcast(ir.VectorType.get((many,), i32), register)
        e = [vector.extract(bits, [], [k]) for k in range(many)]
        for half, which, kind in ((upper, 0x7632, ir.BF16Type.get()), (lower, 0x5410, i16)):
            words = [_bytes(e[k], e[k + 1], which) for k in range(0, many, 2)]
            packed = vector.from_elements(ir.VectorType.get((many // 2,), i32), words)
            half.append(vector.bitcast(ir.VectorType.get((many,), kind), packed))
    return [array(upper, x.layout, np.dtype(jnp.bfloat16)), array(lower, x.layout, np.dtype("uint16"))]


def _many(x: ir.Value) -> int:
    (many,) = ir.VectorType(x.type).shape
    return many


def _bytes(a: ir.Value, b: ir.Value, which: int) -> ir.Value:
    """An int32 of four of the bytes of two: each digit of `which`, the last first, is that of one, 0 to 3 in a."""
    i32 = ir.IntegerType.get_signless(32)
    return mlir.llvm.inline_asm(i32, [a, b], f"prmt.b32 $0, $1, $2, {which:#06x};", "=r,r,r")


def array(registers: Sequence[ir.Value], layout: Any, dtype: np.dtype) -> mgpu.FragmentedArray:
    """A block of a thread's vectors."""
    array = np.empty(len(registers), dtype=object)
    array[:] = registers
    signed = None if jnp.issubdtype(dtype, jnp.floating) else jnp.issubdtype(dtype, jnp.signedinteger)
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)


def _group_max(x: mgpu.FragmentedArray, group: int) -> mgpu.FragmentedArray:
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
    return array(registers, x.layout, np.dtype("float32"))
