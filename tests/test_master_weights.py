"""16-bit params with exact weights behind them, and steps that what is not finite leaves as if they had never been."""

import functools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

import zerojax
from pallas_kernels import formats

INNERS = {
    "adamw": optax.adamw(1e-2),
    "fused": zerojax.fused_adamw(1e-2),
    "chain": zerojax.chain(optax.clip_by_global_norm(1.0), zerojax.fused_adamw(1e-2, mask={"w": True, "b": False})),
    "momentum": optax.sgd(1e-2, momentum=0.9),
}
SHAPES = {"w": (24, 32), "b": (33,)}


def params_of(dtype):
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.standard_normal(shape), "bfloat16").astype(dtype) for k, shape in SHAPES.items()}


@functools.cache
def all_grads():
    """Gradients of a thousand steps, made once: computed beside an update they could differ in the last bit."""
    rng = np.random.default_rng(1)
    return {k: rng.standard_normal((1000, *shape), dtype=np.float32) for k, shape in SHAPES.items()}


def grads_at(step):
    return jax.tree.map(lambda x: jnp.asarray(x[step]), all_grads())


def run(tx, params, state, steps, *, way="apply", first=0):
    def step(carry, grads):
        params, state = carry
        if way == "apply":
            return zerojax.apply(tx, grads, state, params), None
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    some = jax.tree.map(lambda x: x[first : first + steps], all_grads())
    return jax.jit(lambda *carry: jax.lax.scan(step, carry, some)[0])(params, state)


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("kind", ["split", "float32"])
@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("way", ["apply", "update"])
def test_weights_are_those_of_float32_training(name, kind, way):
    inner = INNERS[name]
    tx = zerojax.master_weights(inner, kind=kind)
    params = params_of("bfloat16")
    params, state = run(tx, params, tx.init(params), 20, way=way)
    want, want_state = run(inner, params_of("float32"), inner.init(params_of("float32")), 20, way=way)
    full = zerojax.full_precision(params, state)
    same((full, state.inner_state), (want, want_state))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    if kind == "float32":
        same(params, jax.tree.map(lambda x: x.astype("bfloat16"), full))
    else:  # truncated: nearer to zero, by less than a spacing
        for p, w in zip(jax.tree.leaves(params), jax.tree.leaves(full), strict=True):
            p, w = np.asarray(p, np.float64), np.asarray(w, np.float64)
            assert np.all((np.abs(p) <= np.abs(w)) & (np.abs(w - p) < 2.0**-7 * np.abs(p) + 1e-30))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_thousand_steps_are_bit_equal_at_every_stage(stage):
    inner = INNERS["fused"]

    def train(tx, dtype):
        params = params_of(dtype)
        plan = zerojax.make_plan(params, models.mesh_of(4), stage=stage, min_size=1)
        tx = zerojax.zero(tx, plan)
        return plan, tx, *run(tx, jax.device_put(params, plan.params), tx.init(params), 1000)

    # With float32 params at the same stage: a sum over a shard may have another last bit than one over the whole.
    *_, want, _ = train(inner, "float32")
    plan, tx, params, state = train(zerojax.master_weights(inner), "bfloat16")
    full = zerojax.full_precision(params, state)
    same(full, want)
    layouts = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, plan.opt_state(tx.inner))
    assert all(jax.tree.leaves(layouts))


@pytest.mark.parametrize(("dtype", "state_bytes"), [(None, 10.0), ("bfloat16", 6.0), ("int8", 4 + 2 / 32)])
def test_bytes_of_a_param(dtype, state_bytes):
    params = {"w": jnp.zeros((256, 512), "bfloat16")}
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=1)
    tx = zerojax.zero(zerojax.master_weights(zerojax.fused_adamw(1e-3, mu_dtype=dtype, nu_dtype=dtype)), plan)
    state = zerojax.create_train_state(params, tx, plan)
    device = jax.devices()[0]
    held = lambda tree: sum(
        s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device
    )
    count = 256 * 512
    assert held(state.params) == 2 * count
    assert held(state.opt_state) == state_bytes * count / 8 + 4  # and the count of steps
    assert plan.memory(tx).opt_state == held(state.opt_state)


@pytest.mark.parametrize("kind", ["split", "float32"])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_gathered_after_an_update_is_16_bit_params(stage, kind):
    params = {"w": jnp.ones((256, 64), "bfloat16")}
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=stage)
    tx = zerojax.zero(zerojax.master_weights(zerojax.fused_adamw(1e-3), kind=kind), plan)
    state = zerojax.create_train_state(params, tx, plan)
    step = zerojax.make_train_step(lambda params, x: jnp.mean(x @ params["w"]), tx, plan)
    text = step.lower(state, np.ones((4, 256), np.float32)).as_text()
    # Read before XLA: for four H200s it compiles the one constraint into one all-gather of bfloat16, but on a CPU,
    # which has no 16-bit collectives, into one of float32.
    whole = re.findall(r"sharding_constraint .* <@mesh, \[{}, {}\]> : tensor<256x64x(\w+)>", text)
    assert set(whole) == {"bf16"}
    assert "all_gather" not in text


