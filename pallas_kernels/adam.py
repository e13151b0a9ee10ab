"""One step of Adam or AdamW on lists of leaves, in one pass and in place (arXiv:1412.6980, arXiv:1711.05101).

Bytes an element in float32: params, mu and nu are read and written once, gradients read once: 28. Optax's update and
`apply_updates` in one jit move as few, in one XLA kernel a leaf; here many leaves share a launch. What precedes the
update, a clip factor, a loss scale, a skipped step, are scalars here and not passes of their own. Fewer bytes take
other formats (formats.py): 18 with bfloat16 moments and gradients, 14 with 8-bit moments and params in two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, formats, leaves, stored
from pallas_kernels.formats import Place, Tools, widen

Config = leaves.Config


class Scalars(NamedTuple):
    """What one step of Adam needs beside arrays: float32 scalars (seed: int32), so that none of them compiles anew.

    Attributes:
      learning_rate: Step size.
      b1, b2: Decay rates of mu and nu.
      c1, c2: 1 - b1 and 1 - b2, where a Python float gives more digits than float32 can.
      eps, eps_root: Added outside and inside of the square root.
      weight_decay: Decoupled decay, times the learning rate; 0 for none.
      l2: Added to the gradient, times the param; 0 for none.
      mu_factor, grad_factor: mu_hat = mu_factor mu + grad_factor g: bias correction, Nesterov's with the second.
      nu_factor: nu_hat = nu_factor nu: bias correction.
      scale: Multiplies the gradient: clip factor, inverse of a loss scale.
      apply: 1, or 0 to leave everything as it is, whatever the gradients hold.
      seed: Of the step, for what is rounded stochastically.
    """

    learning_rate: Any
    b1: Any
    b2: Any
    c1: Any
    c2: Any
    eps: Any
    eps_root: Any
    weight_decay: Any
    l2: Any
    mu_factor: Any
    grad_factor: Any
    nu_factor: Any
    scale: Any
    apply: Any
    seed: Any = None


def adam_scalars(
    count: jax.Array,
    learning_rate: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    weight_decay: Any = 0.0,
    l2: Any = 0.0,
    nesterov: bool = False,
    bias_correction: bool = True,
    scale: Any = 1.0,
    apply: Any = True,
) -> Scalars:
    """`Scalars` of a step.

    Args:
      count: int32 scalar, the number of this step: 1 at the first.
      learning_rate: Step size, a float scalar as all that follow.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the square root.
      eps_root: Added inside it.
      weight_decay: Decoupled weight decay, times the learning rate.
      l2: Weight decay of the other kind, added to the gradient.
      nesterov: Nesterov momentum (Dozat, 2016), as in Optax.
      bias_correction: Whether moments are divided by 1 - b**t.
      scale: Multiplies the gradients before anything else.
      apply: bool scalar; False leaves everything as it is.

    Returns:
      float32 scalars, and the count as the step's seed.

    Precision:
      1 - b**t is formed as -expm1(t log b): formed in float32 it is off by 1.3e-5 at b = 0.999, t = 1.
    """
    seed, count = jnp.asarray(count, jnp.int32), jnp.asarray(count, jnp.float32)
    # By 1 - b, which a Python float gives in more digits than float32 has of b. At b = 0 there is no bias.
    unbias = lambda b, t: jnp.where(b == 0, 1.0, -1 / jnp.expm1(t * jnp.log1p(jnp.float32(b - 1))))
    if not bias_correction:
        unbias = lambda b, t: jnp.float32(1)
    if nesterov:
        mu_factor, grad_factor = b1 * unbias(b1, count + 1), (1 - b1) * unbias(b1, count)
    else:
        mu_factor, grad_factor = unbias(b1, count), 0.0
    values = (
        learning_rate, b1, b2, 1 - b1, 1 - b2, eps, eps_root, weight_decay, l2,
        mu_factor, grad_factor, unbias(b2, count), scale, apply,
    )  # fmt: skip
    numbers: Any = [jnp.asarray(x, jnp.float32) for x in values]
    return Scalars(*numbers)._replace(seed=seed)


def moments(
    s: Scalars, p: jax.Array | None, g: jax.Array, mu: jax.Array, nu: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient as the step takes it, and the new moments of a leaf.

    All arrays are of one shape, float32 or wider; `decay` is 1 for a leaf that decays and 0 for one that does not, and
    may fill a block; `p` may be None where nothing decays.
    """
    g = g * s.scale
    if p is not None:
        g = g + (s.l2 * decay) * p
    return g, s.b1 * mu + s.c1 * g, s.b2 * nu + s.c2 * (g * g)


