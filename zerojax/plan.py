"""The plan: shapes, a mesh and a ZeRO stage -> where every array lives and what it costs. Touches no device.

ZeRO (arXiv:1910.02054) cuts optimizer state (stage 1), gradients (stage 2) and params (stage 3) over the devices of a
mesh axis. Here that is a choice of one dim for each leaf, made from its shape alone, so that any Optax state can be
planned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import formats
from zerojax import host, layout, meshes, report, selection
from zerojax.host import Offload, Rest
from zerojax.meshes import AnyMesh

PyTree = Any
STAGES = (0, 1, 2, 3)
_CODES = jax.tree_util.GetAttrKey("codes")  # of `formats.Blocks`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """Where one param lives.

    Attributes:
      name: Its path, as `blocks/attention/kernel`.
      shape: Shape of the whole array, in elements.
      dtype: Its dtype.
      whole: Spec without ZeRO: what `param_specs` said, or replicated.
      sharded: Spec with the ZeRO axis on `dim`; `whole` where `dim` is None.
      dim: The dim that ZeRO cuts, or None.
      reason: Why `dim` is None; empty where it is not.
      on_host: Whether it is in host memory at rest.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    whole: PartitionSpec
    sharded: PartitionSpec
    dim: int | None
    reason: str
    on_host: bool = False


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes at rest: `params`, `grads` and `opt_state` on each device, `host` in each device's share of host memory.

    `grads` is the buffer that gradients are accumulated in.
    """

    params: int
    grads: int
    opt_state: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on each device; `host` stands apart."""
        return self.params + self.grads + self.opt_state

    def __str__(self) -> str:
        parts = ("params", "grads", "opt_state", "total", "host")
        return ", ".join(f"{p} {report.format_bytes(getattr(self, p))}" for p in parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where every array lives; made by `make_plan`, plain data.

    Attributes:
      mesh: The mesh planned for; an `AbstractMesh` plans for machines one does not have.
      stage: ZeRO stage, 0 to 3.
      axes: The mesh axes that ZeRO shards over.
      leaves: One `Leaf` a param, in `jax.tree.leaves` order.
      treedef: The tree structure of the params.
      min_size: Leaves with fewer elements stay whole.
      offload: What of the optimizer's state lives in host memory.
    """

    mesh: AnyMesh
    stage: int
    axes: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    treedef: jax.tree_util.PyTreeDef
    min_size: int
    offload: Offload | None = None

    @property
    def num_shards(self) -> int:
        """Number of devices that ZeRO shards over."""
        return meshes.shards(self.mesh, self.axes)

    @property
    def axis(self) -> str | tuple[str, ...]:
        """The ZeRO axis as a `PartitionSpec` names it: one name, or a tuple of several."""
        return self.axes if len(self.axes) > 1 else self.axes[0]

    @property
    def shapes(self) -> PyTree:
        """The params as `jax.ShapeDtypeStruct`s."""
        return self.treedef.unflatten(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.leaves)

    def specs(self, *, sharded: bool) -> PyTree:
        """`PartitionSpec`s shaped like params, with the ZeRO axis where `sharded`, without it elsewhere."""
        return self.treedef.unflatten(leaf.sharded if sharded else leaf.whole for leaf in self.leaves)

    @property
    def param_specs(self) -> PyTree:
        """`PartitionSpec`s of the params at rest: sharded at stage 3."""
        return self.specs(sharded=self.stage >= 3)

    @property
    def grad_specs(self) -> PyTree:
        """`PartitionSpec`s of the gradients where they are accumulated: sharded from stage 2 on."""
        return self.specs(sharded=self.stage >= 2)

    @property
    def update_specs(self) -> PyTree:
        """`PartitionSpec`s of params and gradients while the optimizer works on them: sharded from stage 1 on."""
        return self.specs(sharded=self.stage >= 1)

    @property
    def params(self) -> PyTree:
        """`NamedSharding`s of the params at rest, shaped like params."""
        return jax.tree.map(lambda rest: rest.sharding(self.mesh), self.param_rests)

    @functools.cached_property
    def param_rests(self) -> PyTree:
        """How each param is kept, `host.Rest`s shaped like params."""

        def rest(i: int, leaf: Leaf) -> Rest:
            spec = leaf.sharded if self.stage >= 3 else leaf.whole
            size = layout.shard_bytes(self.mesh, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), spec)
            return Rest(leaf.name, leaf.shape, leaf.dtype, spec, size, i, leaf.on_host, (1,) * len(leaf.shape))

        return self.treedef.unflatten(itertools.starmap(rest, enumerate(self.leaves)))

    def on_device(self, params: PyTree) -> PyTree:
        """Params, all on the device."""
        return jax.tree.map(lambda rest, x: host.in_use(x, rest), self.param_rests, params)

    def at_rest(self, params: PyTree) -> PyTree:
        """Params where the plan keeps them; inside a jit, but not in `meshes.on_mesh`."""
        return jax.tree.map(lambda rest, x: host.at_rest(x, rest, self.mesh), self.param_rests, params)

    def param_bytes(self, *, on_host: bool) -> int:
        """Bytes of the params at rest on each device, or in its share of host memory."""
        return sum(rest.size for rest in jax.tree.leaves(self.param_rests) if rest.on_host == on_host)

    @property
    def grads(self) -> PyTree:
        """`NamedSharding`s of the gradients where they are accumulated, shaped like params."""
        return meshes.named(self.mesh, self.grad_specs)

    @property
    def batch(self) -> NamedSharding:
        """`NamedSharding` of a batch: its leading dim over the ZeRO axis."""
        return NamedSharding(self.mesh, PartitionSpec(self.axis))

    def opt_state(self, tx: optax.GradientTransformation) -> PyTree:
        """`NamedSharding`s shaped like `tx.init(params)`, for any Optax transformation.

        A leaf of the state that stands at a param's path with that param's shape (Adam's `mu`, a `MultiSteps`
        accumulator) is sharded as that param; any other (Adafactor's rows, a count) by its own shape. What `offload`
        sends to the host has its memory kind; a leaf larger than a bucket is `host.Pieces`.
        """
        return jax.tree.map(lambda rest: rest.sharding(self.mesh), self.rests(tx))

    def opt_state_specs(self, tx: optax.GradientTransformation) -> PyTree:
        """The `PartitionSpec`s behind `opt_state`, of whole leaves."""
        return jax.tree.map(lambda rest: rest.spec, self.rests(tx))

    def rests(self, tx: optax.GradientTransformation) -> PyTree:
        """How each leaf of the state is kept, `host.Rest`s shaped like `tx.init(params)`."""
        return self.rests_of(self._state_shapes(tx), getattr(tx, "unit", None))

    def rests_of(self, state: PyTree, unit: str | None) -> PyTree:
        """As `rests`, of a state's shapes; `unit` as of `FusedTransformation`."""
        paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(self.shapes))
        numbers = dict(zip(paths, range(len(self.leaves)), strict=True))

        def rest(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Rest:
            param, spec = self._spec_of(numbers, path, x.shape)
            size = layout.shard_bytes(self.mesh, x, spec)
            return Rest(meshes.path_name(path), x.shape, x.dtype, spec, size, param, grid=(1,) * x.ndim)

        rests = jax.tree_util.tree_map_with_path(rest, state)
        return rests if self.offload is None else self._offloaded(rests, unit)

    def _spec_of(
        self, numbers: dict[tuple[Any, ...], int], path: tuple[Any, ...], shape: tuple[int, ...]
    ) -> tuple[int | None, PartitionSpec]:
        """To which param a leaf of the state belongs, if to one, and its spec."""
        for start in range(len(path) + 1):  # the longest suffix of the path that is a param's,
            for end in (len(path), len(path) - 1):  # or that of a part of what is kept for one
                if (number := numbers.get(path[start:end])) is not None:
                    leaf = self.leaves[number]
                    like = leaf.sharded if self.stage >= 1 else leaf.whole
                    # A number in a chain's first link, its count, stands where a list's first param would.
                    if leaf.shape == shape and (shape or end == len(path) or path[-1] == _CODES):
                        return number, like
                    if end < len(path) and _is_grouped(leaf.shape, shape):
                        return number, layout.grouped_spec(self.mesh, leaf.shape, like, formats.GROUP)
        if self.stage == 0:
            return None, PartitionSpec()
        return None, layout.shard_spec(shape, PartitionSpec(), self.axis, self.num_shards, self.min_size)[0]

    def _offloaded(self, rests: PyTree, unit: str | None) -> PyTree:
        """`rests` with what `offload` sends to the host; in pieces, if `unit` says that the update may take such."""
        assert self.offload is not None
        treedef: Any = jax.tree.structure(rests)
        beside = self.param_bytes(on_host=False) + layout.total_bytes(self.mesh, self.shapes, self.grad_specs)
        specs = [leaf.sharded if self.stage >= 1 else leaf.whole for leaf in self.leaves]
        cuts = [layout.cuts(self.mesh, leaf.shape, spec) for leaf, spec in zip(self.leaves, specs, strict=True)]
        held = [rest.size if rest.on_host else 0 for rest in jax.tree.leaves(self.param_rests)]
        params = [(leaf.shape, cut, size) for leaf, cut, size in zip(self.leaves, cuts, held, strict=True)]
        chosen = selection.select(
            jax.tree.leaves(rests), self.offload, params, beside=beside, in_pieces=unit == "element"
        )
        return treedef.unflatten(chosen)

    def _state_shapes(self, tx: optax.GradientTransformation) -> PyTree:
        # `zero` of a transformation keeps what the transformation does, but in the layout that is asked for here.
        return jax.eval_shape(getattr(tx, "inner", tx).init, self.shapes)

    def memory(self, tx: optax.GradientTransformation, *, param_dtype: Any = None, grad_dtype: Any = None) -> Memory:
        """Bytes at rest on each device.

        Args:
          tx: The optimizer, any Optax transformation.
          param_dtype: Plans as if floating params had this dtype; their own by default.
          grad_dtype: Likewise for gradients; the params' by default.

        Returns:
          A `Memory`, in bytes a device: activations, and what the compiler adds for temporaries, are not in it.

        Example:
          >>> mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
          >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}
          >>> print(make_plan(params, mesh, stage=2).memory(optax.adam(1e-3)))
          params 67.1 MB, grads 8.39 MB, opt_state 16.8 MB, total 92.3 MB, host 0 B
        """
        plan = self if param_dtype is None else self._with_dtype(param_dtype)
        grads = plan if grad_dtype is None else plan._with_dtype(grad_dtype)
        rests = jax.tree.leaves(plan.rests(tx))
        return Memory(
            params=plan.param_bytes(on_host=False),
            grads=layout.total_bytes(grads.mesh, grads.shapes, grads.grad_specs),
            opt_state=sum(rest.size for rest in rests if not rest.on_host),
            host=sum(rest.size for rest in rests if rest.on_host) + plan.param_bytes(on_host=True),
        )

    def _with_dtype(self, dtype: Any) -> Plan:
        floating = lambda leaf: jax.numpy.issubdtype(leaf.dtype, np.floating)
        leaves = tuple(dataclasses.replace(f, dtype=np.dtype(dtype)) if floating(f) else f for f in self.leaves)
        return dataclasses.replace(self, leaves=leaves)

    def unsharded(self) -> Iterator[Leaf]:
        """The params that ZeRO leaves whole, each with its `reason`."""
        return (leaf for leaf in self.leaves if leaf.dim is None)

    def check(self, params: PyTree, what: str = "params") -> None:
        """Raises `ValueError` unless `params` has the planned structure, shapes and, but for updates, dtypes."""
        leaves, treedef = jax.tree.flatten(params)
        if treedef == self.treedef and all(np.shape(x) == f.shape for x, f in zip(leaves, self.leaves, strict=True)):
            self._check_dtypes(leaves, what)
            return
        planned = {leaf.name: leaf.shape for leaf in self.leaves}
        came = {meshes.path_name(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
        hint = f"make a plan from these {what}, or pass the {what} that the plan was made from."
        for name, shape in planned.items():
            if name not in came:
                raise ValueError(f"{what} lack the leaf {name!r} {list(shape)} that the plan has; {hint}")
            if came[name] != shape:
                raise ValueError(f"{what}: leaf {name!r} has shape {came[name]}, the plan has {shape}; {hint}")
        for name in came.keys() - planned.keys():
            raise ValueError(f"{what} have a leaf {name!r} {list(came[name])} that the plan lacks; {hint}")
        raise ValueError(
            f"{what} have the planned leaves in other containers: {treedef}, the plan has {self.treedef}; {hint}"
        )

    def _check_dtypes(self, leaves: list[Any], what: str) -> None:
        for x, leaf in zip(leaves, self.leaves, strict=True):
            dtype = layout.shape_dtype(x, leaf.name)[1]
            if what == "params" and dtype != leaf.dtype:
                raise ValueError(
                    f"{what}: leaf {leaf.name!r} has dtype {dtype}, the plan has {leaf.dtype}; make a plan from "
                    "these params."
                )

    def __str__(self) -> str:
        return self.table()

    def table(self, tx: optax.GradientTransformation | None = None) -> str:
        """The table people read: each param's layout and its bytes a device, and why what is whole is whole.

        Args:
          tx: With an optimizer, the last lines have the bytes of its state too: all of it, and its parts by dtype.

        Example:
          >>> mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
          >>> w, b = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((4096, 4096), (4096,)))
          >>> params = {"w": w, "b": b}
          >>> print(make_plan(params, mesh, stage=3).table(optax.adam(1e-3)))
          ZeRO stage 3 over 8 devices (mesh axis data): bytes on each
          leaf          shape    dtype    sharded as   params    grads
          -----  ------------  -------  ------------  -------  -------
          b            [4096]  float32         whole  16.4 kB  16.4 kB
          w      [4096, 4096]  float32  None, 'data'  8.39 MB  8.39 MB
          total                                        8.4 MB   8.4 MB
          whole: b: 4096 elements are fewer than min_size=16384
          params 8.4 MB, grads 8.4 MB, opt_state 16.8 MB, total 33.6 MB, host 0 B
          opt_state: count int32 4 B, mu float32 8.4 MB, nu float32 8.4 MB
        """
        shapes = self.treedef.flatten_up_to(self.shapes)
        at_rest = [self.treedef.flatten_up_to(specs) for specs in (self.param_specs, self.grad_specs)]
        held = [
            [layout.shard_bytes(self.mesh, x, spec) for x, spec in zip(shapes, specs, strict=True)] for specs in at_rest
        ]
        rows = [
            [leaf.name, list(leaf.shape), leaf.dtype, _placement(leaf, self.stage), *map(report.format_bytes, sizes)]
            for leaf, *sizes in zip(self.leaves, *held, strict=True)
        ]
        totals = self.param_bytes(on_host=False), sum(held[1])
        rows.append(
            [
                "total on the device" if self.param_bytes(on_host=True) else "total",
                *[""] * 3,
                *map(report.format_bytes, totals),
            ]
        )
        lines = [
            f"ZeRO stage {self.stage} over {self.num_shards} devices (mesh axis {', '.join(self.axes)}): bytes on each",
            report.text_table(["leaf", "shape", "dtype", "sharded as", "params", "grads"], rows),
            *(f"whole: {leaf.name}: {leaf.reason}" for leaf in self.unsharded() if self.stage),
        ]
        return "\n".join(lines if tx is None else [*lines, str(self.memory(tx)), self._state_parts(tx)])

    def _state_parts(self, tx: optax.GradientTransformation) -> str:
        """Bytes of the optimizer's state by the name of its field, dtype, and where it is."""
        parts: dict[str, int] = {}
        for path, rest in jax.tree_util.tree_leaves_with_path(self.rests(tx)):
            names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
            fields = [name for name in names if name not in ("inner_state", *formats.Blocks._fields)] or ["state"]
            dtype = "8-bit" if set(names) & set(formats.Blocks._fields) else rest.dtype.name
            name = f"{fields[-1]} {dtype}" + (" on the host" if rest.on_host else "")
            parts[name] = parts.get(name, 0) + rest.size
        return "opt_state: " + ", ".join(f"{name} {report.format_bytes(size)}" for name, size in parts.items())


def make_plan(
    params: PyTree,
    mesh: AnyMesh,
    *,
    stage: int,
    axis: str | tuple[str, ...] = "data",
    offload: str | Offload | None = None,
    param_specs: PyTree | None = None,
    min_size: int = 2**14,
    strict: bool = False,
) -> Plan:
    """Decides where every param, gradient and piece of optimizer state lives.

    Each leaf is cut along its largest dim that the number of devices divides. Of equal dims the first is taken, but the
    leading one last: in a stack of layers it counts the layers, and `layerwise` gathering needs those whole.

    Args:
      params: Pytree of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
      mesh: The devices; an `AbstractMesh` plans for machines one does not have.
      stage: 0 replicates everything; 1 shards optimizer state, 2 also gradients, 3 also params.
      axis: Mesh axis to shard over, or a tuple of several taken as one.
      offload: What of the optimizer's state lives in host memory: None for nothing, "pinned_host" for all, or an
        `Offload`, which may send params there, too.
      param_specs: `PartitionSpec`s already taken, by tensor parallelism say: a prefix of `params`, None for nothing
        taken. The ZeRO axis goes on a dim that they leave free.
      min_size: Leaves with fewer elements stay whole: sharding them would cost a collective and save little.
      strict: Raises where a leaf of `min_size` elements or more cannot be sharded.

    Returns:
      The `Plan`.

    Raises:
      ValueError: an unknown stage or axis, a spec that does not fit its leaf or takes the ZeRO axis; params for the
        host at a stage that has them whole on each device; or, under `strict`, a leaf that cannot be sharded.
      TypeError: a leaf without shape and dtype, or a mesh that is none.

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv:1910.02054,
        section 5.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> plan = make_plan({"w": jax.ShapeDtypeStruct((512, 2048), "float32")}, mesh, stage=3)
      >>> plan.params["w"].spec
      P(None, 'data')
    """
    if isinstance(stage, bool | float) or stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}.")
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {type(mesh).__name__}; see jax.make_mesh."
        )
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"axis must name at least one mesh axis, each once, got {axis!r}.")
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(f"the mesh has no axis {name!r}; it has {mesh.axis_names}: pass one of them as axis=.")
    offload = host.as_offload(offload)
    params_on_host = offload is not None and offload.params
    if params_on_host and stage < 3:
        raise ValueError(
            f"Offload(params=True) wants stage 3, got stage {stage}: there the model takes layer by layer what "
            "layerwise= of make_train_step names."
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    taken = layout.taken_specs(param_specs, params)
    size = meshes.shards(mesh, axes)
    leaves = []
    for (path, x), whole in zip(paths, taken, strict=True):
        name = meshes.path_name(path)
        shape, dtype = layout.shape_dtype(x, name)
        layout.check_taken(name, shape, whole, mesh, axes)
        sharded, dim, reason = layout.shard_spec(shape, whole, axes if len(axes) > 1 else axes[0], size, min_size)
        if strict and stage and dim is None and math.prod(shape) >= max(min_size, 1):
            raise ValueError(
                f"leaf {name!r} {list(shape)} cannot be sharded over mesh axis {axis!r} of {size} devices: {reason}. "
                f"Pad one of its dims to a multiple of {size}, raise min_size above {math.prod(shape)}, or pass "
                "strict=False to keep it whole."
            )
        leaves.append(
            Leaf(
                name=name,
                shape=shape,
                dtype=dtype,
                whole=whole,
                sharded=sharded,
                dim=dim,
                reason=reason,
                on_host=params_on_host and dim is not None,
            )
        )
    return Plan(
        mesh=mesh,
        stage=stage,
        axes=axes,
        leaves=tuple(leaves),
        treedef=treedef,
        min_size=min_size,
        offload=offload,
    )


def _is_grouped(shape: tuple[int, ...], x: tuple[int, ...]) -> bool:
    """Whether `x` is the shape of one number for each group of a leaf's last dim, as `formats.Blocks` has."""
    return x == (*shape[:-1], math.ceil(math.prod(shape[-1:]) / formats.GROUP))


def _placement(leaf: Leaf, stage: int) -> str:
    entries = ", ".join(map(repr, leaf.sharded if stage else leaf.whole))
    return (entries or "whole") + (" on the host" if leaf.on_host else "")
