"""Held-out loss of a byte GPT trained in float32 and in fewer bits: same data, same initial weights.

    python benchmarks/precision.py                     # every variant and seed -> results/precision-<device>.{json,md}
    python benchmarks/precision.py --plot=results.json # docs/images/precision.png, from what an earlier run wrote

Trains on all local devices, a hundred steps a program. Every variant starts from the same weights, those that bfloat16
holds, and computes in the dtype of its params; products of float32 are float32's, not TF32's.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import gpt  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import text  # noqa: E402

import zerojax  # noqa: E402
from zerojax import report  # noqa: E402

ROWS, EVERY = 32, 100  # rows of a batch; steps of a program, after which the held-out loss is taken
LEARNING_RATE, WARMUP, DECAY, CLIP = 2e-3, 50, 0.1, 1.0  # as configs/char_gpt.py has them
B2 = 0.999  # where that has 0.95: Optax's default, and the harder one for moments of few bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What is held in which dtype.

    Attributes:
      params: Dtype of params and compute.
      masters: `kind` of `zerojax.master_weights`, or None without.
      moments: `mu_dtype` and `nu_dtype`.
      plain: Takes `optax.adamw`, whose moments have the params' dtype.
      loss_scale: Whether the loss is scaled, dynamically.
      nudge: What all initial weights are multiplied by: how far apart two equal trainings end.
    """

    params: str = "float32"
    masters: str | None = None
    moments: str | None = None
    plain: bool = False
    loss_scale: bool = False
    nudge: float = 1.0

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW behind a clip by global norm, over float32 weights where there are masters."""
        schedule = learning_rate(steps)
        if self.plain:
            adamw = optax.adamw(schedule, b2=B2, weight_decay=DECAY, mask=matrices)
        else:
            dtypes = {"mu_dtype": self.moments, "nu_dtype": self.moments}
            adamw = zerojax.fused_adamw(schedule, b2=B2, weight_decay=DECAY, mask=matrices, **dtypes)
        tx = zerojax.chain(optax.clip_by_global_norm(CLIP), adamw)
        return zerojax.master_weights(tx, kind=self.masters) if self.masters else tx


VARIANTS = {
    "float32": Variant(),
    "float32, weights nudged by 1e-6": Variant(nudge=1 + 1e-6),
    "bfloat16, split masters": Variant(params="bfloat16", masters="split"),
    "bfloat16, split masters, bfloat16 moments": Variant(params="bfloat16", masters="split", moments="bfloat16"),
    "bfloat16, split masters, int8 moments": Variant(params="bfloat16", masters="split", moments="int8"),
    "float16, float32 masters, loss scale": Variant(params="float16", masters="float32", loss_scale=True),
    "bfloat16 alone (optax.adamw)": Variant(params="bfloat16", plain=True),
}
EXACT = "float32"


def learning_rate(steps: int) -> optax.Schedule:
    """A short warm-up, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps - 1), steps)


def matrices(params: Any) -> Any:
    """What decays: not biases, norms and positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def initial(model: gpt.GPT, seed: jax.Array) -> Any:
    """float32 weights that are bfloat16 numbers."""
    return jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), gpt.make_init(model)(jax.random.key(seed)))


def training_batches(data: text.Text, first: int, count: int, seed: int, rows: int) -> np.ndarray:
    """int32 [count, rows, tokens + 1], of steps `first` and after."""
    tokens = gpt.GPTConfig().context
    return np.stack([text.batch_at(data.train, first + i, rows=rows, tokens=tokens, seed=seed) for i in range(count)])


def held_out_batches(data: text.Text, count: int) -> np.ndarray:
    """int32 [count, rows, tokens + 1], the same for every seed."""
    tokens = gpt.GPTConfig().context
    return np.stack([text.batch_at(data.held_out, i, rows=ROWS, tokens=tokens) for i in range(count)])


@dataclasses.dataclass(frozen=True)
class Program:
    """A variant, compiled: `create(seed)`, `train(state, batches)`, `evaluate(params, batches)`; `bytes_a_param`."""

    create: Callable[[Any], Any]
    train: Callable[[Any, Any], Any]
    evaluate: Callable[[Any, Any], Any]
    bytes_a_param: float


def compile_variant(variant: Variant, steps: int, train: np.ndarray, held_out: np.ndarray) -> Program:
    """Compiles for batches shaped like `train` and `held_out`."""
    model = gpt.GPT(gpt.GPTConfig(dtype=variant.params))
    loss_fn = gpt.make_loss(model)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    start = lambda seed: jax.tree.map(lambda x: (x * variant.nudge).astype(variant.params), initial(model, seed))
    plan = zerojax.make_plan(jax.eval_shape(start, jnp.int32(0)), mesh, stage=1)
    tx = zerojax.zero(variant.optimizer(steps), plan)
    scale = zerojax.dynamic_loss_scale() if variant.loss_scale else None
    create = lambda seed: zerojax.create_train_state(start, tx, plan, jnp.int32(seed), loss_scale=scale)
    step = zerojax.make_train_step(loss_fn, tx, plan, loss_scale=scale)
    eval_step = zerojax.make_eval_step(loss_fn, plan)
    state = create(0)
    layout = (jax.tree.map(lambda x: x.sharding, state), None)
    many = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0, out_shardings=layout)
    mean = jax.jit(lambda params, batches: jnp.mean(jax.lax.map(lambda rows: eval_step(params, rows)["loss"], batches)))
    held = report.device_bytes(state.params), report.device_bytes(state.opt_state) * mesh.size
    return Program(
        create,
        many.lower(state, train).compile(),
        mean.lower(state.params, held_out).compile(),
        sum(held) / sum(x.size for x in jax.tree.leaves(state.params)),
    )


def run(program: Program, data: text.Text, held_out: np.ndarray, steps: int, seed: int) -> dict[str, Any]:
    """Trains once."""
    state, losses, clock = program.create(seed), [], time.perf_counter()
    for first in range(0, steps, EVERY):
        state, metrics = program.train(state, training_batches(data, first, EVERY, seed, ROWS))
        losses.append(program.evaluate(state.params, held_out))
    found = [round(float(x), 5) for x in losses]
    return {"held_out": found, "skipped": int(metrics["skipped"][-1]), "s": round(time.perf_counter() - clock, 2)}


def difference(results: dict[str, Any], name: str) -> list[float]:
    """Percent by which a variant's last loss is above that of float32, for each seed."""
    last = lambda name: [run["held_out"][-1] for run in results["runs"][name]]
    return [100 * (a / b - 1) for a, b in zip(last(name), last(EXACT), strict=True)]


