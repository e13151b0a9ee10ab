"""Fused optimizers against Optax and a float64 recurrence, in a loop of one's own and under every stage."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

import zerojax
from pallas_kernels import dispatch

SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 5)
DECAYED = {"w": True, "b": False, "scalar": True, "none": False}
PAIRS = {
    "adam": (zerojax.fused_adam(1e-2), optax.adam(1e-2)),
    "adam_nesterov": (zerojax.fused_adam(SCHEDULE, nesterov=True), optax.adam(SCHEDULE, nesterov=True)),
    "adam_eps_root": (zerojax.fused_adam(1e-2, 0.8, 0.99, 1e-6, 1e-7), optax.adam(1e-2, 0.8, 0.99, 1e-6, 1e-7)),
    "adamw": (zerojax.fused_adamw(SCHEDULE, weight_decay=0.1), optax.adamw(SCHEDULE, weight_decay=0.1)),
    "adamw_mask": (zerojax.fused_adamw(1e-2, mask=DECAYED), optax.adamw(1e-2, mask=DECAYED)),
    "adamw_mask_function": (
        zerojax.fused_adamw(1e-2, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
    ),
    "decay_schedule": (zerojax.fused_adamw(1e-2, weight_decay=SCHEDULE), optax.adamw(1e-2, weight_decay=SCHEDULE)),
    "lamb": (zerojax.fused_lamb(SCHEDULE, weight_decay=0.1), optax.lamb(SCHEDULE, weight_decay=0.1)),
    "chain": (
        zerojax.chain(optax.clip_by_global_norm(1.0), zerojax.fused_adamw(1e-2)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    ),
}  # fmt: skip


def params_of(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"w": (24, 16), "b": (16,), "scalar": (), "none": (0, 3)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def grads_of(step, dtype="float32"):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype), params_of())


def close(got, want, steps):
    # Each step rounds a param once, and Optax's bias corrections are off by 1.3e-5 of a step of 1e-2 at first.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6 * steps, atol=3e-7 * steps), got, want)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("way", ["update", "apply"])
def test_fused_equals_optax(name, way):
    fused, plain = PAIRS[name]
    params, want = params_of(), params_of()
    state, plain_state = fused.init(params), plain.init(want)

    @jax.jit
    def step(params, state, grads):
        if way == "apply":
            return zerojax.apply(fused, grads, state, params)
        updates, state = fused.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(4):
        params, state = step(params, state, grads_of(i))
        updates, plain_state = plain.update(grads_of(i), plain_state, want)
        want = optax.apply_updates(want, updates)
    close(params, want, 4)
    for key in ("mu", "nu", "count"):
        get = lambda tree, key=key: optax.tree.get_all_with_path(tree, key)[0][1]
        close(get(state), get(plain_state), 4)


LINKS = {
    "scale_clip": [optax.scale(0.01), optax.clip_by_global_norm(1.0)],
    "clip_by_element": [optax.clip_by_global_norm(1.0), optax.clip(0.05)],
    "scale_decay": [optax.scale(0.01), optax.add_decayed_weights(0.1)],
    "clip_scale": [optax.clip_by_global_norm(1.0), optax.scale(3.0)],
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("nested", [False, True])
def test_chains_hand_on_what_optax_chains_do(name, nested):
    # By the moments: Adam's step forgets a factor of its gradients.
    tx = zerojax.fused_adam(1e-2)
    first, second = LINKS[name]
    fused = zerojax.chain(first, zerojax.chain(second, tx)) if nested else zerojax.chain(first, second, tx)
    plain = optax.chain(first, second, optax.adam(1e-2))
    params = params_of()
    _, state = jax.jit(functools.partial(zerojax.apply, fused))(grads_of(1), fused.init(params), params)
    _, want = plain.update(grads_of(1), plain.init(params), params)
    for key in ("mu", "nu"):
        get = lambda tree, key=key: optax.tree.get_all_with_path(tree, key)[0][1]
        # What a link adds may cancel, and XLA contracts it with its product under jit: some bits of the sum.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), get(state), get(want))


def test_updates_are_as_wide_as_params():
    params, tx = params_of(), zerojax.fused_adam(1e-2)
    updates, _ = tx.update(grads_of(1, "bfloat16"), tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


def adamw_float64(params, steps, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8, wd=0.1):
    p = {k: np.asarray(x, np.float64) for k, x in params.items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t in range(1, steps + 1):
        for k, g in grads_of(t).items():
            g = np.asarray(g, np.float64)
            m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g * g
            p[k] -= lr * (m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps) + wd * p[k])
    return p


@pytest.mark.parametrize("steps", [1, 30])
def test_adamw_drifts_no_more_from_float64_than_optax(steps):
    want = adamw_float64(params_of(), steps)
    errors = []
    for tx in (zerojax.fused_adamw(1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)):
        params, state = params_of(), tx.init(params_of())
        for t in range(1, steps + 1):
            params, state = zerojax.apply(tx, grads_of(t), state, params)
        errors.append(max(np.abs(params[k] - want[k]).max() for k in ("w", "b", "scalar")))
    ulp = np.finfo(np.float32).eps * max(np.abs(want[k]).max() for k in ("w", "b"))
    assert errors[0] <= max(2 * ulp, errors[1])


@pytest.mark.skipif(bool(dispatch.too_old()), reason="kernels need a newer jax")
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [zerojax.fused_adamw, zerojax.fused_lamb])
def test_kernel_equals_reference(make, grad_dtype):
    params, tx = params_of(), make(1e-2, weight_decay=0.1, mask=DECAYED, implementation="interpret")
    state = tx.init(params)
    state = state._replace(mu=grads_of(7), nu=jax.tree.map(jnp.square, grads_of(8)))
    got = zerojax.apply(tx, grads_of(1, grad_dtype), state, params)
    xla = make(1e-2, weight_decay=0.1, mask=DECAYED, implementation="xla")
    want = zerojax.apply(xla, grads_of(1, grad_dtype), state, params)
    close(got, want, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [zerojax.fused_adamw, zerojax.fused_lamb])
def test_stages_train_as_one_device(stage, make):
    def run(stage, devices):
        params = models.mlp_params()
        plan = zerojax.make_plan(params, models.mesh_of(devices), stage=stage, min_size=64)
        tx = zerojax.zero(zerojax.chain(optax.clip_by_global_norm(1.0), make(1e-2, weight_decay=0.1)), plan)
        state = zerojax.create_train_state(params, tx, plan)
        step = zerojax.make_train_step(models.mlp_loss, tx, plan)
        program = step.lower(state, models.mlp_batches()[0]).compile().as_text()
        losses = []
        for batch in models.mlp_batches(4):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params), program

    losses, params, _ = run(0, 1)
    got_losses, got, program = run(stage, 8)
    np.testing.assert_allclose(got_losses, losses, rtol=3e-6)  # sums over devices round in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), got, params)
    if stage == 3 and make is zerojax.fused_adamw:
        gathered = program.count(" all-gather(") + program.count(" all-gather-start(")
        assert gathered <= 3  # the params for the loss, and nothing for the update


@pytest.mark.skipif(bool(dispatch.too_old()), reason="kernels need a newer jax")
@pytest.mark.parametrize("make", [zerojax.fused_adamw, zerojax.fused_lamb])
def test_kernel_runs_on_shards(make):
    params = {"w": params_of()["w"]}
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=1, min_size=64)
    results = []
    for implementation in ("interpret", "xla"):
        tx = zerojax.zero(make(1e-2, implementation=implementation), plan)
        apply = jax.jit(functools.partial(zerojax.apply, tx))
        results.append(apply({"w": grads_of(1)["w"]}, tx.init(params), params))
    close(*results, 1)


def test_an_overflow_leaves_everything_but_the_scale():
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=2, min_size=64)
    tx = zerojax.zero(zerojax.fused_adamw(1e-2), plan)
    scale = zerojax.dynamic_loss_scale(initial=2.0**8, hysteresis=1)
    state = zerojax.create_train_state(params, tx, plan, loss_scale=scale)
    step = zerojax.make_train_step(models.mlp_loss, tx, plan, loss_scale=scale)
    batch = models.mlp_batches(1)[0]
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, batch | {"y": np.full_like(batch["y"], np.inf)})
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert not metrics["finite"] and int(state.skipped) == 1 and float(state.loss_scale.scale) == 2.0**7
    state, metrics = step(state, batch)
    assert metrics["finite"] and int(state.opt_state.count) == 1


@pytest.mark.parametrize("make", [zerojax.fused_adam, zerojax.fused_adamw, zerojax.fused_lamb])
def test_works_inside_optax_wrappers(make):
    params = params_of()
    frozen = {"w": "train", "b": "freeze", "scalar": "train", "none": "train"}
    wrapped = {
        "inject": optax.inject_hyperparams(make)(learning_rate=SCHEDULE),
        "masked": optax.masked(make(1e-2), {"w": True, "b": False, "scalar": True, "none": True}),
        "multi": optax.multi_transform({"train": make(1e-2), "freeze": optax.set_to_zero()}, frozen),
        "steps": optax.MultiSteps(make(1e-2), 2),
    }
    for tx in wrapped.values():
        abstract = jax.eval_shape(tx.init, params)
        state = jax.jit(tx.init)(params)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda x: x.shape, abstract)
        for i in range(2):
            new, state = jax.jit(functools.partial(zerojax.apply, tx))(grads_of(i), state, params)
        assert not np.array_equal(new["w"], params["w"])


def test_moments_of_16_bit_params_are_float32_and_do_not_stall():
    params = {"w": jnp.zeros(4, jnp.bfloat16)}
    tx = zerojax.fused_adam(1e-3)
    state = tx.init(params)
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.float32
    step = jax.jit(functools.partial(tx.update))
    for _ in range(3000):
        updates, state = step({"w": jnp.full(4, 0.1, jnp.bfloat16)}, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    bfloat16_tenth = float(jnp.bfloat16(0.1))
    # 1 - 0.999**3000 of the square; Optax's bfloat16 moment stands at 0.0039.
    np.testing.assert_allclose(state.nu["w"], bfloat16_tenth**2 * (1 - 0.999**3000), rtol=1e-3)


def test_deepspeed_lamb_has_its_golden_values():
    rng = np.random.default_rng(3)
    p, lr, b1, b2, eps, wd = rng.standard_normal(8), 1e-2, 0.9, 0.999, 1e-8, 0.01
    tx = zerojax.fused_lamb(lr, b1, b2, eps, weight_decay=wd, variant="deepspeed")
    params, m, v = {"p": jnp.asarray(p, jnp.float32)}, np.zeros(8), np.zeros(8)
    state = tx.init(params)
    for t in range(1, 4):
        g = rng.standard_normal(8)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / (np.sqrt(v) + eps) + wd * p
        ratio = np.clip(np.linalg.norm(p) / np.linalg.norm(u), 0.01, 10.0)
        p = p - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * ratio * u
        params, state = zerojax.apply(tx, {"p": jnp.asarray(g, jnp.float32)}, state, params)
    np.testing.assert_allclose(params["p"], p, rtol=3e-6, atol=1e-7)


def test_trust_ratio_is_clamped_and_one_without_a_norm():
    for p, clamp, ratio in ((100.0, 10.0, 10.0), (0.0, 10.0, 1.0)):
        tx = zerojax.fused_lamb(0.1, max_trust_ratio=clamp)
        params = {"p": jnp.full(4, p)}
        new, _ = zerojax.apply(tx, {"p": jnp.ones(4)}, tx.init(params), params)
        np.testing.assert_allclose(new["p"], p - 0.1 * ratio, rtol=2e-6)


SMALL = {
    "bfloat16": zerojax.fused_adamw(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16"),
    "int8": zerojax.chain(
        optax.clip_by_global_norm(1.0), zerojax.fused_adamw(1e-2, mu_dtype="int8", nu_dtype=jnp.int8)
    ),
    "lamb": zerojax.fused_lamb(1e-2, weight_decay=0.1, mu_dtype="bfloat16", nu_dtype="int8"),
    "injected": optax.inject_hyperparams(zerojax.fused_adamw)(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", [1, 3])
def test_shards_round_as_the_whole_does(name, stage):
    tx, params = SMALL[name], models.mlp_params()
    batch = models.mlp_batches(1)[0]
    grads = jax.grad(models.mlp_loss)(params, batch)
    want, want_state = jax.jit(functools.partial(zerojax.apply, tx))(grads, tx.init(params), params)
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=stage, min_size=1)
    sharded = zerojax.zero(tx, plan)
    state = sharded.init(params)
    got, state = jax.jit(functools.partial(zerojax.apply, sharded))(grads, state, jax.device_put(params, plan.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, want)
    # A clip's or trust ratio's norm is summed in another order, and may differ in its last bit. Then a moment meets its
    # threshold once in 2**16 times: 0.1 are to be expected of these 4,000 elements of two moments.
    differ = [
        np.sum(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (state, want_state)), strict=True)
    ]
    assert sum(differ) <= 2
    shardings = jax.tree.map(lambda x: x.sharding, state)
    assert all(
        a.is_equivalent_to(b, x.ndim)
        for a, b, x in zip(*map(jax.tree.leaves, (shardings, plan.opt_state(tx), state)), strict=True)
    )


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"nu_dtype='float16' cannot hold a moment: squares leave its range"):
        zerojax.fused_adam(1e-3, nu_dtype="float16")
    with pytest.raises(ValueError, match="mu_dtype='int32' cannot hold a moment; take float32, bfloat16 or int8"):
        zerojax.fused_adamw(1e-3, mu_dtype="int32")
    with pytest.raises(ValueError, match="mu_dtype='int7' is no dtype"):
        zerojax.fused_lamb(1e-3, mu_dtype="int7")
    with pytest.raises(ValueError, match="variant must be one of"):
        zerojax.fused_lamb(1e-3, variant="apex")
    with pytest.raises(TypeError, match="leaf 'n' of dtype int32 has no Adam moments"):
        zerojax.fused_adam(1e-3).init({"n": jnp.arange(3)})
    tx = zerojax.fused_adamw(1e-3)
    with pytest.raises(TypeError, match="meaning of its own for scale"):
        zerojax.apply(zerojax.fused_adam(1e-3), params_of(), None, params_of(), scale=2.0)
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params_of(), tx.init(params_of()))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        tx = zerojax.fused_adam(1e-3, implementation="triton")
        zerojax.apply(tx, params_of(), tx.init(params_of()), params_of())


def test_a_chain_of_one_is_a_chain():
    params = {"w": jnp.ones((4, 3))}
    grads = {"w": jnp.full((4, 3), 0.5)}
    ours, theirs = zerojax.chain(zerojax.fused_adam(0.1)), optax.chain(optax.adam(0.1))
    updates, _ = theirs.update(grads, theirs.init(params), params)
    got, state = zerojax.apply(ours, grads, ours.init(params), params)
    np.testing.assert_allclose(got["w"], params["w"] + updates["w"], rtol=1e-6)
    assert int(state[0].count) == 1
    with pytest.raises(ValueError, match="at least one transformation"):
        zerojax.chain()
