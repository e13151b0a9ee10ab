"""Loss scaling: DeepSpeed's rule step by step, and a training step that an overflow leaves as if it had never been."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

import zerojax
from zerojax import step as step_module

# The rule.


def deepspeed_scales(finite, *, initial, window, hysteresis, consecutive_hysteresis, minimum):
    """The scale after each step, by DynamicLossScaler of DeepSpeed 0.19 (runtime/fp16/loss_scaler.py), in plain Python.

    Two departures: at the minimum the scale holds, where DeepSpeed may raise; and it stays within float32.
    """
    scale, last_overflow, left = initial, -1, hysteresis
    scales = []
    for iteration, ok in enumerate(finite):
        if not ok:
            if hysteresis == 1 or left == 1:
                scale = max(scale / 2, minimum)
            else:
                left -= 1
            last_overflow = iteration
        else:
            if consecutive_hysteresis:
                left = hysteresis
            stable = iteration - last_overflow - 1
            if stable > 0 and stable % window == 0:
                if not consecutive_hysteresis:
                    left = hysteresis
                if scale * 2 < 2.0**128:
                    scale *= 2
        scales.append(scale)
    return scales


def scales_of(rule, sequences):
    """The same of each row of `sequences`, by the rule under test; a scan wants the dtypes of its state unchanged."""

    def step(state, finite):
        state = rule.update(state, finite)
        return state, state.scale

    return np.asarray(jax.jit(jax.vmap(lambda finite: jax.lax.scan(step, rule.init(), finite)[1]))(sequences))


@functools.cache
def overflow_sequences(length=300):
    """No overflow, rare ones, common ones, nothing else, and bursts, which hysteresis is for."""
    rng = np.random.default_rng(0)
    independent = [rng.random(length) >= share for share in (0.0, 0.03, 0.2, 0.5, 0.9, 1.0)]
    bursts = [np.repeat(rng.random(length // n) >= 0.3, n) for n in (2, 4)]
    return np.stack([*independent, *bursts])


@pytest.mark.parametrize("minimum", [0.25, 1.0, 100.0])
@pytest.mark.parametrize("consecutive_hysteresis", [False, True])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 7])
def test_dynamic_scale_moves_as_deepspeeds(window, hysteresis, consecutive_hysteresis, minimum):
    options = {
        "initial": 300.0,  # no power of two: the last halving ends on the minimum, not by itself
        "window": window,
        "hysteresis": hysteresis,
        "consecutive_hysteresis": consecutive_hysteresis,
        "minimum": minimum,
    }
    got = scales_of(zerojax.dynamic_loss_scale(**options), overflow_sequences())
    want = [deepspeed_scales(finite, **options) for finite in overflow_sequences()]
    np.testing.assert_array_equal(got, want)  # halving and doubling are exact


def test_dynamic_scale_by_default():
    rng = np.random.default_rng(1)
    finite = rng.random((2, 4000)) >= [[0.004], [0.0002]]
    defaults = {"window": 1000, "hysteresis": 2, "consecutive_hysteresis": False, "minimum": 1.0}
    want = [deepspeed_scales(row, initial=2.0**16, **defaults) for row in finite]
    assert {2.0**15, 2.0**16, 2.0**17} <= set(np.ravel(want))  # it moves both ways
    np.testing.assert_array_equal(scales_of(zerojax.dynamic_loss_scale(), finite), want)


def test_dynamic_scale_seen_in_deepspeed():
    """From a run of DeepSpeed 0.19.8: with a window of 2 the scale doubles after good steps 3, 5 and 7."""
    (got,) = scales_of(zerojax.dynamic_loss_scale(initial=1.0, window=2), np.ones((1, 8), bool))
    assert got.tolist() == [1, 1, 2, 2, 4, 4, 8, 8]


def test_dynamic_scale_stays_finite_and_above_its_minimum():
    always, never = np.ones((1, 200), bool), np.zeros((1, 200), bool)
    rule = zerojax.dynamic_loss_scale(window=1, hysteresis=1, minimum=2.0**-3)
    assert scales_of(rule, always)[0, -1] == 2.0**127
    assert scales_of(rule, never)[0, -1] == 2.0**-3


@pytest.mark.parametrize("scale", [1.0, 1000, 2.0**16])
def test_static_scale_never_moves(scale):
    assert set(np.ravel(scales_of(zerojax.static_loss_scale(scale), overflow_sequences()))) == {scale}


@pytest.mark.parametrize(
    ("rule", "options", "parts"),
    [
        ("static_loss_scale", {"scale": 0}, ["scale", "positive", "0"]),
        ("static_loss_scale", {"scale": -8.0}, ["scale", "positive", "-8.0"]),
        ("static_loss_scale", {"scale": float("nan")}, ["scale", "nan"]),
        ("static_loss_scale", {"scale": float("inf")}, ["scale", "inf"]),
        ("dynamic_loss_scale", {"minimum": 0.0}, ["minimum=0.0"]),
        ("dynamic_loss_scale", {"minimum": -1.0}, ["minimum=-1.0"]),
        ("dynamic_loss_scale", {"initial": 1.0, "minimum": 2.0}, ["minimum=2.0", "initial=1.0"]),
        ("dynamic_loss_scale", {"initial": float("nan")}, ["initial=nan"]),
        ("dynamic_loss_scale", {"initial": float("inf")}, ["initial=inf"]),
        ("dynamic_loss_scale", {"window": 0}, ["window=0", "at least 1"]),
        ("dynamic_loss_scale", {"hysteresis": 0}, ["hysteresis=0", "at least 1"]),
    ],
)
def test_scales_that_are_none(rule, options, parts):
    with pytest.raises(ValueError, match=r"scale|window") as error:
        getattr(zerojax, rule)(**options)
    for part in parts:
        assert part in str(error.value), str(error.value)


# In a training step.

DEVICES, ACCUMULATE, ROWS = 4, 4, 32
STAGES = [0, 1, 2, 3]

# A power of two changes no digit of a gradient, but the programs with and without it are compiled apart, and fuse other
# products and sums into one rounding (6e-8); Adam's quotient carries that of a gradient in full, times the step size.
RTOL, ATOL = 2e-6, 2e-6


def line_params():
    """A leaf that is cut over the devices, and two that stay whole."""
    rng = np.random.default_rng(2)
    return {"w": rng.normal(size=(8, 16)).astype(np.float32), "odd": np.ones(3, np.float32), "gain": np.float32(1.5)}


def line_loss(params, batch):
    y = params["gain"] * jnp.tanh(batch["x"] @ params["w"]) + jnp.sum(params["odd"])
    return jnp.mean((y - batch["y"]) ** 2)


@functools.cache
def line_batches(steps=4):
    rng = np.random.default_rng(3)
    draw = lambda n: rng.normal(size=(ROWS, n)).astype(np.float32)
    return tuple({"x": draw(8), "y": draw(16)} for _ in range(steps))


def with_inf(batch, row):
    """The batch with one infinite target: one row, so one device and one micro-batch, overflows."""
    y = batch["y"].copy()
    y[row] = np.inf
    return batch | {"y": y}


def adamw():
    return optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10), weight_decay=0.1)


def trainer(stage, loss_scale=None, *, loss_fn=line_loss, params=None, make_tx=adamw, **options):
    """A function that makes a new state, and the step for it."""
    params = line_params() if params is None else params
    plan = zerojax.make_plan(params, models.mesh_of(DEVICES), stage=stage, min_size=16)
    step = zerojax.make_train_step(loss_fn, make_tx(), plan, loss_scale=loss_scale, **options)
    return lambda: zerojax.create_train_state(params, make_tx(), plan, loss_scale=loss_scale), step


def run(state, step, batches):
    """The state after all batches and the metrics of each."""
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def on_host(tree):
    """A copy that no donation can reach."""
    return jax.tree.map(np.array, tree)


@functools.cache
def unscaled(stage):
    create, step = trainer(stage, accumulate=ACCUMULATE)
    return run(create(), step, line_batches())


def assert_bitwise(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_near(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), got, want)


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 1000.0])
@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_changes_no_number(stage, scale):
    want, without = unscaled(stage)
    create, step = trainer(stage, zerojax.static_loss_scale(scale), accumulate=ACCUMULATE)
    state, history = run(create(), step, line_batches())
    assert_near(state.params, want.params)
    assert_near(state.opt_state, want.opt_state)
    for metrics, plain in zip(history, without, strict=True):
        np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=RTOL)
        np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=RTOL)
        assert (metrics["loss_scale"], metrics["finite"], metrics["skipped"]) == (scale, True, 0)
        assert "loss_scale" not in plain


@functools.cache
def overflow_trainer(stage):
    rule = zerojax.dynamic_loss_scale(initial=2.0**10, minimum=2.0**9)
    return trainer(stage, rule, accumulate=ACCUMULATE)


@pytest.mark.parametrize("row", [0, 13, ROWS - 1])  # each on another device, and not all in the same micro-batch
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_leaves_params_and_optimizer_bitwise_untouched(stage, row):
    create, step = overflow_trainer(stage)
    first, second, third, last = line_batches()
    state, history = run(create(), step, [first, second])
    assert (history[-1]["finite"], history[-1]["skipped"], history[-1]["loss_scale"]) == (True, 0, 2.0**10)
    assert optax.tree.get(state.opt_state, "mu")["odd"].any()  # there is something to lose
    # Of two overflows in a row the second halves the scale; a third finds it at its minimum, where it holds.
    for skipped, used, left in [(1, 2.0**10, 2.0**10), (2, 2.0**10, 2.0**9), (3, 2.0**9, 2.0**9)]:
        before = on_host(state)
        state, (metrics,) = run(state, step, [with_inf(third, row)])
        assert_bitwise(state.params, before.params)
        assert_bitwise(state.opt_state, before.opt_state)  # Adam's and the schedule's counts too
        assert state.step == 2 + skipped
        assert state.skipped == metrics["skipped"] == skipped
        assert not metrics["finite"]
        assert not np.isfinite(metrics["grad_norm"])
        assert (metrics["loss_scale"], state.loss_scale.scale) == (used, left)
        if skipped != 2:  # now it is at the minimum, but has not been kept from halving yet
            assert metrics["at_minimum"] == (skipped == 3)
    state, history = run(state, step, [third, last])
    want, _ = unscaled(stage)  # which never saw an overflow
    assert_near(state.params, want.params)
    assert_near(state.opt_state, want.opt_state)
    assert (state.step, state.skipped, state.loss_scale.scale) == (7, 3, 2.0**9)
    assert (history[-1]["skipped"], history[-1]["finite"]) == (3, True)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_in_any_micro_batch_of_any_device_skips_the_whole_step(stage):
    create, step = overflow_trainer(stage)
    batch, state = line_batches()[0], create()
    state, _ = run(state, step, [batch])
    before = on_host(state)
    rows = range(0, ROWS, ROWS // (DEVICES * ACCUMULATE))  # the first of each device's each micro-batch
    for skipped, row in enumerate(rows, 1):
        state, (metrics,) = run(state, step, [with_inf(batch, row)])
        assert (metrics["finite"], metrics["skipped"]) == (False, skipped), row
    assert_bitwise((state.params, state.opt_state), (before.params, before.opt_state))


def test_the_host_waits_for_no_number(monkeypatch):
    """Neither on a finite step nor on one that is skipped: the next is dispatched before the device is done."""
    create, step = overflow_trainer(2)
    good, bad = (jax.device_put(b) for b in (line_batches()[0], with_inf(line_batches()[0], 3)))
    state, _ = step(create(), good)

    def read(_):
        raise AssertionError("a number was read on the host")

    with monkeypatch.context() as patched, jax.transfer_guard("disallow"):
        patched.setattr(type(state.step), "_value", property(read))
        with pytest.raises(AssertionError, match="read on the host"):
            bool(state.step)  # so this is how one would be noticed
        for batch in (good, bad, bad):
            state, metrics = step(state, batch)
    assert (metrics["skipped"], metrics["finite"], state.step) == (2, False, 4)


def last_elements(params, batch):
    """Of each leaf the last element has a gradient, the mean over rows of its own column of the batch."""
    return sum(jnp.mean(batch[name]) * jnp.ravel(x)[-1] for name, x in params.items())


@pytest.mark.parametrize("stage", STAGES)
def test_one_infinite_element_of_one_gradient_is_seen_by_all(stage):
    """In a leaf that is whole as in one that is cut, where one device alone has it in its shard."""
    create, step = trainer(stage, zerojax.static_loss_scale(2.0), loss_fn=last_elements)
    ones = {name: np.ones(DEVICES, np.float32) for name in line_params()}
    state = create()
    before, skipped = on_host(state), 0
    for leaf in line_params():
        for bad in (np.inf, -np.inf, np.nan):
            state, (metrics,) = run(state, step, [ones | {leaf: np.array([1, 1, bad, 1], np.float32)}])
            skipped += 1
            assert (metrics["finite"], metrics["skipped"]) == (False, skipped)
            assert_bitwise((state.params, state.opt_state), (before.params, before.opt_state))
    state, (metrics,) = run(state, step, [ones])
    assert metrics["finite"]
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3), rtol=RTOL)
    for name, x in before.params.items():
        assert np.ravel(state.params[name])[-1] < np.ravel(x)[-1]


def test_a_static_scale_skips_too_and_stays():
    create, step = trainer(2, zerojax.static_loss_scale(2.0**10))
    state = create()
    before = on_host(state)
    state, (metrics,) = run(state, step, [with_inf(line_batches()[0], 3)])
    assert_bitwise((state.params, state.opt_state), (before.params, before.opt_state))
    assert (metrics["finite"], metrics["skipped"], state.loss_scale.scale) == (False, 1, 2.0**10)


def test_without_a_scale_nothing_is_skipped():
    create, step = trainer(2)
    state, (metrics,) = run(create(), step, [with_inf(line_batches()[0], 3)])
    assert (metrics["finite"], metrics["skipped"], state.skipped) == (False, 0, 0)
    assert not np.isfinite(np.asarray(state.params["w"])).all()


# A gradient of one in every element, at every step: what moves is the scale alone.


def plain_sum(params, batch):
    return jnp.mean(batch) * sum(map(jnp.sum, jax.tree.leaves(params)))


def sgd():
    return optax.sgd(0.5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_on_which_the_scale_grows_is_as_long_as_any_other(stage):
    """DeepSpeed divides the gradients of that step by the doubled scale, and halves its update (seen in 0.19.8)."""
    rule = zerojax.dynamic_loss_scale(initial=8.0, window=2)
    create, step = trainer(stage, rule, loss_fn=plain_sum, make_tx=sgd)
    state = create()
    elements = sum(np.size(x) for x in jax.tree.leaves(line_params()))
    scales, before = [], line_params()
    for _ in range(6):
        state, (metrics,) = run(state, step, [np.ones((DEVICES, 1), np.float32)])
        # Steps of one half, and halves and doubles of them, are exact; params below 8 round each by less than 5e-7.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - 0.5, rtol=0, atol=5e-7), state.params, before)
        np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(elements), rtol=RTOL)
        scales.append(float(metrics["loss_scale"]))
        before = on_host(state.params)
    assert scales == [8, 8, 8, 16, 16, 32]  # what each step used: it doubled after the third and the fifth


@pytest.mark.parametrize("scale", [2.0**64, 2.0**100])
def test_grad_norm_is_right_at_any_scale_that_the_gradients_bear(scale):
    """In float32 a scale grows as long as nothing overflows; then the square of a scaled gradient does, before it."""
    create, step = trainer(1, zerojax.static_loss_scale(scale), loss_fn=plain_sum, make_tx=sgd)
    state, (metrics,) = run(create(), step, [np.ones((DEVICES, 1), np.float32)])
    assert metrics["finite"]
    elements = sum(np.size(x) for x in jax.tree.leaves(line_params()))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(elements), rtol=RTOL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - 0.5, rtol=0, atol=5e-7), state.params, line_params())


# What it is for: gradients that float16 cannot hold.


def summed():
    """An optimizer that does nothing but add up gradients, in float32."""
    zeros = lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    add = lambda grads, sums, params=None: (
        jax.tree.map(jnp.zeros_like, grads),
        jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, grads),
    )
    return optax.GradientTransformation(zeros, add)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_below_float16_survive(stage, dtype):
    """Computed in float16 they are 1e-9, and its smallest number is 6e-8: only the scaled ones are seen at all."""
    half = lambda x: x.astype(jnp.float16)
    loss_fn = lambda params, x: jnp.float32(1e-9) * jnp.sum(half(params["w"]) * half(x).mean(0)).astype(jnp.float32)
    options = {"loss_fn": loss_fn, "params": {"w": jnp.ones((4, 16), dtype)}, "make_tx": summed}
    batch = np.ones((DEVICES, 4, 16), np.float32)
    grads = {}
    for scale in (1.0, 2.0**20):
        create, step = trainer(stage, zerojax.static_loss_scale(scale), **options)
        grads[scale] = run(create(), step, [batch])[0].opt_state["w"]
    np.testing.assert_array_equal(grads[1.0], 0)
    np.testing.assert_allclose(grads[2.0**20], 1e-9, rtol=2**-10)  # one rounding of float16


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("grad_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_16_bit_params_travel_in_grad_dtype(stage, grad_dtype, accumulate):
    """Each device's gradients are bfloat16 numbers, so that only sums over devices and micro-batches round."""
    dot = lambda params, x: jnp.sum(params["w"].astype(jnp.float32) * x.mean(0))
    params = {"w": jnp.ones((8, 16), "bfloat16")}
    options = {"loss_fn": dot, "params": params, "make_tx": summed, "accumulate": accumulate}
    create, step = trainer(stage, grad_dtype=grad_dtype, **options)
    batch = np.random.default_rng(5).standard_normal((DEVICES * accumulate, 8, 16)).astype("bfloat16")
    lowered = step.lower(create(), batch).as_text()
    name = "all_reduce" if stage == 0 else "reduce_scatter"
    travels = re.findall(rf'"stablehlo.{name}".*?\}}\) : \(tensor<8x16x(\w+)>', lowered, re.DOTALL)
    assert set(travels) == {"f32" if grad_dtype == "float32" else "bf16"}, lowered
    state, _ = run(create(), step, [batch])
    got, want = np.asarray(state.opt_state["w"]), batch.astype(np.float64).mean(0)
    largest = np.abs(batch.astype(np.float64)).mean(0)  # what the rounding of a sum is a part of
    if grad_dtype == "float32":
        assert np.all(np.abs(got - want) <= 2.0**-22 * largest)
    else:  # of each device's sum, then two levels of partial sums and the result, half a spacing of 8 bits each
        error = np.abs(got - want)
        assert np.all(error <= 5 * 2.0**-8 * largest) and error.max() > 2.0**-12 * largest.max()


