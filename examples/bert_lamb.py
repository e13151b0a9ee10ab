"""BERT-style pre-training with LAMB, as the DeepSpeed JSON beside it says, on real text.

    python examples/bert_lamb.py --steps=400 --cpu-devices=8

LAMB and ZeRO together: the norms behind its trust ratios are those of whole layers at every stage.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import text
from flax import linen as nn

import zerojax
import zerojax.nn

MASK = text.VOCAB  # the token that stands where a byte is to be guessed
CONFIG = pathlib.Path(__file__).with_suffix(".json")


class MaskedText:
    """Windows of text with 15 % of the bytes to guess: of these 80 % masked, 10 % another byte, 10 % as they are."""

    def __init__(self, data: np.ndarray, tokens: int) -> None:
        self._data, self._tokens, self._guesses = data, tokens, round(0.15 * tokens)

    def __len__(self) -> int:
        return len(self._data) // self._tokens

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(i)
        tokens = self._data[i * self._tokens : (i + 1) * self._tokens].astype(np.int32)
        where = rng.permutation(self._tokens)[: self._guesses].astype(np.int32)
        targets, kind = tokens[where], rng.random(self._guesses)
        other = rng.integers(0, text.VOCAB, self._guesses, dtype=np.int32)
        tokens[where] = np.where(kind < 0.8, MASK, np.where(kind < 0.9, other, targets))
        return {"tokens": tokens, "where": where, "targets": targets}


class Block(nn.Module):
    """x [B, T, D] -> [B, T, D]: attention in both directions and an MLP, a norm behind each, as in BERT."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # [B, T, H, K] each
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k)
        weights = zerojax.nn.softmax(scores, scale=(width // self.heads) ** -0.5)
        mixed = jnp.einsum("bhqs,bshk->bqhk", weights, v).reshape(x.shape)
        x = zerojax.nn.LayerNorm(name="norm1")(x + nn.Dense(width, name="out")(mixed))
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(x))
        return zerojax.nn.LayerNorm(name="norm2")(x + nn.Dense(width, name="down")(hidden))


class MaskedLM(nn.Module):
    """A batch of `MaskedText` -> mean cross entropy of its guesses, in nats."""

    layers: int = 2
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        embed = nn.Embed(text.VOCAB + 8, self.width, name="embed")  # bytes, the mask, and padding to a multiple of 8
        positions = self.param("positions", nn.initializers.normal(0.02), (batch["tokens"].shape[1], self.width))
        x = zerojax.nn.LayerNorm(name="norm")(embed(batch["tokens"]) + positions)
        for i in range(self.layers):
            x = Block(self.heads, name=f"block{i}")(x)
        guessed = jnp.take_along_axis(x, batch["where"][..., None], axis=1)
        logits = embed.attend(nn.Dense(self.width, name="head")(guessed)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def main() -> None:
    """Trains, and says how well bytes that were never seen are guessed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="a DeepSpeed JSON")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cpu-devices", type=int, help="so many simulated on the CPU")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)

    data = text.load()
    engine, optimizer, *_ = zerojax.initialize(
        args.config, model=MaskedLM(), training_data=MaskedText(data.train, args.tokens)
    )
    print(engine.plan.table(optimizer).splitlines()[0], engine.plan.memory(optimizer), sep="\n")
    metrics: Any = None
    for _ in range(args.steps):
        metrics = engine.train_batch()
    held_out = zerojax.Dataloader(MaskedText(data.held_out, args.tokens), engine.plan.batch, rows=64)
    losses = [float(engine.eval_batch(held_out.next_batch())["loss"]) for _ in range(8)]
    print(f"step {engine.global_steps}: loss {float(metrics['loss']):.3f}, held out {np.mean(losses):.3f} nats a byte")


if __name__ == "__main__":
    main()
