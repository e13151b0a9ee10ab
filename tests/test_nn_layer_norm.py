"""`nn.LayerNorm` and `nn.nnx.LayerNorm`: Flax's params, results and gradients; and no gather of a sharded batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType

from zerojax import meshes
from zerojax.nn import nnx as our_nnx
from zerojax.nn.linen import LayerNorm

CASES = [
    {},
    {"dtype": "bfloat16"},
    {"param_dtype": "bfloat16"},
    {"use_bias": False},
    {"use_scale": False},
    {"use_bias": False, "use_scale": False},
    {"epsilon": 1e-2},
    {"reduction_axes": (1, 2)},
    {"reduction_axes": (0, -1), "feature_axes": -1},
]
BIAS = jax.nn.initializers.normal(1.0)


def batch(dtype="float32", shape=(8, 3, 40)):
    return (jax.random.normal(jax.random.key(0), shape) + 2).astype(dtype)


def same(got, want):
    """One expression, grouped otherwise: float32 rounding apart, which can move a bfloat16 to its neighbour."""
    assert got.dtype == want.dtype
    tolerance = 2e-5 if got.dtype == jnp.float32 else 2**-6
    wide = lambda a: np.asarray(a).astype("float32")
    np.testing.assert_allclose(wide(got), wide(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_linen_params_results_and_gradients_are_flax(fields, dtype):
    theirs, ours = (m(**fields, bias_init=BIAS, use_fast_variance=False) for m in (linen.LayerNorm, LayerNorm))
    x = batch(dtype)
    variables = theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), variables)
    same(ours.apply(variables, x), theirs.apply(variables, x))
    loss = lambda layer: lambda v, x: jnp.sum(jnp.sin(layer.apply(v, x).astype("float32")))
    jax.tree.map(same, *(jax.grad(loss(layer), (0, 1))(variables, x) for layer in (ours, theirs)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", CASES[:-1], ids=str)
def test_nnx_params_results_and_gradients_are_flax(fields, dtype):
    make = lambda m: m(40, **fields, bias_init=BIAS, use_fast_variance=False, rngs=nnx.Rngs(0))
    theirs, ours = make(nnx.LayerNorm), make(our_nnx.LayerNorm)
    x = batch(dtype)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m)) for m in (ours, theirs)))
    same(ours(x), theirs(x))
    loss = lambda layer, x: jnp.sum(jnp.sin(layer(x).astype("float32")))
    jax.tree.map(same, *(nnx.to_pure_dict(nnx.grad(loss)(layer, x)) for layer in (ours, theirs)))


@pytest.mark.parametrize("make", [LayerNorm, lambda: our_nnx.LayerNorm(40, rngs=nnx.Rngs(0))], ids=["linen", "nnx"])
def test_a_mask_and_other_dtypes_go_to_the_parent(make):
    run = lambda x, **kwargs: (
        lambda m: (
            m.init_with_output(jax.random.key(0), x, **kwargs)[0] if hasattr(m, "init_with_output") else m(x, **kwargs)
        )
    )(make())
    x, mask = batch(), jnp.arange(40) < 20
    same(run(x, mask=mask[None, None])[..., :20], run(x[..., :20].repeat(2, -1))[..., ::2])
    assert run(jnp.ones((0, 40))).shape == (0, 40)
    assert run(jnp.arange(40)[None]).dtype == jnp.float32


def test_a_large_mean_is_right_where_fast_variance_cancels():
    x = batch() + 1e4
    want = (lambda d: d / np.sqrt((d**2).mean(-1, keepdims=True) + 1e-6))(
        np.asarray(x, "float64") - np.asarray(x, "float64").mean(-1, keepdims=True)
    )
    got = LayerNorm().apply({"params": {"scale": jnp.ones(40), "bias": jnp.zeros(40)}}, x)
    np.testing.assert_allclose(got, want, atol=5e-3)  # the mean, 1e4, has its last float32 bit at 1e-3


def test_sharded_batches_are_not_for_a_kernel():
    assert meshes.kernel_implementation() == "xla"  # eight devices, and no mesh that says what is where
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    seen = []
    body = lambda x: (seen.append(meshes.kernel_implementation()), x)[1]
    jax.shard_map(body, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))(jnp.ones(8))
    assert seen == [None]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    run = jax.shard_map(body, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), axis_names={"data"})
    jax.jit(run)(jnp.ones(8))
    assert seen == [None, "xla"]


@pytest.mark.parametrize("how", ["auto", "explicit", "shard_map", "shard_map unchecked"])
def test_a_sharded_batch_is_not_gathered(how):
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    layer, x = LayerNorm(bias_init=BIAS), batch(shape=(16, 3, 40))
    params = layer.init(jax.random.key(1), x)
    loss = lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x)))
    step = jax.value_and_grad(loss, (0, 1))
    want = step(params, x)
    if how.startswith("shard_map"):
        inner, checked = step, how == "shard_map"

        def local_step(params, x):
            value, (dparams, dx) = inner(params, x)
            # With check_vma the transpose sums what comes in whole; without, it is the caller's.
            total = lambda a: jax.lax.psum(a, "data")
            return total(value), (dparams if checked else jax.tree.map(total, dparams), dx)

        specs = (jax.P(), (jax.P(), jax.P("data")))
        step = jax.shard_map(
            local_step, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=specs, check_vma=checked
        )
    with jax.set_mesh(mesh):
        params, x = jax.device_put(
            (params, x), (jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data")))
        )
        compiled = jax.jit(step).lower(params, x).compile()
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), compiled(params, x), want)
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text
