"""Transformations that update and apply in one pass, alone and in a chain.

A transformation's `update` returns what is to be added; `optax.apply_updates` adds it. Between the two stands a tree
of the params' size, which XLA fuses away where it can see both, and no kernel can. So a fused transformation has a
third function, `prepare(grads, state, params) -> Work`: what is left to do leaf by leaf, as data. It is done at once,
by `apply_link`, or bucket by bucket where the state is in host memory (offload.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels import formats
from zerojax import meshes, shards
from zerojax.host import Absent
from zerojax.plan import Plan
from zerojax.scaling import update_as_scale
from zerojax.shards import Rule
from zerojax.zero import ZeroTransformation

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a fused transformation has left to do, leaf by leaf.

    Attributes:
      rule: What is done with a leaf; None where nothing is left.
      params, grads, mu, nu: Leaves, or what stands for them.
      scalars: Of the rule.
      decay: Which leaves decay.
      implementation: Of the rule's op.
      rest: Arrays that `finish` needs.
      finish: `finish(rest, new) -> (params, state)`, of new params, mu and nu; it computes nothing.
    """

    rule: Rule | None
    params: Sequence[Any] = ()
    grads: Sequence[Any] = ()
    mu: Sequence[Any] = ()
    nu: Sequence[Any] = ()
    scalars: Any = None
    decay: Sequence[bool] = ()
    implementation: str | None = None
    rest: Any
    finish: Callable[[Any, Sequence[Sequence[Any]]], tuple[PyTree, PyTree]]

    def then(self, rest: Any, finish: Callable[[Any, PyTree, PyTree], tuple[PyTree, PyTree]]) -> Work:
        """With a wrapper's last word, `finish(rest, params, state) -> (params, state)`."""
        inner = self.finish
        outer = lambda both, new: finish(both[0], *inner(both[1], new))
        return dataclasses.replace(self, rest=(rest, self.rest), finish=outer)

    def done(self, plan: Plan | None) -> tuple[PyTree, PyTree]:
        """New params and state, all leaves at once."""
        new: Sequence[Sequence[Any]] = ()
        if self.rule is not None:
            lists = [list(x) for x in (self.params, self.grads, self.mu, self.nu)]
            # What XLA makes of a multiplication and an addition, one rounding or two, depends on what it fuses them
            # with: so that a step is the same bit for bit whether its state is streamed or not.
            lists[1], scalars = jax.lax.optimization_barrier((lists[1], self.scalars))
            new = shards.run(self.rule, plan, lists, scalars, list(self.decay), implementation=self.implementation)
        return self.finish(self.rest, new)


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that can also update and apply in one pass.

    Attributes:
      prepare: `prepare(grads, state, params, *, plan=None, finite=None, scale=None, **extra_args) -> Work`.
        Leaves of `params` may be `formats.Split` or `formats.Copied`; what the work is done on may be anything that
        stands for an array. `plan` says how global arrays are cut; `finite`, a bool scalar, leaves everything as it is
        where it is False; `scale` multiplies the gradients.
      skips: Whether gradients that are not finite leave everything as it is.
      unit: What the rule has to see at once: an "element", a "leaf", or, None, all leaves.
    """

    prepare: Callable[..., Work]
    skips: bool
    unit: str | None

    def __new__(
        cls, init: Any, update: Any, prepare: Callable[..., Work], *, unit: str | None, skips: bool = False
    ) -> FusedTransformation:
        self = super().__new__(cls, init, update)
        self.prepare, self.unit, self.skips = prepare, unit, skips
        return self


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, which keeps a fused last link visible to `apply`.

    Example:
      >>> import zerojax
      >>> tx = chain(optax.clip_by_global_norm(1.0), zerojax.fused_adamw(3e-4))
      >>> isinstance(tx, FusedTransformation)
      True
    """
    if not transforms:
        raise ValueError("chain wants at least one transformation, got none; optax.identity() does nothing.")
    chained = optax.chain(*transforms)
    *links, last = transforms
    if not isinstance(last, FusedTransformation):
        return chained
    if not links:
        return FusedTransformation(chained.init, chained.update, _alone(last), unit=last.unit, skips=last.skips)
    before = optax.chain(*links)

    def prepare(
        grads: PyTree, state: PyTree, params: PyTree, *, finite: Any = None, scale: Any = None, **options: Any
    ) -> Work:
        extra = {k: v for k, v in options.items() if k != "plan"}
        if last.skips and finite is None:  # the links' state is to stay as it is, too
            finite = all_finite(grads)
        if scale is not None:  # what the links do to gradients need not be linear
            grads, scale = jax.tree.map(lambda g: formats.widen(g) * scale, grads), None
        # All links at once: behind one that scales, the next wants the scaled gradients. In float32, where a norm of
        # 16-bit gradients would be none.
        wide = jax.tree.map(formats.widen, grads)
        sums = shards.squares_of(grads, options.get("plan"))
        linked, factor, new = update_as_scale(before, wide, state[:-1], whole(params), squares=sums, **extra)
        grads, factor = (linked, scale) if factor is None else (grads, factor)
        work = last.prepare(grads, state[-1], params, finite=finite, scale=factor, **options)
        return work.then(keep(finite, new, state[:-1]), lambda new, params, state: (params, (*new, state)))

    return FusedTransformation(chained.init, chained.update, prepare, unit=last.unit, skips=last.skips)


def _alone(link: FusedTransformation) -> Callable[..., Work]:
    """`prepare` of a chain of one."""

    def prepare(grads: PyTree, state: PyTree, params: PyTree, **options: Any) -> Work:
        work = link.prepare(grads, state[0], params, **options)
        return work.then(None, lambda _, params, state: (params, (state,)))

    return prepare


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
    What comes in host memory is returned whole and on the device.
    """
    plan = tx.plan
    if plan.offload is not None:
        # Not before there are gradients: activations have the room until then.
        grads, state, params = jax.lax.optimization_barrier((grads, state, params))
        state, params = tx.in_use(state), plan.on_device(params)
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
    **options: Any,
) -> tuple[PyTree, PyTree]:
    """One step of a transformation that may be fused; options as of `FusedTransformation.prepare`."""
    return prepare_link(tx, grads, state, params, plan=plan, **options).done(plan)


def prepare_link(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    plan: Plan | None = None,
    finite: jax.Array | None = None,
    scale: jax.Array | None = None,
    **extra_args: Any,
) -> Work:
    """As `FusedTransformation.prepare`, of any transformation: one that is not fused is done at once."""
    if isinstance(tx, FusedTransformation):
        return tx.prepare(grads, state, params, plan=plan, finite=finite, scale=scale, **extra_args)
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
    result = keep(finite, (new, new_state), (params, state))
    return Work(rule=None, rest=result, finish=lambda result, _: result)


def keep(finite: jax.Array | None, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the gradients were finite, else `old`."""
    return new if finite is None else formats.keep(finite, new, old)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no number of a tree is infinite or NaN."""
    return jnp.all(jnp.array([True, *(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))]))


def whole(params: PyTree) -> PyTree:
    """Params with each leaf one array, of float32 where it is stored as a format is; None where some are elsewhere."""
    if any(isinstance(x, Absent) for x in jax.tree.leaves(params)):
        return None
    plain = lambda x: formats.decode(x) if formats.is_stored(x) else x
    return jax.tree.map(plain, params, is_leaf=formats.is_stored)
