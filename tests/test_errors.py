"""What a training step refuses, and that it says which leaf, what came, what was wanted, and the way out."""

import functools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

import zerojax

DEVICES = 4
ROWS = np.ones((32, 8), np.float32)


def two_leaves():
    return {"w": jnp.ones((8, 4)), "b": jnp.ones((4,))}


def mean_square(params, x):
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def momentum():
    return optax.sgd(0.1, momentum=0.9)


@functools.cache
def plan_of(stage, devices=DEVICES):
    return zerojax.make_plan(two_leaves(), models.mesh_of(devices), stage=stage, min_size=4)


@functools.cache
def state_of(stage, devices=DEVICES, make_tx=momentum):
    """Shared by tests: a call that is refused donates nothing."""
    return zerojax.create_train_state(two_leaves(), make_tx(), plan_of(stage, devices))


def step_of(loss_fn=mean_square, stage=1, make_tx=momentum, **options):
    return zerojax.make_train_step(loss_fn, make_tx(), plan_of(stage), **options)


def message(error):
    """The text that a user reads, notes included."""
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


def refused(error_type, parts, f, *args, **kwargs):
    """Calls `f`; it raises `error_type` with all of `parts` in its message."""
    with pytest.raises(error_type) as error:
        f(*args, **kwargs)
    for part in parts:
        assert part in message(error), message(error)


# Batches.


@pytest.mark.parametrize(
    ("batch", "accumulate", "parts"),
    [
        (ROWS[:30], 1, ["'(root)'", "[30, 8]", "30 rows", "4 devices", "'data'", "drop or pad"]),
        ({"x": ROWS[:20]}, 2, ["'x'", "[20, 8]", "20 rows", "4 devices", "2 micro-batches", "= 8"]),
        ({"x": ROWS, "y": [ROWS[:30]]}, 1, ["'y/0'", "[30, 8]"]),
        ({"x": ROWS, "n": 1.0}, 1, ["'n'", "scalar", "leading dim"]),
        ({"x": ROWS, "n": np.float32(1)}, 1, ["'n'", "scalar"]),
        ({"x": ROWS, "y": ROWS[:16]}, 1, ["'x' has 32 rows", "'y' has 16 rows", "leading dim"]),
        (ROWS[:0], 1, ["'(root)'", "[0, 8]", "0 rows"]),
        ({}, 1, ["batch has no arrays"]),
        (None, 1, ["batch has no arrays"]),
    ],
)
def test_batches_that_do_not_fit(batch, accumulate, parts):
    loss_fn = lambda params, batch: mean_square(params, batch["x"])
    step = step_of(loss_fn, accumulate=accumulate)
    refused(ValueError, ["batch", *parts], step, state_of(1), batch)
    evaluate = zerojax.make_eval_step(loss_fn, plan_of(1))
    if accumulate == 1:
        refused(ValueError, ["batch", *parts], evaluate, two_leaves(), batch)
        refused(ValueError, ["batch", *parts], zerojax.value_and_grad(loss_fn, plan_of(1)), two_leaves(), batch)


def test_two_axes_taken_as_one_are_counted_together():
    mesh = models.mesh_of(2, 4, names=("replica", "fsdp"))
    plan = zerojax.make_plan(two_leaves(), mesh, stage=1, axis=("replica", "fsdp"), min_size=4)
    value_and_grad = zerojax.value_and_grad(mean_square, plan)
    parts = ["20 rows", "8 devices", "('replica', 'fsdp')"]
    refused(ValueError, parts, value_and_grad, two_leaves(), ROWS[:20])


# Loss functions.


@pytest.mark.parametrize(
    ("loss_fn", "has_aux", "parts"),
    [
        (lambda p, x: jnp.mean((x @ p["w"]) ** 2, axis=1), False, ["floating scalar", "float32[8]", "mean"]),
        (lambda p, x: mean_square(p, x)[None], False, ["floating scalar", "float32[1]"]),
        (lambda p, x: jnp.int32(1), False, ["floating scalar", "int32[]"]),
        (lambda p, x: 1.0, False, ["floating scalar", "float"]),
        (lambda p, x: None, False, ["floating scalar", "NoneType"]),
        (lambda p, x: (mean_square(p, x), {}), False, ["floating scalar", "tuple", "has_aux=True"]),
        (lambda p, x: {"loss": mean_square(p, x)}, False, ["floating scalar", "dict"]),
        (mean_square, True, ["has_aux=True", "(loss, aux)"]),
        (lambda p, x: (mean_square(p, x), 1, 2), True, ["has_aux=True", "(loss, aux)", "tuple"]),
        (lambda p, x: (jnp.ones(3), mean_square(p, x)), True, ["floating scalar", "float32[3]"]),
    ],
)
def test_losses_that_are_none(loss_fn, has_aux, parts):
    refused(ValueError, ["loss", *parts], step_of(loss_fn, has_aux=has_aux), state_of(1), ROWS)
    refused(
        ValueError, ["loss", *parts], zerojax.make_eval_step(loss_fn, plan_of(1), has_aux=has_aux), two_leaves(), ROWS
    )


