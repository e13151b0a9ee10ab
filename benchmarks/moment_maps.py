"""Which map and block size should hold a second moment in 8 bits? Adam's moments over real steps of a byte GPT.

    python benchmarks/moment_maps.py        # -> results/moment-maps-<device>.{json,md}

Two questions to each candidate: how far do moment and update stray from those in float32 when fed the same gradients,
those of the float32 training; and what loss does a training end with whose second moment it holds. The first moment is
float32, so that nothing else differs. Codes are unsigned, of 8 bits, rounded stochastically as `pallas_kernels.formats`
rounds them; neighbours along the last dim share a power of two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import gpt  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import precision  # noqa: E402
import text  # noqa: E402

from pallas_kernels import formats  # noqa: E402

Store = Callable[[jax.Array, jax.Array], jax.Array]  # (moment, seed int32) -> the moment after it was stored


def stored_as(root: int, group: int) -> Store:
    """8-bit codes of the moment's `root`-th root: 1 is linear; `group` neighbours share a power of two."""

    def store(x: jax.Array, seed: jax.Array) -> jax.Array:
        codes = jnp.sqrt(x) if root > 1 else x
        codes = jnp.sqrt(codes) if root > 2 else codes
        rows = codes.reshape(-1, group)
        bound = jnp.maximum(rows.max(-1, keepdims=True) * (1.0001 / 255), 2.0**-120)
        unit = jnp.ldexp(1.0, jnp.ceil(jnp.log2(bound)).astype(int))
        value = lambda code: (code * unit) ** root
        code = jnp.floor(rows / unit)
        share = (x.reshape(rows.shape) - value(code)) / (value(code + 1) - value(code))
        code += jax.random.uniform(jax.random.key(seed), rows.shape) < share
        return value(jnp.maximum(code, 1)).reshape(x.shape)

    return store


def shipped(x: jax.Array, seed: jax.Array) -> jax.Array:
    """As `nu_dtype="int8"` stores it."""
    return formats.decode(formats.encode(x, formats.zeros(x.shape, signed=False), half=1, seed=seed))


STORES: dict[str, Store] = {
    "float32": lambda x, seed: x,
    "shipped: square root, 32": shipped,
    "square root, 32": stored_as(2, 32),
    "square root, 64": stored_as(2, 64),
    "square root, 128": stored_as(2, 128),
    "fourth root, 32": stored_as(4, 32),
    "fourth root, 128": stored_as(4, 128),
    "linear, 32": stored_as(1, 32),
}
EXACT = "float32"
TRAINED = (EXACT, "shipped: square root, 32", "fourth root, 32", "linear, 32", "square root, 128")


class State(NamedTuple):
    """Of `scale_by_adam`: steps done, and both moments."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(store: Store, b2: float, b1: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose second moment goes through `store` after every step."""

    def init(params: Any) -> State:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return State(jnp.int32(0), mu, nu)

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        count, leaves = state.count + 1, len(jax.tree.leaves(grads))
        treedef = jax.tree.structure(grads)
        seeds = treedef.unflatten([count * leaves + i for i in range(leaves)])
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g, seed: store(b2 * v + (1 - b2) * g * g, seed), state.nu, grads, seeds)
        c1, c2 = 1 - b1**count, 1 - b2**count
        return jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu), State(count, mu, nu)

    return optax.GradientTransformation(init, update)


