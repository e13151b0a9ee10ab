"""Optimizer state in host memory: what goes there, that the numbers stay the same, and that they stay there."""

import gc
import math
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import zerojax
from zerojax import host, selection

# 10 bytes of state a param: the first leaf is cut on eight devices too, where a piece has a megabyte at least.
SHAPES = {"big": (8, 256, 576), "small": (96, 40), "bias": (40,), "one": (3,)}
SMALL = zerojax.Offload(bucket_bytes=2**18)
OPTIMIZERS = {
    "split": lambda: zerojax.master_weights(
        zerojax.chain(optax.clip_by_global_norm(0.5), zerojax.fused_adamw(optax.linear_schedule(1e-2, 1e-3, 5)))
    ),
    "int8": lambda: zerojax.master_weights(
        zerojax.fused_adamw(
            1e-2,
            mu_dtype="int8",
            nu_dtype="int8",
            mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        )
    ),
    "bfloat16": lambda: zerojax.skip_nonfinite(zerojax.fused_adam(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16")),
    "lamb": lambda: zerojax.master_weights(zerojax.fused_lamb(1e-2), kind="float32"),
}


def params():
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(0.05 * rng.standard_normal(shape), jnp.bfloat16) for k, shape in SHAPES.items()}


def loss(p, x):
    p = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    h = jnp.tanh(x @ p["big"][0])
    for layer in p["big"][1:]:
        h = jnp.tanh(h[:, :256] @ layer)
    return jnp.mean((h[:, :96] @ p["small"] * p["one"].sum() + p["bias"] - 1) ** 2)


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(kind,))


def batches(steps):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((16, 256), dtype=np.float32) for _ in range(steps)]


def train(tx, mesh, stage, offload, *, steps=3, loss_scale=None, spoil=None):
    plan = zerojax.make_plan(params(), mesh, stage=stage, offload=offload, min_size=1024)
    tx = zerojax.zero(tx, plan)
    state = zerojax.create_train_state(params(), tx, plan, loss_scale=loss_scale)
    step = zerojax.make_train_step(loss, tx, plan, accumulate=2, loss_scale=loss_scale)
    losses = []
    for i, batch in enumerate(batches(steps)):
        if i == spoil:
            batch[3] = np.inf
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return tx, state, losses


def arrays(tx, state):
    """All numbers of a state, its leaves whole, as on the device."""
    return jax.device_get((state.params, tx.in_use(state.opt_state), state.skipped))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("devices", "stage"), [(8, 1), (8, 3), (2, 2), (1, 0)])
def test_a_streamed_state_is_bit_for_bit_the_one_on_the_device(name, devices, stage):
    mesh = mesh_of(devices)
    plain, there, losses = train(OPTIMIZERS[name](), mesh, stage, None)
    streamed, here, same = train(OPTIMIZERS[name](), mesh, stage, SMALL)
    assert losses == same
    assert_same(arrays(plain, there), arrays(streamed, here))
    kept, wanted = jax.tree.leaves(here.opt_state), jax.tree.leaves(streamed.plan.opt_state(streamed))
    for x, sharding in zip(kept, wanted, strict=True):  # they end where they began
        assert x.sharding == sharding and (x.sharding.memory_kind == "pinned_host") == (x.ndim > 0)
    cut = [x for x in jax.tree.leaves(here.opt_state, is_leaf=host.is_pieces) if host.is_pieces(x)]
    if devices == 1:  # of the shards of eight a piece would be too small
        assert bool(cut) == (name != "lamb")  # norms want whole leaves


