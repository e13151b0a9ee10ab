"""How moments and weights are stored in fewer bytes: exact where it is said, unbiased where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zerojax
from pallas_kernels import formats

SHAPE = (64, 100)  # rows of three groups and a ragged one


def values(signed, seed=0):
    """Numbers whose rows differ in size, as gradients' do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(SHAPE) * np.exp(2 * rng.standard_normal((SHAPE[0], 1)))
    return jnp.asarray(x if signed else x**2, jnp.float32)


def like_of(kind, signed):
    return jnp.zeros(SHAPE, "bfloat16") if kind == "bfloat16" else formats.zeros(SHAPE, signed=signed)


def test_halves_of_a_weight_are_the_weight():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    x = jnp.asarray(bits.view(np.float32))
    halves = jax.jit(formats.split)(x)
    assert (halves.high.dtype, halves.low.dtype) == (jnp.bfloat16, jnp.uint16)
    np.testing.assert_array_equal(np.asarray(formats.joined(halves)).view(np.uint32), bits)
    # The kernels' way gives the same, of every finite number.
    finite = jnp.where(jnp.isfinite(x), x, 0)
    again = formats.encode(finite, halves)
    np.testing.assert_array_equal(formats.decode(again), finite)


def spacing(x, kind, signed):
    """At least the distance of the two numbers between which each of x is stored."""
    if kind == "bfloat16":
        return np.abs(x) * 2.0**-7
    # The power of two leaves at least half of the codes to the largest of a group.
    largest = np.asarray(formats.group_max(jnp.abs(jnp.asarray(x, jnp.float32))), np.float64)
    step = largest / 63 if signed else np.sqrt(largest) / 127
    return step if signed else 2 * np.sqrt(x) * step + step**2


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("signed", [True, False])
def test_rounding_has_no_bias(kind, signed):
    x, like, seeds = values(signed), like_of(kind, signed), 256
    store = jax.jit(lambda seed: formats.decode(formats.encode(x, like, half=int(not signed), seed=seed)))
    exact = np.asarray(x, np.float64)
    error = np.mean([np.asarray(store(seed), np.float64) for seed in range(seeds)], axis=0) - exact
    error /= spacing(exact, kind, signed)
    if not signed and kind == "int8":  # below the first code they are rounded up always
        error = error[exact > (np.sqrt(np.asarray(formats.group_max(x), np.float64)) / 127) ** 2]
    # A rounding's deviation is half of the spacing at most; five deviations of the mean.
    assert np.abs(error).max() <= 5 * 0.5 / np.sqrt(seeds)
    assert np.abs(error.mean()) <= 5 * 0.5 / np.sqrt(seeds * error.size)


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_is_within_its_resolution(signed):
    x, like = values(signed), formats.zeros(SHAPE, signed=signed)
    stored = formats.encode(x, like, half=0, seed=3)
    assert [a.dtype for a in stored] == [jnp.dtype("int8" if signed else "uint8"), jnp.dtype("int8")]
    assert stored.exponents.shape == (64, 4)
    root = lambda a: np.asarray(a, np.float64) if signed else np.sqrt(np.asarray(a, np.float64))
    largest = formats.group_max(jnp.abs(x))
    # The power of two leaves at least 63 (127) of the codes to the largest of a group.
    step = root(largest) / (63 if signed else 127)
    assert np.all(np.abs(root(formats.decode(stored)) - root(x)) <= 1.001 * step)


def test_what_is_not_zero_stays_so():
    x = jnp.asarray([[1e-12] * 31 + [1.0]])
    nu = formats.decode(formats.encode(x, formats.zeros((1, 32), signed=False), half=1, seed=0))
    assert np.all(np.asarray(nu) > 0)
    zero = formats.encode(jnp.zeros(40), formats.zeros((40,), signed=False), half=1, seed=0)
    np.testing.assert_array_equal(formats.decode(zero), np.zeros(40))


