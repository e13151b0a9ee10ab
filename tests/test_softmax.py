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
from pallas_kernels.softmax_rows import Config, broadcast_terms, config_for

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


@pytest.mark.parametrize("implementation", [None, *dispatch.IMPLEMENTATIONS])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_empty(shape, implementation):  # runs nowhere, so also where the kernel cannot
    y, vjp = jax.vjp(functools.partial(softmax, implementation=implementation), jnp.ones(shape))
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


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_where_and_bias(dtype, implementation):
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, 3, 40)).astype(dtype)
    keep = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 40)).at[1].set(False).at[2, 0].set(True)
    bias = jax.random.normal(jax.random.key(2), (2, 1, 40))
    masked = lambda x, bias: softmax(x, scale=0.5, where=keep, bias=bias, implementation=implementation)
    y, vjp = jax.vjp(masked, x, bias)
    assert_close(y, oracle(x, 0.5, keep, f64(bias)), 3e-7)
    dx, dbias = vjp(dy)
    assert np.all(y[:, 1] == 0) and np.all(dx[:, 1] == 0)
    assert_close(dx, oracle_gradient(y, dy, 0.5), 1e-6)
    # Sums of 3 terms of float32 that nearly cancel.
    np.testing.assert_allclose(dbias, oracle_gradient(y, dy).sum(1, keepdims=True), rtol=1e-5, atol=1e-7)
    assert dbias.dtype == bias.dtype


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("shape", [(40,), (3, 1), (2, 1, 40), (2, 3, 40)])
def test_masks_broadcast(shape, implementation):
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, 3, 40))
    keep = jax.random.bernoulli(jax.random.key(1), 0.5, shape)
    bias = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    options = {"where": keep, "bias": bias, "causal": True, "scale": -0.5, "implementation": implementation}
    y, vjp = jax.vjp(lambda x: softmax(x, **options), x)
    kept = np.broadcast_to(lower(3, 40) & np.asarray(keep), x.shape)
    assert_close(y, oracle(x, -0.5, kept, f64(bias)), 3e-7)
    assert_close(vjp(dy)[0], oracle_gradient(y, dy, -0.5), 1e-6)


@pytest.mark.parametrize("implementation", BOTH)
def test_what_is_masked_is_zero_beside_nan(implementation):
    keep = jnp.arange(40) % 3 > 0
    x = jnp.where(keep, 1.0, NAN) + jnp.array([[0.0], [NAN], [INF]])
    y, vjp = jax.vjp(lambda x: softmax(x, where=keep, implementation=implementation), x)
    (dx,) = vjp(x)
    assert np.all(np.where(keep, 0, y) == 0) and np.isnan(np.asarray(y)[1:, keep]).all()
    np.testing.assert_allclose(y[0, keep], 1 / np.sum(keep), rtol=2e-7)
    assert np.isfinite(dx[0]).all()


@pytest.mark.parametrize("implementation", BOTH)
def test_vmap_of_masks(implementation):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 40))
    keep = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 40))
    bias = jax.random.normal(jax.random.key(2), (2, 3, 1, 40))
    one = functools.partial(softmax, implementation=implementation)
    wanted = softmax_reference(x, where=keep[:, None, None], bias=bias)
    both = jax.vmap(lambda x, keep, bias: one(x, where=keep, bias=bias))(x, keep, bias)
    np.testing.assert_allclose(both, wanted, rtol=2e-6)
    shared = jax.vmap(lambda bias: one(x[0], where=keep[0], bias=bias))(bias)
    np.testing.assert_allclose(shared, softmax_reference(x[0], where=keep[0], bias=bias[:, None][:, 0]), rtol=2e-6)