def test_a_model_trains_with_split_masters_and_small_moments():
    start = jax.tree.map(lambda x: x.astype("bfloat16"), models.mlp_params())
    loss = lambda params, batch: models.mlp_loss(jax.tree.map(lambda x: x.astype("float32"), params), batch)
    mesh, losses = models.mesh_of(4), {}
    for dtype in (None, "int8"):
        for stage in (1, 3):
            inner = zerojax.chain(
                optax.clip_by_global_norm(1.0), zerojax.fused_adamw(3e-3, mu_dtype=dtype, nu_dtype=dtype)
            )
            plan = zerojax.make_plan(start, mesh, stage=stage, min_size=1)
            tx = zerojax.zero(zerojax.master_weights(inner), plan)
            state = zerojax.create_train_state(start, tx, plan)
            step = zerojax.make_train_step(loss, tx, plan, grad_dtype="float32")
            found = []
            for batch in models.mlp_batches(3) * 5:
                state, metrics = step(state, batch)
                found.append(float(metrics["loss"]))
            losses[dtype, stage] = found
    np.testing.assert_allclose(losses[None, 1], losses[None, 3], rtol=1e-5)
    np.testing.assert_allclose(losses["int8", 1], losses[None, 1], rtol=0.02)
    assert losses["int8", 3][-1] < 0.9 * losses["int8", 3][0]


def test_a_weight_that_nearly_vanishes_keeps_its_param_and_master_together():
    params = {"w": jnp.asarray([1.0, -1.0, 1.0], "bfloat16")}
    tx = zerojax.master_weights(optax.sgd(1.0))
    state = tx.init(params)
    updates, state = tx.update({"w": jnp.asarray([1 - 1e-7, -1.0, 1 + 3e-6])}, state, params)
    params = optax.apply_updates(params, updates)
    full = zerojax.full_precision(params, state)["w"]
    assert np.all(np.abs(np.asarray(full) - np.asarray([1e-7, 0, -3e-6])) <= 2.0**-24)
    same(params["w"], formats.split(full).high)


@pytest.mark.parametrize("wrap", [lambda tx: tx, zerojax.master_weights])
def test_what_is_not_finite_changes_nothing_but_a_count(wrap):
    tx = zerojax.skip_nonfinite(wrap(zerojax.fused_adamw(optax.linear_schedule(1e-2, 0, 10))))
    params = params_of("bfloat16" if wrap is zerojax.master_weights else "float32")
    params, state = run(tx, params, tx.init(params), 2)
    bad = grads_at(5) | {"b": jnp.full((33,), jnp.nan)}
    for way in ("apply", "update"):
        if way == "apply":
            new, skipped = jax.jit(functools.partial(zerojax.apply, tx))(bad, state, params)
        else:
            updates, skipped = tx.update(bad, state, params)
            new = optax.apply_updates(params, updates)
        same((new, skipped.inner_state), (params, state.inner_state))
        assert int(skipped.skipped) == 1
    # And goes on as if the step had not been.
    got = run(tx, new, skipped, 2, first=2)[0]
    want = run(tx, params_of(params["w"].dtype), tx.init(params_of(params["w"].dtype)), 4)[0]
    same(got, want)


def test_the_train_step_counts_what_it_skips():
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(2), stage=2, min_size=1)
    tx = zerojax.zero(zerojax.skip_nonfinite(optax.adamw(1e-2)), plan)
    state = zerojax.create_train_state(params, tx, plan)
    step = zerojax.make_train_step(models.mlp_loss, tx, plan)
    (batch,) = models.mlp_batches(1)
    state, metrics = step(state, batch | {"x": batch["x"] * np.inf})
    assert (int(metrics["skipped"]), bool(metrics["finite"])) == (1, False)
    same(state.params, params)
    state, metrics = step(state, batch)
    assert (int(metrics["skipped"]), int(state.step), bool(metrics["finite"])) == (1, 2, True)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="kind must be one of"):
        zerojax.master_weights(optax.sgd(1.0), kind="bfloat16")
    with pytest.raises(TypeError, match="leaf 'n' has dtype int32; floating params are wanted"):
        zerojax.master_weights(optax.sgd(1.0)).init({"n": jnp.arange(3)})
    with pytest.raises(TypeError, match=r"leaf 'h' has dtype float16.*upper half"):
        zerojax.master_weights(optax.sgd(1.0)).init({"h": jnp.zeros(3, "float16")})
    with pytest.raises(ValueError, match="has 0 states of master_weights"):
        zerojax.full_precision({}, optax.sgd(1.0).init({}))
    with pytest.raises(ValueError, match="needs the params"):
        tx = zerojax.master_weights(optax.sgd(1.0))
        tx.update({}, tx.init({}))


