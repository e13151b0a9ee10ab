"""One step of LAMB on lists of leaves (arXiv:1904.00962): Adam's step, scaled for each leaf by ||param|| / ||step||.

Bytes an element in float32: 28 for the moments and the norms, 16 for the update, which computes the step again from the
new moments rather than store it; the new moments read once more for that are counted: 40 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, formats, leaves, stored
from pallas_kernels.adam import (
    Scalars,
    adam_scalars,
    by_leaf,
    check,
    direction,
    floats,
    moments,
    stored_moments,
    unserved,
)
from pallas_kernels.formats import Place, Tools, widen

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
    params: Sequence[Any],
    grads: Sequence[jax.Array],
    mu: Sequence[Any],
    nu: Sequence[Any],
    scalars: Scalars,
    *,
    trust: TrustRatio = UNLIMITED,
    decay: Sequence[bool] | None = None,
    places: Sequence[Place] | None = None,
    across: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """One step of LAMB.

    Args:
      params: Leaves of any shape, of a floating dtype or a format of `formats`; each has a trust ratio of its own.
      grads: Likewise, float32 or 16-bit.
      mu: First moments, of the params' shapes; or `formats.Blocks`.
      nu: Second moments, likewise.
      scalars: From `lamb_scalars`.
      trust: Limits of the ratio, which is 1 where either norm is 0.
      decay: Which leaves decay; all by default.
      places: Where leaves that are shards lie in whole ones, as in `adam`.
      across: Sums float32[leaves, 2], squares of a device's shards of params and steps, over the devices that share a
        leaf; for a kernel that runs on shards.
      implementation: None, "mosaic", "xla" or "interpret".
      config: Launch choices; by default those measured best.

    Returns:
      New `(params, mu, nu)`, lists in the formats that came.

    Raises:
      ValueError: lists or shapes do not match; the implementation asked for cannot run here.
      TypeError: a leaf of a dtype that is not floating.

    Precision:
      float32 arithmetic and norms; stored as by `adam`. A step is that of the moments as stored, the norm in its trust
      ratio that of the step before they are rounded.

    Example:
      >>> p, g, zero = [jnp.full(4, 2.0)], [jnp.full(4, 0.5)], [jnp.zeros(4)]
      >>> p, mu, nu = lamb(p, g, zero, zero, lamb_scalars(1, 0.1))
      >>> round(float(p[0][0]), 6)
      1.8

    References:
      You et al., arXiv:1904.00962, Algorithm 2.
    """
    decay = [True] * len(params) if decay is None else list(decay)
    places = list(map(Place, range(len(params)))) if places is None else places
    check("lamb", params, grads, mu, nu, decay)
    choice = lamb_choice(params, grads, mu, nu, implementation=implementation)

    def by_xla(lists: stored.Lists, decay: Sequence[bool], places: Sequence[Place]) -> Any:
        params, grads, mu, nu = lists
        return lamb_reference(params, grads, mu, nu, scalars, trust=trust, decay=decay, places=places)

    def kernel(lists: stored.Lists, decay: Sequence[bool], places: Sequence[Place]) -> Any:
        return _by_kernel(lists, decay, places, scalars, trust, across, config, choice.implementation)

    if choice.implementation == "xla":
        return by_xla((params, grads, mu, nu), decay, places)
    new = stored.by_service(kernel, by_xla, (params, grads, mu, nu), decay, places)
    return new[0], new[1], new[2]


def _by_kernel(
    lists: stored.Lists,
    decay: Sequence[bool],
    places: Sequence[Place],
    scalars: Scalars,
    trust: TrustRatio,
    across: Callable[[jax.Array], jax.Array] | None,
    config: Config | None,
    implementation: str,
) -> list[list[Any]]:
    params, grads, mu, nu = lists
    s, flags = floats(scalars), jnp.array(decay, jnp.float32)
    options: Any = {"seed": scalars.seed, "places": places, "config": config, "implementation": implementation}
    (new_mu, new_nu), squares = stored.run(
        "lamb_moments", _moments_and_squares, s, [mu, nu], [params, grads], halves=(0, 1, None, None),
        factors=flags[:, None], sums=2, **options,
    )  # fmt: skip
    squares = squares if across is None else across(squares)
    # Between barriers: XLA may make a division by a root a product with rsqrt, as it suits what it fuses it with, and a
    # step shall not depend on which leaves are updated together.
    rate, norms = jax.lax.optimization_barrier((scalars.learning_rate, jnp.sqrt(squares)))
    rates = jax.lax.optimization_barrier(rate * trust_ratio(trust, norms[:, 0], norms[:, 1]))
    (new_params,), _ = stored.run(
        "lamb_params", _stepped, s, [params], [new_mu, new_nu], halves=(None, 0, 1),
        factors=jnp.stack([rates, flags], axis=1), **options,
    )  # fmt: skip
    return [new_params, new_mu, new_nu]


def _moments_and_squares(
    tools: Tools, s: list[jax.Array], mu: jax.Array, nu: jax.Array, p: jax.Array, g: jax.Array, d: jax.Array
) -> tuple[jax.Array, ...]:
    here = Scalars(*s)
    g, mu, nu = moments(here, p, g, mu, nu, d)
    step = direction(here, p, None, mu, nu, d, tools)
    return mu, nu, tools.square(p), tools.square(step)


def _stepped(
    tools: Tools, s: list[jax.Array], p: jax.Array, mu: jax.Array, nu: jax.Array, rate: jax.Array, d: jax.Array
) -> tuple[jax.Array]:
    return (p - rate * direction(Scalars(*s), p, None, mu, nu, d, tools),)


def lamb_reference(
    params: Sequence[Any],
    grads: Sequence[jax.Array],
    mu: Sequence[Any],
    nu: Sequence[Any],
    scalars: Scalars,
    *,
    trust: TrustRatio = UNLIMITED,
    decay: Sequence[bool] | None = None,
    places: Sequence[Place] | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """`lamb` in jnp."""
    step = lambda s, *leaf: lamb_step(s, trust, *leaf)
    return by_leaf(step, params, grads, mu, nu, scalars, decay, places)


def lamb_choice(
    params: Sequence[Any], grads: Sequence[Any], mu: Sequence[Any], nu: Sequence[Any], *_: Any,
    implementation: str | None = None, **__: Any,
) -> dispatch.Choice:  # fmt: skip
    """Which implementation `lamb` would run."""
    arrays = (params, grads, mu, nu)
    empty = all(0 in formats.shape_of(p) for p in params)
    return dispatch.choose("lamb", implementation, arrays, empty=empty, unserved=unserved(arrays))


def trust_ratio(trust: TrustRatio, param_norm: jax.Array, step_norm: jax.Array) -> jax.Array:
    """||param|| / ||step|| within the limits; 1 where either is 0."""
    defined = (param_norm > 0) & (step_norm > 0)
    ratio = param_norm / jnp.where(defined, step_norm, 1)
    return jnp.where(defined, jnp.clip(ratio, trust.minimum, trust.maximum), 1)


def lamb_step(
    s: Scalars, trust: TrustRatio, p: jax.Array, g: jax.Array, mu: Any, nu: Any, decay: Any,
    place: Place = formats.WHOLE,
) -> tuple[jax.Array, Any, Any]:  # fmt: skip
    """What one step adds to a leaf, and its new moments, stored as the old ones are; arguments as of `adam_step`."""
    _, new_mu, new_nu = moments(s, p, widen(g), formats.decode(mu), formats.decode(nu), decay)
    step = direction(s, p, None, new_mu, new_nu, decay)
    rate = s.learning_rate * trust_ratio(trust, *(jnp.sqrt(jnp.sum(x * x)) for x in (p, step)))
    mu, nu = stored_moments(s, new_mu, new_nu, mu, nu, place)
    return -rate * direction(s, p, None, formats.decode(mu), formats.decode(nu), decay), mu, nu
