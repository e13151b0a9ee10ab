"""`zero(inner, plan)` is `inner`, for any Optax transformation: same params, state in shards, same names and dtypes."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import zerojax

DEVICES, MIN_SIZE, STEPS = 8, 16, 3
LAYOUTS = [(1, models.AUTO), (1, models.EXPLICIT), (3, models.AUTO), (3, models.EXPLICIT)]
name_of = lambda x: str(getattr(x, "name", x)).lower()
every_layout = pytest.mark.parametrize(("stage", "axis_type"), LAYOUTS, ids=name_of)
either_mesh = pytest.mark.parametrize("axis_type", [models.AUTO, models.EXPLICIT], ids=name_of)

# The same arithmetic runs on both sides, compiled once for one device and once for shards: XLA then fuses other
# products and sums into one rounding, and a sum over a leaf (norms, means, the dots of L-BFGS) has another order.
# Params are near 1, so each of three updates may end one rounding away (6e-8); Muon's five matrix products, a few.
RTOL, ATOL = 1e-6, 2e-7
# A moment stored in bfloat16 may fall to the other side of a rounding: one unit in its last place.
BFLOAT16_RTOL = 2**-7


def params_of_every_kind():
    """760 elements: leaves that are cut along their first or last dim, and that stay whole: odd, small, scalar."""
    keys = iter(jax.random.split(jax.random.key(3), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    return {
        "wide": {"kernel": normal(16, 24), "bias": normal(24)},
        "tall": [normal(32, 8)],
        "odd": normal(7, 13),
        "small": normal(4),
        "gain": jnp.float32(1.5),
    }


@functools.cache
def grads_of(step):
    """Gradients of no loss: what an optimizer makes of them is all that counts here."""
    keys = iter(jax.random.split(jax.random.key(100 + step), 8))
    return jax.device_get(
        jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), params_of_every_kind())
    )


def by_size(params):
    return jax.tree.map(lambda x: "train" if x.ndim == 2 else "freeze", params)


has_dims = lambda params: jax.tree.map(lambda x: x.ndim > 0, params)
schedule = optax.linear_schedule(1e-2, 1e-3, 10)
TRANSFORMATIONS = {
    "sgd momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adam bfloat16 mu": lambda: optax.adam(1e-2, mu_dtype="bfloat16"),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
    "novograd": lambda: optax.chain(optax.novograd(1e-2, weight_decay=0.1), optax.trace(0.5)),
    "adagrad": lambda: optax.adagrad(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "sm3": lambda: optax.masked(optax.sm3(1e-2), has_dims),  # Optax's sm3 fails on a scalar
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9, weight_decay_rate=0.1),
    "muon": lambda: optax.contrib.muon(1e-2, weight_decay=0.1),
    "scale_by_lbfgs": lambda: optax.chain(optax.scale_by_lbfgs(memory_size=3), optax.scale(-1e-2)),
    "noisy_sgd": lambda: optax.chain(optax.noisy_sgd(1e-2, eta=0.1, key=7), optax.trace(0.9)),
    "clip adamw schedule": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule)),
    "masked": lambda: optax.masked(optax.adamw(1e-2), has_dims),
    "partition": lambda: optax.partition({"train": optax.adamw(1e-2), "freeze": optax.set_to_zero()}, by_size),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule, weight_decay=0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(1e-2), max_consecutive_errors=2),
    "flatten": lambda: optax.flatten(optax.adam(1e-2)),
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def a_plan(stage, axis_type, params=None):
    params = params_of_every_kind() if params is None else params
    return zerojax.make_plan(params, models.mesh_of(DEVICES, axis_type=axis_type), stage=stage, min_size=MIN_SIZE)


def placed(params, shardings):
    """Copies that a donating step may have."""
    return jax.tree.map(lambda x, sharding: jax.device_put(np.array(x), sharding), params, shardings)


@functools.cache
def plain(name):
    """What Optax does on one device: the state at first, params and state after the last step."""
    params, tx = params_of_every_kind(), TRANSFORMATIONS[name]()
    first = state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, grads_of(i))
    return first, params, state


def assert_same_values(got, want):
    def same(path, a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == jnp.bfloat16:
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=BFLOAT16_RTOL, atol=ATOL)
        else:
            np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL, err_msg=jax.tree_util.keystr(path))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree_util.tree_map_with_path(same, got, want)


def assert_laid_out(tree, shardings):
    where = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    wrong = jax.tree_util.tree_leaves_with_path(jax.tree.map(where, tree, shardings))
    assert all(right for _, right in wrong), [jax.tree_util.keystr(path) for path, right in wrong if not right]


def assert_held_in_shards(state):
    """Whatever can be cut by eight is held by eighths, and some of it can; all else is whole on each device."""
    cut = []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        cuttable = x.size >= MIN_SIZE and any(n % DEVICES == 0 for n in x.shape)
        held = {shard.data.size for shard in x.addressable_shards}
        assert held == {x.size // DEVICES if cuttable else x.size}, jax.tree_util.keystr(path)
        assert len({shard.device for shard in x.addressable_shards}) == DEVICES
        cut.append(cuttable)
    assert any(cut)


@every_layout
@every_transformation
def test_same_params_as_plain_optax_from_an_eighth_of_the_state(name, stage, axis_type):
    first, want, last = plain(name)
    plan = a_plan(stage, axis_type)
    tx = zerojax.zero(TRANSFORMATIONS[name](), plan)
    params = placed(params_of_every_kind(), plan.params)
    shardings = plan.opt_state(TRANSFORMATIONS[name]())
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    assert_same_values(state, first)
    assert_laid_out(state, shardings)
    assert_held_in_shards(state)
    for i in range(STEPS):
        params, state, updates = step(params, state, grads_of(i))
        assert_laid_out(updates, plan.params)
        assert_laid_out(params, plan.params)
        assert_laid_out(state, shardings)
    assert_held_in_shards(state)
    assert_same_values(params, want)
    assert_same_values(state, last)
    assert len(traces) == 1  # the state that comes out is of the type that went in


@either_mesh
@every_transformation
def test_init_inside_jit(name, axis_type):
    """Most states are zeros, so that no array of the program comes from the mesh: it is the plan that names it."""
    plan = a_plan(1, axis_type)
    tx = zerojax.zero(TRANSFORMATIONS[name](), plan)
    state = jax.jit(tx.init)(placed(params_of_every_kind(), plan.params))
    assert_same_values(state, plain(name)[0])
    assert_laid_out(state, plan.opt_state(TRANSFORMATIONS[name]()))
    assert_held_in_shards(state)


@either_mesh
@every_transformation
def test_init_from_shapes_alone(name, axis_type):
    first, _, _ = plain(name)
    plan = a_plan(1, axis_type)
    tx = zerojax.zero(TRANSFORMATIONS[name](), plan)
    abstract = jax.eval_shape(tx.init, plan.shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(first)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, first))
    try:
        TRANSFORMATIONS[name]().init(plan.shapes)
    except TypeError:  # inject_hyperparams and flatten ask for arrays; zero() asks for what its inner one does
        with pytest.raises(TypeError, match="ShapeDtypeStruct"):
            tx.init(plan.shapes)
        return
    state = tx.init(plan.shapes)  # none of these states depends on the values of the params
    assert_same_values(state, first)
    assert_laid_out(state, plan.opt_state(TRANSFORMATIONS[name]()))


def test_state_is_planned_on_a_mesh_one_does_not_have():
    mesh = jax.sharding.AbstractMesh((1024,), ("data",), axis_types=(models.AUTO,))
    shapes = {"w": jax.ShapeDtypeStruct((4096, 2048), "float32")}
    plan = zerojax.make_plan(shapes, mesh, stage=1)
    assert jax.eval_shape(zerojax.zero(optax.adam(1e-3), plan).init, shapes)[0].mu == shapes
    assert plan.opt_state(optax.adam(1e-3))[0].mu["w"].spec == PartitionSpec("data", None)


def stepped(tx, params, state):
    """Params and state after STEPS updates in a user's own jit."""
    for i in range(STEPS):
        updates, state = jax.jit(tx.update)(grads_of(i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("stage", [0, 2])
def test_the_other_stages(stage):
    _, want, _ = plain("clip adamw schedule")
    plan = a_plan(stage, models.AUTO)
    tx = zerojax.zero(TRANSFORMATIONS["clip adamw schedule"](), plan)
    params = placed(params_of_every_kind(), plan.params)
    state = tx.init(params)
    params, state = stepped(tx, params, state)
    assert_same_values(params, want)
    held = optax.tree.get(state, "mu")["wide"]["kernel"].addressable_shards[0].data.size
    assert held == 16 * 24 // (8 if stage else 1)


# Gradients of a real loss, in a loop of one's own.


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loop_of_ones_own(stage):
    losses, _, want = models.reference(models.mlp_params, models.mlp_loss)
    params = models.mlp_params()
    plan = zerojax.make_plan(params, models.mesh_of(DEVICES), stage=stage, min_size=64)
    tx = zerojax.zero(models.clipped_adamw(), plan)
    params = placed(params, plan.params)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(models.mlp_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for batch, loss in zip(models.mlp_batches(), losses, strict=True):
        params, state, got = step(params, state, jax.device_put(batch, plan.batch))
        np.testing.assert_allclose(got, loss, rtol=2e-6)  # the mean over rows is taken in another order
    # Adam divides a gradient by its own size: where it is near zero its rounding counts in full, times the step size.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), jax.device_get(params), want)
    assert_laid_out(state, plan.opt_state(models.clipped_adamw()))


@every_layout
def test_a_scan_over_steps(stage, axis_type):
    """A scan wants the carry's type unchanged, its layout on an Explicit mesh included."""
    _, want, _ = plain("adamw")
    plan = a_plan(stage, axis_type)
    tx = zerojax.zero(TRANSFORMATIONS["adamw"](), plan)
    params = placed(params_of_every_kind(), plan.params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: np.stack(g), *[grads_of(i) for i in range(STEPS)])
    (params, state), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, stacked))(params, tx.init(params))
    assert_same_values(params, want)
    assert_laid_out(state, plan.opt_state(TRANSFORMATIONS["adamw"]()))


@every_layout
def test_each_device_does_its_share_of_the_arithmetic(stage, axis_type):
    """An eighth; and where gradients come whole, at stage 1, what it costs to cut them."""
    params = {"w": jnp.ones((64, 64))}
    plan = a_plan(stage, axis_type, params)

    def flops(tx, params):
        return jax.jit(tx.update).lower(params, tx.init(params), params).compile().cost_analysis()["flops"]

    share = flops(zerojax.zero(optax.adamw(1e-2), plan), placed(params, plan.params)) / flops(optax.adamw(1e-2), params)
    assert share < (0.25 if stage == 1 else 0.126)


@either_mesh
def test_under_a_mesh_that_the_caller_has_set(axis_type):
    _, want, _ = plain("adamw")
    plan = a_plan(1, axis_type)
    tx = zerojax.zero(TRANSFORMATIONS["adamw"](), plan)
    with jax.set_mesh(plan.mesh):
        params = placed(params_of_every_kind(), plan.params)
        state = tx.init(params)
        params, _ = stepped(tx, params, state)
    assert_same_values(params, want)


def test_tensor_parallel_state_is_cut_on_both_dims():
    mesh = models.mesh_of(4, 2, names=("data", "model"))
    params = params_of_every_kind()
    specs = jax.tree.map(lambda _: None, params)
    specs["wide"]["kernel"] = PartitionSpec(None, "model")
    plan = zerojax.make_plan(params, mesh, stage=1, param_specs=specs, min_size=MIN_SIZE)
    tx = zerojax.zero(TRANSFORMATIONS["lamb"](), plan)
    params = placed(params, plan.params)
    state = tx.init(params)
    for i in range(STEPS):
        updates, state = jax.jit(tx.update)(grads_of(i), state, params)
        params = optax.apply_updates(params, updates)
    assert_same_values(params, plain("lamb")[1])
    assert optax.tree.get(state, "nu")["wide"]["kernel"].sharding.spec == PartitionSpec("data", "model")
    assert params["wide"]["kernel"].sharding.spec == PartitionSpec(None, "model")


def test_bfloat16_params_keep_their_dtype_and_their_states():
    params = jax.tree.map(lambda x: x.astype("bfloat16"), params_of_every_kind())
    grads = [jax.tree.map(lambda x: x.astype("bfloat16"), grads_of(i)) for i in range(STEPS)]
    make = lambda: optax.adamw(1e-2, mu_dtype="float32")

    def train(tx, params):
        state = tx.init(params)
        for g in grads:
            updates, state = jax.jit(tx.update)(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    plan = a_plan(1, models.AUTO, params)
    assert_same_values(train(zerojax.zero(make(), plan), placed(params, plan.params)), train(make(), params))


# Without jit.


@every_layout
def test_eager_update_is_traced_once(stage, axis_type):
    traces = []

    def counted(updates, state, params):
        traces.append(1)
        return updates, state

    plan = a_plan(stage, axis_type)
    count = optax.GradientTransformation(lambda params: optax.EmptyState(), counted)
    tx = zerojax.zero(optax.chain(count, TRANSFORMATIONS["lamb"]()), plan)
    params = placed(params_of_every_kind(), plan.params)
    state = tx.init(params)
    for i in range(STEPS):
        updates, state = tx.update(placed(grads_of(i), plan.params), state, params)
        assert_laid_out(updates, plan.params)
        params = jax.jit(optax.apply_updates)(params, updates)
    assert len(traces) == 1
    assert_same_values(params, plain("lamb")[1])
    assert_held_in_shards(state)


def test_eager_arrays_may_come_from_anywhere():
    """Params and gradients of one device, or of NumPy, are laid out on the way in."""
    _, want, _ = plain("adamw")
    plan = a_plan(1, models.AUTO)
    tx = zerojax.zero(TRANSFORMATIONS["adamw"](), plan)
    params = jax.device_get(params_of_every_kind())
    state = tx.init(params_of_every_kind())
    for i in range(STEPS):
        updates, state = tx.update(grads_of(i), state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
    assert_same_values(params, want)


def test_update_without_params():
    plan = a_plan(1, models.AUTO)
    tx = zerojax.zero(optax.sgd(0.5), plan)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads_of(0), tx.init(params_of_every_kind()))
        assert_same_values(updates, jax.tree.map(lambda g: -0.5 * g, grads_of(0)))


# Extra arguments of update.


def quadratic(params):
    return sum(jnp.sum((x - 0.25) ** 2) for x in jax.tree.leaves(params))


def line_search():
    return optax.chain(
        optax.scale_by_lbfgs(memory_size=3),
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=4),
    )


def lbfgs_step(tx, jit):
    """A step of L-BFGS as Optax's documentation writes it: `value_fn` is a function, closed over or passed eagerly."""

    def step(params, state):
        value, grad = jax.jit(jax.value_and_grad(quadratic))(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=quadratic)
        return jax.jit(optax.apply_updates)(params, updates), state

    return jax.jit(step) if jit else step


@functools.cache
def plain_lbfgs():
    params, tx = params_of_every_kind(), line_search()
    state, step = tx.init(params), lbfgs_step(tx, jit=True)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@every_layout
def test_extra_args_reach_a_line_search(stage, axis_type, jit):
    plan = a_plan(stage, axis_type)
    tx = zerojax.zero(line_search(), plan)
    params = placed(params_of_every_kind(), plan.params)
    state, step = tx.init(params), lbfgs_step(tx, jit)
    for _ in range(STEPS):
        params, state = step(params, state)
    # Near the minimum the curvature is a quotient of two small differences, which enlarges the roundings of both.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, plain_lbfgs())
    assert float(quadratic(jax.device_get(params))) < 1e-3 * float(quadratic(params_of_every_kind()))
    assert_laid_out(state, plan.opt_state(line_search()))


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_extra_args_reach_those_who_want_them_only(jit):
    plan = a_plan(1, models.AUTO)
    by_value = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params, *, value, **extra: (
            jax.tree.map(lambda g: g * value * extra["more"][1], updates),
            state,
        ),
    )
    run = (lambda f: jax.jit(f)) if jit else (lambda f: f)
    for inner, factor in ((optax.chain(by_value, optax.sgd(0.5)), -6.0), (optax.sgd(0.5), -0.5)):
        tx = zerojax.zero(inner, plan)
        state = tx.init(params_of_every_kind())
        updates, _ = run(tx.update)(grads_of(0), state, None, value=jnp.float32(4), more=[1, 3.0], unused=None)
        assert_same_values(updates, jax.tree.map(lambda g, f=factor: np.float32(f) * g, grads_of(0)))


