"""Running a function on a mesh, whatever the mesh's axis types and whatever mesh the caller has set.

Everything that zerojax traces over global arrays goes through `on_mesh`, so that the rest of the library is written
once, with bare `PartitionSpec`s, for Auto and Explicit meshes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
AnyMesh = Mesh | AbstractMesh


def abstract(mesh: AnyMesh) -> AbstractMesh:
    """The mesh without its devices."""
    return mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh


def tracing(tree: PyTree) -> bool:
    """Whether a tree holds tracers, or the caller is inside a jit, to which the tree is a constant."""
    is_tracer = lambda x: isinstance(x, jax.core.Tracer)
    return any(map(is_tracer, jax.tree.leaves(tree))) or is_tracer(jax.lax.iota("int32", 1))


def check_devices(mesh: AnyMesh) -> None:
    """Raises `ValueError` for a mesh that one can plan for but not run on."""
    if not isinstance(mesh, Mesh):
        raise ValueError(f"the plan was made for {mesh}, which has no devices: make it again with a jax.sharding.Mesh.")


def simulated(mesh: AnyMesh) -> bool:
    """Whether the mesh's devices are threads of a CPU."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def kernel_implementation() -> str | None:
    """What to pass to `pallas_kernels` as `implementation`: None where a kernel may run, else "xla".

    A kernel knows the arrays of one device. Called on an array that is sharded over a mesh it would make XLA gather
    that array, in silence. It may run where that cannot be: with one device, and inside a `jax.shard_map` over all of
    the mesh's axes. XLA's form runs on shards anywhere.

    Example:
      >>> kernel_implementation() in (None, "xla")
      True
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types)
    return None if manual or jax.device_count() == 1 else "xla"


def compiler_options(mesh: AnyMesh) -> dict[str, Any] | None:
    """What a program with several collectives is compiled with on these devices.

    On a CPU, jaxlib from 0.11 on can mix up who takes part in which of a program's collectives: an abort in its
    rendezvous, or wrong sums. Its other scheduler makes that rarer (docs/architecture.md says what was seen).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if simulated(mesh) else None


def shards(mesh: AnyMesh, entry: str | tuple[str, ...] | None) -> int:
    """How many shards one entry of a `PartitionSpec` cuts a dim into; 1 for `None`."""
    size = 1
    for name in axis_names(entry):
        size *= mesh.shape[name]
    return size


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def on_mesh(mesh: AnyMesh, f: Callable[..., PyTree], out_specs: PyTree) -> Callable[..., PyTree]:
    """`f`, traced with every axis of `mesh` in Auto mode, its results laid out by `out_specs`.

    On an Explicit mesh each operation would have to say how its result is sharded, which neither Optax nor a user's
    optimizer does; inside `f` the compiler decides, and at its end types are explicit again.

    Args:
      mesh: The mesh that the arguments live on.
      f: A function of pytrees of global arrays. It may use `constrain` and `jax.shard_map` without naming the mesh.
      out_specs: A prefix of `f`'s result, its leaves `PartitionSpec`s.

    Returns:
      A function to be called while tracing (inside `jax.jit`).
    """

    @functools.wraps(f)
    def traced(*args: PyTree) -> PyTree:
        ambient = jax.sharding.get_abstract_mesh()
        if not ambient.empty and ambient.manual_axes:
            raise ValueError(
                f"zerojax works on global arrays, but it was called inside a shard_map over {ambient.manual_axes}; "
                "call it outside, or use plain Optax on the shards."
            )
        if not ambient.empty and ambient.shape != mesh.shape:
            raise ValueError(
                f"the plan's mesh has the axes {dict(mesh.shape)}, but jax.set_mesh chose one with "
                f"{dict(ambient.shape)}; set the plan's mesh, or none."
            )
        with jax.sharding.use_abstract_mesh(abstract(mesh) if ambient.empty else ambient):
            if AxisType.Explicit in mesh.axis_types:
                return jax.sharding.auto_axes(laid_out, axes=mesh.axis_names, out_sharding=out_specs)(*args)
            return laid_out(*args)

    def laid_out(*args: PyTree) -> PyTree:
        # Named by devices, not by specs alone: an Optax state that does not depend on params is a constant of the
        # program, which would otherwise run on one device.
        return constrain(f(*args), named(_all_auto(mesh), out_specs))

    return traced


def _all_auto(mesh: AnyMesh) -> AnyMesh:
    """The same devices, all axes in Auto mode."""
    auto = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=auto)


def constrain(tree: PyTree, layout: PyTree) -> PyTree:
    """Lays the arrays of `tree` out by `layout`, a prefix of it, its leaves specs or shardings; inside `on_mesh`."""

    def one(sharding: PartitionSpec | NamedSharding, subtree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), subtree)

    return jax.tree.map(one, layout, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def named(mesh: AnyMesh, specs: PyTree) -> PyTree:
    """The tree of `NamedSharding`s for a tree of `PartitionSpec`s."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as people write it: `blocks/attention/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"
