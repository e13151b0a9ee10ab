"""A GPT in Flax Linen: pre-norm blocks, tied embedding, learned positions (Radford et al., GPT-2, 2019).

B: batch, T: tokens, D: width, H: heads, K: D // H, V: vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import zerojax.nn

INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a GPT, and how it is computed.

    Attributes:
      dtype: Dtype of activations and matrix products; params are float32.
      unroll: Layers compiled side by side, of the `layers` that are scanned. 1 compiles in a fraction of the time and
        bounds stage 3's memory by one layer; `layers` leaves no loop, which the compiler schedules best.
      remat: Whether the backward pass recomputes each layer's activations rather than keep them.
    """

    vocab: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    dtype: str = "float32"
    unroll: int = 1
    remat: bool = False


SIZES = {
    "tiny": GPTConfig(vocab=512, context=64, layers=2, heads=2, width=64, dtype="bfloat16"),
    "125M": GPTConfig(vocab=50304, context=1024, layers=12, heads=12, width=768, dtype="bfloat16"),
    "350M": GPTConfig(vocab=50304, context=2048, layers=24, heads=16, width=1024, dtype="bfloat16"),
    "1.3B": GPTConfig(vocab=50304, context=1024, layers=24, heads=16, width=2048, dtype="bfloat16"),
    "7B": GPTConfig(vocab=50304, context=2048, layers=32, heads=32, width=4096, dtype="bfloat16"),
    "17B": GPTConfig(vocab=50304, context=2048, layers=44, heads=44, width=5632, dtype="bfloat16"),
}

LAYERWISE = "^(embed|blocks)"
"""The leaves that `GPT` gathers itself, where it uses them: `make_train_step(..., layerwise=LAYERWISE)`."""


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the stream."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        norm = lambda name: zerojax.nn.LayerNorm(dtype=c.dtype, name=name)
        dense = lambda size, name: nn.Dense(size, dtype=c.dtype, kernel_init=INIT, name=name)
        heads = dense(3 * c.width, "qkv")(norm("norm1")(x))  # [B, T, 3D]
        q, k, v = jnp.split(heads.reshape(*x.shape[:2], 3 * c.heads, -1), 3, axis=2)  # [B, T, H, K] each
        x = x + dense(c.width, "out")(_attention(q, k, v).reshape(x.shape))
        hidden = nn.gelu(dense(4 * c.width, "up")(norm("norm2")(x)))
        return x + dense(c.width, "down")(hidden)


class GPT(nn.Module):
    """tokens int32 [B, T] -> logits float32 [B, T, V]."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        gathered_embed = zerojax.nn.gathered(nn.Embed, dtype=c.dtype, methods=("__call__", "attend"))
        embed = gathered_embed(c.vocab, c.width, dtype=c.dtype, embedding_init=INIT, name="embed")
        positions = self.param("positions", INIT, (c.context, c.width))
        x = embed(tokens) + positions[: tokens.shape[1]].astype(c.dtype)
        policy = jax.checkpoint_policies.nothing_saveable if c.remat else None
        block = zerojax.nn.gathered(Block, dtype=c.dtype, policy=policy, prevent_cse=c.remat and c.unroll > 1)
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
            unroll=c.unroll,
        )
        x, _ = layers(block(c, name="blocks"), x, None)
        return embed.attend(zerojax.nn.LayerNorm(dtype=c.dtype, name="norm")(x)).astype(jnp.float32)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, [B, T, H, K] -> [B, T, H, K]; the fused kernel of cuDNN where there is one."""
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
    if q.dtype == jnp.float16 and jax.default_backend() == "cpu":  # which sums no float16 products in float32
        return _attention(*(x.astype(jnp.float32) for x in (q, k, v))).astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if fused else None)


def make_loss(model: GPT) -> Any:
    """`loss_fn(params, tokens)`: mean cross entropy of each next token, in nats; tokens int32 [B, T + 1]."""

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_fn


def make_init(model: GPT) -> Any:
    """`init(key) -> params`."""
    return lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