def direction(
    s: Scalars,
    p: jax.Array | None,
    g: jax.Array | None,
    mu: jax.Array,
    nu: jax.Array,
    decay: Any,
    tools: Tools = formats.EXACT,
) -> jax.Array:
    """What a step subtracts before the learning rate, of the new moments; `g` of `moments`, for Nesterov momentum."""
    momentum = s.mu_factor * mu if g is None else s.mu_factor * mu + s.grad_factor * g
    step = tools.divide(momentum, tools.sqrt(s.nu_factor * nu + s.eps_root) + s.eps)
    return step if p is None else step + (s.weight_decay * decay) * p


def stored_moments(s: Scalars, mu: jax.Array, nu: jax.Array, old_mu: Any, old_nu: Any, place: Place) -> tuple[Any, Any]:
    """Moments as they are kept: each with its half of the random bits."""
    pairs = ((mu, old_mu), (nu, old_nu))
    mu, nu = (formats.encode(x, old, half=k, seed=s.seed, place=place) for k, (x, old) in enumerate(pairs))
    return mu, nu


def adam_step(
    s: Scalars, p: jax.Array | None, g: jax.Array, mu: Any, nu: Any, decay: Any, place: Place = formats.WHOLE
) -> tuple[jax.Array, Any, Any]:
    """What one step adds to a leaf, and its new moments, stored as the old ones are; `p` as in `moments`."""
    g, new_mu, new_nu = moments(s, p, widen(g), formats.decode(mu), formats.decode(nu), decay)
    delta = -s.learning_rate * direction(s, p, g, new_mu, new_nu, decay)
    return delta, *stored_moments(s, new_mu, new_nu, mu, nu, place)