# Options.


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"accumulate": 0}, ["accumulate", "at least 1", "0"]),
        ({"accumulate": -2}, ["accumulate", "-2"]),
        ({"accumulate": 1.5}, ["accumulate", "whole number", "1.5"]),
        ({"accumulate": "2"}, ["accumulate", "'2'"]),
        ({"reduce": "max"}, ["reduce", "('mean', 'sum')", "'max'"]),
        ({"reduce": None}, ["reduce", "None"]),
        ({"grad_dtype": "float23"}, ["grad_dtype", "bfloat16", "'float23'"]),
        ({"grad_dtype": "int8"}, ["grad_dtype", "floating", "'int8'"]),
        ({"layerwise": "kernel"}, ["layerwise='kernel'", "names no leaf", "b, w"]),
        ({"layerwise": lambda name: name == "W"}, ["layerwise", "names no leaf", "b, w"]),
    ],
)
def test_options_that_mean_nothing(options, parts):
    refused(ValueError, parts, step_of, **options)


def test_gradients_do_not_travel_as_integers():
    """They would be cut to whole numbers on the way."""
    with pytest.raises((TypeError, ValueError)) as error:
        step_of(grad_dtype="int32")(state_of(1), ROWS)
    assert "grad_dtype" in message(error)
    assert "int32" in message(error)


# Layers that the model has to gather itself.


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, x: jnp.mean(x @ p["w"]),
        lambda p, x: jnp.mean(jnp.dot(x, p["w"])),
        lambda p, x: jnp.mean(jnp.einsum("bi,ij->bj", x, p["w"])),
        lambda p, x: jnp.mean(p["w"] * 2),
        lambda p, x: jnp.mean(p["w"].astype("bfloat16")),
        lambda p, x: jnp.mean(p["w"].T @ x.T),
        lambda p, x: jnp.mean(p["w"][0]),
        lambda p, x: jax.lax.scan(lambda c, w: (c + jnp.sum(w), None), 0.0, p["w"])[0],
    ],
    ids=["x @ w", "dot", "einsum", "w * 2", "astype", "T", "index", "scan"],
)
def test_a_leaf_that_the_model_forgets_to_gather(loss_fn):
    step = step_of(loss_fn, stage=3, layerwise="^w$")
    with pytest.raises((TypeError, AttributeError)) as error:
        step(state_of(3), ROWS)
    assert "'w'" in message(error)
    assert "zerojax.gather" in message(error)
    assert "layerwise" in message(error)


def test_the_leaf_that_was_forgotten_is_the_one_that_is_named():
    step = step_of(
        lambda p, x: jnp.mean(x @ p["w"] + zerojax.gather(p["b"])), stage=3, layerwise=lambda name: name in ("w", "b")
    )
    with pytest.raises(TypeError, match=r"^param 'w' is named by layerwise"):
        step(state_of(3), ROWS)


def test_a_forgotten_leaf_read_by_a_tree_function_is_no_silent_mistake():
    """A penalty on all params, as many losses have: of a shard it would be a part, and its gradient too small."""

    def penalised(params, x):
        return jnp.mean(x @ zerojax.gather(params["w"])) + sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    with pytest.raises(TypeError) as error:
        step_of(penalised, stage=3, layerwise="^w$")(state_of(3), ROWS)
    assert "zerojax.gather" in message(error)


def test_an_error_of_the_users_own_stays_what_it_is():
    def broken(params, x):
        raise KeyError("bias")

    with pytest.raises(KeyError, match="bias"):
        step_of(broken, stage=3, layerwise="^w$")(state_of(3), ROWS)
    with pytest.raises(KeyError, match="bias") as error:
        step_of(broken, stage=3)(state_of(3), ROWS)
    assert "gather" not in message(error)  # nothing is named by layerwise, so no advice about it


