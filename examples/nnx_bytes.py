"""Guessing the next byte with an NNX model: an MLP over the last bytes (Bengio et al., 2003), at any ZeRO stage.

python examples/nnx_bytes.py --steps=500 --stage=3 --cpu-devices=8
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import text
from flax import nnx

import zerojax
from zerojax.nn import nnx as zerojax_nnx

CONTEXT = 16


class ByteMLP(nnx.Module):
    """A batch of bytes int32 [B, CONTEXT + 1] -> mean cross entropy of the last byte, given those before it."""

    def __init__(self, rngs: nnx.Rngs, width: int = 32, hidden: int = 512) -> None:
        self.embed = nnx.Embed(text.VOCAB, width, rngs=rngs)
        self.norm = zerojax_nnx.LayerNorm(CONTEXT * width, rngs=rngs)
        self.up = nnx.Linear(CONTEXT * width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, text.VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens[:, :-1]).reshape(len(tokens), -1)
        logits = self.down(nnx.gelu(self.up(self.norm(x)))).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, -1]).mean()


class Windows:
    """Every window of the text."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data) - CONTEXT

    def __getitem__(self, i: int) -> np.ndarray:
        return self._data[i : i + CONTEXT + 1].astype(np.int32)


def main() -> None:
    """Trains, then hands the params back to an NNX module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--cpu-devices", type=int, help="so many simulated on the CPU")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)

    c = zerojax.config.default()
    c.zero.stage, c.batch.rows, c.logging.every = args.stage, 256, 50
    c.optimizer.update({"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01})
    c.schedule.update({"name": "cosine", "warmup_num_steps": min(50, args.steps - 1), "total_num_steps": args.steps})

    data = text.load()
    # The class, not a module: its params are made sharded, and no device ever holds them all.
    engine, *_ = zerojax.initialize(c, model=ByteMLP, training_data=Windows(data.train))
    metrics: Any = None
    for _ in range(args.steps):
        metrics = engine.train_batch()

    model = ByteMLP(nnx.Rngs(0))
    nnx.update(model, jax.device_get(engine.state.params))
    held_out = np.stack([Windows(data.held_out)[i] for i in range(2048)])
    losses = f"loss {float(metrics['loss']):.3f}, held out {float(model(held_out)):.3f} nats a byte"
    print(f"step {engine.global_steps}: {losses}")


if __name__ == "__main__":
    main()
