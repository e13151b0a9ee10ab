"""What a training run leaves behind and takes up again: metrics and checkpoints."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import ml_collections
import tensorboardX
from rich import progress

import zerojax
from zerojax import runs


class Metrics:
    """metrics.jsonl, TensorBoard events and a progress bar, which go on where a run was; written by process 0."""

    def __init__(self, workdir: pathlib.Path, start: int, steps: int) -> None:
        self._main = jax.process_index() == 0
        self.history: list[dict[str, float]] = []
        if self._main:
            workdir.mkdir(parents=True, exist_ok=True)
            self.history = runs.lines_until(workdir / "metrics.jsonl", start)
            self._lines = (workdir / "metrics.jsonl").open("a")
            self._writer = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)
        columns = (*progress.Progress.get_default_columns(), progress.TextColumn("{task.fields[note]}"))
        self._bar = progress.Progress(*columns, disable=not self._main)
        self._task = self._bar.add_task("training", total=steps, completed=start, note="compiling")

    def __enter__(self) -> Metrics:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._main:
            self._lines.close()
            self._writer.close()

    def write(self, line: dict[str, float]) -> None:
        """Adds a line."""
        self.history.append(line)
        if self._main:
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())  # no later than the checkpoint of this step
            for name in line.keys() - {"step"}:
                self._writer.add_scalar(f"train/{name}", line[name], line["step"])
        note = f"loss {line['loss']:.3f}  {line['step_ms']:.0f} ms/step  {line['tokens_per_s']:,.0f} tokens/s"
        self._bar.update(self._task, completed=line["step"], note=note)


_MAY_CHANGE = (
    "steps",
    "zero",
    "mesh",
    "logging",
    "checkpoint",
    "eval_every",
    "eval_batches",
    "sample_bytes",
    "cpu_devices",
)


def check_config(then: str, now: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` where a run would not go on as it began; its length, layout and outputs may change."""

    def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
        parts = [flat(v, f"{before}{k}.") if isinstance(v, dict) else {f"{before}{k}": v} for k, v in tree.items()]
        return {name: value for part in parts for name, value in part.items()}

    old, new = (flat(json.loads(text)) for text in (then, now.to_json_best_effort()))
    for name in [*old, *(set(new) - set(old))]:
        if name.split(".")[0] not in _MAY_CHANGE and old.get(name) != new.get(name):
            raise ValueError(
                f"the run began with config.{name}={old.get(name)!r}, now it is {new.get(name)!r}: it would not go on "
                "as it began. Pass the old value, or another --workdir."
            )


class Saver:
    """The last checkpoints, and the one of the lowest held-out loss; written behind training."""

    def __init__(self, workdir: pathlib.Path, c: ml_collections.ConfigDict, extra: dict[str, Any]) -> None:
        self._last, self._best_of_all, self._config = workdir / "checkpoints", workdir / "best", c
        self._lowest = extra.get("best_held_out_loss", float("inf"))

    def save(self, state: zerojax.TrainState, step: int, held_out_loss: float | None, *, stopping: bool) -> None:
        """Saves where it is time to."""
        if held_out_loss is not None and held_out_loss < self._lowest:
            self._lowest = held_out_loss
            if zerojax.latest_step(self._best_of_all) != step:  # a run that was killed came this far
                self._write(self._best_of_all, state, step, max_to_keep=1)
        every = self._config.checkpoint.every
        if stopping or (every and step % every == 0) or step == self._config.steps:
            self._write(self._last, state, step, max_to_keep=self._config.checkpoint.max_to_keep)

    def _write(self, folder: pathlib.Path, state: zerojax.TrainState, step: int, max_to_keep: int | None) -> None:
        extra = {"config": self._config.to_json_best_effort(), "best_held_out_loss": self._lowest}
        zerojax.save_checkpoint(folder, state, step=step, extra=extra, wait=False, max_to_keep=max_to_keep)
