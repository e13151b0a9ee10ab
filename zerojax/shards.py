"""Optimizer kernels on the shards of each device: on global arrays XLA would gather them for a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import formats
from pallas_kernels.dispatch import Choice
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """An optimizer of `pallas_kernels`.

    Attributes:
      op: `op(params, grads, mu, nu, scalars, *, decay, places, implementation)` on lists of leaves.
      choice: Which implementation it runs.
      step: What it adds to one leaf, and the leaf's new moments.
      norms: Whether a step depends on the norm of the whole leaf; then `op` takes `across`, which adds up shards'.
    """

    op: Callable[..., Any]
    choice: Callable[..., Choice]
    step: Callable[..., Any]
    norms: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf of the params, or a block of one.

    Attributes:
      leaf: Its number.
      whole: Shape of the leaf.
      spec: How the block lies over the mesh.
      starts: Where the block begins in each dim; None for a whole leaf.
    """

    leaf: Any
    whole: tuple[int, ...]
    spec: PartitionSpec
    starts: Any = None

    def place(self, shape: tuple[int, ...], mesh: meshes.AnyMesh | None = None) -> Place:
        """Where the block, of `shape`, lies in its leaf; with a mesh, in a `shard_map`, where this device's shard."""
        cuts, behind = [], 1
        for dim in reversed(range(len(shape))):
            entry = self.spec[dim] if mesh is not None and dim < len(self.spec) else None
            parts = 1 if mesh is None else meshes.shards(mesh, entry)
            n = shape[dim] // parts
            if n < self.whole[dim]:
                start = 0 if self.starts is None else self.starts[dim]
                if axes := meshes.axis_names(entry):
                    start = start + jax.lax.axis_index(axes) * n
                stride = _wrapped((self.whole[dim] - n) * behind) if dim else 0
                cuts.append(formats.Cut(min(n * behind, 2**32 - 1), stride, start * _wrapped(behind)))
            behind *= self.whole[dim]
        return Place(self.leaf, tuple(cuts))


def run(
    rule: Rule,
    plan: Plan | None,
    lists: list[list[Any]],
    scalars: Any,
    decay: list[bool],
    *,
    implementation: str | None,
    parts: list[Part] | None = None,
) -> list[list[Any]]:
    """An optimizer's step on leaves, or on blocks of some; each device works on its shards.

    A leaf of which shards end within a group of 8-bit moments is left to XLA, which exchanges what it must.

    Args:
      rule: The optimizer.
      plan: How leaves are cut: by `update_specs`; None where they are on one device.
      lists: Params, gradients, mu and nu.
      scalars: Of the step.
      decay: Which leaves decay.
      implementation: Of the op.
      parts: What of which leaves `lists` hold; by default all that the plan has.

    Returns:
      New params, mu and nu.
    """
    if plan is None or rule.choice(*lists, implementation=implementation).implementation == "xla":
        chosen = implementation if plan is None else "xla"
        return list(rule.op(*lists, scalars, decay=decay, places=_places(parts, lists), implementation=chosen))
    if parts is None:
        specs = plan.treedef.flatten_up_to(plan.update_specs)
        parts = [Part(i, formats.shape_of(x), spec) for i, (x, spec) in enumerate(zip(lists[0], specs, strict=True))]
    mesh, rows = plan.mesh, list(zip(*lists, strict=True))
    # Nor do kernels serve rows that end within a group; and a norm of such a leaf would be that of a shard.
    parted = [
        not all(map(formats.whole_groups, row)) or any(_parts_groups(x, part.spec, mesh) for x in row)
        for row, part in zip(rows, parts, strict=True)
    ]
    new: list[list[Any]] = [[None] * len(rows) for _ in range(3)]
    pick = lambda some: [[x[i] for i in some] for x in lists]

    def collect(some: list[int], result: Any) -> None:
        for k, column in enumerate(result):
            for i, leaf in zip(some, column, strict=True):
                new[k][i] = leaf

    if some := [i for i, is_parted in enumerate(parted) if is_parted]:
        flags, places = [decay[i] for i in some], _places([parts[i] for i in some], pick(some))
        collect(some, rule.op(*pick(some), scalars, decay=flags, places=places, implementation="xla"))
    if some := [i for i, is_parted in enumerate(parted) if not is_parted]:
        mine = [parts[i] for i in some]
        specs, shapes = [part.spec for part in mine], [formats.shape_of(lists[0][i]) for i in some]

        def on_shards(lists: list[list[Any]], scalars: Any, where: list[tuple[Any, Any]]) -> Any:
            here = [dataclasses.replace(part, leaf=i, starts=at) for part, (i, at) in zip(mine, where, strict=True)]
            places = [part.place(shape, mesh) for part, shape in zip(here, shapes, strict=True)]
            options = {"across": _sum_over_shards(specs)} if rule.norms else {}
            flags = [decay[i] for i in some]
            return rule.op(*lists, scalars, decay=flags, places=places, implementation=implementation, **options)

        whole = PartitionSpec()
        shard_map = jax.shard_map(
            on_shards, in_specs=([specs] * 4, whole, whole), out_specs=(specs,) * 3, check_vma=False
        )
        collect(some, shard_map(pick(some), scalars, [(part.leaf, part.starts) for part in mine]))
    return new


def _places(parts: list[Part] | None, lists: list[list[Any]]) -> list[Place] | None:
    """Of blocks of whole arrays; None for whole leaves."""
    if parts is None:
        return None
    return [part.place(formats.shape_of(x)) for part, x in zip(parts, lists[0], strict=True)]


def _wrapped(x: int) -> Any:
    return np.uint32(x % 2**32).view(np.int32)


def _parts_groups(leaf: Any, spec: PartitionSpec, mesh: meshes.AnyMesh) -> bool:
    """Whether shards of a leaf end within groups of its 8-bit numbers."""
    if not isinstance(leaf, formats.Blocks) or len(spec) < leaf.codes.ndim or not leaf.codes.ndim:
        return False
    return leaf.codes.shape[-1] // meshes.shards(mesh, spec[-1]) % formats.GROUP != 0 and spec[-1] is not None


def _sum_over_shards(specs: list[PartitionSpec]) -> Callable[[jax.Array], jax.Array]:
    """Sums [leaves, k], numbers of each leaf's shard, over the devices that share the leaf; inside a `shard_map`."""
    cut = [tuple(name for entry in spec for name in meshes.axis_names(entry)) for spec in specs]

    def across(x: jax.Array) -> jax.Array:
        for axes in sorted(set(cut) - {()}):
            here = jnp.array([axes == other for other in cut])[:, None]
            x = jnp.where(here, jax.lax.psum(jnp.where(here, x, 0), axes), x)
        return x

    return across