def optimizer(adam: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip by global norm, as benchmarks/precision.py trains by it."""
    decay = optax.add_decayed_weights(precision.DECAY, precision.matrices)
    clip = optax.clip_by_global_norm(precision.CLIP)
    return optax.chain(clip, adam, decay, optax.scale_by_learning_rate(precision.learning_rate(steps)))


def strayed(got: Any, want: Any) -> jax.Array:
    """Relative L2 error of each leaf, the mean over leaves."""
    error = lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
    return jnp.mean(jnp.stack(jax.tree.leaves(jax.tree.map(error, got, want))))


def compile_errors(steps: int, b2: float, batches: np.ndarray) -> tuple[Any, Any]:
    """`(create, train)`: float32 training, whose clipped gradients go into every candidate; errors of each step."""
    loss_fn, candidates = gpt.make_loss(gpt.GPT(gpt.GPTConfig())), [scale_by_adam(s, b2) for s in STORES.values()]
    tx, clip = optimizer(candidates[0], steps), optax.clip_by_global_norm(precision.CLIP)

    def create(seed: int) -> Any:
        params = precision.initial(gpt.GPT(gpt.GPTConfig()), seed)
        return params, tx.init(params), [c.init(params) for c in candidates]

    def step(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
        params, state, others = carry
        grads = jax.grad(loss_fn)(params, rows)
        updates, state = tx.update(grads, state, params)
        clipped, _ = clip.update(grads, clip.init(params))
        found = [c.update(clipped, other) for c, other in zip(candidates, others, strict=True)]
        (exact_update, exact), *_ = found
        errors = [(strayed(new.nu, exact.nu), strayed(update, exact_update)) for update, new in found]
        return (optax.apply_updates(params, updates), state, [new for _, new in found]), errors

    train = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
    return create, train.lower(create(0), batches).compile()


def compile_training(store: Store, steps: int, b2: float, batches: np.ndarray, held_out: np.ndarray) -> Any:
    """`(create, train, evaluate)` of a training whose second moment goes through `store`."""
    model = gpt.GPT(gpt.GPTConfig())
    loss_fn, tx = gpt.make_loss(model), optimizer(scale_by_adam(store, b2), steps)

    def create(seed: int) -> Any:
        params = precision.initial(model, seed)
        return params, tx.init(params)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0], donate_argnums=0)
    mean = jax.jit(lambda params, batches: jnp.mean(jax.lax.map(lambda rows: loss_fn(params, rows), batches)))
    carry = create(0)
    return create, train.lower(carry, batches).compile(), mean.lower(carry[0], held_out).compile()


def markdown(results: dict[str, Any]) -> str:
    """The page under results/."""
    exact = results["stores"][EXACT]["losses"]
    seeds = "one seed" if len(exact) == 1 else f"mean over {len(exact)} seeds"
    lines = [
        f"# Second moments in 8 bits on {results['device']}, {results['date']}",
        "",
        f"`{results['command']}`, jax {results['jax']}, Python {results['python']}, commit {results['commit']}.",
        "",
        f"The byte GPT of benchmarks/precision.py, {results['steps']} steps of {results['rows']} x 128 bytes, "
        f"b2 = {precision.B2}. Errors are relative L2 against float32, the mean over leaves and the last half of "
        "the steps, all moments fed the same gradients. "
        f"Held-out loss in nats a byte, over {results['held_out_batches']} batches, of a training of its own, and the "
        f"difference to the first: {seeds}.",
        "",
        "| root of the moment, group | error of nu | error of the update | held-out loss | against float32 |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["stores"].items():
        off = [100 * (a / b - 1) for a, b in zip(row["losses"], exact, strict=False)]
        cells = [f"{100 * x:.1f} %" for x in row["errors"]]
        cells += [f"{statistics.mean(row['losses']):.4f}", f"{statistics.mean(off):+.2f} %"] if off else ["", ""]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help=f"a multiple of {2 * precision.EVERY}")
    parser.add_argument("--rows", type=int, default=precision.ROWS, help="of a batch")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out-batches", type=int, default=64)
    parser.add_argument("--commit", default="unknown", help="named in the page")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    data = text.load()
    held_out = precision.held_out_batches(data, args.held_out_batches)
    batches_of = lambda seed: [
        precision.training_batches(data, first, precision.EVERY, seed, args.rows)
        for first in range(0, args.steps, precision.EVERY)
    ]
    first, clock = batches_of(0), time.perf_counter()
    with futures.ThreadPoolExecutor() as pool:
        measuring = pool.submit(compile_errors, args.steps, precision.B2, first[0])
        arguments = (args.steps, precision.B2, first[0], held_out)
        trainings = {name: pool.submit(compile_training, STORES[name], *arguments) for name in TRAINED}
    print(f"compiled in {time.perf_counter() - clock:.0f} s", flush=True)
    create, train = measuring.result()
    carry, found = create(0), []
    for batches in first:
        carry, errors = train(carry, batches)
        found.append(np.asarray(errors))  # [stores, 2, steps]
    late = np.concatenate(found, -1)[..., args.steps // 2 :].mean(-1)
    rows = {
        name: {"errors": [round(float(x), 5) for x in pair], "losses": []}
        for name, pair in zip(STORES, late, strict=True)
    }
    print(f"measured in {time.perf_counter() - clock:.0f} s: {rows}", flush=True)
    device = jax.local_devices()[0].device_kind
    results = {
        "command": f"python benchmarks/moment_maps.py --steps={args.steps} --rows={args.rows} --seeds={args.seeds} "
        f"--held-out-batches={args.held_out_batches}",
        "device": device,
        "date": str(datetime.date.today()),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": args.commit,
        "steps": args.steps,
        "rows": args.rows,
        "held_out_batches": args.held_out_batches,
        "stores": rows,
    }
    path = args.out / f"moment-maps-{device.replace(' ', '-')}.json".lower()
    for seed in range(args.seeds):
        for name, training in trainings.items():
            create, train, evaluate = training.result()
            carry = create(seed)
            for batches in batches_of(seed):
                carry = train(carry, batches)
            rows[name]["losses"].append(round(float(evaluate(carry[0], held_out)), 5))
            path.write_text(json.dumps(results))
            path.with_suffix(".md").write_text(markdown(results))
            print(f"{time.perf_counter() - clock:.0f} s, seed {seed}, {name}: {rows[name]}", flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