def test_an_explicit_mesh_and_a_share_of_the_state():
    mesh = mesh_of(4, AxisType.Explicit)
    some = zerojax.Offload(pattern="nu|masters", bucket_bytes=2**18)
    plain, there, losses = train(OPTIMIZERS["split"](), mesh, 2, None)
    streamed, here, same = train(OPTIMIZERS["split"](), mesh, 2, some)
    assert losses == same
    assert_same(arrays(plain, there), arrays(streamed, here))
    adam = here.opt_state.inner_state[1]
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    assert (kinds(adam.mu), kinds(adam.nu), kinds(here.opt_state.masters)) == (
        {"device"},
        {"pinned_host"},
        {"pinned_host"},
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_an_overflow_leaves_what_is_on_the_host_as_it_is(scaled):
    scale = zerojax.dynamic_loss_scale(initial=2.0**8, hysteresis=1) if scaled else None
    tx = OPTIMIZERS["split"]() if scaled else OPTIMIZERS["bfloat16"]()
    runs = [train(tx, mesh_of(2), 1, offload, loss_scale=scale, spoil=1) for offload in (None, SMALL)]
    assert [int(state.skipped) for _, state, _ in runs] == [1, 1]
    assert_same(*(arrays(tx, state) for tx, state, _ in runs))


def test_the_old_state_is_freed_and_refused():
    plan = zerojax.make_plan(params(), mesh_of(2), stage=1, offload=SMALL, min_size=1024)
    tx = zerojax.zero(OPTIMIZERS["split"](), plan)
    state = zerojax.create_train_state(params(), tx, plan)
    step = zerojax.make_train_step(loss, tx, plan)
    step(state, batches(1)[0])
    moved = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert all(x.is_deleted() for x in moved)
    with pytest.raises(ValueError, match="went into an earlier step"):
        step(state, batches(1)[0])


def update_by(tx, plan, how, grads, state, now):
    if how == "apply":
        return zerojax.apply(tx, grads, state, now)
    if how == "apply in a jit":
        return jax.jit(lambda g, s, p: zerojax.apply(tx, g, s, p), out_shardings=(plan.params, plan.opt_state(tx)))(
            grads, state, now
        )
    updates, state = tx.update(grads, state, now)
    return optax.apply_updates(now, updates), state


@pytest.mark.parametrize("how", ["apply", "apply in a jit", "update"])
def test_a_loop_of_ones_own(how):
    grads = jax.tree.map(lambda x: x.astype(jnp.float32) * 3, params())
    results = []
    for offload in (None, SMALL):
        plan = zerojax.make_plan(params(), mesh_of(4), stage=2, offload=offload, min_size=1024)
        tx = zerojax.zero(OPTIMIZERS["split"](), plan)
        now, state = jax.device_put(params(), plan.params), tx.init(params())
        for _ in range(2):
            now, state = update_by(tx, plan, how, grads, state, now)
        for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(plan.opt_state(tx)), strict=True):
            assert x.sharding.memory_kind == sharding.memory_kind
        results.append(jax.device_get((now, tx.in_use(state))))
    # By XLA's update in a program of its own, of which a CPU may round a product and a sum once or twice.
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pattern", [None, "nu"])  # with "nu", mu stays on the device
def test_apply_keeps_what_it_was_given(pattern):
    offload = zerojax.Offload(bucket_bytes=2**18, pattern=pattern)
    given = params() | {"number": jnp.float32(0.5), "empty": jnp.zeros((0, 4))}
    plan = zerojax.make_plan(given, mesh_of(2), stage=1, offload=offload, min_size=1024)
    tx = zerojax.zero(OPTIMIZERS["int8"](), plan)
    state, now = tx.init(given), given
    grads = jax.tree.map(jnp.ones_like, now)
    first = zerojax.apply(tx, grads, state, now)
    assert_same(jax.device_get(first), jax.device_get(zerojax.apply(tx, grads, state, now)))


