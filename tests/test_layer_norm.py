"""`pallas_kernels.layer_norm` against float64: XLA's form, the kernels simulated, and their lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pallas_kernels import dispatch, rows
from pallas_kernels import layer_norm_rows as ln
from pallas_kernels.layer_norm import layer_norm, layer_norm_choice, layer_norm_reference

kernels = pytest.mark.skipif(dispatch.too_old() is not None, reason="kernels need a newer jax")

# float32 keeps 6e-8 of each number; sums of a few thousand terms in tree order add a little. Gradients have two sums in
# them. A 16-bit result may be off by its own rounding, relative L2 2**-9 / sqrt(3) or 2**-12 / sqrt(3) for random
# numbers, and by 2 % of that for values that round to the other side.
FORWARD, BACKWARD, ROUNDING = 3e-7, 1e-6, 1.02


def exact(x, scale, bias, dy, *, epsilon=1e-6, dtotal=0.0):
    """y, dx, dscale and dbias of rows [..., n], in float64."""
    x, scale, bias, dy = (np.asarray(a).astype("float64") for a in (x, scale, bias, dy))
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    unit, dunit = centred * rstd, dy * scale
    along = (dunit * unit).mean(-1, keepdims=True)
    dx = (dunit - dunit.mean(-1, keepdims=True) - unit * along) * rstd + np.asarray(dtotal).astype("float64")
    leading = tuple(range(x.ndim - 1))
    return unit * scale + bias, dx, (dy * unit).sum(leading), dy.sum(leading)


def arrays(shape, dtype="float32", *, weights="float32", mean=0.0, seed=0):
    """x, scale, bias, dy."""
    rng = np.random.default_rng(seed)
    draw = lambda shape, dtype, at=0.0: jnp.asarray(rng.standard_normal(shape) + at, dtype)
    n = shape[-1:]
    return draw(shape, dtype, mean), draw(n, weights, 1.0), draw(n, weights), draw(shape, dtype)


def error(got, want):
    """Relative L2; absolute where nothing is wanted."""
    got, want = np.asarray(got).astype("float64"), np.asarray(want).astype("float64")
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0)


def check(got, want, dtype, tolerance):
    """Against float64; what is stored in 16 bits, against its pure rounding."""
    assert got.dtype == dtype
    if jnp.dtype(dtype) == jnp.float32:
        assert error(got, want) <= tolerance
    else:
        rounded = np.asarray(jnp.asarray(want, "float32").astype(dtype))
        assert error(got, want) <= ROUNDING * error(rounded, want) + tolerance


def with_gradients(x, scale, bias, dy, **kwargs):
    y, vjp = jax.vjp(functools.partial(layer_norm, **kwargs), x, scale, bias)
    return y, *vjp(dy)


def check_all(case, dtype, weights="float32", **kwargs):
    got, want = with_gradients(*case, **kwargs), exact(*case)
    for a, b, kind, tolerance in zip(
        got, want, (dtype, dtype, weights, weights), (FORWARD, *[BACKWARD] * 3), strict=True
    ):
        check(a, b, kind, tolerance)


@pytest.mark.parametrize(
    "shape", [(4, 3), (2, 7), (3, 31), (3, 127), (3, 129), (2, 3, 1000), (2, 1, 2, 4097), (257,), (131, 8)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_is_right_at_any_length(shape, dtype):
    check_all(arrays(shape, dtype), dtype, implementation="xla")


@pytest.mark.parametrize("n", [1, 2])
def test_rows_of_one_and_two_elements(n):
    case = arrays((5, n))
    y, dx, dscale, dbias = with_gradients(*case, implementation="xla")
    want = exact(*case)
    assert error(y, want[0]) <= FORWARD and error(dscale, want[2]) <= BACKWARD and error(dbias, want[3]) <= BACKWARD
    # Such a row has no freedom left but epsilon's: dx is what remains of numbers that cancel, as large as dy * rstd.
    np.testing.assert_allclose(dx, want[1], atol=1e-6 * (1e3 if n == 1 else 1e1))


# Rows side by side in a warp, one a warp, several one after the other; with a ragged end, of odd length, fewer rows
# than a tile, a last tile that is not full; rows that warps share, likewise.
@kernels
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((9, 384), "float32"),
        ((2, 19, 128), "bfloat16"),
        ((5, 1000), "float16"),
        ((1, 64), "float32"),
        ((70, 8), "bfloat16"),
        ((3, 33), "bfloat16"),
        ((9, 6), "float32"),
        ((3, 1544), "bfloat16"),
        ((2, 4096), "float32"),
        ((3, 4097), "float32"),
        ((2, 8192), "bfloat16"),
    ],
)
def test_kernels_are_right(shape, dtype):
    check_all(arrays(shape, dtype, weights="float32"), dtype, implementation="interpret")


@kernels
@pytest.mark.parametrize(("warps", "turns", "later"), [(1, 1, False), (1, 2, True), (4, 3, False), (4, 1, True)])
@pytest.mark.parametrize("again", [False, True])
def test_more_tiles_than_blocks_and_stages(monkeypatch, warps, turns, later, again):
    monkeypatch.setattr(rows, "PROCESSORS", 2)
    config = rows.Config(warps=warps, stages=3, hold=False, again=again, turns=turns, later=later)
    monkeypatch.setattr(ln, "config_for", lambda *_: config)
    check_all(arrays((39, 128)), "float32", implementation="interpret")


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=kernels)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual_is_added_first_and_its_sum_returned(implementation, dtype):
    x, scale, bias, dy = arrays((5, 256), dtype)
    residual, dtotal = arrays((5, 256), dtype, seed=1)[::3]
    run = lambda *args: layer_norm(*args[:3], residual=args[3], implementation=implementation)
    (y, total), vjp = jax.vjp(run, x, scale, bias, residual)
    np.testing.assert_array_equal(total, x + residual)
    dx, dscale, dbias, dresidual = vjp((dy, dtotal))
    want = exact(total, scale, bias, dy, dtotal=dtotal)
    # The simulation may carry the sum in more precision than bfloat16 has, which the GPU does not: 2**-9 of it.
    slack = 2**-9 if implementation == "interpret" and dtype == "bfloat16" else 0.0
    for got, expected, kind in zip((y, dx, dscale, dbias), want, (dtype, dtype, "float32", "float32"), strict=True):
        check(got, expected, kind, slack or BACKWARD)
    np.testing.assert_array_equal(dx, dresidual)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=kernels)])
@pytest.mark.parametrize("given", ["", "scale", "bias"])
def test_scale_and_bias_may_be_absent(implementation, given):
    x, scale, bias, dy = arrays((5, 128))
    scale, bias = scale if given == "scale" else None, bias if given == "bias" else None
    got = with_gradients(x, scale, bias, dy, implementation=implementation)
    want = exact(x, 1.0 if scale is None else scale, 0.0 if bias is None else bias, dy)
    assert (got[2] is None, got[3] is None) == (scale is None, bias is None)
    for a, b in zip(got, want, strict=True):
        if a is not None:
            check(a, b, "float32", BACKWARD)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=kernels)])
def test_gradients_come_in_each_arguments_dtype(implementation):
    case = arrays((6, 128), "float32", weights="bfloat16")
    check_all(case, "float32", "bfloat16", implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=kernels)])
@pytest.mark.parametrize("mean", [1000.0, 1e4])
@pytest.mark.parametrize("n", [256, 1001, 3000])
def test_large_mean_small_variance(n, mean, implementation):
    # The mean of numbers near 1e4 is known to 1e-3 in float32, and the rest of it must not be lost.
    check_all(arrays((4, n), mean=mean), "float32", implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=kernels)])
def test_constant_rows_give_the_bias_and_nan_stays_in_its_row(implementation):
    x, scale, bias, _ = arrays((8, 128))
    y = layer_norm(jnp.full((3, 128), 7.0), scale, bias, implementation=implementation)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias, y.shape))
    spoilt = layer_norm(x.at[2, 5].set(jnp.nan), scale, bias, implementation=implementation)
    assert np.isnan(spoilt[2]).all()
    clean = layer_norm(x, scale, bias, implementation=implementation)
    np.testing.assert_array_equal(np.delete(spoilt, 2, 0), np.delete(clean, 2, 0))


@kernels
def test_a_row_does_not_depend_on_how_many_there_are():
    x, scale, bias, _ = arrays((11, 256))
    all_rows = layer_norm(x, scale, bias, implementation="interpret")
    for many in (1, 6):
        np.testing.assert_array_equal(layer_norm(x[:many], scale, bias, implementation="interpret"), all_rows[:many])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_in_nothing_out(shape):
    case = arrays(shape)
    y, dx, dscale, dbias = with_gradients(*case)
    assert (y.shape, dx.shape, dscale.shape, dbias.shape) == (shape, shape, shape[-1:], shape[-1:])
    assert not dscale.any() and not dbias.any()


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=kernels)])
def test_vmap_scan_and_remat(implementation):
    x, scale, bias, dy = arrays((3, 4, 128))
    f = functools.partial(layer_norm, implementation=implementation)
    want = f(x, scale, bias)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    close(jax.vmap(f, (0, None, None))(x, scale, bias), want)
    close(jax.lax.scan(lambda c, row: (c, f(row, scale, bias)), None, x)[1], want)
    loss = lambda f: lambda *args: jnp.sum(f(*args) * dy)
    if implementation == "xla":  # the simulation's callbacks do not go through remat
        jax.tree.map(close, *(jax.grad(loss(g), (0, 1, 2))(x, scale, bias) for g in (f, jax.checkpoint(f))))


def test_reference_is_flax_and_its_own_derivative_is_ours():
    x, scale, bias, dy = arrays((4, 33), mean=2.0)
    layer = nn.LayerNorm(use_fast_variance=False)
    want = layer.apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(layer_norm_reference(x, scale, bias), want, rtol=1e-6, atol=1e-6)
    by_jax = jax.vjp(layer_norm_reference, x, scale, bias)[1](dy)
    ours = with_gradients(x, scale, bias, dy, implementation="xla")[1:]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, by_jax)


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [2, 33, 64, 512, 1000, 1024, 2048, 3001, 4096, 5120, 8192, 14432, 20001, 65536])
def test_lowers_for_cuda_on_a_cpu_host(n, dtype):
    case = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays((7, n), dtype)]
    run = functools.partial(with_gradients, implementation="mosaic")
    text = jax.jit(run).trace(*case).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3  # forward, backward, and the last step of dscale and dbias


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [256, 2048, 4096, 8192])
def test_residual_lowers_for_cuda(n, dtype):
    x, scale, bias, _ = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays((7, n), dtype))
    run = lambda x, s, b, r: jax.vjp(lambda *a: layer_norm(*a[:3], residual=a[3], implementation="mosaic"), x, s, b, r)
    both = lambda *args: (lambda out, vjp: vjp(out))(*run(*args))
    text = jax.jit(both).trace(x, scale, bias, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "zerojax_layer_norm_backward" in text


@kernels
@pytest.mark.parametrize("checked", [False, True])
def test_lowers_for_cuda_inside_shard_map(checked):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((8,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    place = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))
    x, scale, bias, dy = arrays((16, 256))
    rows, whole = jax.P("data"), jax.P()

    def local(x, scale, bias, dy):
        _, *grads = with_gradients(x, scale, bias, dy, implementation="mosaic")
        return grads if checked else [grads[0], *(jax.lax.psum(g, "data") for g in grads[1:])]

    specs = {"in_specs": (rows, whole, whole, rows), "out_specs": [rows, whole, whole]}
    step = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=checked, **specs))
    case = [place(a, spec) for a, spec in zip((x, scale, bias, dy), specs["in_specs"], strict=True)]
    text = step.trace(*case).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
    assert "all_reduce" in text and "all_gather" not in text


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_length_has_a_launch_that_fits(itemsize, streams):
    lengths = [*range(2, 300), *(2**k + more for k in range(9, 18) for more in (-8, -1, 0, 1, 8, 96))]
    for n in lengths:
        for many in (1, 1000, 262144):
            for kind in ("forward", "backward"):
                if n > ln._LONGEST[kind]:
                    continue
                config = ln.config_for(kind, many, n, itemsize, streams)
                grid = rows.Grid(many, n, itemsize, config)
                assert max(grid.ring_bytes(streams), 2 * grid.sums_bytes) <= rows.SHARED_BYTES
                assert grid.teams >= 1 and grid.part * config.warps >= n and config.cluster <= 16
                # The number of rows is not to change the order of a sum.
                one = ln.config_for(kind, 1, n, itemsize, streams)
                assert (config.warps, config.cluster) == (one.warps, one.cluster)


@pytest.mark.parametrize(
    ("columns", "warps", "cluster"),
    [(1001, 4, 1), (4096, 8, 1), (257, 1, 1), (8200, 16, 2), (14432, 32, 2), (9, 64, 16)],
)
def test_every_column_is_in_one_place(columns, warps, cluster):
    grid = rows.Grid(1, columns, 2, rows.Config(warps=warps, warpgroups=max(1, warps // 4 // cluster), cluster=cluster))
    lanes = np.arange(0, grid.span)
    starts = np.arange(grid.registers)[:, None] * grid.stride + np.arange(grid.warps) * grid.span
    found = []
    for block, count in enumerate(grid.block_counts):
        here = (starts[..., None] + lanes).swapaxes(0, 1).reshape(grid.warps, -1)
        assert (here[:, : grid.full * grid.span] < count).all()
        found += [column + block * grid.block_columns for column in here.ravel() if column < count]
        if cluster == 1:
            assert grid.warp_counts == [(warp < count).sum() for warp in here]
    assert sorted(found) == list(range(columns))
    assert grid.whole == (grid.registers * grid.stride * cluster == columns)


@pytest.mark.parametrize("implementation", [None, *dispatch.IMPLEMENTATIONS])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape, implementation):
    x, scale = jnp.ones(shape), jnp.ones(shape[-1])
    y, vjp = jax.vjp(lambda x, scale: layer_norm(x, scale, implementation=implementation), x, scale)
    dx, dscale = vjp(y)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dscale, np.zeros(shape[-1]))


def test_choice_says_why():
    assert layer_norm_choice(jnp.ones((2, 128))).implementation == "xla"  # a CPU
    why = lambda kind, n, dtype="float32": ln.unserved(kind, jax.ShapeDtypeStruct((2, n), dtype))
    assert why("forward", 50257, "bfloat16") is None
    assert "not of 262145" in why("forward", 2**18 + 1)
    assert "not of 262144" in why("backward", 2**18)
    slow = lambda n, dtype: ln.slower(jax.ShapeDtypeStruct((2, n), dtype))
    assert "50257 elements" in slow(50257, "bfloat16")
    assert not any([slow(50257, "float32"), slow(50256, "bfloat16"), slow(1001, "float16")])
    assert "float8_e5m2" in why("forward", 8, "float8_e5m2")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": np.ones((2, 4), "int32")}, TypeError, "x must have a float dtype, got int32"),
        ({"x": np.ones((2, 4), "complex64")}, TypeError, "x must have a float dtype, got complex64"),
        ({"x": np.float32(1)}, ValueError, "x must have a last dim"),
        (
            {"scale": np.ones(3, "float32")},
            ValueError,
            r"scale must have the shape of x's last dim, \(4,\), got \(3,\)",
        ),
        ({"bias": np.ones((2, 4), "float32")}, ValueError, "bias must have the shape"),
        ({"bias": np.ones(4, "int8")}, TypeError, "bias must have a float dtype, got int8"),
        ({"residual": np.ones((1, 4), "float32")}, ValueError, "residual must have x's shape"),
        ({"residual": np.ones((2, 4), "float16")}, TypeError, "residual must have x's dtype"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
        ({"implementation": "mosaic"}, ValueError, "cannot run"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, kind, message):
    arguments = {"x": np.ones((2, 4), "float32"), "scale": None, "bias": None, **change}
    with pytest.raises(kind, match=message):
        layer_norm(**arguments)
