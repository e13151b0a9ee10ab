"""The cases of benchmarks/kernels.py whose kernels work on rows: LayerNorm, softmax and causal softmax."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from device_time import Case, measured, rotating

from pallas_kernels import layer_norm, softmax, softmax_reference
from pallas_kernels.layer_norm import bytes_moved as layer_norm_bytes
from pallas_kernels.layer_norm import layer_norm_choice
from pallas_kernels.softmax import bytes_moved as softmax_bytes
from pallas_kernels.softmax import softmax_choice

Shape = tuple[int, ...]
DTYPES = ("bfloat16", "float32")
PEER_NORMS = [(4096, 768), (8192, 1024), (8192, 4096), (16384, 8192), (65536, 1024)]
MORE_NORMS = [(32768, 4096), (8192, 16384), (8192, 14432), (262144, 256)]
PEER_ROWS = [(524288, 512), (262144, 1024), (65536, 4096), (32768, 8192), (8192, 32768), (4096, 65536)]
MORE_ROWS = [(16384, 16384), (2048, 131072), (1024, 262144), (2048, 50257)]
SQUARES = [(256, 1024, 1024), (64, 2048, 2048), (16, 4096, 4096)]
ROW_OPS: dict[str, tuple[list[Shape], dict[str, Any]]] = {  # shapes, options
    "layer_norm": (PEER_NORMS + MORE_NORMS, {}),
    "softmax": (PEER_ROWS + MORE_ROWS, {}),
    "causal": (SQUARES, {"causal": True, "scale": 0.125}),
}


def row_cases() -> list[Case]:
    """Every kernel on rows, over its shapes, dtypes and directions."""
    cases = []
    for op, (shapes, options) in ROW_OPS.items():
        f, choice = (layer_norm, layer_norm_choice) if op == "layer_norm" else (softmax, softmax_choice)
        for dtype in DTYPES:
            for shape in shapes:
                arguments = row_arguments(op, shape, dtype)
                runs = choice(*arguments, **options).implementation
                directions = ["forward", "backward"]
                if op == "layer_norm" and shape in PEER_NORMS:
                    directions.append("forward+backward")
                for direction in directions:
                    program = functools.partial(row_program, arguments=arguments, direction=direction)
                    programs = {
                        "zerojax": functools.partial(program, functools.partial(f, **options)),
                        "xla": functools.partial(program, functools.partial(f, implementation="xla", **options)),
                    }
                    if (op, direction) == ("softmax", "backward"):
                        # From x XLA is faster on short rows, 427 us for 631 of 65536 x 4096 bfloat16 on an H200, slower
                        # on long ones, 921 for 630 of 8192 x 32768, and slower in all that was tried of other ops.
                        programs["autodiff"] = functools.partial(program, softmax_reference, saved=False)
                    name = f"{op}/{'x'.join(map(str, shape))}/{dtype}/{direction}"
                    cases.append(Case(name, row_floor(op, arguments[0], direction), runs, programs))
    return cases


def row_arguments(op: str, shape: Shape, dtype: str) -> list[jax.ShapeDtypeStruct]:
    """x, and LayerNorm's scale and bias, which are float32 as Flax keeps them."""
    weights = 2 if op == "layer_norm" else 0
    return [jax.ShapeDtypeStruct(shape, dtype), *[jax.ShapeDtypeStruct(shape[-1:], "float32")] * weights]


def row_floor(op: str, x: jax.ShapeDtypeStruct, direction: str) -> int:
    """The least bytes: of LayerNorm also scale, bias, their gradients, counted in x's dtype, and two float32 a row."""
    if op == "layer_norm":
        weight, statistics = x.shape[-1] * x.dtype.itemsize, 8 * math.prod(x.shape[:-1])
        moved = layer_norm_bytes(x)
        floors = {
            "forward": moved["forward"] + 2 * weight + statistics,
            "backward": moved["backward"] + 3 * weight + statistics,
        }
    else:
        causal = op == "causal"
        floors = {d: softmax_bytes(x, causal=causal, backward=d == "backward") for d in ("forward", "backward")}
    return sum(floors[d] for d in direction.split("+"))


def row_program(
    f: Callable[..., jax.Array], *, arguments: list[jax.ShapeDtypeStruct], direction: str, saved: bool = True
) -> Callable[[], dict[str, Any]]:
    """One direction of `f`."""
    run, make_arguments = compile_rows(f, arguments, direction, saved=saved)
    make_arguments(lambda _, spec: window(spec.dtype.name, spec.shape))  # compiled here, in a thread
    return lambda: measured(rotating(run, lambda: make_arguments(draw)), run)


def compile_rows(
    f: Callable[..., jax.Array], arguments: list[jax.ShapeDtypeStruct], direction: str, *, saved: bool
) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """One direction of `f`, compiled, and what makes its arguments by `draw(index, spec)`.

    A backward pass is given arrays like those that the forward pass saved, where that is `saved`; else x and weights,
    from which XLA computes what it needs.
    """

    def pull_back(dy: jax.Array, *arguments: jax.Array) -> Any:
        y, vjp = jax.vjp(f, *arguments)
        return vjp(dy) if direction == "backward" else (y, vjp(dy))

    if direction == "forward":
        program, specs = f, arguments
    elif direction == "backward" and saved:
        save = jax.jit(lambda *arguments: jax.vjp(f, *arguments)[1]).trace(*arguments)
        program, specs = (lambda vjp, dy: vjp(dy)), [save.out_info, arguments[0]]
    else:
        program, specs = pull_back, [arguments[0], *arguments]
    leaves, tree = jax.tree.flatten(specs)
    run = jax.jit(program).lower(*specs).compile()
    return run, lambda draw: tree.unflatten([draw(i, leaf) for i, leaf in enumerate(leaves)])


POOL = 2**28 + 2**16  # the largest array, and offsets


@functools.cache
def pool(dtype: str) -> jax.Array:
    """Normal numbers, of which every array is a part."""
    return jax.random.normal(jax.random.key(0), POOL, dtype)


@functools.cache
def window(dtype: str, shape: Shape) -> Any:
    """A program that copies what begins at a given place of a pool."""
    part = lambda pool, start: jax.lax.dynamic_slice(pool, (start,), (math.prod(shape),)).reshape(shape)
    return jax.jit(part).lower(jax.ShapeDtypeStruct((POOL,), dtype), np.int32(0)).compile()


def draw(index: int, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """A new array of normal numbers, other ones for each index."""
    return window(spec.dtype.name, spec.shape)(pool(spec.dtype.name), np.int32(4096 * index))
