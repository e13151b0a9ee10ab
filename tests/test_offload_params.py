"""Params in host memory: that the numbers stay the same, where they are, and what moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_offload
from flax import linen as nn
from jax.sharding import AxisType
from test_offload import OPTIMIZERS, arrays, assert_same, batches, mesh_of

import zerojax
import zerojax.nn
from zerojax import host
from zerojax.step import StreamedTrainStep

ON_HOST = zerojax.Offload(params=True, bucket_bytes=2**18)
# 12 bytes a param with its state: the first leaf is cut on four devices too, where a piece has a megabyte at least.
SHAPES = {"blocks": {"w": (8, 256, 256), "b": (8, 256)}, "out": (256, 96), "scale": (3,)}


def params(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(0.05 * rng.standard_normal(shape), dtype)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def layer(h, w):
    w = zerojax.gather(w)
    return jnp.tanh(h @ w["w"].astype(jnp.float32) + w["b"].astype(jnp.float32)), None


def head(p, h):
    return jnp.mean((h @ p["out"].astype(jnp.float32) * p["scale"].astype(jnp.float32).sum() - 1) ** 2)


def scanned(p, x):
    body = jax.checkpoint(layer, policy=zerojax.keep_expensive)
    return head(p, jax.lax.scan(body, x, p["blocks"])[0])


def unrolled(p, x):
    for i in range(8):
        x, _ = jax.checkpoint(layer)(x, jax.tree.map(lambda a: a[i], p["blocks"]))  # noqa: B023
    return head(p, x)


def plan_of(devices, offload, *, kind=AxisType.Auto, dtype=jnp.bfloat16):
    return zerojax.make_plan(params(dtype), mesh_of(devices, kind), stage=3, offload=offload, min_size=512)


def train(tx, plan, *, steps=3, loss=scanned, layerwise="blocks", dtype=jnp.bfloat16, **options):
    tx = zerojax.zero(tx, plan)
    state = zerojax.create_train_state(params(dtype), tx, plan)
    step = zerojax.make_train_step(loss, tx, plan, layerwise=layerwise, **options)
    losses = []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return tx, state, losses


def kinds(tree):
    return [x.sharding.memory_kind for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("devices", "kind"), [(1, AxisType.Auto), (4, AxisType.Auto), (4, AxisType.Explicit)])
def test_the_same_bit_for_bit_as_on_the_device(name, devices, kind):
    plain, there, losses = train(OPTIMIZERS[name](), plan_of(devices, None, kind=kind), accumulate=2)
    away, here, same = train(OPTIMIZERS[name](), plan_of(devices, ON_HOST, kind=kind), accumulate=2)
    assert losses == same
    assert_same(arrays(plain, there), arrays(away, here))
    assert kinds(here.params) == ["pinned_host"] * 3 + ["device"]  # the last is too small to be sharded
    wanted = jax.tree.leaves(away.plan.params)
    assert all(x.sharding == sharding for x, sharding in zip(jax.tree.leaves(here.params), wanted, strict=True))


@pytest.mark.parametrize(
    ("loss", "layerwise"), [(unrolled, "blocks"), (scanned, None), (scanned, "blocks/w")], ids=["unrolled", "all", "w"]
)
def test_layers_by_index_and_params_that_are_gathered_at_once(loss, layerwise):
    run = functools.partial(train, loss=loss, layerwise=layerwise)
    *plain, losses = run(OPTIMIZERS["split"](), plan_of(4, None))
    *away, same = run(OPTIMIZERS["split"](), plan_of(4, ON_HOST))
    assert losses == same
    assert_same(arrays(*plain), arrays(*away))


@pytest.mark.parametrize("options", [{"fraction": 0}, {"fraction": 0.5}, {"pattern": "nu"}], ids=str)
@pytest.mark.parametrize(("devices", "kind"), [(1, AxisType.Auto), (4, AxisType.Explicit)])
def test_state_on_the_device(options, devices, kind):
    offload = zerojax.Offload(params=True, bucket_bytes=2**18, **options)
    run = lambda offload: train(OPTIMIZERS["split"](), plan_of(devices, offload, kind=kind))
    plain, there, losses = run(None)
    away, here, same = run(offload)
    assert losses == same
    assert_same(arrays(plain, there), arrays(away, here))
    assert kinds(here.params) == ["pinned_host"] * 3 + ["device"]


def test_any_optimizer():
    run = lambda offload: train(optax.adam(1e-2), plan_of(4, offload, dtype=jnp.float32), dtype=jnp.float32)
    _, _, losses = run(None)
    with pytest.warns(UserWarning, match="moved to the device as a whole, after the gradients"):
        _, state, same = run(zerojax.Offload(params=True, fraction=0))
    # XLA rounds products and sums together where it fuses them, which copies between them may change.
    np.testing.assert_allclose(losses, same, rtol=1e-6)
    assert kinds(state.params) == ["pinned_host"] * 3 + ["device"]


def test_by_flax_and_init():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(256, param_dtype=jnp.bfloat16, dtype=jnp.float32)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                zerojax.nn.gathered(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
            )
            return scan(name="blocks")(x, None)[0]

    model, x = Model(), jnp.ones((8, 256))
    init = lambda key: model.init(key, x)["params"]
    loss = lambda p, x: jnp.mean((model.apply({"params": p}, x) - 1) ** 2)
    results = []
    for offload in (None, ON_HOST):
        plan = zerojax.make_plan(
            jax.eval_shape(init, jax.random.key(0)), mesh_of(4), stage=3, offload=offload, min_size=512
        )
        tx = zerojax.zero(zerojax.master_weights(zerojax.fused_adamw(1e-2)), plan)
        state = zerojax.create_train_state(init, tx, plan, jax.random.key(0))
        step = zerojax.make_train_step(loss, tx, plan, layerwise="blocks")
        for batch in batches(2):
            state, metrics = step(state, batch)
        results.append((float(metrics["loss"]), arrays(tx, state)))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])
    assert set(kinds(state.params)) == {"pinned_host"}


def test_loops_of_ones_own():
    plan, plain = plan_of(4, ON_HOST), plan_of(4, None)
    batch = batches(1)[0]
    results = []
    for p in (plan, plain):
        tx = zerojax.zero(OPTIMIZERS["split"](), p)
        here = jax.device_put(params(), p.params)
        loss, grads = zerojax.value_and_grad(scanned, p, layerwise="blocks")(here, batch)
        assert set(kinds(grads)) == {"device"}
        evaluated = zerojax.make_eval_step(scanned, p, layerwise="blocks")(here, batch)["loss"]
        state = tx.init(here)
        updates, _ = tx.update(grads, state, here)
        streamed, _ = zerojax.apply(tx, grads, state, here)
        jitted, _ = jax.jit(lambda g, s, x, tx=tx: zerojax.apply(tx, g, s, x))(grads, state, here)
        assert kinds(streamed) == kinds(jitted) == kinds(here)
        results.append(jax.device_get((loss, evaluated, updates, streamed, jitted, here)))
    assert_same(*results)


def test_checkpoints_weights_and_phases(tmp_path):
    plan = plan_of(4, ON_HOST)
    tx, state, _ = train(OPTIMIZERS["split"](), plan)
    want = arrays(tx, state)
    zerojax.save_checkpoint(tmp_path / "steps", state)
    restored, _ = zerojax.restore_checkpoint(tmp_path / "steps", tx, plan)
    assert_same(arrays(tx, restored), want)
    assert kinds(restored.params) == kinds(state.params)
    on_device = zerojax.zero(tx.inner, plan_of(2, None))
    elsewhere, _ = zerojax.restore_checkpoint(tmp_path / "steps", on_device, on_device.plan)
    assert_same(arrays(on_device, elsewhere), want)
    zerojax.export_params(tmp_path / "weights", state.params)
    imported = zerojax.import_params(tmp_path / "weights", plan)
    assert kinds(imported) == kinds(state.params)
    assert_same(jax.device_get(imported), jax.device_get(state.params))
    away = zerojax.offload_states(state, plan)
    assert set(kinds(away)) == {"pinned_host"}
    back = zerojax.reload_states(away, plan)
    assert kinds(back.params) == kinds(restored.params)
    assert_same(arrays(tx, back), want)


def copies(jaxpr):
    """What a program copies to the device: shapes, and the operations that they come from, "" for an argument."""
    found, sources = [], {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "device_put" and eqn.params["devices"] == (jax.memory.Space.Device,):
            found.append((eqn.invars[0].aval.shape, sources.get(eqn.invars[0], "")))
        sources |= dict.fromkeys(eqn.outvars, eqn.primitive.name)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                found += copies(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("fraction", [0, 1])
@pytest.mark.parametrize("make", [OPTIMIZERS["split"], lambda: optax.adam(1e-2)], ids=["streamed", "optax"])
@pytest.mark.filterwarnings("ignore:what is in host memory")
def test_gradients_are_taken_with_a_layer_at_a_time_on_the_device(make, fraction):
    """By what the programs copy: simulated host memory is the device's own, so that bytes would say nothing."""
    plan = plan_of(4, zerojax.Offload(params=True, bucket_bytes=2**18, fraction=fraction))
    tx = zerojax.zero(make(), plan)
    step = zerojax.make_train_step(scanned, tx, plan, layerwise="blocks")
    state, batch = zerojax.create_train_state(params(), tx, plan), batches(1)[0]
    shards = {(256 // 4, 256), (256 // 4,), (256 // 4, 96)}  # of a layer; of what is not gathered by the model
    streams = isinstance(step, StreamedTrainStep)
    assert streams == (make is OPTIMIZERS["split"])
    if streams:
        assert {shape for shape, _ in copies(step._first.trace(*step._parts(state), batch).jaxpr.jaxpr)} == shards
    # The whole step as one program, as in a jit of one's own: the rest comes when there are gradients.
    found = copies(jax.make_jaxpr(step)(state, batch).jaxpr)
    early = {shape for shape, source in found if source != "optimization_barrier"}
    late = {shape for shape, source in found if source == "optimization_barrier"}
    assert early == shards
    assert late >= {(8, 256, 256), (8, 256), (256, 96)}


def test_what_the_plan_says():
    plan = plan_of(4, ON_HOST)
    tx = OPTIMIZERS["split"]()
    without = plan_of(4, test_offload.SMALL)
    assert plan.memory(tx).params == 6 and without.memory(tx).params > 100_000
    assert plan.memory(tx).total + plan.memory(tx).host == without.memory(tx).total + without.memory(tx).host
    table = plan.table(tx)
    assert "None, 'data', None on the host" in table or "None, None, 'data' on the host" in table
    assert "total on the device" in table
    for stage in (0, 1, 2):
        with pytest.raises(ValueError, match="wants stage 3, got stage"):
            zerojax.make_plan(params(), mesh_of(4), stage=stage, offload=ON_HOST)


def test_a_host_without_room_is_seen_before_anything_is_made(tmp_path, monkeypatch):
    plan = plan_of(4, ON_HOST)
    zerojax.export_params(tmp_path / "weights", params())
    monkeypatch.setattr(host.os, "sysconf", lambda name: 8)
    never = lambda: pytest.fail("init was run")
    with pytest.raises(MemoryError, match=r"the optimizer's state and the params have .* Offload\(params=False\)"):
        zerojax.create_train_state(never, OPTIMIZERS["split"](), plan)
    with pytest.raises(MemoryError, match="the params have"):
        zerojax.import_params(tmp_path / "weights", plan)


def test_an_init_makes_a_part_of_the_params_at_a_time(monkeypatch):
    monkeypatch.setattr(host, "PART_BYTES", 40_000)
    plan = plan_of(4, ON_HOST)
    calls = []
    state = zerojax.create_train_state(lambda: calls.append(0) or params(), OPTIMIZERS["split"](), plan)
    held = [rest.size for rest in jax.tree.leaves(plan.param_rests)]
    assert held == [8 * 64 * 2, 8 * 64 * 256 * 2, 64 * 96 * 2, 6]
    assert len(calls) == 3  # the first; the second, which is more than a part by itself; the last two
    assert_same(jax.device_get(state.params), jax.device_get(params()))


def test_donated_params_are_gone():
    plan = plan_of(4, ON_HOST)
    tx = zerojax.zero(OPTIMIZERS["split"](), plan)
    given = jax.device_put(params(), plan.params)
    state = zerojax.create_train_state(given, tx, plan)
    step = zerojax.make_train_step(scanned, tx, plan, layerwise="blocks")
    new, _ = step(state, batches(1)[0])
    assert not any(x.is_deleted() for x in jax.tree.leaves((given, new)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
