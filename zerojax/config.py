"""What a run is configured by: one schema for `ml_collections` flags and DeepSpeed's JSON, and what it stands for.

    c = zerojax.config.default()                      # or from_deepspeed("ds_config.json")
    c.zero.stage = 2
    tx = zerojax.config.make_optimizer(c)             # `zerojax.initialize(c, ...)` does all of this

`schema.KEYS` lists every key with its default and meaning, `recipes` the optimizers and schedules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from zerojax import masters, meshes, recipes, schedules
from zerojax.deepspeed import from_deepspeed as from_deepspeed
from zerojax.fused import chain
from zerojax.host import Offload
from zerojax.precision import LossScale, dynamic_loss_scale, static_loss_scale
from zerojax.schema import KEYS as KEYS
from zerojax.schema import check as check
from zerojax.schema import default as default
from zerojax.schema import nearest

PyTree = Any


def make_mesh(c: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `c.mesh`, over all devices unless told otherwise.

    Example:
      >>> dict(make_mesh(default(), jax.devices()[:1]).shape)
      {'data': 1}
    """
    devices = jax.devices() if devices is None else devices
    axes, shape = tuple(c.mesh.axes), list(c.mesh.shape)
    if len(axes) != len(shape):
        raise ValueError(f"config: mesh.axes={axes} and mesh.shape={tuple(shape)} differ in length.")
    if shape.count(-1) > 1:
        raise ValueError(f"config: mesh.shape={tuple(shape)} has several -1; only one axis can take what is left.")
    if -1 in shape:
        known = -int(_product(shape))
        shape[shape.index(-1)] = len(devices) // known if known else 0
    if _product(shape) != len(devices):
        raise ValueError(
            f"config: mesh.shape={tuple(c.mesh.shape)} asks for {abs(_product(shape))} devices, there are "
            f"{len(devices)}: its product must be the number of devices, -1 takes what the other axes leave."
        )
    return jax.make_mesh(tuple(shape), axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def plan_options(c: ConfigDict) -> dict[str, Any]:
    """What `make_plan` takes beside params and mesh, from `c.zero`."""
    axis = tuple(c.zero.axis)
    options: dict[str, Any] = {
        "stage": c.zero.stage,
        "axis": axis if len(axis) > 1 else axis[0],
        "min_size": c.zero.min_size,
        "strict": c.zero.strict,
    }
    if c.zero.offload.device != "none":
        given = {name: value for name, value in c.zero.offload.items() if name != "device"}
        if given["params"] and c.zero.stage < 3:
            raise ValueError(
                f"config: zero.offload.params is True and zero.stage {c.zero.stage}: it wants stage 3, where each "
                "device has its shards of the params alone."
            )
        try:
            options["offload"] = Offload(**given)
        except ValueError as e:
            e.add_note("config: zero.offload")
            raise
    elif c.zero.offload.params:
        raise ValueError(
            "config: zero.offload.params is True and zero.offload.device 'none': set the device to 'pinned_host', and "
            "zero.offload.fraction to 0 if the optimizer's state shall stay on the device."
        )
    return options


def step_options(c: ConfigDict, devices: int) -> dict[str, Any]:
    """What `make_train_step` takes beside loss, optimizer and plan; `loss_scale` goes to `create_train_state`, too.

    Example:
      >>> c = default()
      >>> c.batch.accumulate = 4
      >>> step_options(c, devices=8)["accumulate"]
      4
    """
    return {
        "accumulate": solve_batch(c, devices).accumulate,
        "reduce": c.batch.reduce,
        "grad_dtype": c.precision.grad_dtype,
        "loss_scale": make_loss_scale(c),
        "layerwise": c.zero.layerwise,
    }


def in_dtype(c: ConfigDict, params_or_init: Any) -> Any:
    """Params, or their init, with floats in the dtype of `c.precision`; float32 leaves them as the model has them.

    Example:
      >>> c = default()
      >>> c.precision.params = "bfloat16"
      >>> in_dtype(c, lambda key: {"w": jax.random.normal(key, (2,))})(jax.random.key(0))["w"].dtype.name
      'bfloat16'
    """
    if c.precision.params == "float32":
        return params_or_init
    if callable(params_or_init):
        return lambda *args: in_dtype(c, params_or_init(*args))
    cast = lambda x: x.astype(c.precision.params) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, params_or_init)


