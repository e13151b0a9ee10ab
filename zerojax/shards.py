"""Optimizer kernels on the shards of each device: on global arrays XLA would gather them for a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import formats
from pallas_kernels.formats import Place
from pallas_kernels.squares import squares, squares_choice
from zerojax import meshes
from zerojax.plan import Plan

PyTree = Any


def squares_of(grads: PyTree, plan: Plan | None) -> Callable[[], jax.Array] | None:
    """Sums of squares of all leaves by one kernel, for links that take a global norm; None where XLA's are to run."""
    leaves = jax.tree.leaves(grads)
    chosen = meshes.kernel_implementation() if plan is None else None
    if not leaves or squares_choice(leaves, implementation=chosen).implementation == "xla":
        return None
    if plan is None:
        return lambda: squares(leaves)
    specs = plan.treedef.flatten_up_to(plan.update_specs)
    across = _sum_over_shards(specs)
    local = lambda *xs: across(squares(xs)[:, None])[:, 0]
    return lambda: jax.shard_map(local, in_specs=tuple(specs), out_specs=PartitionSpec(), check_vma=False)(*leaves)


def run_on_shards(
    op: Callable[..., Any],
    plan: Plan,
    lists: list[list[Any]],
    scalars: Any,
    decay: list[bool],
    *,
    norms: bool,
    implementation: str | None,
) -> list[list[Any]]:
    """An optimizer's kernel, run by each device on its shards.

    A leaf of which shards end within a group of 8-bit moments is left to XLA, which exchanges what it must.

    Args:
      op: Of `pallas_kernels`, on lists of leaves.
      plan: How they are cut: by `update_specs`.
      lists: Params, gradients, mu and nu.
      scalars: Of the step.
      decay: Which leaves decay.
      norms: Whether `op` takes `across`, which adds up numbers of shards.
      implementation: Of `op`.

    Returns:
      New params, mu and nu.
    """
    specs = plan.treedef.flatten_up_to(plan.update_specs)
    rows = list(zip(*lists, strict=True))
    # Nor do kernels serve rows that end within a group; and a norm of such a leaf would be that of a shard.
    parted = [
        not all(map(formats.whole_groups, row)) or any(_parts_groups(x, spec, plan.mesh) for x in row)
        for row, spec in zip(rows, specs, strict=True)
    ]
    new: list[list[Any]] = [[None] * len(rows) for _ in range(3)]

    def collect(some: list[int], result: Any) -> None:
        for k, column in enumerate(result):
            for i, leaf in zip(some, column, strict=True):
                new[k][i] = leaf

    if some := [i for i, is_parted in enumerate(parted) if is_parted]:
        pick = [[x[i] for i in some] for x in lists]
        options: Any = {"decay": [decay[i] for i in some], "places": [Place(i) for i in some]}
        collect(some, op(*pick, scalars, implementation="xla", **options))
    if some := [i for i, is_parted in enumerate(parted) if not is_parted]:
        mine, shapes = [specs[i] for i in some], [formats.shape_of(lists[0][i]) for i in some]

        def on_shards(*args: Any) -> Any:
            places = [_place(i, shape, spec, plan.mesh) for i, shape, spec in zip(some, shapes, mine, strict=True)]
            options = {"across": _sum_over_shards(mine)} if norms else {}
            flags = [decay[i] for i in some]
            return op(*args, decay=flags, places=places, implementation=implementation, **options)

        shard_map = jax.shard_map(
            on_shards, in_specs=((mine,) * 4) + (PartitionSpec(),), out_specs=(mine,) * 3, check_vma=False
        )
        collect(some, shard_map(*[[x[i] for i in some] for x in lists], scalars))
    return new


def _parts_groups(leaf: Any, spec: PartitionSpec, mesh: meshes.AnyMesh) -> bool:
    """Whether shards of a leaf end within groups of its 8-bit numbers."""
    if not isinstance(leaf, formats.Blocks) or len(spec) < leaf.codes.ndim or not leaf.codes.ndim:
        return False
    return leaf.codes.shape[-1] // meshes.shards(mesh, spec[-1]) % formats.GROUP != 0 and spec[-1] is not None


def _place(leaf: int, shape: tuple[int, ...], spec: PartitionSpec, mesh: meshes.AnyMesh) -> Place:
    """Where this device's shard of a leaf lies in it; inside a `shard_map`."""
    cuts, behind = [], 1
    for dim in reversed(range(len(shape))):
        if axes := meshes.axis_names(spec[dim] if dim < len(spec) else None):
            n = shape[dim] // meshes.shards(mesh, spec[dim])
            wrapped = lambda x: np.uint32(x % 2**32).view(np.int32)
            stride = wrapped((shape[dim] - n) * behind) if dim else 0
            offset = jax.lax.axis_index(axes) * wrapped(n * behind)
            cuts.append(formats.Cut(min(n * behind, 2**32 - 1), stride, offset))
        behind *= shape[dim]
    return Place(leaf, tuple(cuts))


def _sum_over_shards(specs: list[PartitionSpec]) -> Callable[[jax.Array], jax.Array]:
    """Sums [leaves, k], numbers of each leaf's shard, over the devices that share the leaf; inside a `shard_map`."""
    cut = [tuple(name for entry in spec for name in meshes.axis_names(entry)) for spec in specs]

    def across(x: jax.Array) -> jax.Array:
        for axes in sorted(set(cut) - {()}):
            here = jnp.array([axes == other for other in cut])[:, None]
            x = jnp.where(here, jax.lax.psum(jnp.where(here, x, 0), axes), x)
        return x

    return across