# Params and states.


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_params_without_a_gradient(dtype, stage):
    params = {"w": jnp.ones((8, 4)), "table": {"ids": jnp.ones((8,), dtype)}}
    plan = zerojax.make_plan(params, models.mesh_of(DEVICES), stage=stage, min_size=4)
    value_and_grad = zerojax.value_and_grad(lambda p, x: jnp.mean(x @ p["w"]), plan)
    refused(TypeError, ["'table/ids'", dtype, "no gradient"], value_and_grad, params, ROWS)
    step = zerojax.make_train_step(lambda p, x: jnp.mean(x @ p["w"]), optax.sgd(0.1), plan)
    state = zerojax.create_train_state(params, optax.sgd(0.1), plan)
    refused(TypeError, ["'table/ids'", dtype, "no gradient"], step, state, ROWS)


WRONG_PARAMS = [
    ({"w": jnp.ones((8, 4))}, ["lack the leaf 'b' [4]"]),
    ({"w": jnp.ones((4, 8)), "b": jnp.ones(4)}, ["'w'", "(4, 8)", "(8, 4)"]),
    ({"w": jnp.ones((8, 4)), "b": jnp.ones(4), "c": jnp.ones(2)}, ["have a leaf 'c' [2]", "the plan lacks"]),
    ([jnp.ones(4), jnp.ones((8, 4))], ["lack the leaf"]),
]


@pytest.mark.parametrize(("params", "parts"), WRONG_PARAMS)
@pytest.mark.parametrize("stage", [0, 3])
def test_params_that_the_plan_was_not_made_from(stage, params, parts):
    plan = plan_of(stage)
    parts = ["params", "plan", *parts]
    refused(ValueError, parts, zerojax.create_train_state, params, momentum(), plan)
    refused(ValueError, parts, zerojax.create_train_state, lambda key: params, momentum(), plan, jax.random.key(0))
    refused(ValueError, parts, step_of(stage=stage), state_of(stage)._replace(params=params), ROWS)


def test_arguments_for_an_init_that_is_none():
    parts = ["create_train_state", "1 argument", "no function"]
    refused(TypeError, parts, zerojax.create_train_state, two_leaves(), momentum(), plan_of(1), jax.random.key(0))


def test_what_is_no_optimizer():
    refused(
        TypeError, ["GradientTransformation", "function"], zerojax.make_train_step, mean_square, optax.adam, plan_of(1)
    )
    refused(
        TypeError, ["GradientTransformation", "NoneType"], zerojax.create_train_state, two_leaves(), None, plan_of(1)
    )


def test_an_optimizer_of_another_plan():
    tx = zerojax.zero(momentum(), plan_of(1))
    refused(ValueError, ["another plan"], zerojax.make_train_step, mean_square, tx, plan_of(2))
    refused(ValueError, ["another plan"], zerojax.create_train_state, two_leaves(), tx, plan_of(2))


@pytest.mark.parametrize(("stage", "devices"), [(0, DEVICES), (1, DEVICES), (3, 2)])
def test_a_state_of_another_plan(stage, devices):
    """Its arrays lie elsewhere than the step was compiled for: moving them would be a step's cost, unasked."""
    with pytest.raises(ValueError, match="plan") as error:
        step_of(stage=3)(state_of(stage, devices), ROWS)
    assert re.search(r"'(step|(.*/)?b)'", message(error)), message(error)  # the first leaf that lies elsewhere


def adam():
    return optax.adam(1e-3)


def test_a_state_of_another_optimizer():
    refused(ValueError, ["opt_state"], step_of(stage=1), state_of(1, make_tx=adam), ROWS)


def test_a_loss_scale_at_one_end_only():
    """Neither is a scale in the state dropped in silence, nor can a step go without the state that it wants."""
    rule = zerojax.static_loss_scale(8.0)
    refused(ValueError, ["loss_scale"], step_of(stage=1, loss_scale=rule), state_of(1), ROWS)
    with_scale = zerojax.create_train_state(two_leaves(), momentum(), plan_of(1), loss_scale=rule)
    refused(ValueError, ["loss_scale"], step_of(stage=1), with_scale, ROWS)


def test_arguments_in_the_wrong_order():
    refused(TypeError, ["TrainState", "dict"], step_of(stage=1), two_leaves(), ROWS)