@pytest.mark.parametrize("grad_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_are_summed_in_float32(stage, grad_dtype):
    """A sum of 256 and fifteen ones: in bfloat16 it would stay at 256, and float32's 271 becomes 272 at the end."""
    dot = lambda params, x: jnp.sum(params["w"].astype(jnp.float32) * x.mean(0))
    options = {"loss_fn": dot, "params": {"w": jnp.ones((4, 16), "bfloat16")}, "make_tx": summed, "reduce": "sum"}
    create, step = trainer(stage, grad_dtype=grad_dtype, accumulate=16, **options)
    batch = np.ones((DEVICES, 16, 4, 16), np.float32)
    batch[:, 0] = 256
    state, _ = run(create(), step, [batch.reshape(DEVICES * 16, 4, 16) / DEVICES])
    np.testing.assert_array_equal(state.opt_state["w"], 272)


def test_a_float16_model_without_a_loss_scale_warns_once(monkeypatch):
    monkeypatch.setattr(step_module, "_warned_of_float16", False)
    options = {"loss_fn": plain_sum, "params": {"a": jnp.ones(4), "h": jnp.ones((4, 16), "float16")}, "make_tx": sgd}
    trainer(1, zerojax.static_loss_scale(8.0), **options)  # no warning, which would be an error here
    with pytest.warns(
        UserWarning, match=r"1 params are float16, 'h' .*loss_scale=zerojax.dynamic_loss_scale\(\)"
    ) as seen:
        trainer(1, **options)
    assert len(seen) == 1
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        trainer(2, **options)
    assert not again