def test_random_bits_do_not_depend_on_how_a_leaf_is_cut():
    key = formats.leaf_key(jnp.int32(7), 3)
    whole = np.asarray(formats.random_bits(key, formats.places((6, 8, 10))))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8, 10)), "float32")
    want = np.asarray(formats.encode(x, x.astype("bfloat16"), half=0, seed=7, place=formats.Place(3)))
    for i, j in ((0, 0), (1, 0), (1, 3)):  # cut in 2 along the first dim, and in 4 along the second
        cuts = (formats.Cut(2 * 10, 6 * 10, j * 2 * 10), formats.Cut(3 * 8 * 10, 0, i * 3 * 8 * 10))
        part = x[3 * i : 3 * i + 3, 2 * j : 2 * j + 2]
        got = formats.encode(part, part.astype("bfloat16"), half=0, seed=7, place=formats.Place(3, cuts))
        np.testing.assert_array_equal(got, want[3 * i : 3 * i + 3, 2 * j : 2 * j + 2])
    # Each bit is set in half of the elements, within five standard deviations.
    ones = [((whole.view(np.uint32) >> bit) & 1).mean() for bit in range(32)]
    np.testing.assert_allclose(ones, 0.5, atol=5 * 0.5 / np.sqrt(whole.size))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_second_moment_neither_stalls_nor_sticks(dtype):
    # Rounded to nearest, a bfloat16 one would stand at 0.0039 of 0.0095, and never fall.
    params = {"w": jnp.zeros((8, 64))}
    tx = zerojax.fused_adam(1e-4, mu_dtype=dtype, nu_dtype=dtype)

    @jax.jit
    def run(params, state, g):
        body = lambda _, carry: zerojax.apply(tx, {"w": jnp.full((8, 64), g)}, carry[1], carry[0])
        return jax.lax.fori_loop(0, 3000, body, (params, state))

    params, state = run(params, tx.init(params), 0.1)
    # A random walk of steps of 0.4 to 0.8 % with a memory of 1000 steps, over 512 elements.
    decoded = lambda: np.asarray(formats.decode(state.nu["w"]), np.float64).mean()
    np.testing.assert_allclose(decoded(), 0.01 * (1 - 0.999**3000), rtol=0.01)
    params, state = run(params, state, 1e-3)
    left = 0.01 * (1 - 0.999**3000) * 0.999**3000 + 1e-6
    np.testing.assert_allclose(decoded(), left, rtol=0.03)


def test_small_moments_follow_float32_ones():
    """200 steps of a regression: losses within 2 % of those with float32 moments.

    A second moment with a memory of 1000 steps takes a random walk: each step changes it by 0.1 %, which is rounded to
    0 or to a whole spacing s, a variance of 0.001 s a step. After 200 steps that is 3 % of bfloat16 (s of 0.4 to 0.8 %)
    and 6 % of 8 bits (1 to 3 %).
    """
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.standard_normal((200, 32, 24)), "float32")
    ys = jnp.sin(xs @ jnp.asarray(rng.standard_normal((24, 4)), "float32"))
    shapes = {"a": (24, 64), "b": (64, 64), "c": (64, 4)}
    first = {k: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), "float32") for k, s in shapes.items()}

    def loss(p, x, y):
        return jnp.mean((jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] - y) ** 2)

    def train(dtype):
        tx = zerojax.fused_adamw(3e-3, mu_dtype=dtype, nu_dtype=dtype)
        reference = optax.adamw(3e-3)

        def step(carry, batch):
            # The same gradients for both, so that only what is stored differs.
            params, state, exact = carry
            value, grads = jax.value_and_grad(loss)(params, *batch)
            _, exact = reference.update(grads, exact, params)
            params, state = zerojax.apply(tx, grads, state, params)
            return (params, state, exact), value

        start = (first, tx.init(first), reference.init(first))
        (_, state, exact), losses = jax.jit(lambda xs, ys: jax.lax.scan(step, start, (xs, ys)))(xs, ys)
        return state, optax.tree.get(exact, "mu"), optax.tree.get(exact, "nu"), np.asarray(losses)

    *_, plain = train(None)
    for dtype in ("bfloat16", "int8"):
        state, mu, nu, losses = train(dtype)
        for stored, exact, bound in ((state.mu, mu, 0.03), (state.nu, nu, 0.04 if dtype == "bfloat16" else 0.08)):
            for name in shapes:
                want = np.asarray(exact[name], np.float64)
                got = np.asarray(formats.decode(stored[name]), np.float64)
                assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want), (dtype, name)
        np.testing.assert_allclose(losses[-20:].mean(), plain[-20:].mean(), rtol=0.02)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_leaves_its_neighbours_alone(signed, bad):
    x = jnp.full(32, 0.25).at[3].set(bad)
    got = np.asarray(formats.decode(formats.encode(x, formats.zeros((32,), signed=signed), half=0, seed=0)))
    np.testing.assert_allclose(np.delete(got, 3), 0.25, rtol=0.02)
