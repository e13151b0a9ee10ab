"""DeepSpeed's learning rate schedules, value for value, as Optax schedules: functions of the number of updates done.

DeepSpeed steps its scheduler after an update, so update n takes the scheduler's value after n steps, and a warm-up
begins twice: its first two updates both have its first rate, with WarmupLR's defaults 0. What Optax has is better taken
from there; these are for runs that must not change.

References:
  DeepSpeed 0.19, `runtime/lr_schedules.py`; its names and defaults are kept. Smith, arXiv:1803.09820 (OneCycle and the
    range test).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

WARMUP_TYPES = ("log", "linear")


def warmup_lr(
    *,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 1e-3,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> optax.Schedule:
    """WarmupLR: from `warmup_min_lr` to `warmup_max_lr`, which then stays.

    Args:
      warmup_min_lr: The rate of the first two updates.
      warmup_max_lr: The rate after warm-up.
      warmup_num_steps: Length of the warm-up, counted from the second update.
      warmup_type: "log", steep at first, or "linear".

    Example:
      >>> schedule = warmup_lr(warmup_max_lr=0.1, warmup_num_steps=10, warmup_type="linear")
      >>> [round(float(schedule(n)), 6) for n in (0, 1, 2, 3, 11, 12)]
      [0.0, 0.0, 0.01, 0.02, 0.1, 0.1]
    """
    ramp, steps = _ramp(warmup_num_steps, warmup_type)

    def schedule(count: Any) -> jax.Array:
        k = _last_step(count)
        return warmup_min_lr + (warmup_max_lr - warmup_min_lr) * jnp.where(k < steps, ramp(k), 1.0)

    return schedule


def warmup_decay_lr(
    *,
    total_num_steps: int,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 1e-3,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> optax.Schedule:
    """WarmupDecayLR: as `warmup_lr`, then on a line back to `warmup_min_lr` at `total_num_steps`.

    Example:
      >>> schedule = warmup_decay_lr(total_num_steps=10, warmup_num_steps=5, warmup_max_lr=0.1)
      >>> [round(float(schedule(n)), 6) for n in (0, 1, 6, 7, 11)]
      [0.0, 0.0, 0.1, 0.08, 0.0]
    """
    ramp, steps = _ramp(warmup_num_steps, warmup_type)

    def schedule(count: Any) -> jax.Array:
        k = _last_step(count)
        left = jnp.maximum(0.0, (total_num_steps - k) / max(1, total_num_steps - steps))
        return warmup_min_lr + (warmup_max_lr - warmup_min_lr) * jnp.where(k < steps, ramp(k), left)

    return schedule


def warmup_cosine_lr(
    *,
    learning_rate: float,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 1e-4,
    warmup_type: str = "log",
) -> optax.Schedule:
    """WarmupCosineLR: `learning_rate` times a warm-up, then times half a cosine down to `cos_min_ratio`.

    Args:
      learning_rate: The optimizer's rate, which DeepSpeed reads from it.
      total_num_steps: Where the cosine ends.
      warmup_min_ratio: The ratio at the warm-up's beginning; the very first update has rate 0 whatever it is.
      warmup_num_steps: Length of the warm-up.
      cos_min_ratio: The ratio in the end.
      warmup_type: "log" or "linear".

    Example:
      >>> schedule = warmup_cosine_lr(learning_rate=0.01, total_num_steps=12, warmup_num_steps=4, cos_min_ratio=0.1)
      >>> [round(float(schedule(n)), 6) for n in (0, 1, 2, 4, 5, 12)]
      [0.0, 0.0, 0.005, 0.01, 0.009657, 0.001]
    """
    ramp, steps = _ramp(warmup_num_steps, warmup_type)
    cosine = optax.cosine_decay_schedule(1.0, max(1, total_num_steps - steps), cos_min_ratio)

    def schedule(count: Any) -> jax.Array:
        k = _last_step(count)
        ratio = jnp.where(k < steps, warmup_min_ratio + (1 - warmup_min_ratio) * ramp(k), cosine(k - steps + 1))
        return learning_rate * jnp.where(jnp.asarray(count) == 0, 0.0, ratio)

    return schedule


def one_cycle(
    *,
    cycle_min_lr: float,
    cycle_max_lr: float,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
) -> optax.Schedule:
    """OneCycle's learning rate: up, down, then a slow decay.

    Args:
      cycle_min_lr: The rate where the cycle begins and ends.
      cycle_max_lr: The rate at its top.
      decay_lr_rate: After the cycle the rate is `cycle_min_lr / (1 + decay_lr_rate * d / decay_step_size)`, d updates
        later; 0 for none.
      cycle_first_step_size: Updates on the way up.
      cycle_second_step_size: Updates on the way down; None for as many.
      cycle_first_stair_count: Stairs on the way up; 0 for a line.
      cycle_second_stair_count: Stairs on the way down; None for as many.
      decay_step_size: The unit of the decay; 0 for none.

    Example:
      >>> schedule = one_cycle(cycle_min_lr=0.001, cycle_max_lr=0.01, cycle_first_step_size=4)
      >>> [round(float(schedule(n)), 6) for n in (0, 1, 4, 5, 8, 9)]
      [0.001, 0.00325, 0.01, 0.00775, 0.001, 0.001]
    """
    height, total = _cycle(
        cycle_first_step_size, cycle_second_step_size, cycle_first_stair_count, cycle_second_stair_count
    )
    decay = decay_lr_rate / decay_step_size if decay_step_size else 0.0

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count)
        in_cycle = cycle_min_lr + (cycle_max_lr - cycle_min_lr) * height(n)
        return jnp.where(n <= total, in_cycle, cycle_min_lr / (1 + decay * jnp.maximum(n - total, 0)))

    return schedule


def one_cycle_momentum(
    *,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
) -> optax.Schedule:
    """OneCycle's momentum (Adam's b1), which falls as the rate rises; with it DeepSpeed sets b2 to 0.99.

    As in DeepSpeed the very first update has `cycle_min_mom`, the second nearly `cycle_max_mom`.

    Args:
      cycle_min_mom: Momentum at the cycle's top.
      cycle_max_mom: Momentum where the cycle begins and ends.
      decay_mom_rate: After the cycle momentum is `cycle_max_mom * (1 + decay_mom_rate * d / decay_step_size)`.
      cycle_first_step_size: As in `one_cycle`, and those that follow.
      cycle_second_step_size: As in `one_cycle`.
      cycle_first_stair_count: As in `one_cycle`.
      cycle_second_stair_count: As in `one_cycle`.
      decay_step_size: As in `one_cycle`.

    Example:
      >>> schedule = one_cycle_momentum(cycle_first_step_size=4)
      >>> [round(float(schedule(n)), 6) for n in (0, 1, 4, 8)]
      [0.8, 0.875, 0.8, 0.9]
    """
    height, total = _cycle(
        cycle_first_step_size, cycle_second_step_size, cycle_first_stair_count, cycle_second_stair_count
    )
    growth = decay_mom_rate / decay_step_size if decay_step_size else 0.0

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count)
        in_cycle = cycle_max_mom - (cycle_max_mom - cycle_min_mom) * height(n)
        after = cycle_max_mom * (1 + growth * jnp.maximum(n - total, 0))
        return jnp.where(n == 0, cycle_min_mom, jnp.where(n <= total, in_cycle, after))

    return schedule


def lr_range_test(
    *,
    lr_range_test_min_lr: float = 1e-3,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
) -> optax.Schedule:
    """LRRangeTest: a rate that grows without end, to find where training breaks.

    Args:
      lr_range_test_min_lr: The first rate.
      lr_range_test_step_size: Updates in which it grows by `lr_range_test_step_rate` times the first.
      lr_range_test_step_rate: Slope.
      lr_range_test_staircase: Grows in stairs of `lr_range_test_step_size` updates.

    Example:
      >>> schedule = lr_range_test(lr_range_test_step_size=2)
      >>> [round(float(schedule(n)), 6) for n in range(3)]
      [0.001, 0.0015, 0.002]
    """
    size = _positive("lr_range_test_step_size", lr_range_test_step_size)

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count)
        return lr_range_test_min_lr * (
            1 + lr_range_test_step_rate * (n // size if lr_range_test_staircase else n / size)
        )

    return schedule


def _last_step(count: Any) -> jax.Array:
    """DeepSpeed's index of the last batch, 0 where there is none yet: its warm-ups are at their beginning in both."""
    return jnp.maximum(jnp.asarray(count) - 1, 0)