def adam(
    params: Sequence[Any],
    grads: Sequence[jax.Array],
    mu: Sequence[Any],
    nu: Sequence[Any],
    scalars: Scalars,
    *,
    decay: Sequence[bool] | None = None,
    places: Sequence[Place] | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """One step of Adam, in place where params, mu and nu are donated.

    Args:
      params: Leaves of any shape, of a floating dtype, or `formats.Split` or `formats.Copied`.
      grads: Likewise, float32 or 16-bit.
      mu: First moments, of the params' shapes; or `formats.Blocks`.
      nu: Second moments, likewise.
      scalars: From `adam_scalars`.
      decay: Which leaves decay; all by default.
      places: Where leaves that are shards lie in whole ones, for the random bits of stochastic rounding; by default
        leaves are whole, and their number is their place in the list.
      implementation: None, "mosaic", "xla" or "interpret".
      config: Launch choices; by default those measured best.

    Returns:
      New `(params, mu, nu)`, lists in the formats that came.

    Raises:
      ValueError: lists or shapes do not match; the implementation asked for cannot run here.
      TypeError: a leaf of a dtype that is not floating.

    Precision:
      float32 arithmetic. Stored in 16 bits, params and float16 moments are rounded to nearest; bfloat16 moments and
      `formats.Blocks` stochastically. The kernel's square root and division are good to 2 units in the last place.

    Example:
      >>> p, g, zero = [jnp.ones(4)], [jnp.full(4, 0.5)], [jnp.zeros(4)]
      >>> p, mu, nu = adam(p, g, zero, zero, adam_scalars(1, 0.1))
      >>> round(float(p[0][0]), 6), round(float(mu[0][0]), 6)
      (0.9, 0.05)

    References:
      Kingma and Ba, arXiv:1412.6980, Algorithm 1; Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2.
    """
    decay = [True] * len(params) if decay is None else list(decay)
    places = list(map(Place, range(len(params)))) if places is None else places
    check("adam", params, grads, mu, nu, decay)
    choice = adam_choice(params, grads, mu, nu, implementation=implementation)

    def by_xla(lists: stored.Lists, decay: Sequence[bool], places: Sequence[Place]) -> Any:
        params, grads, mu, nu = lists
        return adam_reference(params, grads, mu, nu, scalars, decay=decay, places=places)

    if choice.implementation == "xla":
        return by_xla((params, grads, mu, nu), decay, places)

    def kernel(lists: stored.Lists, decay: Sequence[bool], places: Sequence[Place]) -> list[list[Any]]:
        params, grads, mu, nu = lists
        return stored.run(
            "adam",
            _body,
            floats(scalars),
            [params, mu, nu],
            [grads],
            halves=(None, 0, 1, None),
            factors=jnp.array(decay, jnp.float32)[:, None],
            seed=scalars.seed,
            places=places,
            config=config,
            implementation=choice.implementation,
        )[0]

    new = stored.by_service(kernel, by_xla, (params, grads, mu, nu), decay, places)
    return new[0], new[1], new[2]


def _body(
    tools: Tools, s: list[jax.Array], p: jax.Array, mu: jax.Array, nu: jax.Array, g: jax.Array, d: jax.Array
) -> tuple[jax.Array, ...]:
    here = Scalars(*s)
    g, mu, nu = moments(here, p, g, mu, nu, d)
    return p - here.learning_rate * direction(here, p, g, mu, nu, d, tools), mu, nu


def adam_reference(
    params: Sequence[Any],
    grads: Sequence[jax.Array],
    mu: Sequence[Any],
    nu: Sequence[Any],
    scalars: Scalars,
    *,
    decay: Sequence[bool] | None = None,
    places: Sequence[Place] | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """`adam` in jnp, which XLA fuses into one kernel a leaf."""
    return by_leaf(adam_step, params, grads, mu, nu, scalars, decay, places)


def by_leaf(
    step: Callable[..., tuple[jax.Array, Any, Any]],
    params: Sequence[Any],
    grads: Sequence[jax.Array],
    mu: Sequence[Any],
    nu: Sequence[Any],
    s: Scalars,
    decay: Sequence[bool] | None,
    places: Sequence[Place] | None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """An optimizer's step, leaf by leaf, in jnp; `step` as `adam_step`."""
    decay = [True] * len(params) if decay is None else decay
    places = list(map(Place, range(len(params)))) if places is None else places
    new: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for leaf in zip(params, grads, mu, nu, decay, places, strict=True):
        p, wide = leaf[0], formats.decode(leaf[0])
        delta, *moments = step(s, wide, *leaf[1:])
        changed = formats.encode(wide + delta, p), *moments
        for column, x, old in zip(new, changed, (p, *leaf[2:4]), strict=True):
            column.append(formats.keep(s.apply > 0, x, old))
    return new


def adam_choice(
    params: Sequence[Any], grads: Sequence[Any], mu: Sequence[Any], nu: Sequence[Any], *_: Any,
    implementation: str | None = None, **__: Any,
) -> dispatch.Choice:  # fmt: skip
    """Which implementation `adam` would run."""
    arrays = (params, grads, mu, nu)
    empty = all(0 in formats.shape_of(p) for p in params)
    return dispatch.choose("adam", implementation, arrays, empty=empty, unserved=unserved(arrays))


def unserved(arrays: Any) -> str | None:
    """Why the kernels cannot take these leaves, or None."""
    served = ("float32", "bfloat16", "float16")
    plain = [x for x in jax.tree.leaves(arrays, is_leaf=formats.is_stored) if not formats.is_stored(x)]
    if others := {x.dtype.name for x in plain}.difference(served):
        return f"kernels serve {', '.join(served)}, not {', '.join(sorted(others))}"
    return None


def floats(s: Scalars) -> jax.Array:
    """The float32 ones; the last is `apply`."""
    return jnp.stack(s[:-1])


def check(
    op: str, params: Sequence[Any], grads: Sequence[Any], mu: Sequence[Any], nu: Sequence[Any], decay: Sequence[bool]
) -> None:
    """Raises unless the lists match, leaf by leaf, and hold floating numbers."""
    lists = {"params": params, "grads": grads, "mu": mu, "nu": nu, "decay": decay}
    if len({len(x) for x in lists.values()}) > 1:
        came = ", ".join(f"{len(x)} {name}" for name, x in lists.items())
        raise ValueError(f"{op}: lists of one length are wanted, one entry a leaf, got {came}.")
    for i, p in enumerate(params):
        shape = formats.shape_of(p)
        for name, x in (("params", p), ("grads", grads[i]), ("mu", mu[i]), ("nu", nu[i])):
            if formats.shape_of(x) != shape:
                raise ValueError(
                    f"{op}: leaf {i} has shape {list(formats.shape_of(x))} in {name}, {list(shape)} in params."
                )
            if not formats.is_stored(x) and not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"{op}: leaf {i} of {name} has dtype {x.dtype}; floating dtypes are served.")
