"""Softmax: values and gradients against float64, by XLA's form and by the kernel interpreted; and what is lowered."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch
from pallas_kernels.softmax import bytes_moved, softmax, softmax_choice, softmax_reference
from pallas_kernels.softmax_rows import Config, config_for

KERNEL = pytest.mark.skipif(bool(dispatch.too_old()), reason="no kernels in this jax")
BOTH = ["xla", pytest.param("interpret", marks=KERNEL)]
INF, NAN = math.inf, math.nan


def f64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def oracle(x, scale=1.0, keep=None, bias=0.0):
    """In float64, on the inputs as they were rounded; rows of which nothing is kept are zeros."""
    z = f64(x) * scale + bias
    z = z if keep is None else np.where(keep, z, -INF)
    largest = z.max(-1, keepdims=True)
    shifted = np.exp(z - np.where(largest == -INF, 0, largest))
    total = shifted.sum(-1, keepdims=True)
    return shifted / np.where(total == 0, 1, total)


def oracle_gradient(y, dy, scale=1.0):
    return scale * (f64(dy) - (f64(dy) * f64(y)).sum(-1, keepdims=True)) * f64(y)


def lower(queries, keys):
    return np.arange(keys) <= np.arange(queries)[:, None] + keys - queries


def assert_close(got, want, bound):
    """float32: relative L2 within `bound`. 16 bits: within 1.02 of what rounding the exact result once costs."""
    error = np.linalg.norm(f64(got) - want)
    if got.dtype == jnp.float32:
        assert error <= bound * np.linalg.norm(want)
    else:
        rounded = f64(jnp.asarray(want, jnp.float32).astype(got.dtype))
        assert error <= 1.02 * np.linalg.norm(rounded - want) + 1e-30


def check(shape, dtype, implementation, **options):
    """Values, and gradients of the y that was saved."""
    x = (2 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
    dy = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    y, vjp = jax.vjp(functools.partial(softmax, implementation=implementation, **options), x)
    (dx,) = vjp(dy)
    assert y.dtype == dx.dtype == x.dtype
    keep = lower(*shape[-2:]) if options.get("causal") else None
    scale = options.get("scale", 1.0)
    # float32's exp, sum and product each round once or twice, at 6e-8; the gradient cancels in dy - dot besides.
    assert_close(y, oracle(x, scale, keep), 3e-7)
    assert_close(dx, oracle_gradient(y, dy, scale), 1e-6)
    return y, dx


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 31, 33, 127, 128, 129, 257, 1000, 1025, 4097, 50257])
def test_any_length(columns):
    check((3, columns), "float32", "xla")


@KERNEL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 129), (9, 512), (2, 1000), (1, 2304)])
def test_kernel_any_length(shape, dtype):
    check(shape, dtype, "interpret")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 4, 65), (4, 1024)])
def test_any_rank_and_dtype(shape, dtype):
    check(shape, dtype, "xla")


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("scale", [0.125, 3.0, -0.7])
def test_scale(scale, implementation):
    check((3, 200), "float32", implementation, scale=scale)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 7, 7), (3, 5), (5, 3), (2, 2, 9, 136)])
def test_causal(shape, implementation):
    y, dx = check(shape, "float32", implementation, scale=0.5, causal=True)
    keep = np.broadcast_to(lower(*shape[-2:]), shape)
    assert np.all(np.asarray(y)[~keep] == 0) and np.all(np.asarray(dx)[~keep] == 0)


@KERNEL
def test_causal_kernel_does_not_see_what_is_masked():
    x = jnp.where(lower(4, 4), 1.0, NAN)
    y, vjp = jax.vjp(lambda x: softmax(x, causal=True, implementation="interpret"), x)
    (dx,) = vjp(x)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(dx))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_empty(shape):
    y, vjp = jax.vjp(softmax, jnp.ones(shape))
    assert y.shape == vjp(y)[0].shape == shape


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("columns", [5, 1100])  # a row in one warp, and in four
def test_what_is_not_finite_stays_in_its_row(columns, implementation):
    x = jax.random.normal(jax.random.key(0), (7, columns))
    x = x.at[0, 3].set(NAN).at[1].set(-INF).at[2, 0].set(INF).at[3, 1:].set(-INF).at[4].set(3e38).at[5].set(-7.0)
    y = softmax(x, implementation=implementation)
    assert np.isnan(y[:3]).all()
    np.testing.assert_array_equal(y[3], np.eye(columns)[0])
    np.testing.assert_allclose(y[4:6], 1 / columns, rtol=2e-7)  # one rounding of 1 / columns, one of the product
    np.testing.assert_allclose(y[6], oracle(x[6]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_where_and_bias(dtype):
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, 3, 40)).astype(dtype)
    keep = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 40)).at[1].set(False).at[2, 0].set(True)
    bias = jax.random.normal(jax.random.key(2), (2, 1, 40))
    y, vjp = jax.vjp(lambda x, bias: softmax(x, scale=0.5, where=keep, bias=bias), x, bias)
    assert_close(y, oracle(x, 0.5, keep, f64(bias)), 3e-7)
    dx, dbias = vjp(dy)
    assert np.all(y[:, 1] == 0) and np.all(dx[:, 1] == 0)
    assert_close(dx, oracle_gradient(y, dy, 0.5), 1e-6)
    # Sums of 3 terms of float32 that nearly cancel.
    np.testing.assert_allclose(dbias, oracle_gradient(y, dy).sum(1, keepdims=True), rtol=1e-5, atol=1e-7)
    assert dbias.dtype == bias.dtype


def test_reference_is_jax_nn_softmax():
    x = jax.random.normal(jax.random.key(0), (4, 50))
    keep = jax.random.bernoulli(jax.random.key(1), 0.5, x.shape)
    np.testing.assert_allclose(softmax_reference(x), jax.nn.softmax(x), rtol=1e-6)
    np.testing.assert_allclose(softmax_reference(x, where=keep), jax.nn.softmax(x, where=keep), rtol=1e-6)
    by_autodiff = jax.grad(lambda x: jnp.sum(jnp.sin(softmax_reference(x, where=keep, scale=2.0))))(x)
    by_rule = jax.grad(lambda x: jnp.sum(jnp.sin(softmax(x, where=keep, scale=2.0))))(x)
    np.testing.assert_allclose(by_rule, by_autodiff, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("implementation", BOTH)
def test_transforms(implementation):
    x = jax.random.normal(jax.random.key(0), (3, 4, 8))
    loss = lambda x: jnp.sum(jnp.sin(softmax(x, causal=True, implementation=implementation)))
    values, gradients = softmax(x, causal=True, implementation="xla"), jax.grad(loss)(x)
    one = functools.partial(softmax, causal=True, implementation=implementation)
    np.testing.assert_allclose(jax.vmap(one)(x), values, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(one, in_axes=2, out_axes=2)(x.transpose(1, 2, 0)), values.transpose(1, 2, 0), 1e-6
    )
    np.testing.assert_allclose(jax.lax.scan(lambda _, x: (None, one(x)), None, x)[1], values, rtol=1e-6)
    for transformed in (jax.vmap(jax.grad(loss)), jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x)))):
        np.testing.assert_allclose(transformed(x), gradients, rtol=1e-5, atol=1e-8)
    if implementation == "xla":  # the interpreter's callbacks have effects, which remat does not take; see below
        np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(x), gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("implementation", BOTH)
def test_a_row_does_not_depend_on_its_neighbours(implementation):
    x = jax.random.normal(jax.random.key(0), (6, 300))
    y = softmax(x, implementation=implementation)
    np.testing.assert_array_equal(softmax(x[4:5], implementation=implementation), y[4:5])


CUDA = AbstractMesh(
    (), (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
)


@KERNEL
@pytest.mark.parametrize(
    ("shape", "dtype", "causal"),
    [
        ((64, 512), "bfloat16", False),
        ((64, 8192), "float32", False),
        ((64, 16384), "bfloat16", False),
        ((4, 262144), "float32", False),
        ((3, 50257), "bfloat16", False),
        ((2, 256, 256), "bfloat16", True),
        ((2, 100, 4096), "float16", True),
    ],
)
def test_lowers_for_cuda_on_a_cpu_host(shape, dtype, causal):
    def both(x, dy):
        y, vjp = jax.vjp(lambda x: softmax(x, scale=0.125, causal=causal, implementation="mosaic"), x)
        return y, vjp(dy)[0]

    x = jax.ShapeDtypeStruct(shape, dtype)
    with jax.sharding.use_abstract_mesh(CUDA):
        text = jax.jit(both).trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2


@KERNEL
def test_lowers_for_cuda_under_remat_scan_and_vmap():
    one = jax.checkpoint(lambda x: jnp.sum(jnp.sin(softmax(x, causal=True, implementation="mosaic"))))
    step = lambda x: jax.lax.scan(lambda total, x: (total + jnp.sum(jax.vmap(one)(x)), None), 0.0, x)[0]
    with jax.sharding.use_abstract_mesh(CUDA):
        x = jax.ShapeDtypeStruct((3, 2, 128, 128), "float32")
        text = jax.jit(jax.grad(step)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2  # the value is not asked for: forward again, and backward


def test_config_holds_every_row():
    for backward in (False, True):
        for columns in [1, 128, 1024, 1025, 8192, 12289, 50257, 128256, 262144, 2**19]:
            config = config_for(columns, 2, backward=backward)
            assert config.cluster <= 16 and config.warpgroups <= 4
            assert config.warps == 1 or config.warps == 4 * config.warpgroups * config.cluster
            assert columns <= config.warps * 32 * 64
    assert config_for(8192, 2, backward=False) == Config()


def test_bytes_of_causal_halves():
    x = jax.ShapeDtypeStruct((2, 4, 4), "bfloat16")
    assert bytes_moved(x) == 2 * 2 * 32
    assert bytes_moved(x, causal=True) == 2 * (20 + 32)
    assert bytes_moved(x, causal=True, backward=True) == 2 * (40 + 32)


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (jnp.ones(3, int), {}, TypeError, "int32; cast"),
        (jnp.ones(3, complex), {}, TypeError, "complex64"),
        (jnp.ones(3), {"causal": True}, ValueError, "two dims"),
        (jnp.ones(()), {}, ValueError, "one dim"),
        (jnp.ones(3), {"scale": jnp.ones(())}, TypeError, "Python number"),
        (jnp.ones(3), {"where": jnp.ones(3)}, TypeError, "bias"),
        (jnp.ones(3), {"bias": jnp.ones((2, 3))}, ValueError, r"bias must broadcast.*\(2, 3\)"),
        (jnp.ones(3), {"implementation": "triton"}, ValueError, "triton"),
    ],
)
def test_bad_input(x, options, error, words):
    with pytest.raises(error, match=words):
        softmax(x, **options)


def test_choice_says_why():
    assert "NVIDIA" in softmax_choice(jnp.ones((2, 256))).why or dispatch.too_old()
    assert "2 elements" not in softmax_choice(jnp.ones((2, 256)), implementation="xla").why
    with jax.sharding.use_abstract_mesh(CUDA):
        if not dispatch.too_old():
            assert softmax_choice(jax.ShapeDtypeStruct((2, 256), "float32")).implementation == "mosaic"
            assert "16 bytes" in softmax_choice(jax.ShapeDtypeStruct((2, 50257), "bfloat16")).why
            assert "fewer than 128" in softmax_choice(jax.ShapeDtypeStruct((2, 7), "float32")).why
    with pytest.raises(ValueError, match="cannot run"):
        softmax(jnp.ones((2, 256)), bias=jnp.ones(256), implementation="interpret")
