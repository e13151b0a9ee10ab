"""One step of LAMB on lists of leaves (arXiv:1904.00962): Adam's step, scaled for each leaf by ||param|| / ||step||.

Bytes an element in float32: 28 for the moments and the norms, 16 for the update, which computes the step again from the
new moments rather than store it; the new moments read once more for that are counted: 40 in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, leaves
from pallas_kernels.adam import Scalars, adam_scalars, check, direction, keep, moments, unserved, widen

Config = leaves.Config


class TrustRatio(NamedTuple):
    """Limits of a leaf's trust ratio: None for none."""

    minimum: float | None = None
    maximum: float | None = None


UNLIMITED = TrustRatio()


def lamb_scalars(count: jax.Array, learning_rate: Any, *, variant: str = "optax", **hyperparameters: Any) -> Scalars:
    """`Scalars` of a step.

    Args:
      count: int32 scalar, the number of this step: 1 at the first.
      learning_rate: Float scalar.
      variant: "optax": bias-corrected moments inside the ratio, as in the paper. "deepspeed": raw moments inside, and
        the correction on the learning rate, so that weight decay and the first steps are damped by it.
      **hyperparameters: Those of `adam_scalars`.
    """
    s = adam_scalars(count, learning_rate, **hyperparameters)
    if variant == "optax":
        return s
    correction = s.mu_factor / jnp.sqrt(s.nu_factor)
    one = jnp.float32(1)
    return s._replace(learning_rate=s.learning_rate * correction, mu_factor=one, nu_factor=one)


def lamb(
    params: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    mu: Sequence[jax.Array],
    nu: Sequence[jax.Array],
    scalars: Scalars,
    *,
    trust: TrustRatio = UNLIMITED,
    decay: Sequence[bool] | None = None,
    across: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """One step of LAMB.

    Args:
      params: Leaves of any shape, of a floating dtype; each has a trust ratio of its own.
      grads: Likewise, float32 or 16-bit.
      mu: First moments, of the params' shapes.
      nu: Second moments.
      scalars: From `lamb_scalars`.
      trust: Limits of the ratio, which is 1 where either norm is 0.
      decay: Which leaves decay; all by default.
      across: Sums float32[leaves, 2], squares of a device's shards of params and steps, over the devices that share a
        leaf; for a kernel that runs on shards.
      implementation: None, "mosaic", "xla" or "interpret".
      config: Launch choices; by default those measured best.

    Returns:
      New `(params, mu, nu)`, lists in the dtypes that came.

    Raises:
      ValueError: lists or shapes do not match; the implementation asked for cannot run here.
      TypeError: a leaf of a dtype that is not floating.

    Precision:
      float32 arithmetic and norms, rounded to nearest where stored in 16 bits.

    Example:
      >>> p, g, zero = [jnp.full(4, 2.0)], [jnp.full(4, 0.5)], [jnp.zeros(4)]
      >>> p, mu, nu = lamb(p, g, zero, zero, lamb_scalars(1, 0.1))
      >>> round(float(p[0][0]), 6)
      1.8

    References:
      You et al., arXiv:1904.00962, Algorithm 2.
    """
    decay = [True] * len(params) if decay is None else list(decay)
    check("lamb", params, grads, mu, nu, decay)
    choice = lamb_choice(params, grads, mu, nu, implementation=implementation)
    if choice.implementation == "xla":
        return lamb_reference(params, grads, mu, nu, scalars, trust=trust, decay=decay)
    run = functools.partial(leaves.run, config=config or Config(), implementation=choice.implementation)
    flags = jnp.array(decay, jnp.float32)

    def first(s: list[jax.Array], m: jax.Array, v: jax.Array, p: jax.Array, g: jax.Array, d: jax.Array) -> Any:
        here, wide = Scalars(*s), widen(p)
        g, new_m, new_v = moments(here, wide, widen(g), widen(m), widen(v), d)
        step = direction(here, wide, None, new_m, new_v, d)
        return keep(here, new_m, m), keep(here, new_v, v), wide * wide, step * step

    def second(s: list[jax.Array], p: jax.Array, m: jax.Array, v: jax.Array, rate: jax.Array, d: jax.Array) -> Any:
        here, wide = Scalars(*s), widen(p)
        return (keep(here, wide - rate * direction(here, wide, None, widen(m), widen(v), d), p),)

    s = jnp.stack(scalars)
    (new_mu, new_nu), squares = run("lamb_moments", first, s, [mu, nu], [params, grads], factors=flags[:, None], sums=2)
    squares = squares if across is None else across(squares)
    rates = scalars.learning_rate * trust_ratio(trust, squares[:, 0], squares[:, 1])
    factors = jnp.stack([rates, flags], axis=1)
    (new_params,), _ = run("lamb_params", second, s, [params], [new_mu, new_nu], factors=factors)
    return new_params, new_mu, new_nu


def lamb_reference(
    params: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    mu: Sequence[jax.Array],
    nu: Sequence[jax.Array],
    scalars: Scalars,
    *,
    trust: TrustRatio = UNLIMITED,
    decay: Sequence[bool] | None = None,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """`lamb` in jnp."""
    decay = [True] * len(params) if decay is None else decay
    new = [_step(scalars, trust, *leaf) for leaf in zip(params, grads, mu, nu, decay, strict=True)]
    return [x[0] for x in new], [x[1] for x in new], [x[2] for x in new]


def lamb_choice(
    params: Sequence[Any], grads: Sequence[Any], mu: Sequence[Any], nu: Sequence[Any], *_: Any,
    implementation: str | None = None, **__: Any,
) -> dispatch.Choice:  # fmt: skip
    """Which implementation `lamb` would run."""
    arrays = (params, grads, mu, nu)
    return dispatch.choose("lamb", implementation, arrays, unserved=unserved(arrays))


def trust_ratio(trust: TrustRatio, param_square: jax.Array, step_square: jax.Array) -> jax.Array:
    """||param|| / ||step|| within the limits, of squared norms; 1 where either is 0."""
    defined = (param_square > 0) & (step_square > 0)
    ratio = jnp.sqrt(param_square) / jnp.sqrt(jnp.where(defined, step_square, 1))
    return jnp.where(defined, jnp.clip(ratio, trust.minimum, trust.maximum), 1)


def lamb_delta(
    s: Scalars, trust: TrustRatio, p: jax.Array, g: jax.Array, mu: jax.Array, nu: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one step adds to a leaf, and its new moments; arguments are those of `adam.moments`."""
    g, mu, nu = moments(s, p, g, mu, nu, decay)
    step = direction(s, p, None, mu, nu, decay)
    return -s.learning_rate * trust_ratio(trust, jnp.sum(p * p), jnp.sum(step * step)) * step, mu, nu


def _step(
    s: Scalars, trust: TrustRatio, p: jax.Array, g: jax.Array, mu: jax.Array, nu: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = widen(p)
    delta, new_mu, new_nu = lamb_delta(s, trust, wide, widen(g), widen(mu), widen(nu), decay)
    return keep(s, wide + delta, p), keep(s, new_mu, mu), keep(s, new_nu, nu)
