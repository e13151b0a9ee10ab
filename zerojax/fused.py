"""Transformations that update and apply in one pass, alone and in a chain; `apply`, which does so for any.

A transformation's `update` returns what is to be added; `optax.apply_updates` adds it. Between the two stands a tree
of the params' size, which XLA fuses away where it can see both, and no kernel can. So a fused transformation has a
third function, `apply(grads, state, params) -> (params, state)`, which `zerojax.apply` and the train step look for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels import formats
from zerojax import meshes, shards
from zerojax.plan import Plan
from zerojax.scaling import update_as_scale
from zerojax.zero import ZeroTransformation

PyTree = Any


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that can also update and apply in one pass.

    Attributes:
      apply: `apply(grads, state, params, *, plan=None, finite=None, scale=None, **extra_args) -> (params, state)`.
        Leaves of `params` may be `formats.Split` or `formats.Copied`. `plan` says how global arrays are cut;
        `finite`, a bool scalar, leaves everything as it is where it is False; `scale` multiplies the gradients.
      skips: Whether gradients that are not finite leave everything as it is.
    """

    apply: Callable[..., tuple[PyTree, PyTree]]
    skips: bool

    def __new__(
        cls, init: Any, update: Any, apply: Callable[..., tuple[PyTree, PyTree]], *, skips: bool = False
    ) -> FusedTransformation:
        self = super().__new__(cls, init, update)
        self.apply, self.skips = apply, skips
        return self


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, which keeps a fused last link visible to `apply`.

    Example:
      >>> import zerojax
      >>> tx = chain(optax.clip_by_global_norm(1.0), zerojax.fused_adamw(3e-4))
      >>> isinstance(tx, FusedTransformation)
      True
    """
    chained = optax.chain(*transforms)
    if not transforms or not isinstance(transforms[-1], FusedTransformation):
        return chained
    *links, last = transforms
    before = optax.chain(*links)

    def apply(
        grads: PyTree, state: PyTree, params: PyTree, *, finite: Any = None, scale: Any = None, **options: Any
    ) -> tuple[PyTree, PyTree]:
        extra = {k: v for k, v in options.items() if k != "plan"}
        if last.skips and finite is None:  # the links' state is to stay as it is, too
            finite = all_finite(grads)
        if links and scale is not None:  # what the links do to gradients need not be linear
            grads, scale = jax.tree.map(lambda g: formats.widen(g) * scale, grads), None
        # All links at once: behind one that scales, the next wants the scaled gradients. In float32, where a norm of
        # 16-bit gradients would be none.
        wide = jax.tree.map(formats.widen, grads)
        sums = shards.squares_of(grads, options.get("plan")) if links else None
        linked, factor, new = update_as_scale(before, wide, state[:-1], whole(params), squares=sums, **extra)
        grads, factor = (linked, scale) if factor is None else (grads, factor)
        params, last_state = last.apply(grads, state[-1], params, finite=finite, scale=factor, **options)
        return params, (*keep(finite, new, state[:-1]), last_state)

    return FusedTransformation(chained.init, chained.update, apply, skips=last.skips)


def apply(
    tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree, **extra_args: Any
) -> tuple[PyTree, PyTree]:
    """One optimizer step: `tx.update` and `optax.apply_updates`, in one pass where `tx` allows.

    A fused optimizer is seen through `chain` and `zero`; any other transformation takes the two passes.

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
      >>> params = {"w": jnp.ones(2)}
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

    def on_shards(grads: PyTree, state: PyTree, params: PyTree, extra_args: dict[str, Any]) -> tuple[PyTree, PyTree]:
        return apply_sharded(tx, grads, state, params, **extra_args, **functions)

    run = meshes.on_mesh(plan.mesh, on_shards, (plan.param_specs, plan.opt_state_specs(tx.inner)))
    return (run if meshes.tracing((grads, state, params)) else jax.jit(run))(grads, state, params, extra_args)


def apply_sharded(
    tx: ZeroTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    finite: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """One optimizer step, inside `meshes.on_mesh`: devices update their shards of the params, then gather them.

    Cheaper than `tx.update` and `optax.apply_updates`: what travels is the params in their own dtype, and the addition
    too is done once for each element and not on every device. Where `finite` is False everything stays as it is.
    """
    plan = tx.plan
    grads, shards = (meshes.constrain(tree, plan.update_specs) for tree in (grads, params))
    shards, new_state = apply_link(tx.inner, grads, state, shards, plan=plan, finite=finite, **extra_args)
    # Gradients may be wider than the params that Optax took its state's dtypes from; what is stored keeps its dtype.
    new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
    return meshes.constrain(meshes.constrain(shards, plan.update_specs), plan.param_specs), new_state


def apply_link(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    plan: Plan | None = None,
    finite: jax.Array | None = None,
    scale: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """One step of a transformation that may be fused, as `FusedTransformation.apply`."""
    if isinstance(tx, FusedTransformation):
        return tx.apply(grads, state, params, plan=plan, finite=finite, scale=scale, **extra_args)
    exact = any(map(formats.is_stored, jax.tree.leaves(params, is_leaf=formats.is_stored)))

    def scaled(g: jax.Array) -> jax.Array:
        wide = formats.widen(g) if scale is None else formats.widen(g) * scale
        return wide if exact else wide.astype(g.dtype)

    full = whole(params)
    updates, new_state = optax.with_extra_args_support(tx).update(
        jax.tree.map(scaled, grads), state, full, **extra_args
    )
    new = jax.tree.map(
        lambda like, x: formats.encode(x, like) if formats.is_stored(like) else x,
        params,
        optax.apply_updates(full, updates),
        is_leaf=formats.is_stored,
    )
    return keep(finite, (new, new_state), (params, state))


def keep(finite: jax.Array | None, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the gradients were finite, else `old`."""
    return new if finite is None else formats.keep(finite, new, old)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no number of a tree is infinite or NaN."""
    return jnp.all(jnp.array([True, *(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))]))


def whole(params: PyTree) -> PyTree:
    """Params with each leaf one array, of float32 where it is stored as a format is."""
    plain = lambda x: formats.decode(x) if formats.is_stored(x) else x
    return jax.tree.map(plain, params, is_leaf=formats.is_stored)