def test_a_mask_sees_the_dtypes_of_params_that_are_elsewhere():
    now = params() | {"one": jnp.ones(3, jnp.float32)}
    wide = lambda p: jax.tree.map(lambda x: x.dtype == jnp.float32, p)
    results = []
    for offload in (None, "pinned_host"):
        plan = zerojax.make_plan(now, mesh_of(2), stage=1, offload=offload, min_size=1024)
        tx = zerojax.zero(zerojax.fused_adamw(0.1, weight_decay=0.5, mask=wide), plan)
        results.append(jax.device_get(zerojax.apply(tx, now, tx.init(now), now)[0]))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_count_is_no_part_of_a_lists_first_param(dtype):
    now = [jnp.float32(1), jnp.ones((64, 32))]
    tx = zerojax.chain(zerojax.fused_adam(1e-2, mu_dtype=dtype, nu_dtype=dtype))
    results = []
    for offload in (None, "pinned_host"):
        plan = zerojax.make_plan(now, mesh_of(2), stage=1, offload=offload, min_size=64)
        (state,) = plan.rests(tx)
        assert state.count.param is None and {x.param for x in jax.tree.leaves(state.mu)} == {0, 1}
        sharded = zerojax.zero(tx, plan)
        with warnings.catch_warnings(action="error"):
            results.append(jax.device_get(zerojax.apply(sharded, now, sharded.init(now), now)[0]))
    assert_same(*results)


def test_what_a_trace_made_does_not_outlive_it():
    plan = zerojax.make_plan(params(), mesh_of(2), stage=1, offload="pinned_host", min_size=1024)
    tx = zerojax.zero(OPTIMIZERS["split"](), plan)
    state = tx.init(params())
    with jax.checking_leaks():
        zerojax.apply(tx, params(), state, params())


def test_transformations_that_trace_around_apply():
    now = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)}
    results = []
    for offload in (None, "pinned_host"):
        plan = zerojax.make_plan(now, mesh_of(2), stage=1, offload=offload, min_size=64)
        plateau = optax.contrib.reduce_on_plateau(patience=1)
        tx = zerojax.zero(zerojax.chain(plateau, zerojax.fused_adam(1e-2)), plan)
        state = tx.init(now)

        def total(c, value=1.0, *, tx=tx, state=state):
            return zerojax.apply(tx, {"w": c * now["w"]}, state, now, value=value)[0]["w"].sum()

        by_value = jax.jit(lambda value, total=total: total(1.0, value))(1.0)
        results.append((jax.jit(lambda total=total: total(1.0))(), by_value, jax.grad(total)(1.0), total(1.0)))
        results.append(jax.vmap(total)(jnp.arange(3.0)))
        jax.grad(lambda c, tx=tx, state=state: tx.update({"w": c * now["w"]}, state, now, value=1.0)[0]["w"].sum())(1.0)
    plain, several, offloaded, also = results
    for x, y in zip([*plain, *several], [*offloaded, *also], strict=True):
        # Sums of 2048 numbers of either sign, by programs that XLA fuses in other ways.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_apply_is_compiled_once_and_what_is_compiled_lives_as_long_as_its_transformation():
    class Mark:
        pass

    now = {"w": jnp.ones((64, 32))}
    for inner, offload in ((optax.sgd(1e-2), None), (zerojax.fused_adam(1e-2), "pinned_host")):
        plan = zerojax.make_plan(now, mesh_of(2), stage=1, offload=offload, min_size=64)
        traces = []
        counted = optax.stateless(lambda g, p, traces=traces: traces.append(0) or g)
        tx = zerojax.zero(zerojax.chain(counted, inner), plan)
        state = tx.init(now)
        _, state = zerojax.apply(tx, now, state, now)
        traces.clear()
        zerojax.apply(tx, now, state, now)
        assert not traces
        tx.mark = Mark()
        mark = weakref.ref(tx.mark)
        del tx, state
        gc.collect()
        assert mark() is None