def markdown(results: dict[str, Any]) -> str:
    """The page under results/."""
    count = len(results["runs"][EXACT])
    seeds = "one seed" if count == 1 else f"mean of {count} seeds"
    lines = [
        f"# Training in fewer bits on {results['device']}, {results['date']}",
        "",
        f"`{results['command']}`, jax {results['jax']}, jaxlib {results['jaxlib']}, Python {results['python']} (whose "
        f"documentation and library are the text), commit {results['commit']}.",
        "",
        f"A byte GPT of 0.8M params, {results['steps']} steps of {ROWS} x 128 bytes, AdamW with b2 = {B2} behind a "
        f"clip by global norm. Held-out loss in nats a byte over {results['held_out_batches']} batches of {ROWS} rows, "
        f"{seeds} (weights and order of data); the difference to float32 seed by seed, mean and range. "
        "Bytes a param at rest on one device: params and optimizer state.",
        "",
        "| variant | bytes a param | held-out loss | against float32 | range | steps skipped |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        mean = statistics.mean(run["held_out"][-1] for run in runs)
        off = difference(results, name)
        skipped = ", ".join(str(run["skipped"]) for run in runs)
        cells = [name, f"{results['bytes_a_param'][name]:.2f}", f"{mean:.4f}", f"{statistics.mean(off):+.2f} %"]
        lines.append("| " + " | ".join([*cells, f"{min(off):+.2f} to {max(off):+.2f} %", skipped]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Held-out loss over steps; beside it how far it is from float32's, the mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, results["steps"] // EVERY + 1) * EVERY
    curve = lambda name: np.array([run["held_out"] for run in results["runs"][name]])
    for i, name in enumerate(results["runs"]):
        style = {"linestyle": ("-", ":", "--", "-.")[i % 4], "linewidth": 1.6, "color": f"C{i}"}
        left.plot(steps, curve(name).mean(0), label=name, **style)
        right.plot(steps, 100 * (curve(name) / curve(EXACT) - 1).mean(0), **style)
    right.axhspan(-0.5, 0.5, color="0.9", zorder=0)
    right.set(xlabel="step", ylabel="held-out loss above float32's, %", ylim=(-1, 3))
    left.set(xlabel="step", ylabel="held-out loss, nats a byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains every variant, or draws what an earlier run wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help=f"a multiple of {EVERY}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out-batches", type=int, default=64)
    parser.add_argument("--commit", default="unknown", help="named in the page")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plot", type=pathlib.Path, help="a json file that an earlier run wrote")
    args = parser.parse_args()
    if args.plot:
        results = json.loads(args.plot.read_text())
        args.plot.with_suffix(".md").write_text(markdown(results))
        plot(results, ROOT / "docs" / "images" / "precision.png")
        return
    jax.config.update("jax_default_matmul_precision", "highest")
    data = text.load()
    held_out, example = held_out_batches(data, args.held_out_batches), training_batches(data, 0, EVERY, 0, ROWS)
    with futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda variant: compile_variant(variant, args.steps, example, held_out), VARIANTS.values())
        programs = dict(zip(VARIANTS, compiled, strict=True))
    device = jax.local_devices()[0].device_kind
    results: dict[str, Any] = {
        "command": f"python benchmarks/precision.py --steps={args.steps} --seeds={args.seeds}",
        "device": f"{jax.device_count()} x {device}",
        "date": str(datetime.date.today()),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": platform.python_version(),
        "commit": args.commit,
        "steps": args.steps,
        "held_out_batches": args.held_out_batches,
        "bytes_a_param": {name: round(program.bytes_a_param, 3) for name, program in programs.items()},
        "runs": {name: [] for name in VARIANTS},
    }
    name = f"precision-{device.replace(' ', '-')}".lower()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for variant, program in programs.items():
            results["runs"][variant].append(run(program, data, held_out, args.steps, seed))
            last = results["runs"][variant][-1]
            print(f"seed {seed}, {variant}: {last['held_out'][-1]:.4f}, {last['s']} s", flush=True)
        (args.out / f"{name}.json").write_text(json.dumps(results))
        (args.out / f"{name}.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
