"""Every stage, device count, mesh and accumulation trains as plain Optax on one device does."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import zerojax

# Sums over rows are taken in another order: each loss is off by a few float32 roundings (6e-8), and Adam divides
# gradients by their own size, so that params near zero carry the rounding of a gradient, times the learning rate.
RTOL, ATOL = 2e-6, 2e-6


def train(plan, loss_fn, params, *, tx=None, batches=None, **options):
    tx = zerojax.zero(tx or models.clipped_adamw(), plan)
    state = zerojax.create_train_state(params, tx, plan, loss_scale=options.get("loss_scale"))
    step = zerojax.make_train_step(loss_fn, tx, plan, **options)
    history = []
    for batch in batches or models.mlp_batches():
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def assert_matches_reference(state, history, params_fn, loss_fn):
    losses, norms, params = models.reference(params_fn, loss_fn)
    np.testing.assert_allclose([m["loss"] for m in history], losses, rtol=RTOL)
    np.testing.assert_allclose([m["grad_norm"] for m in history], norms, rtol=RTOL)
    assert all(m["finite"] for m in history)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), jax.device_get(state.params), params
    )


def assert_laid_out(state, tx, plan):
    """Every array is where the plan says, shard by shard."""
    placed = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(placed, state.params, plan.params))
    assert jax.tree.all(jax.tree.map(placed, state.opt_state, plan.opt_state(tx)))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_matches_optax_on_one_device(stage, devices, accumulate):
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(devices), stage=stage, min_size=64)
    state, history = train(plan, models.mlp_loss, params, accumulate=accumulate)
    assert_matches_reference(state, history, models.mlp_params, models.mlp_loss)
    assert_laid_out(state, models.clipped_adamw(), plan)
    assert int(state.step) == len(history)
    models.mlp_loss(params, models.mlp_batches()[0])  # the caller's arrays are alive


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_explicit_mesh(stage):
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(8, axis_type=models.EXPLICIT), stage=stage, min_size=64)
    state, history = train(plan, models.mlp_loss, params, accumulate=2)
    assert_matches_reference(state, history, models.mlp_params, models.mlp_loss)
    assert_laid_out(state, models.clipped_adamw(), plan)


@pytest.mark.parametrize("axis_type", [models.AUTO, models.EXPLICIT])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_axes_taken_as_one(stage, axis_type):
    mesh = models.mesh_of(2, 4, names=("replica", "fsdp"), axis_type=axis_type)
    params = models.mlp_params()
    plan = zerojax.make_plan(params, mesh, stage=stage, axis=("replica", "fsdp"), min_size=64)
    state, history = train(plan, models.mlp_loss, params, accumulate=2)
    assert_matches_reference(state, history, models.mlp_params, models.mlp_loss)
    assert_laid_out(state, models.clipped_adamw(), plan)


@pytest.mark.parametrize("axis_type", [models.AUTO, models.EXPLICIT])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tensor_parallel_axis_is_kept(stage, axis_type):
    mesh = models.mesh_of(4, 2, names=("data", "model"), axis_type=axis_type)
    params = models.mlp_params()
    specs = jax.tree.map(lambda _: None, params)
    specs["inner"] = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
    specs["tied"] = PartitionSpec("model")
    plan = zerojax.make_plan(params, mesh, stage=stage, param_specs=specs, min_size=64)
    state, history = train(plan, models.mlp_loss, params, accumulate=2)
    assert_matches_reference(state, history, models.mlp_params, models.mlp_loss)
    assert_laid_out(state, models.clipped_adamw(), plan)
    want = PartitionSpec("data", "model") if stage == 3 else PartitionSpec(None, "model")
    assert state.params["inner"]["kernel"].sharding.spec == want


@pytest.mark.parametrize("axis_type", [models.AUTO, models.EXPLICIT])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_layers_gathered_one_by_one(devices, accumulate, axis_type):
    params = models.stack_params()
    plan = zerojax.make_plan(params, models.mesh_of(devices, axis_type=axis_type), stage=3, min_size=64)
    loss_fn = functools.partial(models.stack_loss, gather=zerojax.gather)
    state, history = train(plan, loss_fn, params, accumulate=accumulate, layerwise="^layers/")
    assert_matches_reference(state, history, models.stack_params, models.stack_loss)


def test_sum_over_devices_and_micro_batches():
    params, batches = models.mlp_params(), models.mlp_batches(1)
    loss_fn = lambda p, b: jnp.sum((b["x"] @ p["inner"]["kernel"]) ** 2)
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=2, min_size=64)
    _, (metrics,) = train(plan, loss_fn, params, batches=batches, accumulate=2, reduce="sum")
    whole, grads = jax.value_and_grad(loss_fn)(params, batches[0])
    np.testing.assert_allclose(metrics["loss"], whole, rtol=RTOL)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(grads["inner"]["kernel"]), rtol=RTOL)


def test_aux_is_reduced_as_the_loss_is():
    params, batches = models.mlp_params(), models.mlp_batches(1)
    loss_fn = lambda p, b: (models.mlp_loss(p, b), {"mean": b["x"].mean(0), "count": jnp.int32(b["x"].shape[0])})
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=1, min_size=64)
    _, (metrics,) = train(plan, loss_fn, params, batches=batches, accumulate=2, has_aux=True)
    np.testing.assert_allclose(metrics["aux"]["mean"], batches[0]["x"].mean(0), atol=1e-7)
    assert metrics["aux"]["count"] == 4  # each of 4 devices x 2 micro-batches sees 4 of 32 rows


@pytest.mark.parametrize("axis_type", [models.AUTO, models.EXPLICIT])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_eval_step_and_value_and_grad_give_the_loss_and_gradient_of_the_whole_batch(stage, axis_type):
    params, batch = models.stack_params(), models.mlp_batches(1)[0]
    loss_fn = functools.partial(models.stack_loss, gather=zerojax.gather)
    plan = zerojax.make_plan(params, models.mesh_of(8, axis_type=axis_type), stage=stage, min_size=64)
    state = zerojax.create_train_state(params, models.clipped_adamw(), plan)
    want, want_grads = jax.value_and_grad(models.stack_loss)(params, batch)
    metrics = zerojax.make_eval_step(loss_fn, plan, layerwise="^layers/")(state.params, batch)
    np.testing.assert_allclose(metrics["loss"], want, rtol=RTOL)
    loss, grads = zerojax.value_and_grad(loss_fn, plan, accumulate=2, layerwise="^layers/")(state.params, batch)
    np.testing.assert_allclose(loss, want, rtol=RTOL)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), jax.device_get(grads), want_grads)
    assert jax.tree.all(jax.tree.map(lambda g, s: g.sharding.is_equivalent_to(s, g.ndim), grads, plan.grads))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_params_keep_every_dtype(stage, accumulate):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models.mlp_params())
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=stage, min_size=64)
    first = zerojax.create_train_state(params, models.clipped_adamw(), plan)
    dtypes = jax.tree.map(lambda x: x.dtype, first)
    state, history = train(plan, models.mlp_loss, params, accumulate=accumulate)
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    losses, _, _ = models.reference(models.mlp_params, models.mlp_loss)
    np.testing.assert_allclose([m["loss"] for m in history], losses, rtol=0.05)  # 8 bits of a weight, 4 steps


@pytest.mark.parametrize(
    "make_tx",
    [
        lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        lambda: optax.inject_hyperparams(optax.adamw)(1e-2),
        lambda: optax.apply_if_finite(optax.lamb(1e-2), 3),
        lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
        lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    ],
    ids=["MultiSteps", "inject_hyperparams", "apply_if_finite", "adafactor", "reduce_on_plateau"],
)
def test_other_optimizers_step_as_on_one_device(make_tx):
    params, tx = models.mlp_params(), optax.with_extra_args_support(make_tx())
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=2, min_size=64)
    state, _ = train(plan, models.mlp_loss, params, tx=tx)
    opt_state = tx.init(params)
    for batch in models.mlp_batches():
        loss, grads = jax.value_and_grad(models.mlp_loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)  # LAMB divides by norms of updates too
    jax.tree.map(close, jax.device_get(state.params), params)


def test_steps_can_be_scanned():
    params, batches = models.mlp_params(), models.mlp_batches()
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=2, min_size=64)
    tx = models.clipped_adamw()
    step = zerojax.make_train_step(models.mlp_loss, tx, plan)
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *batches)
    _state, metrics = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(
        zerojax.create_train_state(params, tx, plan), stacked
    )
    np.testing.assert_allclose(metrics["loss"], models.reference(models.mlp_params, models.mlp_loss)[0], rtol=RTOL)