def test_any_other_optimizer_is_moved_whole_and_says_so():
    with pytest.warns(UserWarning, match=r"moved to the device as a whole.*none of zerojax's optimizers"):
        _, state, losses = train(optax.adamw(1e-2), mesh_of(2), 1, "pinned_host")
    _, there, same = train(optax.adamw(1e-2), mesh_of(2), 1, None)
    assert losses == same
    assert_same(jax.device_get(state.params), jax.device_get(there.params))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"pinned_host"}
    before = zerojax.chain(optax.add_decayed_weights(0.1), zerojax.fused_adam(1e-2))
    with pytest.warns(UserWarning, match="a link before its optimizer wants params"):
        train(before, mesh_of(2), 1, "pinned_host", steps=1)


def test_states_go_away_and_come_back():
    tx, state, _ = train(OPTIMIZERS["int8"](), mesh_of(2), 3, zerojax.Offload(pattern="nu"), steps=1)
    before, kinds = arrays(tx, state), jax.tree.map(lambda x: x.sharding.memory_kind, state)
    away = zerojax.offload_states(state, tx.plan)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away)} == {"pinned_host"}
    back = zerojax.reload_states(away, tx.plan)
    assert jax.tree.map(lambda x: x.sharding.memory_kind, back) == kinds
    assert_same(before, arrays(tx, back))


@pytest.mark.parametrize("offload", [None, "pinned_host"])
def test_a_state_that_is_away_goes_nowhere_twice_and_into_no_step(offload):
    plan = zerojax.make_plan(params(), mesh_of(2), stage=1, offload=offload, min_size=1024)
    tx = zerojax.zero(OPTIMIZERS["bfloat16"](), plan)
    state = zerojax.create_train_state(params(), tx, plan)
    state = state._replace(skipped=state.step)  # one array at two leaves
    before = arrays(tx, state)
    away = zerojax.offload_states(zerojax.offload_states(state, plan), plan)
    with pytest.raises(ValueError, match="went into an earlier step, or was offloaded"):
        zerojax.offload_states(state, plan)
    step = zerojax.make_train_step(loss, tx, plan)
    with pytest.raises(ValueError, match=r"is in pinned_host memory.*zerojax.reload_states\(state, plan\)"):
        step(away, batches(1)[0])
    back = zerojax.reload_states(zerojax.reload_states(away, plan), plan)
    assert_same(before, arrays(tx, back))
    with pytest.raises(TypeError, match="offload_states wants the TrainState of create_train_state, got dict"):
        zerojax.offload_states(back.params, plan)
    with pytest.raises(ValueError, match="call it outside"):
        jax.jit(lambda state: zerojax.offload_states(state, plan))(back)


def test_a_state_that_the_host_cannot_hold_stays_where_it_is(monkeypatch):
    plan = zerojax.make_plan(params(), mesh_of(2), stage=1, min_size=1024)
    state = zerojax.create_train_state(params(), optax.sgd(1e-2), plan)
    monkeypatch.setattr(host.os, "sysconf", lambda name: 2)
    with pytest.raises(MemoryError, match="the state has"):
        zerojax.offload_states(state, plan)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def planned(**offload):
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"w": jax.ShapeDtypeStruct((64, 4096, 4096), "bfloat16"), "b": jax.ShapeDtypeStruct((4096,), "bfloat16")}
    return zerojax.make_plan(shapes, mesh, stage=1, offload=zerojax.Offload(**offload))


def test_what_goes_to_the_host():
    tx = zerojax.master_weights(zerojax.fused_adamw(1e-3))
    n = 64 * 4096 * 4096 // 8
    everything = planned().memory(tx)
    assert everything.host == 10 * (n + 4096) and everything.opt_state == 4  # the count
    assert planned(fraction=0.5).memory(tx).host == 4 * n + 10 * 4096  # a moment of w, and all of b's, which still fits
    assert planned(pattern="/nu/").memory(tx).host == 4 * (n + 4096)
    none = zerojax.make_plan(planned().shapes, planned().mesh, stage=1).memory(tx)
    assert planned(hbm_budget_bytes=none.total).memory(tx) == none
    assert planned(hbm_budget_bytes=none.total - 1).memory(tx).host == 4 * n
    assert everything.total + everything.host == none.total
    assert "nu float32 on the host" in planned(pattern="/nu/").table(tx)


