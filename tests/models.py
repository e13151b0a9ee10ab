"""Small models whose leaves have every shape that a plan must cope with, and what Optax makes of them on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(*sizes, names=("data",), axis_type=AUTO):
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes), devices=jax.devices()[:count])


def mlp_params():
    """Leaves that divide, that do not, a scalar, an empty one, and one used twice (`tied`)."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    return {
        "inner": {"kernel": normal(16, 32), "bias": normal(32)},
        "tied": normal(32, 32),
        "odd": normal(7, 13),
        "gain": jnp.float32(1.5),
        "empty": jnp.zeros((0, 8)),
        "head": [normal(32, 8), normal(8)],
    }


def mlp_loss(params, batch):
    x = jnp.tanh(batch["x"] @ params["inner"]["kernel"] + params["inner"]["bias"])
    x = jnp.tanh(x @ params["tied"]) @ params["tied"].T
    x = params["gain"] * x @ params["head"][0] + params["head"][1]
    return jnp.mean((x - batch["y"]) ** 2) + 1e-2 * jnp.sum(params["odd"] ** 2) + jnp.sum(params["empty"])


def mlp_batches(steps=4, rows=32):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.normal(size=(rows, n)).astype(np.float32)
    return [{"x": draw(16), "y": draw(8)} for _ in range(steps)]


def stack_params(layers=4, width=16):
    """A stack of layers for a scan, with an embedding before and a head behind."""
    keys = iter(jax.random.split(jax.random.key(1), 4))
    normal = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    return {
        "embed": normal(8, width),
        "layers": {
            "kernel": normal(layers, width, 2 * width),
            "out": normal(layers, 2 * width, width),
            "bias": jnp.zeros((layers, width)),
        },
        "head": normal(width, 8),
    }


def stack_loss(params, batch, *, gather=lambda tree: tree):
    @jax.checkpoint
    def layer(x, weights):
        w = gather(weights)
        return x + jnp.tanh(x @ w["kernel"]) @ w["out"] + w["bias"], None

    x, _ = jax.lax.scan(layer, batch["y"] @ params["embed"], params["layers"])
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


def clipped_adamw():
    return optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10), weight_decay=0.1)
    )


@functools.cache
def reference(params_fn, loss_fn, make_tx=clipped_adamw):
    """Losses and final params of plain Optax on one device, whole batch at once."""
    params, tx = params_fn(), make_tx()
    state, losses, norms = tx.init(params), [], []

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    for batch in mlp_batches():
        params, state, loss, norm = step(params, state, batch)
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, jax.device_get(params)
