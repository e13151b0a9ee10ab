"""What ZeRO is worth, in two minutes on a laptop: stages 0 to 3 on 8 simulated devices, same model, same text.

    make demo

Bytes are counted from the arrays' real shards, collectives read from the compiled program. Times are those of one CPU
playing eight devices: they show what a stage costs beside stage 0, not how fast a GPU is. Exits with 1 where a loss
differs by more than float32 rounding.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import gpt
import jax
import numpy as np
import optax
import text

import zerojax
from zerojax import report

CONFIG = gpt.GPTConfig(vocab=text.VOCAB, context=64, layers=2, heads=4, width=192)
ROWS, ACCUMULATE = 32, 2  # with micro-batches stages 1 and 2 differ: in what gradients are summed in
MIN_SIZE = 1024  # norms and the smaller biases stay whole: what that costs shows in the optimizer's column
# Stages sum the same float32 numbers in another order. What that does to a loss grows with the steps: 1e-6 after a
# hundred.
TOLERANCE = 1e-5


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW as GPTs are trained with: warm-up, cosine, clipping; at a rate so stable that it amplifies no rounding."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, max(1, steps // 10), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))


def train(stage: int, mesh: jax.sharding.Mesh, data: np.ndarray, steps: int) -> dict[str, Any]:
    """Trains one stage; what it held, ran and lost."""
    model = gpt.GPT(CONFIG)
    init, loss_fn = gpt.make_init(model), gpt.make_loss(model)
    plan = zerojax.make_plan(jax.eval_shape(init, jax.random.key(0)), mesh, stage=stage, min_size=MIN_SIZE)
    tx = zerojax.zero(optimizer(steps), plan)
    state = zerojax.create_train_state(init, tx, plan, jax.random.key(0))
    options = {"accumulate": ACCUMULATE, "layerwise": gpt.LAYERWISE}
    step = zerojax.make_train_step(loss_fn, tx, plan, **options)
    batch = lambda i: text.batch_at(data, i, rows=ROWS, tokens=CONFIG.context)

    start = time.perf_counter()
    compiled = step.lower(state, batch(0)).compile()
    compile_s = time.perf_counter() - start
    _, grads = zerojax.value_and_grad(loss_fn, plan, **options)(state.params, batch(0))
    held = {"params": state.params, "gradients": grads, "optimizer": state.opt_state}
    held = {name: report.device_bytes(tree) for name, tree in held.items()}
    losses, times = [], []
    for i in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, batch(i))
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    return {
        "bytes": held,
        "collectives": report.collectives(compiled.as_text()),
        "compile_s": compile_s,
        "ms": statistics.median(times) * 1e3,
        "losses": losses,
    }


def measured_table(results: list[dict[str, Any]]) -> str:
    """The stages beside one another."""
    rows = []
    for stage, r in enumerate(results):
        difference = max(abs(a - b) for a, b in zip(r["losses"], results[0]["losses"], strict=True))
        found = " + ".join(f"{n} {name}" for name, n in r["collectives"].items())
        sizes = [report.format_bytes(b) for b in (*r["bytes"].values(), sum(r["bytes"].values()))]
        rows.append(
            [
                f"stage {stage}",
                *sizes,
                f"{r['ms']:.0f}",
                f"{r['compile_s']:.1f}",
                f"{r['losses'][-1]:.4f}",
                f"{difference:.0e}",
                found,
            ]
        )
    header = [
        "",
        "params",
        "gradients",
        "optimizer",
        "together",
        "ms/step",
        "compile s",
        "loss",
        "off by",
        "collectives",
    ]
    return report.text_table(header, rows)


def planned_table(devices: int) -> str:
    """The same for a model that no laptop holds, by arithmetic alone."""
    shapes = jax.eval_shape(gpt.make_init(gpt.GPT(gpt.SIZES["7B"])), jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = []
    for stage in range(4):
        m = zerojax.make_plan(shapes, mesh, stage=stage).memory(optimizer(1000))
        rows.append([f"stage {stage}", *map(report.format_bytes, (m.params, m.grads, m.opt_state, m.total))])
    return report.text_table(["", "params", "gradients", "optimizer", "together"], rows)


def main() -> int:
    """Prints both tables, writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    cache = tempfile.TemporaryDirectory()  # new at each run: a program is compiled once, and its time is a real one
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = jax.make_mesh((args.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = text.load().train
    params = jax.eval_shape(gpt.make_init(gpt.GPT(CONFIG)), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"A GPT of {count:,} params learns {len(data):,} bytes of Python's own text: {args.steps} steps of "
        f"{ROWS} x {CONFIG.context} bytes on {args.devices} simulated devices (jax {jax.__version__}).\n",
        flush=True,
    )
    results = []
    for stage in range(4):
        results.append(train(stage, mesh, data, args.steps))
        print(f"stage {stage}: loss {results[-1]['losses'][0]:.3f} -> {results[-1]['losses'][-1]:.3f}", flush=True)
    print(f"\nMeasured: bytes on each device, counted from the shards\n\n{measured_table(results)}")
    print(f"\nPlanned: a GPT of 7B in float32 with AdamW, bytes on each of 8 GPUs\n\n{planned_table(8)}")

    args.out.mkdir(parents=True, exist_ok=True)
    xs = range(1, args.steps + 1)
    curves = {f"stage {stage}": (xs, r["losses"]) for stage, r in enumerate(results)}
    report.plot_lines(curves, args.out / "loss.png", xlabel="step", ylabel="loss, nats a byte")
    bars = {f"stage {stage}": {k: b / 1e6 for k, b in r["bytes"].items()} for stage, r in enumerate(results)}
    report.plot_stacked(bars, args.out / "memory.png", ylabel="MB on each device")
    print(f"\nWrote {args.out / 'loss.png'} and {args.out / 'memory.png'}.")

    wrong = [
        f"stage {stage}, step {i}: {loss!r} where stage 0 has {base!r}"
        for stage, r in enumerate(results)
        for i, (loss, base) in enumerate(zip(r["losses"], results[0]["losses"], strict=True))
        if not abs(loss - base) <= TOLERANCE * abs(base)
    ]
    if wrong:
        print(
            f"FAILED: {len(wrong)} losses differ by more than {TOLERANCE:g}, the first at {wrong[0]}", file=sys.stderr
        )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
