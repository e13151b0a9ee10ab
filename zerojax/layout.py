"""The layout of one leaf: which dim ZeRO cuts, what is taken already, the bytes of a shard. All by shapes."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from zerojax import meshes
from zerojax.meshes import AnyMesh

PyTree = Any


def shard_spec(
    shape: tuple[int, ...], whole: PartitionSpec, axis: str | tuple[str, ...], size: int, min_size: int
) -> tuple[PartitionSpec, int | None, str]:
    """Puts `axis` of `size` devices on one dim of `shape` that `whole` leaves free.

    Returns:
      The spec, the dim, and an empty reason; or `whole`, None, and the reason why no dim was taken.

    Example:
      >>> shard_spec((24, 16, 16), PartitionSpec(), "data", 8, min_size=1)
      (P('data', None, None), 0, '')
      >>> shard_spec((8, 16, 16), PartitionSpec(None, "model"), "data", 8, min_size=1)
      (P(None, 'model', 'data'), 2, '')
      >>> shard_spec((7, 13), PartitionSpec(), "data", 8, min_size=1)
      (P(), None, 'no free dim is a multiple of 8')
    """
    if math.prod(shape) < min_size:
        return whole, None, f"{math.prod(shape)} elements are fewer than min_size={min_size}"
    entries = [*whole, *[None] * (len(shape) - len(whole))]
    dims = [d for d, n in enumerate(shape) if entries[d] is None and n and n % size == 0]
    if not dims:
        return whole, None, f"no free dim is a multiple of {size}"
    dim = max(dims, key=lambda d: (shape[d], d > 0, -d))
    entries[dim] = axis
    return PartitionSpec(*entries), dim, ""


def grouped_spec(mesh: AnyMesh, shape: tuple[int, ...], spec: PartitionSpec, group: int) -> PartitionSpec:
    """The spec of one number for each `group` of a leaf's last dim: the leaf's, but where it would part groups.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
      >>> grouped_spec(mesh, (16, 512), PartitionSpec(None, "data"), 32)
      P(None, 'data')
      >>> grouped_spec(mesh, (16, 80), PartitionSpec(None, "data"), 32)
      P(None, None)
    """
    if not shape or len(spec) < len(shape) or shape[-1] // meshes.shards(mesh, spec[-1]) % group == 0:
        return spec
    return PartitionSpec(*spec[:-1], None)


def taken_specs(param_specs: PyTree | None, params: PyTree) -> list[PartitionSpec]:
    """`param_specs` spread over the leaves of `params`."""
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)
    try:
        spread = jax.tree.map(lambda spec, sub: jax.tree.map(lambda _: spec, sub), param_specs, params, is_leaf=is_spec)
    except ValueError as e:
        raise ValueError(f"param_specs is no prefix of params: {e}") from e
    treedef: Any = jax.tree.structure(params)
    specs = treedef.flatten_up_to(spread)
    for spec in specs:
        if not is_spec(spec):
            raise TypeError(
                f"param_specs must hold PartitionSpecs and None, got {spec!r} of type {type(spec).__name__}."
            )
    return [PartitionSpec() if spec is None else spec for spec in specs]


def check_taken(name: str, shape: tuple[int, ...], whole: PartitionSpec, mesh: AnyMesh, axes: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `whole` fits a leaf and leaves the ZeRO `axes` free."""
    if len(whole) > len(shape):
        raise ValueError(
            f"param_specs: {whole} has {len(whole)} entries, leaf {name!r} {list(shape)} has {len(shape)} dims."
        )
    for dim, entry in enumerate(whole):
        for used in meshes.axis_names(entry):
            if used not in mesh.axis_names:
                raise ValueError(
                    f"param_specs: {whole} of leaf {name!r} names {used!r}; the mesh has the axes {mesh.axis_names}."
                )
            if used in axes:
                raise ValueError(
                    f"param_specs: {whole} of leaf {name!r} takes {used!r}, the ZeRO axis; ZeRO puts it on a free "
                    "dim itself."
                )
        if shape[dim] % meshes.shards(mesh, entry):
            raise ValueError(
                f"param_specs: {whole} cuts dim {dim} of leaf {name!r} {list(shape)} into "
                f"{meshes.shards(mesh, entry)} shards, which does not divide it."
            )


def shape_dtype(x: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a leaf; raises `TypeError` where it is no array."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")) and not isinstance(x, int | float | complex):
        raise TypeError(f"params: leaf {name!r} is no array but {x!r} of type {type(x).__name__}.")
    return tuple(np.shape(x)), x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jax.numpy.result_type(x)


def cuts(mesh: AnyMesh, shape: tuple[int, ...], spec: PartitionSpec) -> list[int]:
    """Into how many shards each dim is cut."""
    return [*(meshes.shards(mesh, entry) for entry in spec), *[1] * (len(shape) - len(spec))]


def shard_bytes(mesh: AnyMesh, x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> int:
    """Bytes of one shard of an array."""
    parts = cuts(mesh, x.shape, spec)
    return math.prod(-(-n // cut) for n, cut in zip(x.shape, parts, strict=True)) * x.dtype.itemsize


def total_bytes(mesh: AnyMesh, shapes: PyTree, specs: PyTree) -> int:
    """Bytes of one shard of each array of a tree."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, spec: shard_bytes(mesh, x, spec), shapes, specs)))