def make_schedule(c: ConfigDict) -> optax.Schedule:
    """The learning rate of `c.schedule` and `c.optimizer`, a function of the number of updates done.

    Raises:
      ValueError: an unknown schedule, a key that it does not take, or one that it lacks.

    Example:
      >>> c = default()
      >>> c.schedule.update({"name": "WarmupLR", "warmup_num_steps": 10, "warmup_type": "linear"})
      >>> round(float(make_schedule(c)(11)), 6)
      0.001
    """
    make, keys = _recipe("schedule.name", c.schedule.name, recipes.SCHEDULES)
    own = (*keys, "cycle_momentum", *recipes.MOMENTUM_KEYS) if make is schedules.one_cycle else keys
    given = _given("schedule", c.schedule, own)
    if "learning_rate" in keys:
        given["learning_rate"] = c.optimizer.learning_rate
    if "warmup_max_lr" in keys:
        given.setdefault("warmup_max_lr", c.optimizer.learning_rate)
    for name in ("total_num_steps", "cycle_min_lr", "cycle_max_lr"):
        if name in keys and name not in given:
            raise ValueError(f"config: {c.schedule.name} needs schedule.{name}, which has no value yet.")
    return make(**{name: value for name, value in given.items() if name in keys})


def make_optimizer(c: ConfigDict, schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
    """The optimizer of `c.optimizer` with what `c.precision` puts around it: clipping inside, master weights outside.

    Args:
      c: From `default`, `from_deepspeed` or `check`.
      schedule: The learning rate; `make_schedule(c)` by default.

    Returns:
      An Optax transformation; wrap it in `zerojax.zero(..., plan)`.

    Raises:
      ValueError: an unknown optimizer, or a key that it does not take.

    Example:
      >>> import zerojax
      >>> c = default()
      >>> c.optimizer.update({"name": "sgd", "learning_rate": 0.5})
      >>> params = {"w": jax.numpy.ones(4)}
      >>> tx = make_optimizer(c)
      >>> params, _ = zerojax.apply(tx, params, tx.init(params), params)  # gradients of norm 2, clipped to 1
      >>> params["w"].tolist()
      [0.75, 0.75, 0.75, 0.75]
    """
    schedule = make_schedule(c) if schedule is None else schedule
    o = c.optimizer
    make, keys = _recipe("optimizer.name", o.name, recipes.OPTIMIZERS)
    given = _given("optimizer", o, (*keys, "name", "learning_rate", "clip_norm"))
    given = {name: value for name, value in given.items() if name in keys}
    if pattern := given.pop("decay_only", None):
        given["mask"] = _matches(pattern)
    if rate := given.get("adam_learning_rate"):
        ratio = rate / o.learning_rate
        given["adam_learning_rate"] = lambda count: ratio * schedule(count)
    given |= _cycled_momentum(c)
    links = make(schedule, **given)
    if o.clip_norm < 0:
        raise ValueError(f"config: optimizer.clip_norm must not be negative, got {o.clip_norm}; 0 is no clipping.")
    if o.clip_norm:
        links = [optax.clip_by_global_norm(o.clip_norm), *links]
    tx: optax.GradientTransformation = chain(*links) if len(links) > 1 else links[0]
    if kind := master_kind(c):
        tx = masters.master_weights(tx, kind=kind)
    return masters.skip_nonfinite(tx) if c.precision.skip_nonfinite else tx


def make_loss_scale(c: ConfigDict) -> LossScale | None:
    """The loss scale of `c.loss_scale`, or None.

    Example:
      >>> make_loss_scale(default()) is None
      True
    """
    s = c.loss_scale
    if s.kind == "none":
        return None
    if s.kind == "static":
        return static_loss_scale(s.initial)
    return dynamic_loss_scale(
        initial=s.initial,
        window=s.window,
        hysteresis=s.hysteresis,
        consecutive_hysteresis=s.consecutive_hysteresis,
        minimum=s.minimum,
    )


def master_kind(c: ConfigDict) -> str | None:
    """What `master_weights` takes as `kind`, or None for no master weights."""
    p = c.precision
    if p.params == "float32" or p.master == "none":
        return None
    if p.master == "auto":
        return "split" if p.params == "bfloat16" else "float32"
    return p.master


class Batch(NamedTuple):
    """Rows of a step, of a micro-batch on one device, and micro-batches; `rows` and `micro_rows` may be open (None)."""

    rows: int | None
    micro_rows: int | None
    accumulate: int


def solve_batch(c: ConfigDict, devices: int) -> Batch:
    """The numbers of `c.batch` that were left out, as DeepSpeed finds them: rows = micro_rows x accumulate x devices.

    Raises:
      ValueError: they do not fit together, with all of them and which were inferred.

    Example:
      >>> c = default()
      >>> c.batch.rows, c.batch.micro_rows = 64, 4
      >>> solve_batch(c, devices=8)
      Batch(rows=64, micro_rows=4, accumulate=2)
    """
    rows, micro_rows, accumulate = (c.batch[name] for name in Batch._fields)
    given = {name: c.batch[name] for name in Batch._fields if c.batch[name] is not None}
    if any(value < 1 for value in given.values()):
        raise ValueError(f"config: batch sizes must be at least 1, got {_listed(given)}.")
    if rows is None and micro_rows is None:
        return Batch(None, None, accumulate or 1)
    if rows is None:
        accumulate = accumulate or 1
        rows = micro_rows * accumulate * devices
    elif micro_rows is None:
        accumulate = accumulate or 1
        micro_rows = rows // devices // accumulate
    elif accumulate is None:
        accumulate = rows // micro_rows // devices
    solved = Batch(rows, micro_rows, accumulate)
    if rows != micro_rows * accumulate * devices or not rows:
        inferred = {name: value for name, value in solved._asdict().items() if name not in given}
        found = f"; so {_listed(inferred)}" if inferred else ""
        raise ValueError(
            f"config: batch.rows must be batch.micro_rows x batch.accumulate x devices, got {_listed(given)} on "
            f"{devices} devices{found}: {rows} is not {micro_rows} x {accumulate} x {devices}. Leave one out, or "
            "change one. (DeepSpeed's train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps.)"
        )
    return solved


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for n in numbers:
        product *= n
    return product


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in numbers.items())


