"""The sums of the columns of a few arrays, in one launch: the last step of what blocks have each added up."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxlib.mlir.dialects import gpu

from pallas_kernels import mlir
from pallas_kernels.dispatch import plgpu
from pallas_kernels.mlir import LANES, WARPS
from pallas_kernels.rows import FLOAT_BYTES, varying_like

# Of a block, which takes 32 columns of one array: all loads of a few hundred rows are under way at once.
_WARPGROUPS = 4
_WARPS = _WARPGROUPS * WARPS


def column_sums(name: str, arrays: Sequence[jax.Array], dtypes: Sequence[Any], implementation: str) -> list[jax.Array]:
    """Sums over rows, in float32 and in an order that is always the same.

    Args:
      name: Of the kernel, as profiles show it.
      arrays: float32[rows, n], all of one shape.
      dtypes: Of each result.
      implementation: "mosaic" or "interpret".

    Returns:
      For each array its sums, [n].
    """
    if implementation == "interpret":
        return [jnp.sum(a, 0).astype(dtype) for a, dtype in zip(arrays, dtypes, strict=True)]
    rows, n = arrays[0].shape

    def kernel(*refs: Any) -> None:
        which, chunk = lax.axis_index("which"), lax.axis_index("chunk")
        scalars = [plgpu.Layout.WG_SPLAT] * 2

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), *scalars))
        def run(_: Any, *args: Any) -> None:
            *refs, parts, which, chunk = args
            for k, (a, out) in enumerate(zip(refs[: len(arrays)], refs[len(arrays) :], strict=True)):
                add_up = functools.partial(_add_up, a, out, parts, mlir.to_index(chunk), rows, n)
                mlir.when(mlir.equal(mlir.to_index(which), k), add_up)

        run(*refs, which, chunk)

    results = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((n,), dtype) for dtype in dtypes],
        grid=(len(arrays), math.ceil(n / LANES)),
        grid_names=("which", "chunk"),
        kernel_name=name,
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((_WARPS * LANES,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*arrays)
    return [varying_like(arrays[0], a) for a in results]


def _add_up(a: ir.Value, out: ir.Value, parts: ir.Value, chunk: ir.Value, rows: int, n: int) -> None:
    """One block's columns: each warp adds up every 16th row, then one warp what all have."""
    warp, lane = mlir.thread()
    column = arith.addi(mlir.times(chunk, LANES), lane)
    column_there = None if n % LANES == 0 else mlir.less(column, n)
    begin = mlir.times(arith.addi(mlir.times(warp, n), column), FLOAT_BYTES)
    begin, one = mlir.at(mlir.address(a, mlir.GLOBAL), begin), mlir.floats(1)
    found = []
    for row in range(0, rows, _WARPS):
        row_there = None if row + _WARPS <= rows else mlir.less(mlir.plus(warp, row), rows)
        read = functools.partial(mlir.load, one, mlir.at(begin, row * n * FLOAT_BYTES))
        found.append(mlir.when(mlir.every(column_there, row_there), read, mlir.zeros(one)))
    shared = mlir.address(parts, mlir.SHARED)
    mlir.store(_tree(found), mlir.at(shared, mlir.times(arith.addi(mlir.times(warp, LANES), lane), FLOAT_BYTES)))
    gpu.barrier()

    def finish() -> None:
        mine = mlir.at(shared, mlir.times(lane, FLOAT_BYTES))
        total = _tree([mlir.load(one, mlir.at(mine, w * LANES * FLOAT_BYTES)) for w in range(_WARPS)])
        element = ir.MemRefType(out.type).element_type
        if element != ir.F32Type.get():
            total = arith.truncf(ir.VectorType.get((1,), element), total)
        here = mlir.times(column, mgpu.bytewidth(element))
        mlir.store(total, mlir.at(mlir.address(out, mlir.GLOBAL), here))

    mlir.when(mlir.every(mlir.equal(warp, 0), column_there), finish)


def _tree(values: Sequence[ir.Value]) -> ir.Value:
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return arith.addf(_tree(values[:half]), _tree(values[half:]))
