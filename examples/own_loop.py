"""A training loop of one's own: plain JAX and Optax, with the state sharded and the optimizer fused.

    python examples/own_loop.py --steps=200 --cpu-devices=8

Two lines differ from a loop without zerojax: `plan`, and `zero(..., plan)` around the optimizer.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
import text

import zerojax

CONTEXT, WIDTH, HIDDEN = 16, 32, 512


def init(key: jax.Array) -> Any:
    """Params of an MLP over the last bytes."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    return {
        "embed": jax.random.normal(keys[0], (text.VOCAB, WIDTH)),
        "up": normal(keys[1], CONTEXT * WIDTH, HIDDEN),
        "down": normal(keys[2], HIDDEN, text.VOCAB),
    }


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the last of CONTEXT + 1 bytes, int32 [B, CONTEXT + 1]."""
    x = params["embed"][tokens[:, :-1]].reshape(len(tokens), -1)
    logits = jax.nn.gelu(x @ params["up"]) @ params["down"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, -1]).mean()


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--cpu-devices", type=int, help="so many simulated on the CPU")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    key = jax.random.key(0)
    plan = zerojax.make_plan(jax.eval_shape(init, key), mesh, stage=args.stage)
    tx = zerojax.zero(optax.chain(optax.clip_by_global_norm(1.0), zerojax.fused_adam(2e-3)), plan)
    params = jax.jit(init, out_shardings=plan.params)(key)
    state = tx.init(params)
    loss_and_grads = zerojax.value_and_grad(loss_fn, plan)  # reduce-scattered; jax.value_and_grad works, too

    # Params first: JAX pairs donated buffers with results by position. zerojax.chain in place of optax.chain, and
    # zerojax.apply in place of the next two lines, make it one pass, in place.
    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = loss_and_grads(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    data = text.load().train
    for i in range(1, args.steps + 1):
        tokens = jax.device_put(text.batch_at(data, i, rows=256, tokens=CONTEXT), plan.batch)
        params, state, loss = step(params, state, tokens)
        number = float(loss)  # waits: steps that queue up on simulated devices starve one another
        if i % 50 == 0 or i == args.steps:
            print(f"step {i}: loss {number:.3f} nats a byte", flush=True)
    held = zerojax.report.device_bytes((params, state))
    whole = sum(x.nbytes for x in jax.tree.leaves((params, state)) if jnp.ndim(x))
    print(
        f"params and state: {zerojax.report.format_bytes(held)} on each device of {zerojax.report.format_bytes(whole)}"
    )


if __name__ == "__main__":
    main()