def _recipe(key: str, name: str, table: dict[str, Any]) -> Any:
    known = {known.lower(): recipe for known, recipe in table.items()}
    if name.lower() in known:
        return known[name.lower()]
    close = nearest(name.lower(), known)
    hint = f"; the nearest is {close!r}" if close else ""
    raise ValueError(f"config: {key} must be one of {', '.join(table)}, got {name!r}{hint}.")


def _given(section: str, node: ConfigDict, allowed: Sequence[str]) -> dict[str, Any]:
    """The keys of a section that have a value which is not the default; raises where one has no effect."""
    given = {}
    for name, value in node.items():
        known = KEYS[f"{section}.{name}"].default
        unset = value is None or (not isinstance(known, type) and value == known)
        if name in allowed and value is not None:
            given[name] = value
        elif not unset and name != "name":
            raise ValueError(
                f"config: {section}.{name}={value!r} has no meaning for {section}.name={node.name!r}, which takes "
                f"{', '.join(k for k in allowed if k != 'name') or 'no further keys'}."
            )
    return given


def _cycled_momentum(c: ConfigDict) -> dict[str, Any]:
    """b1 and b2 as OneCycle sets them, for optimizers that have them."""
    name = c.optimizer.name.lower()
    if c.schedule.name.lower() != "onecycle" or c.schedule.cycle_momentum is False or name not in recipes.BETAS:
        return {}
    if name == "lion":
        raise ValueError(f"config: {name} takes no schedule for b1: set schedule.cycle_momentum=False with OneCycle.")
    given = {key: c.schedule[key] for key in recipes.CYCLE_KEYS if c.schedule[key] is not None}
    return {"b1": schedules.one_cycle_momentum(**given), "b2": 0.99}


def _matches(pattern: str) -> Callable[[PyTree], PyTree]:
    """A mask of the leaves whose path has `pattern`."""
    found = re.compile(pattern).search
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: found(meshes.path_name(path)) is not None, params
    )
