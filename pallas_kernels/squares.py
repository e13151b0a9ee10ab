"""Sums of squares of many leaves in few launches, for a global norm.

Bytes: each leaf is read once. XLA takes one or two launches a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, leaves
from pallas_kernels.adam import unserved
from pallas_kernels.formats import widen


def squares(xs: Sequence[jax.Array], *, implementation: str | None = None) -> jax.Array:
    """The sum of squares of each leaf, in float32 and in an order that is always the same.

    Args:
      xs: Leaves of any shape, float32 or 16-bit.
      implementation: None, "mosaic", "xla" or "interpret".

    Returns:
      float32[leaves].

    Raises:
      ValueError: the implementation asked for cannot run here.

    Example:
      >>> squares([jnp.ones(3), jnp.full((2, 2), 2.0)]).tolist()
      [3.0, 16.0]
    """
    choice = squares_choice(xs, implementation=implementation)
    if choice.implementation == "xla":
        return squares_reference(xs)
    _, sums = leaves.run(
        "squares",
        _square,
        jnp.ones(1),
        [],
        [xs],
        factors=jnp.zeros((len(xs), 0)),
        sums=1,
        config=leaves.Config(),
        implementation=choice.implementation,
    )
    return sums[:, 0]


def squares_reference(xs: Sequence[jax.Array]) -> jax.Array:
    """`squares` in jnp."""
    return jnp.array([jnp.sum(jnp.square(widen(x))) for x in xs], jnp.float32)


def squares_choice(xs: Sequence[Any], *, implementation: str | None = None) -> dispatch.Choice:
    """Which implementation `squares` would run."""
    empty = all(x.size == 0 for x in xs)
    return dispatch.choose("squares", implementation, xs, empty=empty, unserved=unserved(xs))


def _square(here: leaves.Here, x: jax.Array) -> list[jax.Array]:
    return [here.exact.square(widen(x))]
