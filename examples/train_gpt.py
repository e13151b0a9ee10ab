"""Trains a GPT on real text, under any ZeRO stage, on whatever devices there are.

    python examples/train_gpt.py --config=configs/char_gpt.py --workdir=runs/char_gpt --config.zero.stage=3

Writes into the workdir: metrics.jsonl (a line each `logging.every` steps, the first one's times with compilation),
TensorBoard events, loss.png, sample.txt, plan.txt.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import gpt
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tensorboardX
import text
from absl import app, flags
from ml_collections import config_flags
from rich import progress

import zerojax
from zerojax import config, report

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for metrics, pictures and samples; made if missing.")
flags.mark_flags_as_required(["config", "workdir"])


def whole_config(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The schema's part of the config, its schedule as long as the run."""
    whole = config.check(c)
    if c.schedule.name == "cosine":
        whole.schedule.total_num_steps = c.schedule.total_num_steps or c.steps
        whole.schedule.warmup_num_steps = min(c.schedule.warmup_num_steps or 0, c.steps - 1)
    return whole


def sample(model: gpt.GPT, params: Any, prompt: bytes, length: int, key: jax.Array) -> str:
    """Continues `prompt` by `length` bytes, drawn from the model's distribution."""
    context = model.config.context
    start = (
        jnp.zeros((1, context), jnp.int32)
        .at[0, -len(prompt) :]
        .set(jnp.frombuffer(prompt, jnp.uint8).astype(jnp.int32))
    )

    @jax.jit
    def generate(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        def next_byte(tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, tokens)[:, -1, : text.VOCAB]
            byte = jax.random.categorical(key, logits)
            return jnp.concatenate([tokens[:, 1:], byte[:, None]], axis=1), byte[0]

        return jax.lax.scan(next_byte, tokens, jax.random.split(key, length))[1]

    drawn = np.asarray(generate(params, start, key), np.uint8).tobytes()
    return (prompt + drawn).decode(errors="replace")


def train(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Trains as the config says; returns the last line of metrics."""
    model = gpt.GPT(gpt.GPTConfig(**c.model))
    init, loss_fn = gpt.make_init(model), gpt.make_loss(model)
    whole = whole_config(c)
    init, schedule = config.in_dtype(whole, init), config.make_schedule(whole)

    key = jax.random.key(c.seed)
    plan = zerojax.make_plan(jax.eval_shape(init, key), config.make_mesh(whole), **config.plan_options(whole))
    tx = zerojax.zero(config.make_optimizer(whole, schedule), plan)
    options = config.step_options(whole, plan.num_shards)
    state = zerojax.create_train_state(init, tx, plan, key, loss_scale=options["loss_scale"])
    step = zerojax.make_train_step(loss_fn, tx, plan, **options)
    eval_step = zerojax.make_eval_step(loss_fn, plan, layerwise=c.zero.layerwise)

    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "plan.txt").write_text(plan.table(tx) + "\n")
    print(plan.table(tx).splitlines()[0], plan.memory(tx), sep="\n")
    data = text.load()
    batch = lambda part, i: text.batch_at(part, i, rows=c.batch.rows, tokens=c.model.context, seed=c.seed)
    held_out = [batch(data.held_out, i) for i in range(c.eval_batches)]
    evaluate = lambda: float(np.mean([eval_step(state.params, rows)["loss"] for rows in held_out]))

    history: list[dict[str, float]] = []
    writer = tensorboardX.SummaryWriter(str(workdir))
    columns = (*progress.Progress.get_default_columns(), progress.TextColumn("{task.fields[note]}"))
    with progress.Progress(*columns) as bar, (workdir / "metrics.jsonl").open("w") as lines:
        task = bar.add_task("training", total=c.steps, note="compiling")
        clock, since = time.perf_counter(), 0
        for i in range(1, c.steps + 1):
            state, metrics = step(state, batch(data.train, i))
            if i % c.logging.every and i not in (1, c.steps):
                continue
            line = {
                "step": i,
                "loss": float(metrics["loss"]),
                "grad_norm": float(metrics["grad_norm"]),
            }  # waits for the device
            step_s = (time.perf_counter() - clock) / (i - since)
            line |= {"learning_rate": float(schedule(i - 1)), "step_ms": step_s * 1e3}
            line["tokens_per_s"] = c.batch.rows * c.model.context / step_s
            if i % c.eval_every == 0 or i == c.steps:
                line["held_out_loss"] = evaluate()
            history.append(line)
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            for name in line.keys() - {"step"}:
                writer.add_scalar(f"train/{name}", line[name], i)
            note = f"loss {line['loss']:.3f}  {line['step_ms']:.0f} ms/step  {line['tokens_per_s']:,.0f} tokens/s"
            bar.update(task, completed=i, note=note)
            clock, since = time.perf_counter(), i
    writer.close()

    curves = {
        name: ([line["step"] for line in history if name in line], [line[name] for line in history if name in line])
        for name in ("loss", "held_out_loss")
    }
    report.plot_lines(curves, workdir / "loss.png", xlabel="step", ylabel="nats a byte")
    written = sample(model, state.params, b"def ", c.sample_bytes, key)
    (workdir / "sample.txt").write_text(written)
    print(f"held-out loss {history[-1]['held_out_loss']:.4f} nats a byte; a sample:\n{written}")
    return history[-1]


def main(argv: list[str]) -> None:
    """Reads the flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; flags are --config, --config.KEY=VALUE and --workdir.")
    c = _CONFIG.value
    if c.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)
    train(c, pathlib.Path(_WORKDIR.value))


if __name__ == "__main__":
    app.run(main)
