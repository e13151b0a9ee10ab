"""Loss scaling: what keeps float16 gradients from vanishing, as a pure state that the train step carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LossScaleState(NamedTuple):
    """`scale`: float32, what the loss is multiplied by. `stable`: int32, finite steps since the last overflow.

    `hysteresis`: int32, overflows left before the scale is halved.
    """

    scale: jax.Array
    stable: jax.Array
    hysteresis: jax.Array


class LossScale(NamedTuple):
    """A rule for the loss scale, two pure functions: `init() -> state`, `update(state, finite) -> state`."""

    init: Callable[[], LossScaleState]
    update: Callable[[LossScaleState, jax.Array], LossScaleState]


def static_loss_scale(scale: float) -> LossScale:
    """A scale that never changes; steps with an overflow are skipped all the same.

    Example:
      >>> float(static_loss_scale(128.0).init().scale)
      128.0
    """
    if not 0 < np.float32(scale) < np.inf:
        raise ValueError(f"scale must be positive and finite in float32, got {scale}.")
    return LossScale(lambda: _state(scale, 1), lambda state, finite: state)


def dynamic_loss_scale(
    *,
    initial: float = 2.0**16,
    window: int = 1000,
    hysteresis: int = 2,
    consecutive_hysteresis: bool = False,
    minimum: float = 1.0,
) -> LossScale:
    """DeepSpeed's rule: halve the scale on overflow, double it after `window` finite steps.

    Args:
      initial: The first scale.
      window: Finite steps after which the scale doubles.
      hysteresis: Overflows it takes to halve the scale; the count is refilled when the scale grows.
      consecutive_hysteresis: Refills the count at every finite step instead.
      minimum: The scale is never halved below it; there it holds, where DeepSpeed raises.

    References:
      DeepSpeed 0.19, `runtime/fp16/loss_scaler.py`, DynamicLossScaler. One departure: there a step on which the scale
      grows divides its gradients by the new scale, which halves that update; here they are divided by the scale they
      were made with.

    Example:
      >>> rule = dynamic_loss_scale(initial=8.0, hysteresis=1)
      >>> float(rule.update(rule.init(), jnp.array(False)).scale)
      4.0
    """
    if not 0 < np.float32(minimum) <= np.float32(initial) < np.inf:
        raise ValueError(
            f"dynamic_loss_scale wants 0 < minimum <= initial, finite in float32, got minimum={minimum}, "
            f"initial={initial}."
        )
    if window < 1 or hysteresis < 1:
        raise ValueError(f"window and hysteresis must be at least 1, got window={window}, hysteresis={hysteresis}.")

    def update(state: LossScaleState, finite: jax.Array) -> LossScaleState:
        grow = (state.stable > 0) & (state.stable % window == 0)
        doubled = jnp.where(jnp.isfinite(state.scale * 2), state.scale * 2, state.scale)
        after_good = LossScaleState(
            scale=jnp.where(grow, doubled, state.scale),
            stable=state.stable + 1,
            hysteresis=jnp.where(grow | consecutive_hysteresis, hysteresis, state.hysteresis),
        )
        halve = state.hysteresis == 1
        after_overflow = LossScaleState(
            scale=jnp.where(halve, jnp.maximum(state.scale / 2, minimum), state.scale),
            stable=jnp.zeros_like(state.stable),
            hysteresis=jnp.where(halve, state.hysteresis, state.hysteresis - 1),
        )
        return jax.tree.map(lambda good, bad: jnp.where(finite, good, bad), after_good, after_overflow)

    return LossScale(lambda: _state(initial, hysteresis), update)


def _state(scale: float, hysteresis: int) -> LossScaleState:
    return LossScaleState(jnp.float32(scale), jnp.int32(0), jnp.int32(hysteresis))
