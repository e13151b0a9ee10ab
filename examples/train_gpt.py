"""Trains a GPT on real text, under any ZeRO stage, on whatever devices there are.

    python examples/train_gpt.py --config=configs/char_gpt.py --workdir=runs/char_gpt --config.zero.stage=3

Writes into the workdir: metrics.jsonl (a line each `logging.every` steps, the first one's times with compilation),
TensorBoard events, loss.png, sample.txt, plan.txt; checkpoints/ each `checkpoint.every` steps, best/ where the held-out
loss is lowest. The same command goes on from the latest checkpoint, bit for bit. SIGTERM and Ctrl-C finish the step,
save and end with 128 + the signal's number; of several processes SIGTERM alone, to any of them.

    python examples/train_gpt.py ... --distributed        # in each of several processes: SLURM, Open MPI, Kubernetes
    python examples/train_gpt.py ... --distributed --coordinator=HOST:PORT --processes=2 --process=0
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import gpt
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import records
import text
from absl import app, flags, logging
from ml_collections import config_flags

import zerojax
from zerojax import config, report, runs

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for metrics, pictures and samples; made if missing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With --distributed, but under a scheduler: process 0's host:port."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Likewise: how many.")
_PROCESS = flags.DEFINE_integer("process", None, "Likewise: which one this is, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


def whole_config(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The schema's part of the config, its schedule as long as the run."""
    whole = config.check(c)
    if c.schedule.name == "cosine":
        whole.schedule.total_num_steps = c.schedule.total_num_steps or c.steps
        whole.schedule.warmup_num_steps = min(c.schedule.warmup_num_steps or 0, c.steps - 1)
    return whole


def sample(model: gpt.GPT, params: Any, prompt: bytes, length: int, seed: int, mesh: jax.sharding.Mesh) -> str:
    """Continues `prompt` by `length` bytes, drawn from the model's distribution."""
    start = np.zeros((1, model.config.context), np.int32)
    start[0, -len(prompt) :] = np.frombuffer(prompt, np.uint8)

    def generate(params: Any, tokens: jax.Array) -> jax.Array:
        def next_byte(tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, tokens)[:, -1, : text.VOCAB]
            byte = jax.random.categorical(key, logits)
            return jnp.concatenate([tokens[:, 1:], byte[:, None]], axis=1), byte[0]

        return jax.lax.scan(next_byte, tokens, jax.random.split(jax.random.key(seed), length))[1]

    everywhere = jax.NamedSharding(mesh, jax.P())
    drawn = np.asarray(jax.jit(generate, out_shardings=everywhere)(params, start), np.uint8).tobytes()
    return (prompt + drawn).decode(errors="replace")


def train(c: ml_collections.ConfigDict, workdir: pathlib.Path, stop: runs.StopRequest) -> list[dict[str, float]]:
    """Trains as the config says, from the latest checkpoint on; returns the lines of metrics."""
    model = gpt.GPT(gpt.GPTConfig(**c.model))
    init, loss_fn = gpt.make_init(model), gpt.make_loss(model)
    whole = whole_config(c)
    init, schedule = config.in_dtype(whole, init), config.make_schedule(whole)

    key = jax.random.key(c.seed)
    plan = zerojax.make_plan(jax.eval_shape(init, key), config.make_mesh(whole), **config.plan_options(whole))
    tx = zerojax.zero(config.make_optimizer(whole, schedule), plan)
    options = config.step_options(whole, plan.num_shards)
    step = zerojax.make_train_step(loss_fn, tx, plan, **options)
    eval_step = zerojax.make_eval_step(loss_fn, plan, layerwise=c.zero.layerwise)

    start, extra = zerojax.latest_step(workdir / "checkpoints") or 0, {}
    if start:
        state, extra = zerojax.restore_checkpoint(workdir / "checkpoints", tx, plan)
        records.check_config(extra["config"], c)
        print(f"Goes on from step {start} of {workdir / 'checkpoints'}.")
    else:
        state = zerojax.create_train_state(init, tx, plan, key, loss_scale=options["loss_scale"])
    data = text.load()
    batch = batches(c, plan)
    held_out = [batch(data.held_out, i) for i in range(c.eval_batches)]
    evaluate = lambda: float(np.mean([eval_step(state.params, rows)["loss"] for rows in held_out]))

    saver = records.Saver(workdir, c, extra)
    with records.Metrics(workdir, start, c.steps) as metrics_file:
        if jax.process_index() == 0:
            (workdir / "plan.txt").write_text(plan.table(tx) + "\n")
            print(plan.table(tx).splitlines()[0], plan.memory(tx), sep="\n")
        clock, since = time.perf_counter(), start
        for i in range(start + 1, c.steps + 1):
            state, metrics = step(state, batch(data.train, i))
            held_out_loss = None
            if i % c.logging.every == 0 or i % c.eval_every == 0 or i in (1, c.steps):
                line = {"step": i, "loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}  # waits
                step_s = (time.perf_counter() - clock) / (i - since)
                line |= {"learning_rate": float(schedule(i - 1)), "step_ms": step_s * 1e3}
                line["tokens_per_s"] = c.batch.rows * c.model.context / step_s
                if i % c.eval_every == 0 or i == c.steps:
                    line["held_out_loss"] = held_out_loss = evaluate()
                metrics_file.write(line)
                clock, since = time.perf_counter(), i
            stopping = stop.at(i)
            saver.save(state, i, held_out_loss, stopping=stopping)
            if stopping:
                break
    zerojax.wait_until_finished()
    if stop.signal is None:
        finish(
            c, workdir, sample(model, state.params, b"def ", c.sample_bytes, c.seed, plan.mesh), metrics_file.history
        )
    return metrics_file.history


def batches(c: ml_collections.ConfigDict, plan: zerojax.Plan) -> Callable[[np.ndarray, int], jax.Array]:
    """`batch(text, step)`, over the devices of all processes."""

    def batch(part: np.ndarray, i: int) -> jax.Array:
        rows = text.batch_at(part, i, rows=c.batch.rows, tokens=c.model.context, seed=c.seed)
        return jax.make_array_from_callback(rows.shape, plan.batch, rows.__getitem__)

    return batch


def finish(c: ml_collections.ConfigDict, workdir: pathlib.Path, written: str, history: list[dict[str, float]]) -> None:
    """Curves and a sample."""
    if jax.process_index():
        return
    curves = {
        name: ([line["step"] for line in history if name in line], [line[name] for line in history if name in line])
        for name in ("loss", "held_out_loss")
    }
    report.plot_lines(curves, workdir / "loss.png", xlabel="step", ylabel="nats a byte")
    (workdir / "sample.txt").write_text(written)
    held_out = [line["held_out_loss"] for line in history if "held_out_loss" in line]
    print(f"held-out loss {held_out[-1]:.4f} nats a byte; a sample:\n{written}" if held_out else written)


def main(argv: list[str]) -> None:
    """Reads the flags."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unknown arguments {argv[1:]}; flags are --config, --config.KEY=VALUE, --workdir and --distributed."
        )
    logging.set_verbosity(logging.WARNING)  # Orbax tells of each save
    c = _CONFIG.value
    if c.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)
    together = contextlib.nullcontext()
    if _DISTRIBUTED.value:
        together = zerojax.distributed(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    with together, runs.StopRequest() as stop:
        train(c, pathlib.Path(_WORKDIR.value), stop)
    if stop.signal is not None:
        print(f"Stopped by {stop.signal.name}; the same command goes on.")
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    app.run(main)
