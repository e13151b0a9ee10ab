"""zerojax.nn.softmax: jax.nn.softmax's results for any axis and mask, and no gather of what is sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zerojax.nn.functions import softmax


@pytest.mark.parametrize("axis", [-1, 0, 1, 2, (0, 2), (-1,), None])
@pytest.mark.parametrize("masked", [False, True])
def test_is_jax_nn_softmax(axis, masked):
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    where = jax.random.bernoulli(jax.random.key(1), 0.7, (4, 1)).at[0].set(True) if masked else None
    # Both round in float32, in a different order.
    np.testing.assert_allclose(softmax(x, axis, where), jax.nn.softmax(x, axis, where), rtol=2e-6)
    np.testing.assert_allclose(softmax(x, axis, where, scale=0.5), jax.nn.softmax(x * 0.5, axis, where), rtol=2e-6)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(softmax(x, axis, where))))(x)
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(jax.nn.softmax(x, axis, where))))(x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("x", [np.arange(6).reshape(2, 3), [1.0, 2.0], np.float16([1, 2])])
def test_other_inputs(x):
    got, want = softmax(x), jax.nn.softmax(jnp.asarray(x))
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-3)  # float16 rounds once here, several times there


@pytest.mark.parametrize("axis", [-1, 0])
def test_a_row_with_nothing_kept(axis):
    x = jnp.ones((4, 4))
    where = jnp.ones((4, 4), bool).at[2, :].set(False) if axis else jnp.ones((4, 4), bool).at[:, 2].set(False)
    y, vjp = jax.vjp(lambda x: softmax(x, axis, where), x)
    (dx,) = vjp(jnp.arange(16.0).reshape(4, 4))
    assert np.all(y[~where] == 0) and np.all(dx[~where] == 0)
    assert np.isfinite(y).all() and np.isfinite(dx).all()


def test_bad_input():
    with pytest.raises(ValueError, match="axis must be the last; got axis=0"):
        softmax(jnp.ones((2, 2)), 0, causal=True)
    with pytest.raises(TypeError, match="int32; cast"):
        softmax(jnp.ones((2, 2), int), causal=True)
    with pytest.raises(ValueError, match="two dims"):
        softmax(jnp.ones(2), causal=True)


OPTIONS = [{}, {"causal": True, "scale": 0.5}, {"masked": True}, {"axis": 2}]


def value_and_gradient(x, where, masked=False, **options):
    y, vjp = jax.vjp(functools.partial(softmax, where=where if masked else None, **options), x)
    return y, vjp(jnp.sin(x))[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_without_communication(kind, options):
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(kind, kind))
    spec = P("data", "heads")
    x = jax.random.normal(jax.random.key(0), (4, 2, 8, 8))
    where = jnp.eye(8, dtype=bool) | (jnp.arange(8) < 3)
    wanted = value_and_gradient(x, where, **options)
    step = functools.partial(value_and_gradient, **options)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec)), jax.device_put(where, NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(*placed).compile()
        got = compiled(*placed)
    shard_mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    for result in (got, jax.jit(shard_mapped)(*placed)):
        for a, b in zip(result, wanted, strict=True):
            assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
