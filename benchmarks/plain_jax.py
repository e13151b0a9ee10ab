"""The yardstick: the same GPT step in plain JAX, sharded by hand with constraints, as a careful user writes it today.

It uses neither Flax nor zerojax: arrays, `jax.lax.with_sharding_constraint`, and Optax.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NORMS = ("norm1", "norm2")


def shapes(c: Any) -> dict[str, Any]:
    """Shapes of all params of a GPT; layers are stacked."""
    n, d = c.layers, c.width
    blocks = {"qkv": (n, d, 3 * d), "out": (n, d, d), "up": (n, d, 4 * d), "down": (n, 4 * d, d)}
    biases = {f"{k}_bias": (n, s[-1]) for k, s in blocks.items()}
    norms = {f"{k}_{part}": (n, d) for k in NORMS for part in ("scale", "bias")}
    return {
        "embed": (c.vocab, d),
        "positions": (c.context, d),
        "norm_scale": (d,),
        "norm_bias": (d,),
        "blocks": blocks | biases | norms,
    }


def is_shape(x: Any) -> bool:
    """Whether a node of `shapes` is a leaf."""
    return isinstance(x, tuple)


def init(key: jax.Array, c: Any) -> Any:
    """Params float32: matrices normal, norms the identity, biases zero."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes(c), is_leaf=is_shape)
    leaves = []
    for (path, shape), k in zip(paths, jax.random.split(key, len(paths)), strict=True):
        name = path[-1].key
        constant = jnp.ones if name.endswith("_scale") else jnp.zeros if name.endswith("_bias") else None
        leaves.append(constant(shape) if constant else 0.02 * jax.random.normal(k, shape))
    return treedef.unflatten(leaves)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises the last dim, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias).astype(x.dtype)


def block(x: jax.Array, p: dict[str, jax.Array], heads: int) -> jax.Array:
    """One layer; x bfloat16 [B, T, D]."""
    dense = lambda x, name: x @ p[name].astype(x.dtype) + p[f"{name}_bias"].astype(x.dtype)
    norm = lambda x, name: layer_norm(x, p[f"{name}_scale"], p[f"{name}_bias"])
    qkv = dense(norm(x, "norm1"), "qkv").reshape(*x.shape[:2], 3, heads, -1)
    fused = "cudnn" if jax.default_backend() == "gpu" else None
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused)
    x = x + dense(attended.reshape(x.shape), "out")
    return x + dense(jax.nn.gelu(dense(norm(x, "norm2"), "up")), "down")


def loss_fn(params: Any, tokens: jax.Array, c: Any) -> jax.Array:
    """Mean cross entropy; tokens int32 [B, T + 1]."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    embed = params["embed"].astype(c.dtype)
    x = embed[inputs] + params["positions"][: inputs.shape[1]].astype(c.dtype)
    layer = functools.partial(block, heads=c.heads)
    if c.unroll < c.layers:
        x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["blocks"])
    else:
        for i in range(c.layers):
            x = layer(x, jax.tree.map(lambda a, i=i: a[i], params["blocks"]))
    logits = (layer_norm(x, params["norm_scale"], params["norm_bias"]) @ embed.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def build(c: Any, mesh: Mesh, stage: int, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """`(state, step)` with `step(state, tokens) -> (state, loss)`, ZeRO `stage` 1 or 3 by sharding constraints."""
    size = mesh.shape["data"]

    def sharded(shape: tuple[int, ...], first: int) -> NamedSharding:
        dims = [d for d in range(first, len(shape)) if shape[d] % size == 0]
        largest = max(dims, key=lambda d: shape[d])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "data"))

    layout = {
        k: jax.tree.map(lambda s, k=k: sharded(s, k == "blocks"), v, is_leaf=is_shape) for k, v in shapes(c).items()
    }
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), layout)
    params = jax.jit(functools.partial(init, c=c), out_shardings=layout if stage >= 3 else whole)(jax.random.key(0))
    state_layout = optax.tree.map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, params), layout, transform_non_params=lambda _: whole["embed"]
    )
    opt_state = jax.jit(tx.init, out_shardings=state_layout)(params)
    constrain = functools.partial(jax.tree.map, jax.lax.with_sharding_constraint)

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, c)
        shards = constrain(params, layout)
        updates, opt_state = tx.update(constrain(grads, layout), opt_state, shards)
        params = constrain(optax.apply_updates(shards, updates), layout if stage >= 3 else whole)
        return (params, opt_state), loss

    out = ((layout if stage >= 3 else whole, state_layout), NamedSharding(mesh, PartitionSpec()))
    return (params, opt_state), jax.jit(step, donate_argnums=0, out_shardings=out)
