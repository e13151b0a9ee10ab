"""Does it fit? Bytes on each device for every stage, with and without offload and small moments. From shapes alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from zerojax import config as configs
from zerojax import host, layout, report
from zerojax.offload import streamed
from zerojax.plan import Plan, make_plan
from zerojax.sizes import LAYERWISE, Sizes
from zerojax.step import make_train_step
from zerojax.train_state import TrainState
from zerojax.zero import zero

PyTree = Any
RESERVED = 0.06  # of a device's memory, for the runtime and what the allocator cannot join


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train, and what it takes on each device, in bytes.

    Attributes:
      name: As the table has it.
      keys: The config's keys that say it.
      params: At rest.
      opt_state: At rest; with offload what is on the device to be updated, too: four buckets, or, of an optimizer that
        is not streamed, all.
      grads: While a step runs: whole gradients below stage 3, since a scan over layers stacks them before they are
        scattered; at stage 3 shards, and the largest gathered layer with its gradient; and the sums of micro-batches.
      host: At rest, in each device's share of host memory.
      row: Activations of one row: an estimate.
    """

    name: str
    keys: dict[str, Any]
    params: int
    opt_state: int
    grads: int
    host: int
    row: int

    @property
    def at_rest(self) -> int:
        """Bytes between steps."""
        return self.params + self.opt_state

    def rows(self, device_memory: float) -> int:
        """How many rows a micro-batch on each device may have; below 1 it does not fit."""
        return int((device_memory * (1 - RESERVED) - self.at_rest - self.grads) // self.row)


def settings(c: ConfigDict, sizes: Sizes, devices: int, *, dtype: str, remat: bool) -> list[Setting]:
    """Every setting that is planned, what asks least of the run first.

    Args:
      c: The config; its stage, moments and offload are what varies.
      sizes: Of the model.
      devices: That ZeRO shards over.
      dtype: Of activations.
      remat: Whether layers are computed again in the backward pass.
    """
    return [_setting(name, keys, c, sizes, devices, dtype, remat) for name, keys in _variants(c)]


def plan_of(c: ConfigDict, sizes: Sizes, devices: int) -> Plan:
    """The plan of a config for a model's sizes, on devices that need not be there."""
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return make_plan(sizes.shapes(c.precision.params), mesh, **configs.plan_options(c) | {"axis": "data"})


def optimizer_of(c: ConfigDict) -> optax.GradientTransformation:
    """The config's optimizer, whose state does not depend on how long its schedule is."""
    return configs.make_optimizer(c, optax.constant_schedule(c.optimizer.learning_rate))


def table(found: list[Setting], device_memory: float) -> str:
    """The settings beside one another, and the first that fits."""
    rows = []
    for s in found:
        sizes = [s.params, s.opt_state, s.at_rest, s.grads, s.host]
        most = s.rows(device_memory)
        rows.append([s.name, *map(report.format_bytes, sizes), most if most > 0 else "does not fit"])
    header = ["", "params", "optimizer", "at rest", "gradients", "host", "rows a device"]
    fits = next((s for s in found if s.rows(device_memory) > 0), None)
    end = "No setting fits: take more devices, or a smaller model."
    if fits is not None:
        flags = " ".join(f"--config.{key}={value}" for key, value in fits.keys.items())
        end = f"The first that fits is {fits.name}" + (f": {flags}" if flags else ".")
    note = (
        "gradients: while a step runs. A scan over layers stacks them before they are scattered, so below stage 3 they "
        "are whole;\nmodels without a scan hold less."
    )
    return f"{report.text_table(header, rows)}\n{note}\n\n{end}"


def compiled_bytes(c: ConfigDict, sizes: Sizes, mesh: Any, rows: int, *, dtype: str, remat: bool) -> dict[str, int]:
    """What XLA says that a step takes on each device of a real mesh: compiled, not run.

    Returns:
      Bytes by name: `arguments` (state and batch), `temporaries`, and their `peak`, donated results counted once.
    """
    options = configs.plan_options(c) | {"axis": mesh.axis_names[0]}
    plan = make_plan(sizes.shapes(c.precision.params), mesh, **options)
    tx, scale = optimizer_of(c), configs.make_loss_scale(c)
    accumulate = c.batch.accumulate or 1
    loss = lambda params, tokens: sizes.loss(params, tokens, dtype=dtype, remat=remat)
    layerwise = LAYERWISE if plan.stage == 3 else None
    step = make_train_step(loss, tx, plan, accumulate=accumulate, loss_scale=scale, layerwise=layerwise)
    shaped = lambda tree, shardings: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    tx = zero(tx, plan)
    opt_state = shaped(jax.eval_shape(tx.init, plan.shapes), plan.opt_state(tx))
    loss_scale = None if scale is None else jax.eval_shape(scale.init)
    state = TrainState(number, shaped(plan.shapes, plan.params), opt_state, loss_scale, number)
    tokens = jax.ShapeDtypeStruct((rows * accumulate * plan.num_shards, sizes.context + 1), jnp.int32)
    memory: Any = step.lower(state, tokens).compile().memory_analysis()
    found = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return found | {"peak": sum(found.values()) + max(fresh, 0)}


def _variants(c: ConfigDict) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "as configured", {}
    away = c.zero.offload.device != "none"
    home: dict[str, Any] = {"zero.offload.device": "none", "zero.offload.params": False} if away else {}
    for stage in range(4):
        yield f"stage {stage}", {"zero.stage": stage} | home
    small = c.optimizer.name.lower() in ("adam", "adamw", "lamb")
    for dtype in ("bfloat16", "int8") if small else ():
        for stage in (2, 3):
            keys = {"zero.stage": stage, "optimizer.mu_dtype": dtype, "optimizer.nu_dtype": dtype}
            yield f"stage {stage}, {dtype} moments", keys | home
    for stage in (1, 2, 3):
        keys = {"zero.stage": stage, "zero.offload.device": "pinned_host"}
        yield f"stage {stage}, offload", keys if stage == 3 else keys | {"zero.offload.params": False}


def _setting(
    name: str, keys: dict[str, Any], c: ConfigDict, sizes: Sizes, devices: int, dtype: str, remat: bool
) -> Setting:
    c = copy.deepcopy(c)
    c.update_from_flattened_dict(keys)
    plan = plan_of(c, sizes, devices)
    tx = optimizer_of(c)
    memory = plan.memory(tx)
    grads = layout.total_bytes(plan.mesh, plan.shapes, plan.specs(sharded=plan.stage == 3))
    if (c.batch.accumulate or 1) > 1:
        grads += plan.memory(tx, grad_dtype="float32").grads
    if plan.stage == 3:
        grads += _largest_layer(plan, sizes, dtype)
    return Setting(
        name=name,
        keys=keys,
        params=memory.params,
        opt_state=memory.opt_state + _in_flight(plan, tx, c.zero.offload.bucket_bytes),
        grads=grads,
        host=memory.host,
        row=sizes.row_bytes(dtype, remat=remat),
    )


def _in_flight(plan: Plan, tx: optax.GradientTransformation, bucket_bytes: int) -> int:
    """Bytes from host memory that are on a device while an update runs, at most."""
    total = plan.memory(tx).host
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a step does, which none is yet
        stream = streamed(zero(tx, plan))
    # A leaf that cannot be cut is a bucket, whatever its size.
    return total if stream is None else min(total, host.LIVE * max(bucket_bytes, stream.largest_piece))


def _largest_layer(plan: Plan, sizes: Sizes, dtype: str) -> int:
    """Bytes of what stage 3 gathers at once, in `dtype`, and of its gradient in the params'."""
    stacked = [leaf for leaf in plan.leaves if leaf.name.startswith("blocks/")]
    layer = sum(math.prod(leaf.shape) for leaf in stacked) // sizes.layers
    single = max(math.prod(leaf.shape) for leaf in plan.leaves if leaf not in stacked)
    return max(layer, single) * (jnp.dtype(dtype).itemsize + plan.leaves[0].dtype.itemsize)
