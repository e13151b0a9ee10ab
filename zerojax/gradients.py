"""Gradients of a loss over a sharded batch, reduced as the plan says: `psum_scatter` in the program, not in a compiler's hope.

Inside one `shard_map` over the ZeRO axis each device takes the gradient of its own rows. From stage 2 on that gradient is
reduce-scattered at once, after each micro-batch; below, it is summed on the device and reduced once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from zerojax import meshes
from zerojax.gather import Shard
from zerojax.plan import Leaf, Plan

PyTree = Any
LossFn = Callable[[PyTree, PyTree], Any]
Layerwise = str | Callable[[str], bool] | None
REDUCTIONS = ("mean", "sum")


class Result(NamedTuple):
    """What `Objective` computes: `loss` float32 scalar, `aux` reduced as the loss is, `grads` shaped like params.

    `norm` float32 scalar, the global L2 norm of `grads`; `finite` bool scalar, whether all of them are.
    """

    loss: jax.Array
    aux: PyTree
    grads: PyTree
    norm: jax.Array
    finite: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss function and how it is taken over devices and micro-batches; see `make_train_step` for the fields."""

    loss_fn: LossFn
    plan: Plan
    accumulate: int = 1
    has_aux: bool = False
    reduce: str = "mean"
    grad_dtype: Any = None
    layerwise: Layerwise = None

    def __post_init__(self) -> None:
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(
                f"accumulate must be a whole number of micro-batches, at least 1, got {self.accumulate!r}."
            )
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}, got {self.reduce!r}.")
        if self.layerwise is not None and not any(map(self._names, self.plan.leaves)):
            names = ", ".join(leaf.name for leaf in self.plan.leaves[:8])
            raise ValueError(
                f"layerwise={self.layerwise!r} names no leaf; the params have {names}{', ...' * (len(self.plan.leaves) > 8)}."
            )

    def _names(self, leaf: Leaf) -> bool:
        if callable(self.layerwise):
            return self.layerwise(leaf.name)
        return self.layerwise is not None and re.search(self.layerwise, leaf.name) is not None

    def by_layer(self, leaf: Leaf) -> bool:
        """Whether the model gathers this leaf itself."""
        return self.plan.stage >= 3 and leaf.dim is not None and self._names(leaf)

    def check_batch(self, batch: PyTree) -> None:
        """Raises `ValueError` unless devices x micro-batches divides every leading dim, and all are equal."""
        parts = self.plan.num_shards * self.accumulate
        rows: dict[int, str] = {}
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            name, shape = meshes.path_name(path), np.shape(x)
            if not shape:
                raise ValueError(
                    f"batch: leaf {name!r} is a scalar; every leaf needs the global batch as its leading dim."
                )
            if shape[0] % parts or not shape[0]:
                raise ValueError(
                    f"batch: leaf {name!r} {list(shape)} has {shape[0]} rows, no multiple of {self.plan.num_shards} devices on mesh axis "
                    f"{self.plan.axis!r} x {self.accumulate} micro-batches = {parts}: drop or pad rows."
                )
            rows.setdefault(shape[0], name)
        if len(rows) > 1:
            raise ValueError(
                f"batch: leaves differ in their leading dim: {', '.join(f'{n!r} has {r} rows' for r, n in rows.items())}."
            )
        if not rows:
            raise ValueError("batch has no arrays.")

    # Everything below runs while tracing, inside `meshes.on_mesh`.

    def loss(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        """The loss and aux over the whole batch, without a gradient."""

        def local(params: PyTree, rows: PyTree) -> tuple[jax.Array, PyTree]:
            entered = self.plan.treedef.unflatten(self._enter(params))
            return self._reduce_values(*self._call(entered, rows, scale=1 / self._parts)[1])

        return self._over_devices(local, (PartitionSpec(), PartitionSpec()))(params, batch)

    def loss_and_grads(self, params: PyTree, batch: PyTree, *, scale: jax.Array | None = None, sharded: bool) -> Result:
        """The loss, aux and gradients over the whole batch.

        Args:
          params: Laid out by `plan.param_specs`.
          batch: Global arrays, rows leading.
          scale: Multiplies the loss before the gradient is taken; the gradients are returned with it still in.
          sharded: Returns gradients reduce-scattered where the plan shards, rather than whole on every device.
        """
        self.plan.check(params)
        self.check_batch(batch)
        for leaf in self.plan.leaves:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"params: leaf {leaf.name!r} has dtype {leaf.dtype}, which has no gradient; close over it in loss_fn, or put it in the batch."
                )

        def local(params: PyTree, rows: PyTree, scale: jax.Array) -> Result:
            return self._local(params, rows, scale, sharded)

        specs = self.plan.treedef.flatten_up_to(self.plan.specs(sharded=sharded))
        grad_specs = [
            self._manual(spec) for spec, leaf in zip(specs, self.plan.leaves, strict=True) if leaf in self._solid
        ]
        scalar = PartitionSpec()
        run = self._over_devices(local, Result(scalar, scalar, grad_specs, scalar, scalar), scalar)
        result = run(params, batch, jnp.float32(1) if scale is None else scale)
        grads = iter(result.grads)
        every = [next(grads) if leaf in self._solid else jnp.zeros(leaf.shape, leaf.dtype) for leaf in self.plan.leaves]
        return result._replace(grads=self.plan.treedef.unflatten(every))

    @property
    def _solid(self) -> list[Leaf]:
        """The leaves that have elements. An empty gradient computed inside a shard_map crashes jaxlib 0.11 on a CPU."""
        return [leaf for leaf in self.plan.leaves if 0 not in leaf.shape]

    @property
    def _parts(self) -> int:
        """What a sum over devices and micro-batches is divided by."""
        return self.plan.num_shards * self.accumulate if self.reduce == "mean" else 1

    def _manual(self, spec: PartitionSpec) -> PartitionSpec:
        """The part of a spec that names ZeRO axes; the others (tensor parallelism) stay with the compiler."""
        return PartitionSpec(
            *(entry if set(meshes.axis_names(entry)) & set(self.plan.axes) else None for entry in spec)
        )

    def _over_devices(
        self, local: Callable[..., PyTree], out_specs: PyTree, *more_specs: PartitionSpec
    ) -> Callable[..., PyTree]:
        specs = self.plan.treedef.unflatten(map(self._manual, self.plan.treedef.flatten_up_to(self.plan.param_specs)))
        in_specs = (specs, PartitionSpec(self.plan.axis), *more_specs)
        return jax.shard_map(
            local, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.plan.axes), check_vma=False
        )

    def _enter(self, params: PyTree) -> list[Any]:
        """A device's params as the loss function gets them: whole, or a `Shard` where the model gathers."""
        axes = self.plan.axes

        def one(leaf: Leaf, x: jax.Array) -> Any:
            if 0 in leaf.shape:
                return jnp.zeros(leaf.shape, leaf.dtype)  # jaxlib 0.11 crashes on a CPU where an empty argument is summed
            if self.plan.stage < 3 or leaf.dim is None:
                return x
            if self.by_layer(leaf):
                return Shard(x, leaf.name, leaf.dim - len(leaf.shape), axes, self.grad_dtype)
            return jax.lax.all_gather(x, axes, axis=leaf.dim, tiled=True)

        return [one(leaf, x) for leaf, x in zip(self.plan.leaves, self.plan.treedef.flatten_up_to(params), strict=True)]

    def _call(self, params: PyTree, rows: PyTree, scale: Any) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        """`loss * scale`, and (loss, aux); says what is wrong with what the loss function returned."""
        try:
            out = self.loss_fn(params, rows)
        except Exception as e:
            if names := [leaf.name for leaf in self.plan.leaves if self.by_layer(leaf)]:
                e.add_note(
                    f"zerojax: layerwise leaves ({names[0]!r} and {len(names) - 1} others) enter loss_fn as shards; the model must gather them: "
                    "zerojax.gather(params), or zerojax.nn.gathered(Layer)."
                )
            raise
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"has_aux=True wants loss_fn to return (loss, aux), got {type(out).__name__}.")
        loss, aux = out if self.has_aux else (out, ())
        if not hasattr(loss, "dtype") or not jnp.issubdtype(loss.dtype, jnp.floating) or jnp.shape(loss):
            came = f"{loss.dtype}{list(jnp.shape(loss))}" if hasattr(loss, "dtype") else type(loss).__name__
            raise ValueError(
                f"loss_fn must return a floating scalar, got {came}: take the mean over its rows; if it returns (loss, aux), pass has_aux=True."
            )
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)) * scale, (loss, aux)

    def _reduce_values(self, loss: jax.Array, aux: PyTree) -> tuple[jax.Array, PyTree]:
        """The sum or mean over devices of per-device values."""
        over = lambda x: jax.lax.psum(x / self._parts if self._parts > 1 else x, self.plan.axes)
        return over(loss.astype(jnp.promote_types(loss.dtype, jnp.float32))), jax.tree.map(over, aux)

    def _local(self, params: PyTree, rows: PyTree, scale: jax.Array, sharded: bool) -> Result:
        """One device's part: its rows in micro-batches, the gradients of its solid leaves reduced over the devices."""
        entered = self._enter(params)

        def micro(rows: PyTree) -> tuple[jax.Array, PyTree, list[jax.Array]]:
            def scaled(solid: list[Any]) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
                solids = iter(solid)
                leaves = [
                    next(solids) if leaf in self._solid else x
                    for leaf, x in zip(self.plan.leaves, entered, strict=True)
                ]
                # Dividing here and not after the sum over devices is free, and keeps float16 gradients from overflowing in it.
                return self._call(self.plan.treedef.unflatten(leaves), rows, scale / self._parts)

            solid = [x for leaf, x in zip(self.plan.leaves, entered, strict=True) if leaf in self._solid]
            (_, (loss, aux)), grads = jax.value_and_grad(scaled, has_aux=True)(solid)
            return loss, aux, self._reduce_early(jax.tree.leaves(grads))

        if self.accumulate == 1:
            loss, aux, grads = micro(rows)
        else:
            rows = jax.tree.map(lambda x: x.reshape(self.accumulate, -1, *x.shape[1:]), rows)
            zeros = [jnp.zeros(self._accumulator(x), jnp.promote_types(x.dtype, jnp.float32)) for x in self._solid]

            def body(sums: list[jax.Array], rows: PyTree) -> tuple[list[jax.Array], tuple[jax.Array, PyTree]]:
                loss, aux, grads = micro(rows)
                return [s + g for s, g in zip(sums, grads, strict=True)], (loss, aux)

            grads, values = jax.lax.scan(body, zeros, rows)
            loss, aux = jax.tree.map(lambda x: x.sum(0), values)
        grads = self._reduce_late(grads, sharded)
        return Result(*self._reduce_values(loss, aux), grads, *self._norm(grads, sharded))

    def _scatter(self, leaf: Leaf, g: jax.Array) -> jax.Array:
        wire = g.astype(self.grad_dtype or g.dtype)
        return jax.lax.psum_scatter(wire, self.plan.axes, scatter_dimension=leaf.dim, tiled=True).astype(g.dtype)

    def _reduced_early(self, leaf: Leaf) -> bool:
        """Whether a device holds only its shard of this leaf's gradient between micro-batches."""
        return self.plan.stage >= 2 and leaf.dim is not None

    def _accumulator(self, leaf: Leaf) -> tuple[int, ...]:
        """Shape on one device of what a leaf's gradient is summed in over micro-batches."""
        cut = leaf.dim if self._reduced_early(leaf) else None
        return tuple(n // self.plan.num_shards if d == cut else n for d, n in enumerate(leaf.shape))

    def _reduce_early(self, grads: list[jax.Array]) -> list[jax.Array]:
        """After each micro-batch, from stage 2 on: each device keeps the sum of its shard only."""
        early = lambda leaf: self._reduced_early(leaf) and not self.by_layer(leaf)
        return [self._scatter(leaf, g) if early(leaf) else g for leaf, g in zip(self._solid, grads, strict=True)]

    def _reduce_late(self, grads: list[jax.Array], sharded: bool) -> list[jax.Array]:
        """Once, after the last micro-batch: what is still a device's own sum; then each gradient in its param's dtype."""
        grads = list(grads)
        left = [(i, leaf) for i, leaf in enumerate(self._solid) if not self._reduced_early(leaf)]
        whole = [i for i, leaf in left if leaf.dim is None or not sharded]
        wires = [grads[i].astype(self.grad_dtype or grads[i].dtype) for i in whole]
        for i, g in zip(whole, jax.lax.psum(wires, self.plan.axes), strict=True):
            grads[i] = g
        for i, leaf in left:
            if sharded and leaf.dim is not None:
                grads[i] = self._scatter(leaf, grads[i])
        return [g.astype(leaf.dtype) for leaf, g in zip(self._solid, grads, strict=True)]

    def _norm(self, grads: list[jax.Array], sharded: bool) -> tuple[jax.Array, jax.Array]:
        """Global norm and finiteness of reduced gradients, by one small all-reduce however many leaves there are."""
        whole, shards = [jnp.zeros((2,), jnp.float32)], [jnp.zeros((2,), jnp.float32)]
        for leaf, g in zip(self._solid, grads, strict=True):
            g32 = g.astype(jnp.float32)
            sums = jnp.stack([jnp.sum(g32 * g32), jnp.sum(~jnp.isfinite(g32), dtype=jnp.float32)])
            (shards if sharded and leaf.dim is not None else whole).append(sums)
        squares, bad = sum(whole) + jax.lax.psum(sum(shards), self.plan.axes)
        return jnp.sqrt(squares), bad == 0
