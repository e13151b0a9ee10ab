"""`gather` and `nn.gathered`: the same numbers whether a layer's params come whole or in shards."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import linen as nn

import zerojax
import zerojax.nn
from pallas_kernels import dispatch
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.softmax import softmax
from zerojax.gather import Shard


class Layer(nn.Module):
    """LayerNorm, MLP, residual."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(32, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + nn.Dense(16, dtype=self.dtype)(hidden)


class Stack(nn.Module):
    """Four layers scanned between two uses of one table, by two methods of a layer."""

    dtype: str = "float32"
    wrapped: bool = True

    @nn.compact
    def __call__(self, x):
        layer, table = Layer, nn.Embed
        if self.wrapped:
            layer = zerojax.nn.gathered(Layer, dtype=self.dtype, prevent_cse=False)
            table = zerojax.nn.gathered(nn.Embed, dtype=self.dtype, methods=("__call__", "attend"))
        table = table(32, 16, dtype=self.dtype, name="table")
        tokens = jnp.argsort(x, axis=-1)[:, :4]
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        x, _ = scan(layer(self.dtype, name="layers"), table(tokens).sum(1), None)
        return nn.Dense(8, name="head")(table.attend(x))


def loss_of(model):
    return lambda params, batch: jnp.mean((model.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def init_of(model):
    return model.init(jax.random.key(0), jnp.ones((1, 16)))["params"]


def train(model, stage, steps=3):
    params = init_of(model)
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=stage, min_size=64)
    tx = zerojax.zero(models.clipped_adamw(), plan)
    state = zerojax.create_train_state(params, tx, plan)
    step = zerojax.make_train_step(loss_of(model), tx, plan, layerwise="^(layers|table)/")
    lowered = step.lower(state, models.mlp_batches()[0])
    losses = []
    for batch in models.mlp_batches(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params), lowered


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_changes_neither_params_nor_result(dtype):
    plain, wrapped = Stack(dtype, wrapped=False), Stack(dtype)
    params = init_of(plain)
    jax.tree.map(np.testing.assert_array_equal, params, init_of(wrapped))
    assert {x.dtype.name for x in jax.tree.leaves(init_of(wrapped))} == {"float32"}
    x = models.mlp_batches(1)[0]["x"]
    np.testing.assert_array_equal(plain.apply({"params": params}, x), wrapped.apply({"params": params}, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stage_3_layer_by_layer_equals_stage_0(dtype):
    whole, whole_params, _ = train(Stack(dtype), stage=0)
    layered, layered_params, _ = train(Stack(dtype), stage=3)
    # Casting before or after the gather gives the same bits; sums over devices differ in order, as at any stage.
    np.testing.assert_allclose(layered, whole, rtol=2e-6)
    # Adam divides a gradient by its own size: where one is near zero its rounding moves a param by up to the rate,
    # 1e-2, times that. bfloat16 rounds the activations that differ in their last float32 bit, 2**-8 apart.
    atol = 2e-6 if dtype == "float32" else 2e-4
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=2e-6), layered_params, whole_params)


def test_weights_travel_in_the_compute_dtype_and_gradients_in_float32():
    text = train(Stack("bfloat16"), stage=3, steps=1)[2].as_text()
    gathers = re.findall(r"stablehlo.all_gather.*?-> tensor<([^>]*)>", text)
    scatters = re.findall(r"stablehlo.reduce_scatter.*?\}\) : \(tensor<([^>]*)>", text, re.DOTALL)
    # Two matrices of a layer, forward and backward; the table, looked up once and multiplied forward and backward.
    sizes = [math.prod(map(int, g.split("x")[:-1])) for g in gathers if g.endswith("xbf16")]
    assert sum(sizes) == 2 * (2 * 16 * 32) + 3 * 32 * 16
    assert scatters and all(s.endswith("f32") for s in scatters)


def test_gather_is_the_identity_on_whole_leaves():
    tree = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    assert zerojax.gather(tree)["kernel"] is tree["kernel"]
    assert zerojax.gather(tree, dtype="bfloat16")["kernel"] is tree["kernel"]


def test_a_shard_that_is_not_gathered_says_so():
    shard = Shard(jnp.ones((2, 2)), "layers/kernel", (2,), ("data",))
    with pytest.raises(TypeError, match=r"'layers/kernel' is named by layerwise.*zerojax\.gather"):
        jnp.ones((2, 2)) @ shard


def test_a_stack_cut_along_its_layers_cannot_be_gathered_by_layer():
    params = {"layers": jnp.ones((16, 8))}  # more layers than columns, so that the layers are cut
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=3, min_size=64)
    scan = lambda params, x: jax.lax.scan(lambda s, w: (s + jnp.sum(zerojax.gather(w)), None), x.sum(), params)[0]
    step = zerojax.value_and_grad(lambda p, b: scan(p["layers"], b["x"]), plan, layerwise="layers")
    with pytest.raises(ValueError, match=r"'layers' is sharded over its leading dim.*min_size"):
        step(params, models.mlp_batches(1)[0])


