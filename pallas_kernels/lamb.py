"""One step of LAMB on lists of leaves (arXiv:1904.00962): Adam's step, scaled for each leaf by ||param|| / ||step||.

Bytes an element in float32: 28 for the moments and the norms, 16 for the update, which computes the step again from the
new moments rather than store it; the new moments read once more for that are counted: 40 in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.adam import Scalars, adam_scalars, check, direction, widen


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
    implementation: str | None = None,
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
      implementation: None or "xla".

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
    lamb_choice(params, grads, mu, nu, implementation=implementation)
    return lamb_reference(params, grads, mu, nu, scalars, trust=trust, decay=decay)


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
    return dispatch.choose("lamb", implementation, (params, grads, mu, nu), unserved="LAMB has no kernel yet")


def lamb_delta(
    s: Scalars, trust: TrustRatio, p: jax.Array, g: jax.Array, mu: jax.Array, nu: jax.Array, decay: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one step adds to a leaf, and its new moments; arguments are those of `adam.direction`."""
    step, mu, nu = direction(s, p, g, mu, nu, decay)
    norms = [jnp.sqrt(jnp.sum(x * x)) for x in (p, step)]
    defined = (norms[0] > 0) & (norms[1] > 0)
    ratio = jnp.clip(norms[0] / jnp.where(defined, norms[1], 1), trust.minimum, trust.maximum)
    return -s.learning_rate * jnp.where(defined, ratio, 1) * step, mu, nu


def _step(
    s: Scalars, trust: TrustRatio, p: jax.Array, g: jax.Array, mu: jax.Array, nu: jax.Array, decay: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = widen(p)
    delta, new_mu, new_nu = lamb_delta(s, trust, wide, widen(g), widen(mu), widen(nu), decay)
    keep = lambda new, old: jnp.where(s.apply > 0, new.astype(old.dtype), old)
    return keep(wide + delta, p), keep(new_mu, mu), keep(new_nu, nu)