def test_the_table_shows_masters_and_moments_by_dtype():
    params = {"w": jax.ShapeDtypeStruct((256, 512), "bfloat16")}
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=1)
    inner = zerojax.fused_adamw(1e-3, mu_dtype="bfloat16", nu_dtype="int8")
    last = plan.table(zerojax.master_weights(zerojax.chain(optax.clip(1.0), inner))).splitlines()[-1]
    assert last == "opt_state: masters uint16 32.8 kB, count int32 4 B, mu bfloat16 32.8 kB, nu 8-bit 16.9 kB"


WRAPPERS = {
    "skip": zerojax.skip_nonfinite,
    "masters": zerojax.master_weights,
    "both": lambda tx: zerojax.skip_nonfinite(zerojax.master_weights(tx)),
    "both, nested": lambda tx: zerojax.master_weights(zerojax.skip_nonfinite(tx)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_clip_before_a_wrapper_clips(name):
    # By SGD: Adam forgets a factor of its gradients.
    tx = zerojax.chain(optax.clip_by_global_norm(1.0), WRAPPERS[name](optax.sgd(1.0)))
    params, grads = {"w": jnp.zeros(4, "bfloat16")}, {"w": jnp.full(4, 100.0)}
    new, _ = jax.jit(functools.partial(zerojax.apply, tx))(grads, tx.init(params), params)
    np.testing.assert_allclose(new["w"].astype("float32"), -0.5, rtol=2**-8)
    plan = zerojax.make_plan(params, models.mesh_of(2), stage=2, min_size=1)
    state = zerojax.create_train_state(params, tx, plan)
    loss = lambda params, batch: jnp.mean(batch @ params["w"].astype("float32"))
    state, _ = zerojax.make_train_step(loss, tx, plan, grad_dtype="float32")(state, jnp.full((2, 4), 100.0))
    np.testing.assert_allclose(state.params["w"].astype("float32"), -0.5, rtol=2**-8)


def test_small_gradients_survive_two_scales():
    inner = zerojax.master_weights(zerojax.chain(optax.scale(1.0), zerojax.fused_adamw(0.1)), kind="float32")
    tx = zerojax.chain(optax.clip_by_global_norm(1e-2), inner)
    params = {"w": jnp.zeros(2, "float16")}
    _, state = zerojax.apply(tx, {"w": jnp.asarray([6e4, 1e-2], "float16")}, tx.init(params), params)
    mu = optax.tree.get(state, "mu")["w"]
    np.testing.assert_allclose(mu, [1e-3, 1e-3 * 1e-2 / 6e4], rtol=1e-3)


def test_the_states_of_links_before_a_skip_stay_too():
    tx = zerojax.chain(optax.trace(0.9), zerojax.skip_nonfinite(optax.sgd(1.0)))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    new, after = zerojax.apply(tx, {"w": jnp.asarray([jnp.nan, 1.0])}, state, params)
    same((new, after[0]), (params, state[0]))


def test_trees_with_none_masks_and_shapes_alone():
    params = {"a": jnp.ones(3, "bfloat16"), "b": None, "c": jnp.ones(2, "bfloat16")}
    tx = zerojax.master_weights(optax.sgd(1e-4))
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["b"] is None
    np.testing.assert_array_equal(zerojax.full_precision(params, state)["a"].shape, (3,))
    masked = optax.masked(tx, {"a": True, "b": None, "c": False})
    full = zerojax.full_precision(params, masked.init(params))
    assert (full["a"].dtype, full["c"].dtype) == (jnp.float32, jnp.float32)
    shapes = {"a": jax.ShapeDtypeStruct((4,), "bfloat16"), "b": jax.ShapeDtypeStruct((4,), "float32")}
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for inner in (optax.adam(1e-3), zerojax.fused_adam(1e-3, mu_dtype="int8")):
        tx = zerojax.master_weights(inner)
        assert like(tx.init(shapes)) == like(jax.eval_shape(tx.init, shapes))
    with pytest.raises(TypeError, match="leaf 'a' is a ShapeDtypeStruct"):
        zerojax.master_weights(optax.adam(1e-3), kind="float32").init(shapes)