def _ramp(num_steps: int, kind: str) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """A warm-up from 0 to 1, and the steps it takes: at least 2, as in DeepSpeed."""
    if kind not in WARMUP_TYPES:
        raise ValueError(f"warmup_type must be one of {WARMUP_TYPES}, got {kind!r}.")
    steps = max(2, _positive("warmup_num_steps", num_steps))
    if kind == "linear":
        return lambda k: k / steps, steps
    return lambda k: jnp.log(k + 1) / math.log(steps), steps


def _cycle(
    first: int, second: int | None, first_stairs: int, second_stairs: int | None
) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """The height of a cycle, 0 to 1, and its length in updates."""
    up = _positive("cycle_first_step_size", first)
    down = up if second is None else int(second)
    if down < 0:
        raise ValueError(f"cycle_second_step_size must not be negative, got {second!r}.")
    stairs_down = first_stairs if second_stairs is None else second_stairs

    def part(n: jax.Array, size: int, stairs: int) -> jax.Array:
        # In whole numbers: a stair that begins at a fraction rounded down would begin an update late.
        return n * stairs // size / stairs if stairs else n / size

    def height(n: jax.Array) -> jax.Array:
        falling = part(up + down - n, down, stairs_down) if down else jnp.zeros(())
        return jnp.where(n >= up + down, 0.0, jnp.where(n <= up, part(n, up, first_stairs), falling))

    return height, up + down


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or value != int(value) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}.")
    return int(value)
