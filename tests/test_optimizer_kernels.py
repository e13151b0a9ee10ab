"""The optimizer kernels themselves: values by interpretation, and what they lower to for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels
import zerojax
from pallas_kernels import dispatch, formats, leaves

NEW_JAX = pytest.mark.skipif(bool(dispatch.too_old()), reason="kernels need a newer jax")
SHAPES = [(1000,), (3, 5), (), (0, 4), (129,), (300, 7)]
OPS = {
    "adam": (pallas_kernels.adam, pallas_kernels.adam_reference, pallas_kernels.adam_scalars),
    "lamb": (pallas_kernels.lamb, pallas_kernels.lamb_reference, pallas_kernels.lamb_scalars),
}


def state(shapes=SHAPES, dtype="float32", grad_dtype="float32"):
    rng = np.random.default_rng(0)
    normal = lambda dtype: [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    params, grads, mu = normal(dtype), normal(grad_dtype), normal("float32")
    return params, grads, mu, [x**2 for x in normal("float32")]


def h200():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device))


def lower(op, args, **options):
    with h200():
        run = jax.jit(functools.partial(op, **options), donate_argnums=(0, 2, 3))
        return run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@NEW_JAX
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_kernel_equals_reference(name, dtype):
    op, reference, scalars = OPS[name]
    args = state(dtype=dtype, grad_dtype=dtype)
    s = scalars(3, 1e-2, weight_decay=0.1, scale=0.5)
    decay = [True, False, True, True, False, True]
    got = op(*args, s, decay=decay, implementation="interpret")
    want = reference(*args, s, decay=decay)
    # One rounding of the param more or less; LAMB's norms are summed in another order.
    rtol = 2e-6 if dtype == "float32" else 2**-7
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=2e-6), got, want)
    assert [x.dtype for x in got[0]] == [x.dtype for x in args[0]]


def stored(kind, shapes=((300, 64), (1000,), (3, 5), (), (0, 4), (64,))):
    """Params, gradients and moments in a format."""
    rng = np.random.default_rng(1)
    normal = lambda scale: [jnp.asarray(scale * rng.standard_normal(shape), "float32") for shape in shapes]
    params, grads, mu, nu = normal(1), normal(0.1), normal(0.1), [x**2 for x in normal(0.1)]
    small = lambda x, like, half: formats.encode(x, like, half=half, seed=1)
    if "bfloat16" in kind:
        mu, nu = ([x.astype("bfloat16") for x in moment] for moment in (mu, nu))
    if "int8" in kind:
        mu = [small(x, formats.zeros(x.shape, signed=True), 0) for x in mu]
        nu = [small(x, formats.zeros(x.shape, signed=False), 1) for x in nu]
    if "split" in kind:
        params = [formats.split(x) for x in params]
    if "copied" in kind:
        params = [formats.Copied(x, x.astype("bfloat16")) for x in params]
    return params, [g.astype("bfloat16") for g in grads], mu, nu


def decoded(*trees):
    return [jax.tree.map(formats.decode, tree, is_leaf=formats.is_stored) for tree in trees]


def codes(x):
    """Integers that differ by one where numbers in few bits are neighbours."""
    return np.asarray(x).view(np.int16 if x.dtype == "bfloat16" else x.dtype).astype(int)


FORMATS = ["bfloat16", "int8", "int8 split", "copied"]


@NEW_JAX
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_interpreted_formats_equal_the_reference(name, kind):
    op, reference, scalars = OPS[name]
    args = stored(kind)
    s = scalars(3, 1e-2, weight_decay=0.1, scale=0.5)
    got, want = op(*args, s, implementation="interpret"), reference(*args, s)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    # A moment whose last bit differs before it is rounded meets its threshold between the two once in 2**16 times, if
    # spacings are 2**8 times as wide: 0.1 are to be expected of these 20,000, and then the codes are neighbours.
    # A step of LAMB is that of the moments as stored: where these differ, so do the params.
    for row in zip(*got, *want, strict=True):
        (new, *new_moments), (old, *old_moments) = row[:3], row[3:]
        same = np.ones(formats.shape_of(new), bool)
        for x, y in zip(*map(jax.tree.leaves, (new_moments, old_moments)), strict=True):
            if x.dtype == "float32":  # not rounded: as the params
                np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)
            else:
                apart = np.abs(codes(x) - codes(y))
                assert np.sum(apart) <= 2 and np.all(apart <= 1)
                same &= (apart == 0) if x.shape == same.shape else True
        np.testing.assert_allclose(*(np.asarray(x)[same] for x in decoded(new, old)), rtol=2e-6, atol=2e-6)
    unchanged = op(*args, s._replace(apply=jnp.float32(0)), implementation="interpret")
    jax.tree.map(np.testing.assert_array_equal, unchanged, (args[0], *args[2:]))


@NEW_JAX
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_updated_in_place_by_one_launch(kind):
    args = stored(kind, shapes=((64, 64), (32,), (2, 96)))
    text = lower(pallas_kernels.adam, (*args, pallas_kernels.adam_scalars(1, 1e-2)), implementation="mosaic")
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == len(jax.tree.leaves((args[0], *args[2:])))


@NEW_JAX
def test_norms_of_ragged_leaves_are_of_whole_leaves():
    rng = np.random.default_rng(0)
    draw = lambda: {k: jnp.asarray(rng.standard_normal(s), "float32") for k, s in (("a", (64, 40)), ("b", (96, 64)))}
    params, grads, new = draw(), draw(), {}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    plan = zerojax.make_plan(params, mesh, stage=1, min_size=1)
    for implementation in ("interpret", "xla"):
        tx = zerojax.fused_lamb(0.1, mu_dtype="int8", nu_dtype="int8", implementation=implementation)
        tx = zerojax.zero(tx, plan)
        step = jax.jit(functools.partial(zerojax.apply, tx))
        new[implementation], _ = step(grads, tx.init(params), jax.device_put(params, plan.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6), new["interpret"], new["xla"])


@NEW_JAX
def test_a_shard_is_rounded_as_its_part_of_the_whole():
    args, s = stored("bfloat16", shapes=((8, 6, 20),)), pallas_kernels.adam_scalars(3, 1e-2)
    whole = pallas_kernels.adam(*args, s, implementation="interpret")
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[:, 3 * i : 3 * i + 3], args)
        places = [formats.Place(0, (formats.Cut(60, 60, 60 * i),))]
        got = pallas_kernels.adam(*part, s, places=places, implementation="interpret")
        want = jax.tree.map(lambda x, i=i: x[:, 3 * i : 3 * i + 3], whole)
        jax.tree.map(np.testing.assert_array_equal, got[1:], want[1:])


@NEW_JAX
@pytest.mark.parametrize("name", OPS)
def test_a_step_that_is_not_applied_changes_nothing(name):
    op, _, scalars = OPS[name]
    params, grads, mu, nu = state()
    grads[0] = grads[0].at[3].set(jnp.nan)
    for implementation in ("interpret", "xla"):
        got = op(params, grads, mu, nu, scalars(1, 1e-2, apply=False), implementation=implementation)
        jax.tree.map(np.testing.assert_array_equal, got, (params, mu, nu))


@NEW_JAX
@pytest.mark.parametrize("name", OPS)
def test_many_leaves_are_few_launches_in_place(name):
    op, _, scalars = OPS[name]
    args = state(shapes=[(40 + i,) for i in range(60)])
    text = lower(op, (*args, scalars(1, 1e-2)), implementation="mosaic")
    kernels = text.count("stablehlo.custom_call @mosaic_gpu_v2")
    assert kernels == {"adam": 1, "lamb": 3}[name]  # moments, sums of squares, params
    assert text.count("output_operand_alias<") == 3 * 60


@NEW_JAX
def test_large_leaves_share_a_launch_by_the_dozen():
    S = jax.ShapeDtypeStruct
    leaves_of = [S((2**22,), jnp.float32)] * 64
    s = jax.eval_shape(lambda: pallas_kernels.adam_scalars(1, 1e-2))
    text = lower(pallas_kernels.adam, (leaves_of, leaves_of, leaves_of, leaves_of, s))
    assert text.count(" call @run") == 3  # 24, 24 and 16
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2  # like launches are lowered once


@NEW_JAX
def test_leaves_of_other_dtypes_have_launches_of_their_own():
    params, grads, mu, nu = state(shapes=[(256,), (128,)])
    params[0], grads[1] = params[0].astype(jnp.bfloat16), grads[1].astype(jnp.bfloat16)
    text = lower(pallas_kernels.adam, (params, grads, mu, nu, pallas_kernels.adam_scalars(1, 1e-2)))
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2


def test_bias_correction_is_exact_at_the_first_step():
    s = pallas_kernels.adam_scalars(1, 1e-3, b1=0.9, b2=0.999)
    np.testing.assert_allclose([s.mu_factor, s.nu_factor], [10, 1000], rtol=3e-7)
    late = pallas_kernels.adam_scalars(2**31 - 1, 1e-3)
    np.testing.assert_allclose([late.mu_factor, late.nu_factor], [1, 1], rtol=1e-7)
    none = pallas_kernels.adam_scalars(1, 1e-3, b1=0.0)
    assert float(none.mu_factor) == 1


def test_explain_says_which_and_why():
    leaf = [jax.ShapeDtypeStruct((4,), "float32")]
    text = pallas_kernels.explain("adam", leaf, leaf, leaf, leaf)
    assert text.startswith("adam runs xla: kernels need")
    double = [jax.ShapeDtypeStruct((4,), "float64")]
    assert "not float64" in pallas_kernels.explain(pallas_kernels.lamb, double, leaf, leaf, leaf)
    if not dispatch.too_old():
        with h200():
            assert pallas_kernels.explain("lamb", leaf, leaf, leaf, leaf).startswith("lamb runs mosaic")
    with pytest.raises(ValueError, match="op must be one of adam, lamb, layer_norm, softmax"):
        pallas_kernels.explain("gelu")


@NEW_JAX
def test_without_a_plan_no_kernel_runs_on_what_may_be_shards():
    params = {"w": jnp.ones((64, 8))}
    for implementation, kernels in ((None, 0), ("mosaic", 1)):
        tx = zerojax.fused_adamw(1e-3, implementation=implementation)
        with h200():  # of a process with eight devices
            traced = jax.jit(functools.partial(zerojax.apply, tx)).trace(params, tx.init(params), params)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == kernels


@pytest.mark.parametrize("implementation", [None, *dispatch.IMPLEMENTATIONS])
@pytest.mark.parametrize("shapes", [(), ((0, 4), (0,))])
def test_without_elements_any_implementation_gives_them_back(shapes, implementation):
    args = state(shapes)
    for op, _, scalars in OPS.values():
        assert [[x.shape for x in xs] for xs in op(*args, scalars(1, 1e-2), implementation=implementation)] == [
            list(shapes)
        ] * 3
    assert pallas_kernels.squares(args[0], implementation=implementation).tolist() == [0.0] * len(shapes)


def test_bad_input_is_refused_by_name():
    params, grads, mu, nu = state()
    s = pallas_kernels.adam_scalars(1, 1e-2)
    with pytest.raises(ValueError, match=r"adam: leaf 1 has shape \[2\] in grads, \[3, 5\] in params"):
        pallas_kernels.adam(params, [grads[0], jnp.ones(2), *grads[2:]], mu, nu, s)
    with pytest.raises(ValueError, match=r"lists of one length are wanted.*5 grads"):
        pallas_kernels.adam(params, grads[:5], mu, nu, s)
    with pytest.raises(TypeError, match="leaf 0 of params has dtype int32"):
        pallas_kernels.lamb([jnp.arange(2)], [jnp.ones(2)], [jnp.ones(2)], [jnp.ones(2)], s)
    with pytest.raises(ValueError, match="implementation='mosaic' cannot run: kernels need"):
        pallas_kernels.adam(params, grads, mu, nu, s, implementation="mosaic")


def test_groups_keep_order_and_limits():
    flat = [[jnp.zeros(n) for n in (5, 0, 7, 9, 11)]]
    groups = functools.partial(leaves._groups, flat)
    assert list(groups(leaves.Config(leaves=2, elements=12))) == [[0, 2], [3, 4]]
    assert list(groups(leaves.Config(max_leaves=3))) == [[0, 2, 3], [4]]
