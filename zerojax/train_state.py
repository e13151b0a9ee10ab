"""The training state, and how it is created where the plan wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from zerojax import host, meshes
from zerojax.plan import Plan
from zerojax.precision import LossScale, LossScaleState
from zerojax.zero import made, zero

PyTree = Any


class TrainState(NamedTuple):
    """All that a training step carries.

    Attributes:
      step: int32, calls of the step so far, skipped ones too.
      params: The params, laid out by `plan.params`.
      opt_state: The optimizer's state, laid out by `plan.opt_state(tx)`.
      loss_scale: State of the loss scale, or None without one.
      skipped: int32, steps that an overflow kept from updating anything, with a loss scale or `skip_nonfinite`.
    """

    step: jax.Array
    params: PyTree
    opt_state: optax.OptState
    loss_scale: LossScaleState | None
    skipped: jax.Array


def check_alive(state: TrainState) -> None:
    """Raises `ValueError` where a state's arrays are no more."""
    if isinstance(state.step, jax.Array) and not isinstance(state.step, jax.core.Tracer) and state.step.is_deleted():
        raise ValueError(
            "this state went into an earlier step, or was offloaded, which took its arrays over; use the one returned."
        )


def create_train_state(
    params_or_init: PyTree | Callable[..., PyTree],
    tx: optax.GradientTransformation,
    plan: Plan,
    *args: Any,
    loss_scale: LossScale | None = None,
) -> TrainState:
    """A `TrainState`, created where the plan wants it.

    Args:
      params_or_init: Arrays, which are copied and never deleted; or `init(*args) -> params`, which runs sharded, so
        that at stage 3 no device ever holds the whole model. It runs once for each gigabyte of a device's params, and
        makes that gigabyte alone, or one leaf that is larger.
      tx: The optimizer, in `zero(...)` or bare.
      plan: From `make_plan`.
      *args: For `init`, a random key for instance.
      loss_scale: What `make_train_step` gets as `loss_scale`.

    Raises:
      ValueError: the params do not match the plan.
      MemoryError: the plan keeps more in host memory than this process has; then nothing was made.

    Example:
      >>> import zerojax
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> init = lambda key: {"w": jax.random.normal(key, (8, 4))}
      >>> plan = zerojax.make_plan(jax.eval_shape(init, jax.random.key(0)), mesh, stage=3)
      >>> state = create_train_state(init, optax.adam(1e-3), plan, jax.random.key(0))
      >>> int(state.step), state.params["w"].shape
      (0, (8, 4))
    """
    tx = zero(tx, plan)
    meshes.check_devices(plan.mesh)
    tx.check_room()
    if callable(params_or_init):
        params = made(lambda *args: _checked(params_or_init(*args), plan), args, plan.param_rests, plan)
    elif args:
        raise TypeError(f"create_train_state got {len(args)} arguments for init, but params_or_init is no function.")
    else:
        plan.check(params_or_init)
        params = jax.tree.map(host.copied, params_or_init, plan.params)
    numbers = lambda: (jnp.int32(0), None if loss_scale is None else loss_scale.init(), jnp.int32(0))
    step, scale, skipped = jax.jit(numbers, out_shardings=NamedSharding(plan.mesh, PartitionSpec()))()
    return TrainState(step, params, tx.init(params), scale, skipped)


def _checked(params: PyTree, plan: Plan) -> PyTree:
    """What an init made, if it is what the plan is of; a Python number in it is weakly typed, which no state may be."""
    plan.check(params)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)


def state_specs(tx: optax.GradientTransformation, plan: Plan, loss_scale: LossScale | None) -> TrainState:
    """How each array of a state lies over the mesh."""
    scalar = PartitionSpec()
    scale = None if loss_scale is None else jax.tree.map(lambda _: scalar, jax.eval_shape(loss_scale.init))
    specs: Any = (scalar, plan.param_specs, plan.opt_state_specs(tx), scale, scalar)
    return TrainState(*specs)