# Inside and around other transformations.


def test_state_keeps_the_names_of_optax():
    plan = a_plan(1, models.AUTO)
    tx = zerojax.zero(
        optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)), plan
    )
    params = params_of_every_kind()
    _, state = tx.update(grads_of(0), tx.init(params), params)
    assert optax.tree.get(state, "learning_rate") == np.float32(1e-2)
    assert jax.tree.structure(optax.tree.get(state, "mu")) == jax.tree.structure(params)
    assert optax.tree.get(optax.tree.get(state, "inner_state"), "count") == 1
    state = optax.tree.set(state, learning_rate=jnp.float32(0))  # a schedule of one's own writes the state
    updates, _ = tx.update(grads_of(1), state, params)
    assert all(not np.any(np.asarray(u)) for u in jax.tree.leaves(updates))


def test_zero_inside_other_transformations():
    """As a link of a chain, and under lookahead, whose params are pairs of what the plan was made from."""
    params = params_of_every_kind()
    plan = a_plan(1, models.AUTO)
    zeroed = lambda: zerojax.zero(optax.adamw(1e-2), plan)

    def train(tx, params):
        state = tx.init(params)
        params, _ = stepped(tx, params, state)
        return params, state

    chain = lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx, optax.scale(0.5))
    assert_same_values(train(chain(zeroed()), params)[0], train(chain(optax.adamw(1e-2)), params)[0])
    pair = optax.LookaheadParams.init_synced(params)
    lookahead = lambda tx: optax.lookahead(tx, sync_period=2, slow_step_size=0.5)
    got, state = train(lookahead(zeroed()), pair)
    assert_same_values(got, train(lookahead(optax.adamw(1e-2)), pair)[0])
    assert_laid_out(state.fast_state, plan.opt_state(optax.adamw(1e-2)))