def test_buckets_are_less_than_four_of_those_asked_for():
    plan = planned(bucket_bytes=2**25)
    tx = zerojax.master_weights(zerojax.fused_adamw(1e-3))
    rests = [rest for rest in jax.tree.leaves(plan.rests(tx)) if rest.param is not None and math.prod(rest.grid) > 1]
    piece = sum(rest.size // math.prod(rest.grid) for rest in rests)
    assert piece > 2**23 and host.LIVE * piece < 4 * 2**25
    assert {x.spec for x in jax.tree.leaves(plan.opt_state(tx).masters["w"])} == {plan.update_specs["w"]}


@pytest.mark.parametrize(
    ("shape", "cuts", "count"), [((24, 2048, 8192), (1, 1, 8), 100), ((50257, 768), (1, 1), 7), ((7, 11), (1, 1), 5)]
)
def test_grids_cut_what_is_whole_into_equal_parts(shape, cuts, count):
    grid = selection.grid_of(shape, cuts, count)
    assert all(n % k == 0 for n, k in zip(shape, grid, strict=True)) and math.prod(grid) >= count
    assert all(k == 1 for k, cut in zip(grid, cuts, strict=True) if cut > 1)
    x = jnp.arange(math.prod(shape[-2:])).reshape(shape[-2:]) if len(shape) == 2 else jnp.zeros((24, 8, 32))
    small = grid if len(shape) == 2 else (3, 2, 1)
    pieces = host.cut(x, small)
    sharding = NamedSharding(mesh_of(1), jax.P())
    rest = host.Rest("x", x.shape, x.dtype, sharding.spec, x.nbytes, 0, on_host=True, grid=small)
    np.testing.assert_array_equal(host.in_use(pieces, rest), x)


@pytest.mark.parametrize(
    ("offload", "kind", "message"),
    [
        (lambda: "disk", ValueError, "'pinned_host' or a zerojax.Offload, got 'disk'"),
        (lambda: zerojax.Offload(fraction=1.5), ValueError, "from 0 to 1, got 1.5"),
        (lambda: zerojax.Offload(fraction=0.5, hbm_budget_bytes=1), ValueError, "not both"),
        (lambda: zerojax.Offload(pattern="("), ValueError, "no regular expression"),
        (lambda: zerojax.Offload(bucket_bytes=0), ValueError, "at least 1, got 0"),
        (lambda: zerojax.Offload(params=True), ValueError, "wants stage 3, got stage 1"),
        (
            lambda: zerojax.Offload(pattern="nothing"),
            ValueError,
            "names no array of the optimizer's state; it has count",
        ),
        (lambda: zerojax.Offload(hbm_budget_bytes=1000), ValueError, "more than hbm_budget_bytes=1 kB"),
    ],
)
def test_wishes_that_cannot_be_met(offload, kind, message):
    with pytest.raises(kind, match=message):
        zerojax.make_plan(params(), mesh_of(1), stage=1, offload=offload()).memory(zerojax.fused_adam(1e-3))


def test_more_than_the_host_has_is_refused_before_anything_is_made(monkeypatch):
    with pytest.raises(MemoryError, match=r"the machine has .* take more devices"):
        host.check_room(2**60, mesh_of(2), "the state has")
    monkeypatch.setattr(host.meshes, "simulated", lambda mesh: False)
    monkeypatch.setattr(host.os, "sysconf", lambda name: 2**20)
    with pytest.raises(MemoryError, match="XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=88"):
        host.check_room(40 * 2**30, mesh_of(2), "the state has")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "88")
    host.check_room(40 * 2**30, mesh_of(2), "the state has")
