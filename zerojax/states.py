"""A training state that leaves the device between phases of training, and comes back."""

from __future__ import annotations

import math
from typing import Any

import jax

from zerojax import host, meshes
from zerojax.plan import Plan
from zerojax.train_state import TrainState, check_alive

PyTree = Any


def offload_states(state: TrainState, plan: Plan) -> TrainState:
    """A `TrainState` with all its arrays in host memory, so that the device is free between phases of training.

    The arrays that came are freed. `reload_states` brings them back bit for bit; a step does not take what is away.

    Args:
      state: A `TrainState`.
      plan: The plan that it was made with.

    Raises:
      TypeError: `state` is no `TrainState`, its params alone for instance.
      ValueError: `state` went into a step, or is of another plan.
      MemoryError: this process has less host memory than the state takes; then nothing has moved.

    Example:
      >>> import jax.numpy as jnp, optax, zerojax
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> plan = zerojax.make_plan({"w": jnp.ones(4)}, mesh, stage=1)
      >>> state = zerojax.create_train_state({"w": jnp.ones(4)}, optax.sgd(0.1), plan)
      >>> away = offload_states(state, plan)
      >>> away.params["w"].sharding.memory_kind
      'pinned_host'
      >>> reload_states(away, plan).params["w"].sharding.memory_kind
      'device'
    """
    _check(state, plan, "offload_states")
    held = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)]
    host.check_room(sum(held), plan.mesh, "the state has")
    return _moved(state, [host.HOST] * len(held))


def reload_states(state: TrainState, plan: Plan) -> TrainState:
    """A `TrainState` back from `offload_states`: on the device but for what `plan` keeps in host memory.

    Args and errors are those of `offload_states`.
    """
    _check(state, plan, "reload_states")
    leaves: list[Any] = jax.tree.leaves(state.opt_state, is_leaf=host.is_pieces)
    treedef: Any = jax.tree.structure(state.opt_state, is_leaf=host.is_pieces)
    shapes = [jax.ShapeDtypeStruct(host.whole_shape(x), jax.tree.leaves(x)[0].dtype) for x in leaves]
    rests = jax.tree.leaves(plan.rests_of(treedef.unflatten(shapes), None))
    kind = lambda rest: host.HOST if rest.on_host else host.DEVICE
    kinds = [jax.tree.map(lambda _, rest=rest: kind(rest), x) for x, rest in zip(leaves, rests, strict=True)]
    on_device = jax.tree.map(lambda _: host.DEVICE, state._replace(params=None, opt_state=None))
    params = [host.HOST if leaf.on_host else host.DEVICE for leaf in plan.leaves]
    return _moved(state, jax.tree.leaves(on_device._replace(params=params, opt_state=kinds)))


def _check(state: Any, plan: Plan, name: str) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(f"{name} wants the TrainState of create_train_state, got {type(state).__name__}.")
    check_alive(state)
    plan.check(state.params)
    if meshes.tracing(state):
        raise ValueError(f"{name} frees the arrays that it is given, which a jit cannot: call it outside.")


def _moved(state: TrainState, kinds: list[str]) -> TrainState:
    """A state, each array in the memory of its kind; those of which the memory is another are freed."""
    arrays: list[Any] = jax.tree.leaves(state)
    treedef: Any = jax.tree.structure(state)
    leaving = {id(x): (x, kind) for x, kind in zip(arrays, kinds, strict=True) if x.sharding.memory_kind != kind}
    olds = [x for x, _ in leaving.values()]
    news = jax.block_until_ready(jax.device_put(olds, [x.sharding.with_memory_kind(k) for x, k in leaving.values()]))
    moved = dict(zip(leaving, news, strict=True))
    new = treedef.unflatten(moved.get(id(x), x) for x in arrays)
    for x in olds:
        x.delete()
    return new
