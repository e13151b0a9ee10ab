"""Schedules against values that DeepSpeed 0.19.8 gave, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax import schedules

WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1}
CYCLE = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4, "cycle_second_step_size": 4}

# Index: updates done. "WarmupLR linear" is 0.01 a step from the second update on, in DeepSpeed as here.
GOLDEN = {
    "WarmupLR log": (
        schedules.warmup_lr(warmup_num_steps=10, **WARMUP),
        [0, 0, 0.030103, 0.0477121, 0.060206, 0.069897, 0.0778151, 0.0845098, 0.090309, 0.0954243, 0.1, 0.1],
    ),
    "WarmupLR linear": (
        schedules.warmup_lr(warmup_num_steps=10, warmup_type="linear", **WARMUP),
        [0, 0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.1],
    ),
    "WarmupDecayLR": (
        schedules.warmup_decay_lr(warmup_num_steps=5, total_num_steps=10, **WARMUP),
        [0, 0, 0.0430677, 0.0682606, 0.0861353, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02, 0],
    ),
    "WarmupCosineLR": (
        schedules.warmup_cosine_lr(learning_rate=0.01, warmup_num_steps=4, total_num_steps=12, cos_min_ratio=0.1),
        [
            0,
            0,
            0.005,
            0.00792481,
            0.01,
            0.00965746,
            0.00868198,
            0.00722208,
            0.0055,
            0.00377792,
            0.00231802,
            0.00134254,
            0.001,
        ],
    ),
    "OneCycle": (
        schedules.one_cycle(decay_step_size=2, decay_lr_rate=0.5, **CYCLE),
        [
            0.001,
            0.00325,
            0.0055,
            0.00775,
            0.01,
            0.00775,
            0.0055,
            0.00325,
            0.001,
            0.0008,
            0.000666667,
            0.000571429,
            0.0005,
        ],
    ),
    "LRRangeTest": (schedules.lr_range_test(lr_range_test_step_size=2), [0.001, 0.0015, 0.002, 0.0025]),
    "LRRangeTest stairs": (
        schedules.lr_range_test(lr_range_test_step_size=2, lr_range_test_staircase=True),
        [0.001, 0.001, 0.002, 0.002],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_values_are_deepspeeds(name):
    schedule, want = GOLDEN[name]
    counts = jnp.arange(len(want))
    # 1e-7: the golden values have six or more digits of rates of at most 0.1; a float32 there is exact to 4e-9.
    np.testing.assert_allclose([schedule(int(n)) for n in counts], want, atol=1e-7, rtol=0)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(counts), want, atol=1e-7, rtol=0)


def test_stairs_of_a_cycle():
    schedule = schedules.one_cycle(cycle_first_stair_count=2, **CYCLE)
    want = [0.001, 0.001, 0.0055, 0.0055, 0.01, 0.0055, 0.0055, 0.001, 0.001, 0.001]
    np.testing.assert_allclose([schedule(n) for n in range(10)], want, atol=1e-7)


def test_no_stair_of_an_uneven_cycle_comes_late():
    # By the definition in exact fractions: floor(n * stairs / size) / stairs.
    first, stairs = 49, 7
    schedule = schedules.one_cycle(
        cycle_min_lr=0.0, cycle_max_lr=1.0, cycle_first_step_size=first, cycle_first_stair_count=stairs
    )
    up = [(n * stairs // first) / stairs for n in range(first + 1)]
    down = [((2 * first - n) * stairs // first) / stairs for n in range(first + 1, 2 * first + 1)]
    np.testing.assert_allclose([schedule(n) for n in range(2 * first + 1)], up + down, atol=1e-7)


def test_a_cycle_without_second_half_falls_at_once():
    schedule = schedules.one_cycle(**{**CYCLE, "cycle_second_step_size": 0})
    np.testing.assert_allclose([schedule(n) for n in range(6)], [0.001, 0.00325, 0.0055, 0.00775, 0.001, 0.001])


def test_momentum_falls_as_the_rate_rises_and_its_first_value_is_the_lowest():
    schedule = schedules.one_cycle_momentum(cycle_first_step_size=4, decay_step_size=2, decay_mom_rate=0.1)
    want = [0.8, 0.875, 0.85, 0.825, 0.8, 0.825, 0.85, 0.875, 0.9, 0.9 * 1.05, 0.9 * 1.1]
    np.testing.assert_allclose([schedule(n) for n in range(11)], want, rtol=1e-6)


def test_warmup_of_one_step_takes_two():
    got = [float(schedules.warmup_lr(warmup_max_lr=1.0, warmup_num_steps=1)(n)) for n in range(4)]
    np.testing.assert_allclose(got, [0, 0, 1, 1], atol=1e-7)


def test_cosine_stays_at_its_end_and_ignores_the_first_ratio():
    schedule = schedules.warmup_cosine_lr(
        learning_rate=1.0, total_num_steps=6, warmup_num_steps=3, warmup_min_ratio=0.5, cos_min_ratio=0.1
    )
    assert float(schedule(0)) == 0 and float(schedule(1)) == 0.5
    np.testing.assert_allclose([schedule(n) for n in (6, 7, 1000)], 0.1, rtol=1e-6)


def test_as_the_rate_of_an_optimizer():
    tx = optax.sgd(schedules.warmup_lr(warmup_max_lr=1.0, warmup_num_steps=2, warmup_type="linear"))
    state, steps = tx.init(jnp.float32(0)), []
    for _ in range(4):
        step, state = tx.update(jnp.float32(1), state)
        steps.append(float(step))
    assert steps == [0, 0, -0.5, -1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.warmup_lr(warmup_type="exp"), "warmup_type must be one of .*'exp'"),
        (lambda: schedules.warmup_lr(warmup_num_steps=0), "warmup_num_steps must be a whole number, at least 1, got 0"),
        (lambda: schedules.one_cycle(cycle_min_lr=0, cycle_max_lr=1, cycle_first_step_size=1.5), "first_step_size"),
        (lambda: schedules.one_cycle(cycle_min_lr=0, cycle_max_lr=1, cycle_second_step_size=-1), "second_step_size"),
        (lambda: schedules.lr_range_test(lr_range_test_step_size=0), "lr_range_test_step_size"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
