"""Which transformations are found to multiply all gradients by one number, and that the number is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax.scaling import update_as_scale

GRADS = {"a": np.linspace(-2, 3, 12, dtype="float32").reshape(3, 4), "b": np.float32([0.5, 0, -4]), "c": np.float32(2)}
SCALES = {
    "clip": optax.clip_by_global_norm(1.0),
    "clip_idle": optax.clip_by_global_norm(1e6),
    "scale": optax.scale(-0.25),
    "schedule": optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 10)),
    "identity": optax.identity(),
    "two": optax.chain(optax.clip_by_global_norm(1.0), optax.scale(3.0)),
}
OTHERS = {
    "arange": optax.stateless(lambda u, _: jax.tree.map(lambda x: x + jnp.arange(1.0), u)),
    "truncated": optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype("int32").astype(x.dtype), u)),
    "rounded": optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), u)),
    "by_element": optax.clip(1.0),
    "by_block": optax.clip_by_block_rms(1.0),
    "decay": optax.add_decayed_weights(0.1),
    "adam": optax.scale_by_adam(),
    "centralize": optax.centralize(),
    "masked": optax.masked(optax.scale(2.0), {"a": True, "b": False, "c": True}),
}


def run(tx, dtype="float32"):
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), GRADS)
    tx = optax.with_extra_args_support(tx)

    def both(grads):
        updates, scale, state = update_as_scale(tx, grads, tx.init(grads), grads)
        return updates, scale, state, tx.update(grads, tx.init(grads), grads)

    return grads, *jax.jit(both)(grads)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_common_factor_is_found(name, dtype):
    grads, updates, scale, state, (want, want_state) = run(SCALES[name], dtype)
    assert scale is not None
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    # (g / norm) * limit is rounded twice, as g * (limit / norm) is: 2 ulp of the gradient's dtype.
    rtol = 2.5 * float(jnp.finfo(dtype).eps)
    close = lambda g, w: np.testing.assert_allclose(np.float32(g) * scale, np.float32(w), rtol=rtol)
    jax.tree.map(close, updates, want)
    jax.tree.map(np.testing.assert_array_equal, state, want_state)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_common_factor_is_done(name):
    _, updates, scale, state, (want, want_state) = run(OTHERS[name])
    assert scale is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (updates, state), (want, want_state))


def test_infinite_gradients_stay_what_optax_makes_of_them():
    tx = optax.with_extra_args_support(optax.clip_by_global_norm(1.0))
    grads = {"a": jnp.array([jnp.inf, 1.0])}
    _, scale, _ = update_as_scale(tx, grads, tx.init(grads), None)
    want, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(grads["a"] * scale, want["a"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_global_norm_is_taken_from_the_sums_given(dtype):
    grads = {"a": jnp.full(3, 2.0, dtype), "b": jnp.full((2, 2), 3.0, dtype)}
    asked = []

    def squares():
        asked.append(1)
        return jnp.array([16.0, 9.0])  # not those of the leaves, so that the test sees whose are used

    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale(0.5))
    tx = optax.with_extra_args_support(chain)
    wide = jax.tree.map(lambda x: x.astype("float32"), grads)
    same, scale, _ = update_as_scale(tx, wide, tx.init(grads), None, squares=squares)
    assert same is wide
    np.testing.assert_allclose(scale, 0.5 / 5.0, rtol=1e-6)
    assert asked == [1]


def test_sums_of_other_things_are_left_alone():
    def update(updates, state, params=None):
        # Of a multiple, of a part, along one dim, and of no square.
        total = jnp.sum(jnp.square(2 * updates["a"])) + jnp.sum(updates["a"][1:] ** 2) + jnp.sum(updates["b"])
        total += jnp.sum(jnp.sum(updates["b"] ** 2, axis=0) ** 3)
        return jax.tree.map(lambda x: x * total, updates), state

    tx = optax.with_extra_args_support(optax.GradientTransformation(lambda _: (), update))
    grads = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    _, scale, _ = update_as_scale(tx, grads, (), None, squares=lambda: jnp.full(2, jnp.nan))
    np.testing.assert_allclose(scale, 4 * 5 + 5 + 4 + 2 * 8, rtol=1e-6)