def test_evaluation_refuses_shards_that_are_not_gathered():
    params = models.stack_params()
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=3, min_size=64)
    penalty = lambda p, b: jnp.mean(b["y"]) + sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    with pytest.raises(TypeError, match=r"shard of 'layers/\w+' in 'integer_pow'"):
        zerojax.make_eval_step(penalty, plan, layerwise="^layers/")(params, models.mlp_batches(1)[0])


def test_a_shard_that_was_reshaped_cannot_be_gathered():
    params = {"w": jnp.arange(64.0).reshape(8, 8)}
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=3, min_size=1)
    loss_fn = lambda p, b: jnp.sum(zerojax.gather(jax.tree.map(jnp.ravel, p["w"])) * jnp.arange(64.0))
    with pytest.raises(ValueError, match="'w' was reshaped"):
        zerojax.value_and_grad(loss_fn, plan, layerwise="w")(params, models.mlp_batches(1)[0])


@pytest.mark.parametrize("combine", [False, True])
def test_leaves_travel_in_one_collective_or_in_one_each(combine):
    mesh, rng = models.mesh_of(8), np.random.default_rng(0)
    shapes = {"a": ((8, 24), 1), "b": ((16, 8, 3), 0), "c": ((40,), 0), "half": ((8, 8), 1)}  # and which dim is cut
    specs = {name: jax.P(*[None] * dim, "data") for name, (_, dim) in shapes.items()}
    whole = {name: rng.standard_normal(shape).astype("float32") for name, (shape, _) in shapes.items()}
    whole["half"] = whole["half"].astype(jnp.bfloat16)
    weights = {name: rng.standard_normal((8, *x.shape)).astype("float32") for name, x in whole.items()}

    def local(params, weights):
        def loss(params):
            shards = {k: Shard(x, k, x.shape[shapes[k][1] :], ("data",), None, combine) for k, x in params.items()}
            gathered = zerojax.gather(shards)
            return sum(jnp.sum(gathered[k] * weights[k][0]) for k in params), gathered

        (_, gathered), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return gathered, grads

    run = jax.shard_map(local, mesh=mesh, in_specs=(specs, jax.P("data")), out_specs=(jax.P(), specs), check_vma=False)
    gathered, grads = jax.jit(run)(whole, weights)
    jax.tree.map(np.testing.assert_array_equal, gathered, whole)
    want = jax.tree.map(lambda w: w.astype("float64").sum(0), weights)
    half = grads.pop("half"), want.pop("half")
    # Eight float32 numbers near 1 are summed; eight bfloat16 ones keep eight bits.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, want)
    np.testing.assert_allclose(np.asarray(half[0]).astype("float64"), half[1], rtol=2e-2, atol=5e-2)
    text = jax.jit(run).lower(whole, weights).as_text()
    assert len(re.findall("stablehlo.all_gather", text)) == (2 if combine else 4)  # float32 and bfloat16, or each leaf
    assert len(re.findall("stablehlo.reduce_scatter", text)) == (2 if combine else 4)


def operations(jaxpr):
    """Names of all operations of a function; kernels', as profiles show them."""
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name", ""))
        yield name if name.startswith("zerojax_") else eqn.primitive.name
        for value in eqn.params.values():
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from operations(inner)


@pytest.mark.skipif(bool(dispatch.too_old()), reason=str(dispatch.too_old()))
def test_keep_expensive_redoes_kernels_of_one_pass():
    def block(w, scale, x):
        normed = layer_norm(x, scale, implementation="mosaic")
        return softmax(normed @ w, implementation="mosaic")

    def loss(*args):
        return jnp.sum(jax.checkpoint(block, policy=zerojax.keep_expensive)(*args) ** 2)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    arrays = jnp.ones((128, 128)), jnp.ones(128), jnp.ones((8, 128))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=device)):
        done = list(operations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays).jaxpr))
    assert done.count("dot_general") == 3
    assert done.count("zerojax_layer_norm") == done.count("zerojax_softmax") == 2  # forward, and again backward


def test_keep_expensive_keeps_products_and_gathers_twice():
    mesh = models.mesh_of(8)

    def local(w1, w2, x):
        layer = lambda w, x: jnp.tanh(x @ zerojax.gather(Shard(w, "w", w.shape[1:], ("data",))))
        layer = jax.checkpoint(layer, policy=zerojax.keep_expensive)
        return jax.grad(lambda w1, w2, x: jnp.sum(layer(w2, layer(w1, x))), argnums=(0, 1, 2))(w1, w2, x)

    weight, rows = jax.P(None, "data"), jax.P("data")
    specs = (weight, weight, rows)
    grads = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    text = str(jax.make_jaxpr(grads)(jnp.ones((16, 24)), jnp.ones((24, 32)), jnp.ones((8, 16))))
    assert len(re.findall(r"= all_gather\[", text)) == 4  # two layers, forward and backward
    assert len(re.findall(r"= dot_general\[", text)) == 2 * 3  # forward, dx, dw: no product is done again
    assert len(re.findall(r" tanh ", text)) == 4