def test_zero_of_zero_is_itself():
    plan = a_plan(1, models.AUTO)
    tx = zerojax.zero(optax.adam(1e-2), plan)
    assert zerojax.zero(tx, plan) is tx
    with pytest.raises(ValueError, match="already wraps with another plan"):
        zerojax.zero(tx, a_plan(2, models.AUTO))


@pytest.mark.parametrize("inner", [optax.adam, None, 1e-3, "adam", optax.MultiSteps(optax.adam(1e-2), 2)])
def test_what_is_no_transformation_is_refused(inner):
    with pytest.raises(TypeError, match=r"optax\.GradientTransformation") as error:
        zerojax.zero(inner, a_plan(1, models.AUTO))
    assert type(inner).__name__ in str(error.value)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_trees_that_were_not_planned_are_refused_by_name(jit):
    plan = a_plan(1, models.AUTO)
    tx = zerojax.zero(optax.adam(1e-2), plan)
    params, grads = params_of_every_kind(), grads_of(0)
    state = tx.init(params)
    run = (lambda f: jax.jit(f)) if jit else (lambda f: f)
    with pytest.raises(ValueError, match=r"updates: leaf 'odd' has shape \(13, 7\), the plan has \(7, 13\)"):
        run(tx.update)(grads | {"odd": grads["odd"].T}, state, params)
    with pytest.raises(ValueError, match="updates lack the leaf 'tall/0'"):
        run(tx.update)(grads | {"tall": []}, state, params)
    with pytest.raises(ValueError, match="params have a leaf 'more'"):
        run(tx.update)(grads, state, params | {"more": params["odd"]})
    with pytest.raises(ValueError, match="params lack the leaf 'gain'"):
        run(tx.init)({name: x for name, x in params.items() if name != "gain"})


@either_mesh
def test_inside_a_shard_map_is_refused(axis_type):
    """There arrays are shards already, and a norm over them would be a shard's."""
    plan = a_plan(1, axis_type)
    tx = zerojax.zero(optax.sgd(1e-2), plan)
    params, whole = placed(params_of_every_kind(), plan.params), PartitionSpec()
    for f in (tx.init, lambda params: tx.update(params, tx.init(params), params)):
        with pytest.raises(ValueError, match=r"inside a shard_map over \('data',\)"):
            jax.shard_map(f, mesh=plan.mesh, in_specs=whole, out_specs=whole, check_vma=False)(params)


def test_python_numbers_among_params_become_arrays_as_strong_as_others():
    init = lambda: {"w": jnp.ones((64, 32)), "scale": 2.0}
    plan = zerojax.make_plan(jax.eval_shape(init), models.mesh_of(8), stage=3)
    for given in (init, init()):
        state = zerojax.create_train_state(given, optax.adam(1e-3), plan)
        assert not any(x.weak_type for x in jax.tree.leaves(state.params))
        assert float(state.params["scale"]) == 2.0
