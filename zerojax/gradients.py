"""Gradients of a loss over a sharded batch, reduced as the plan says: `psum_scatter` in the program, not in hope.

Inside one `shard_map` over the ZeRO axis each device takes the gradient of its own rows. From stage 2 on that gradient
is reduce-scattered at once, after each micro-batch; below, it is summed on the device and reduced once.
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

from zerojax import flow, meshes
from zerojax.gather import Shard
from zerojax.plan import Leaf, Plan

PyTree = Any
LossFn = Callable[[PyTree, PyTree], Any]
Layerwise = str | Callable[[str], bool] | None
REDUCTIONS = ("mean", "sum")


class Result(NamedTuple):
    """What `Objective.loss_and_grads` computes.

    Attributes:
      loss: float32 scalar.
      aux: What the loss function returned beside it, reduced as the loss is; () without.
      grads: Shaped like params, in the wider of their dtypes and `grad_dtype`; float32 under a loss scale.
      norm: float32 scalar, the global L2 norm of `grads`.
      finite: bool scalar, whether all of `grads` are finite.
    """

    loss: Any
    aux: PyTree
    grads: PyTree
    norm: Any
    finite: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss function, and how it is taken over devices and micro-batches; `make_train_step` documents the fields."""

    loss_fn: LossFn
    plan: Plan
    accumulate: int = 1
    has_aux: bool = False
    reduce: str = "mean"
    grad_dtype: Any = None
    layerwise: Layerwise = None

    def __post_init__(self) -> None:
        if not isinstance(self.accumulate, int | np.integer) or self.accumulate < 1:
            raise ValueError(
                f"accumulate must be a whole number of micro-batches, at least 1, got {self.accumulate!r}."
            )
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}, got {self.reduce!r}.")
        if self.grad_dtype is not None and not _is_floating(self.grad_dtype):
            raise ValueError(f"grad_dtype must be a floating dtype, float32 or bfloat16 say, got {self.grad_dtype!r}.")
        if self.layerwise is not None and not any(map(self._named_by_layerwise, self.plan.leaves)):
            names = [leaf.name for leaf in self.plan.leaves[:8]]
            more = ["..."] * (len(self.plan.leaves) > 8)
            raise ValueError(f"layerwise={self.layerwise!r} names no leaf; the params have {', '.join(names + more)}.")

    def check_batch(self, batch: PyTree) -> None:
        """Raises `ValueError` unless devices x micro-batches divides every leading dim, and all are equal."""
        parts = self.plan.num_shards * self.accumulate
        rows: dict[int, str] = {}
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            name, shape = meshes.path_name(path), np.shape(x)
            if not shape:
                raise ValueError(
                    f"batch: leaf {name!r} is a scalar; every leaf needs the rows of the global batch as its leading "
                    "dim. A random key for dropout: pass jax.random.split(key, rows), and use its first in loss_fn."
                )
            if shape[0] % parts or not shape[0]:
                raise ValueError(
                    f"batch: leaf {name!r} {list(shape)} has {shape[0]} rows, no multiple of {self.plan.num_shards} "
                    f"devices on mesh axis {self.plan.axis!r} x {self.accumulate} micro-batches = {parts}: drop or "
                    "pad rows."
                )
            rows.setdefault(shape[0], name)
        if len(rows) > 1:
            counts = ", ".join(f"{name!r} has {n} rows" for n, name in rows.items())
            raise ValueError(f"batch: leaves differ in their leading dim: {counts}.")
        if not rows:
            raise ValueError("batch has no arrays.")

    # The rest runs while tracing, inside `meshes.on_mesh`.

    def loss(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        """The loss and aux over the whole batch, without a gradient."""

        def local(params: PyTree, rows: PyTree) -> tuple[jax.Array, PyTree]:
            entered = self._enter(params)
            self._check_gathered(entered, rows)
            return self._sum_values(*self._call(entered, rows))

        return self._over_devices(local, (PartitionSpec(), PartitionSpec()))(params, batch)

    def loss_and_grads(self, params: PyTree, batch: PyTree, *, sharded: bool, scale: jax.Array | None = None) -> Result:
        """The loss, aux and gradients over the whole batch.

        Args:
          params: Laid out by `plan.param_specs`.
          batch: Global arrays, rows leading.
          sharded: Returns gradients cut where the plan shards, rather than whole on every device.
          scale: Multiplies the loss before the gradient is taken, and is taken out of the gradients in float32, which
            they then have as their dtype.
        """
        self.plan.check(params)
        self.check_batch(batch)
        for leaf in self.plan.leaves:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"params: leaf {leaf.name!r} has dtype {leaf.dtype}, which has no gradient; close over it in "
                    "loss_fn, or put it in the batch."
                )

        def local(params: PyTree, rows: PyTree, scale: jax.Array | None) -> Result:
            return self._local(params, rows, scale, sharded)

        specs = self.plan.treedef.flatten_up_to(self.plan.specs(sharded=sharded))
        grad_specs = [self._manual(spec) for spec, leaf in zip(specs, self.plan.leaves, strict=True) if _solid(leaf)]
        scalar = PartitionSpec()
        run = self._over_devices(local, Result(scalar, scalar, grad_specs, scalar, scalar), scalar)
        result = run(params, batch, scale)
        solid = iter(result.grads)
        dtype = lambda leaf: self._dtype(leaf) if scale is None else jnp.float32
        grads = [next(solid) if _solid(leaf) else jnp.zeros(leaf.shape, dtype(leaf)) for leaf in self.plan.leaves]
        return result._replace(grads=self.plan.treedef.unflatten(grads))

    def _named_by_layerwise(self, leaf: Leaf) -> bool:
        if callable(self.layerwise):
            return self.layerwise(leaf.name)
        return self.layerwise is not None and re.search(self.layerwise, leaf.name) is not None

    def _by_layer(self, leaf: Leaf) -> bool:
        """Whether the model gathers this leaf itself."""
        return self.plan.stage >= 3 and leaf.dim is not None and self._named_by_layerwise(leaf)

    def _cut_early(self, leaf: Leaf) -> bool:
        """Whether a device keeps only its shard of this leaf's gradient between micro-batches."""
        return self.plan.stage >= 2 and leaf.dim is not None

    @property
    def _parts(self) -> int:
        """What a sum over devices and micro-batches is divided by."""
        return self.plan.num_shards * self.accumulate if self.reduce == "mean" else 1

    def _dtype(self, leaf: Leaf) -> Any:
        """What a leaf's reduced gradient has: a sum that was asked for in float32 is not rounded to bfloat16 after."""
        return jnp.promote_types(leaf.dtype, self.grad_dtype or leaf.dtype)

    def _manual(self, spec: PartitionSpec) -> PartitionSpec:
        """The part of a spec that names ZeRO axes; the others (tensor parallelism) stay with the compiler."""
        return PartitionSpec(
            *(entry if set(meshes.axis_names(entry)) & set(self.plan.axes) else None for entry in spec)
        )

    def _over_devices(
        self, local: Callable[..., PyTree], out_specs: PyTree, *more_specs: PartitionSpec
    ) -> Callable[..., PyTree]:
        params = self.plan.treedef.unflatten(map(self._manual, self.plan.treedef.flatten_up_to(self.plan.param_specs)))
        specs = (params, PartitionSpec(self.plan.axis), *more_specs)
        return jax.shard_map(
            local, in_specs=specs, out_specs=out_specs, axis_names=set(self.plan.axes), check_vma=False
        )

    def _enter(self, params: PyTree) -> PyTree:
        """A device's params as the loss function gets them: whole, or a `Shard` where the model gathers."""

        def one(leaf: Leaf, x: jax.Array) -> Any:
            if not _solid(leaf):
                # jaxlib 0.11 crashes on a CPU where an empty argument is summed.
                return jnp.zeros(leaf.shape, leaf.dtype)
            if self.plan.stage < 3 or leaf.dim is None:
                return x
            if self._by_layer(leaf):
                # Simulated devices meet for each collective at a cost far above its bytes'.
                combine = meshes.simulated(self.plan.mesh)
                shard = Shard(x, leaf.name, x.shape[leaf.dim :], self.plan.axes, self.grad_dtype, combine)
                # Zeros that nothing reads are never made.
                return dataclasses.replace(shard, value=jnp.zeros_like(x), source=x) if leaf.on_host else shard
            if leaf.on_host:
                x = jax.device_put(x, jax.memory.Space.Device)
            return jax.lax.all_gather(x, self.plan.axes, axis=leaf.dim, tiled=True)

        return self.plan.treedef.unflatten(map(one, self.plan.leaves, self.plan.treedef.flatten_up_to(params)))

    def _call(self, params: PyTree, rows: PyTree) -> tuple[jax.Array, PyTree]:
        """(loss, aux) of some rows; says what is wrong with what the loss function returned."""
        try:
            out = self.loss_fn(params, rows)
        except Exception as e:
            if shards := [leaf.name for leaf in self.plan.leaves if self._by_layer(leaf)]:
                e.add_note(
                    f"zerojax: {shards[0]!r} and {len(shards) - 1} other leaves named by layerwise enter loss_fn as "
                    "shards. If that is the cause, gather them where they are used: zerojax.gather(params), or "
                    "zerojax.nn.gathered(Layer)."
                )
            raise
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            came = "an array" if isinstance(out, jax.Array) else type(out).__name__
            raise ValueError(f"has_aux=True wants loss_fn to return (loss, aux), got {came}.")
        loss, aux = out if self.has_aux else (out, ())
        if not hasattr(loss, "dtype") or not jnp.issubdtype(loss.dtype, jnp.floating) or jnp.shape(loss):
            came = f"{loss.dtype}{list(jnp.shape(loss))}" if hasattr(loss, "dtype") else type(loss).__name__
            raise ValueError(
                f"loss_fn must return a floating scalar, got {came}: take the mean over its rows; if it returns "
                "(loss, aux), pass has_aux=True."
            )
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)), aux

    def _check_gathered(self, entered: PyTree, rows: PyTree) -> None:
        """Raises `TypeError` where the loss function computes with a shard as if it were whole."""
        if not any(map(self._by_layer, self.plan.leaves)):
            return
        jaxpr = jax.make_jaxpr(self._call)(entered, rows).jaxpr
        pairs = zip(self.plan.leaves, self.plan.treedef.flatten_up_to(entered), strict=True)
        arrays = [leaf for leaf, x in pairs for _ in jax.tree.leaves(x)]
        shards = {v: f.name for v, f in zip(jaxpr.invars, arrays, strict=False) if self._by_layer(f)}
        if misuse := flow.first_misuse(jaxpr, shards):
            raise TypeError(
                f"loss_fn uses one device's shard of {misuse[0]!r} in {misuse[1]!r} as if it were whole: layerwise "
                "names that leaf, so gather it first, by zerojax.gather or zerojax.nn.gathered, or leave it out of "
                "layerwise."
            )

    def _sum_values(self, loss: jax.Array, aux: PyTree) -> tuple[jax.Array, PyTree]:
        """The sum or mean over devices of what each summed over its micro-batches."""
        over = lambda x: jax.lax.psum(x / self._parts if self._parts > 1 else x, self.plan.axes)
        return jax.tree.map(over, (loss, aux))

    def _local(self, params: PyTree, rows: PyTree, scale: jax.Array | None, sharded: bool) -> Result:
        """One device's part: its rows in micro-batches, the gradients of its solid leaves reduced over the devices."""
        entered = self.plan.treedef.flatten_up_to(self._enter(params))

        def micro(rows: PyTree) -> tuple[jax.Array, PyTree, list[jax.Array]]:
            def scaled(solid: list[Any]) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
                some = iter(solid)
                leaves = [
                    _sourced(next(some), x) if _solid(leaf) else x
                    for leaf, x in zip(self.plan.leaves, entered, strict=True)
                ]
                loss, aux = self._call(self.plan.treedef.unflatten(leaves), rows)
                # Divided here and not after the sum over devices: it is free, and no float16 sum overflows.
                return loss * ((1 if scale is None else scale) / self._parts), (loss, aux)

            self._check_gathered(self.plan.treedef.unflatten(entered), rows)
            solid = [_sourced(x, None) for leaf, x in zip(self.plan.leaves, entered, strict=True) if _solid(leaf)]
            (_, (loss, aux)), grads = jax.value_and_grad(scaled, has_aux=True)(solid)
            return loss, aux, self._reduce_early(jax.tree.leaves(grads))

        if self.accumulate == 1:
            loss, aux, grads = micro(rows)
        else:
            rows = jax.tree.map(lambda x: x.reshape(self.accumulate, -1, *x.shape[1:]), rows)

            def body(sums: list[jax.Array], rows: PyTree) -> tuple[list[jax.Array], tuple[jax.Array, PyTree]]:
                loss, aux, grads = micro(rows)
                return [s + g for s, g in zip(sums, grads, strict=True)], (loss, aux)

            grads, values = jax.lax.scan(body, list(map(self._zeros, filter(_solid, self.plan.leaves))), rows)
            loss, aux = jax.tree.map(lambda x: x.sum(0), values)
        grads = self._reduce_late(grads, sharded)
        if scale is not None:
            grads = [g.astype(jnp.float32) / scale for g in grads]
        return Result(*self._sum_values(loss, aux), grads, *self._norm(grads, sharded))

    def _zeros(self, leaf: Leaf) -> jax.Array:
        """What a leaf's gradient is summed in over micro-batches, on one device: float32 or wider."""
        cut = leaf.dim if self._cut_early(leaf) else None
        shape = [n // self.plan.num_shards if d == cut else n for d, n in enumerate(leaf.shape)]
        return jnp.zeros(shape, jnp.promote_types(leaf.dtype, jnp.float32))

    def _reduce_early(self, grads: list[jax.Array]) -> list[jax.Array]:
        """After each micro-batch; what the model gathered itself comes reduced already, by the gather's transpose."""
        solid = filter(_solid, self.plan.leaves)
        early = lambda leaf: self._cut_early(leaf) and not self._by_layer(leaf)
        return [self._scatter(leaf, g) if early(leaf) else g for leaf, g in zip(solid, grads, strict=True)]

    def _reduce_late(self, grads: list[jax.Array], sharded: bool) -> list[jax.Array]:
        """Once, after the last micro-batch: what is still a device's own; then each gradient in its dtype."""
        grads, leaves = list(grads), list(filter(_solid, self.plan.leaves))
        left = [i for i, leaf in enumerate(leaves) if not self._cut_early(leaf)]
        scattered = [i for i in left if sharded and leaves[i].dim is not None]
        whole = [i for i in left if i not in scattered]
        for i in scattered:
            grads[i] = self._scatter(leaves[i], grads[i])
        wires = [grads[i].astype(self.grad_dtype or leaves[i].dtype) for i in whole]
        for i, g in zip(whole, jax.lax.psum(wires, self.plan.axes), strict=True):
            grads[i] = g
        return [g.astype(self._dtype(leaf)) for leaf, g in zip(leaves, grads, strict=True)]

    def _scatter(self, leaf: Leaf, g: jax.Array) -> jax.Array:
        wire = g.astype(self.grad_dtype or leaf.dtype)
        total = jax.lax.psum_scatter(wire, self.plan.axes, scatter_dimension=leaf.dim, tiled=True)
        return total.astype(jnp.promote_types(g.dtype, wire.dtype))

    def _norm(self, grads: list[jax.Array], sharded: bool) -> tuple[jax.Array, jax.Array]:
        """Global norm and finiteness of reduced gradients, by one small all-reduce however many leaves there are."""
        whole, shards = jnp.zeros(2), jnp.zeros(2)  # sum of squares, count of what is not finite
        for leaf, g in zip(filter(_solid, self.plan.leaves), grads, strict=True):
            g32 = g.astype(jnp.float32)
            sums = jnp.stack([jnp.sum(g32 * g32), jnp.sum(~jnp.isfinite(g32), dtype=jnp.float32)])
            if sharded and leaf.dim is not None:
                shards += sums
            else:
                whole += sums
        squares, bad = whole + jax.lax.psum(shards, self.plan.axes)
        return jnp.sqrt(squares), bad == 0


def _solid(leaf: Leaf) -> bool:
    """Whether a leaf has elements. An empty gradient computed inside a shard_map crashes jaxlib 0.11 on a CPU."""
    return 0 not in leaf.shape


def _sourced(x: Any, like: Any) -> Any:
    """A shard with the source of another, or without one; anything else as it is."""
    return dataclasses.replace(x, source=getattr(like, "source", None)) if isinstance(x, Shard) else x


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # no dtype at all
        return False