@pytest.mark.parametrize("shape", [(4, 6, 8), (4, 1, 8), (1, 6, 1), (6, 8), (1, 1, 1), (4, 1, 1), (8,), (2, 1, 3)])
def test_rows_of_what_broadcasts(shape):
    whole = (2, 6, 3) if shape == (2, 1, 3) else (4, 6, 8)
    rows = np.arange(math.prod(shape)).reshape(shape)
    found = sum(
        (np.arange(math.prod(whole)) // divisor % size * stride)
        for divisor, size, stride in broadcast_terms(whole, shape)
    )
    np.testing.assert_array_equal(np.broadcast_to(found, math.prod(whole)), np.broadcast_to(rows, whole).ravel())


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
    ("shape", "dtype", "causal", "masks"),
    [
        ((64, 512), "bfloat16", False, None),
        ((64, 8192), "float32", False, None),
        ((64, 16384), "bfloat16", False, None),
        ((4, 262144), "float32", False, None),
        ((3, 50257), "bfloat16", False, None),
        ((3, 1001), "float16", False, None),
        ((2, 256, 256), "bfloat16", True, None),
        ((2, 100, 4096), "float16", True, None),
        ((2, 9, 4099), "bfloat16", True, (9, 4099)),
        ((2, 3, 9, 256), "float32", False, (2, 1, 1, 256)),
        ((2, 9, 65536), "bfloat16", False, (2, 1, 65536)),
        ((2, 9, 200), "float32", True, (2, 9, 1)),
    ],
)
def test_lowers_for_cuda_on_a_cpu_host(shape, dtype, causal, masks):
    def both(x, dy, where, bias):
        one = functools.partial(softmax, scale=0.125, causal=causal, implementation="mosaic")
        y, vjp = jax.vjp(lambda x: one(x, where=where, bias=bias), x)
        return y, vjp(dy)[0]

    x = jax.ShapeDtypeStruct(shape, dtype)
    where, bias = masks and jax.ShapeDtypeStruct(masks, bool), masks and jax.ShapeDtypeStruct(masks, "float32")
    with jax.sharding.use_abstract_mesh(CUDA):
        text = jax.jit(both).trace(x, x, where, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2


@KERNEL
def test_lowers_for_cuda_under_remat_scan_and_vmap():
    one = jax.checkpoint(lambda x: jnp.sum(jnp.sin(softmax(x, causal=True, implementation="mosaic"))))
    step = lambda x: jax.lax.scan(lambda total, x: (total + jnp.sum(jax.vmap(one)(x)), None), 0.0, x)[0]
    with jax.sharding.use_abstract_mesh(CUDA):
        x = jax.ShapeDtypeStruct((3, 2, 128, 128), "float32")
        text = jax.jit(jax.grad(step)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2  # the value is not asked for: forward again, and backward


@pytest.mark.parametrize("device", ["", "NVIDIA H200"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_config_holds_every_row(itemsize, backward, device):
    for columns in [1, 128, 1024, 1025, 4099, 8192, 12289, 16384, 50257, 65536, 128256, 131072, 262144, 2**19]:
        for causal in (False, True):
            config = config_for(columns, itemsize, backward=backward, causal=causal, device=device)
            assert config.cluster <= 16 and config.warpgroups <= 4
            assert config.warps == 1 or config.warps == 4 * config.warpgroups * config.cluster
            ragged = columns * itemsize % 16 != 0
            vectors = math.ceil(columns * itemsize / 16 + ragged) / (32 * config.warps)
            vectors = math.ceil(vectors) * (2 if backward else 1)
            if config.staged:  # shared memory of a block, less what barriers and sums need
                assert vectors * 16 * 128 * config.warpgroups <= 226 * 1024
            else:  # registers of a thread, 40 of them for the rest; the longest rows spill
                assert vectors * 4 + 40 <= min(255, 512 // config.warpgroups) or columns == 2**19
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
    row = jax.ShapeDtypeStruct((50257,), "bfloat16")
    assert "NVIDIA" in softmax_choice(jnp.ones((2, 256))).why or dispatch.too_old()
    assert "2 elements" not in softmax_choice(jnp.ones((2, 256)), implementation="xla").why
    with jax.sharding.use_abstract_mesh(CUDA):
        if not dispatch.too_old():
            assert softmax_choice(jax.ShapeDtypeStruct((2, 256), "float32")).implementation == "mosaic"
            assert softmax_choice(jax.ShapeDtypeStruct((2, 50257), "bfloat16"), bias=row).implementation == "mosaic"
            assert "fewer than 128" in softmax_choice(jax.ShapeDtypeStruct((2, 7), "float32")).why
    if not dispatch.too_old():
        assert "biases of float32" in softmax_choice(jnp.ones((2, 256)), bias=jnp.ones(256, int)).why
    with pytest.raises(ValueError, match="cannot run"):
        softmax(jnp.ones((2, 256)), bias=jnp.ones(256, int), implementation="interpret")
