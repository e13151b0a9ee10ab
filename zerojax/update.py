"""One optimizer step, in one pass where the transformation allows, streamed where its state is in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from zerojax import meshes
from zerojax.fused import apply_link, apply_sharded
from zerojax.offload import streamed
from zerojax.zero import ZeroTransformation, once

PyTree = Any


def apply(
    tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree, **extra_args: Any
) -> tuple[PyTree, PyTree]:
    """One optimizer step: `tx.update` and `optax.apply_updates`, in one pass where `tx` allows.

    A fused optimizer is seen through `chain` and `zero`; any other transformation takes the two passes. State that the
    plan keeps in host memory is streamed through the device, unless the call is inside a jit, or one of `extra_args` is
    a function: then it is moved as a whole, which is slower and needs room for all of it.

    Args:
      tx: Any Optax transformation.
      grads: Gradients.
      state: Of `tx.init(params)`.
      params: Params. Donate them and the state to the jit around this call, and the update is in place; in the order in
        which they are returned, `jax.jit(lambda params, state, grads: ..., donate_argnums=(0, 1))`, since JAX pairs
        donated buffers with results of their shape by position and copies what it cannot pair.
      **extra_args: What transformations ask for by name, `value` for instance.

    Returns:
      New `(params, state)`.

    Example:
      >>> params = {"w": jax.numpy.ones(2)}
      >>> tx = optax.sgd(0.5)
      >>> apply(tx, params, tx.init(params), params)[0]["w"].tolist()
      [0.5, 0.5]
    """
    if reserved := {"plan", "finite", "scale"} & set(extra_args):
        raise TypeError(
            f"apply has a meaning of its own for {', '.join(sorted(reserved))}; no transformation gets them."
        )
    if not isinstance(tx, ZeroTransformation):
        return apply_link(tx, grads, state, params, **extra_args)
    plan = tx.plan
    plan.check(grads, "grads")
    plan.check(params)
    functions = {k: extra_args.pop(k) for k in list(extra_args) if callable(extra_args[k])}  # no arguments of a jit
    if functions:
        return jax.jit(functools.partial(_at_once, tx, functions))(grads, state, params, extra_args)
    if not meshes.tracing((grads, state, params, extra_args)) and (stream := streamed(tx)):
        walk = stream.walk(state, params, consume=False)
        return walk.finish(_begin(tx)(grads, stream.small(state), extra_args))
    return _jitted(tx)(grads, state, params, extra_args)


def _at_once(
    tx: ZeroTransformation,
    functions: dict[str, Any],
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    def on_shards(grads: PyTree, state: PyTree, params: PyTree, extra_args: dict[str, Any]) -> tuple[PyTree, PyTree]:
        return apply_sharded(tx, grads, state, params, **extra_args, **functions)

    run = meshes.on_mesh(tx.plan.mesh, on_shards, (tx.plan.param_specs, tx.plan.opt_state_specs(tx.inner)))
    params, state = run(grads, state, params, extra_args)
    return tx.plan.at_rest(params), tx.at_rest(state)


@once
def _jitted(tx: ZeroTransformation) -> Callable[..., Any]:
    """All of the step as one program; inside a transformation, too, where `on_mesh` wants to be in a jit."""
    return jax.jit(functools.partial(_at_once, tx, {}))


@once
def _begin(tx: ZeroTransformation) -> Callable[..., Any]:
    """The program before the first bucket."""
    stream = streamed(tx)
    assert stream is not None
    begin = lambda grads, small, extra_args: stream.begin(grads, small, **extra_args)
    return jax.jit(meshes.on_mesh(tx.plan.mesh, begin, stream.specs))
