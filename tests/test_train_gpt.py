"""The training program stops when it is asked to, and goes on bit for bit, metrics and all."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.context": 16,
    "batch.rows": 16,
    "zero.min_size": 64,
    "zero.stage": 2,
    "sample_bytes": 8,
    "steps": 300,
    "logging.every": 20,
    "eval_every": 100,
    "eval_batches": 1,
    "checkpoint.every": 70,
}


def start(workdir, *flags, devices=2):
    config = [f"--config.{key}={value}" for key, value in {**TINY, "cpu_devices": devices}.items()]
    command = [sys.executable, "examples/train_gpt.py", "--config=configs/char_gpt.py", f"--workdir={workdir}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}")}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | cache
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *config, *flags], cwd=ROOT, env=environment, **pipes)


def finished(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out[-2000:] + err[-3000:]
    return out


def lines(workdir):
    """Of the metrics, without times."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_ms", "tokens_per_s")} for line in found]


def under_way(process, workdir):
    """Waits for a line of metrics."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").exists() and "\n" in (workdir / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=10))


def arrays(workdir):
    """Of the last checkpoint, as Orbax alone reads it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided")  # there are as many devices here
        return ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(TINY["steps"]))


def assert_as_without(workdir, without):
    assert lines(workdir) == lines(without)
    for x, y in zip(jax.tree.leaves(arrays(workdir)), jax.tree.leaves(arrays(without)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A run that nobody stops."""
    workdir = tmp_path_factory.mktemp("runs") / "without"
    finished(start(workdir))
    return workdir


def test_a_run_keeps_the_last_and_the_best(without):
    assert sorted(int(p.name) for p in (without / "checkpoints").iterdir()) == [280, 300]
    held_out = {line["step"]: line["held_out_loss"] for line in lines(without) if "held_out_loss" in line}
    assert list(held_out) == [100, 200, 300]
    assert [p.name for p in (without / "best").iterdir()] == [str(min(held_out, key=held_out.get))]
    assert [line["step"] for line in lines(without)] == [1, *range(20, 301, 20)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, without, number):
    process = start(tmp_path)
    under_way(process, tmp_path)
    process.send_signal(number)
    assert f"Stopped by {number.name}; the same command goes on." in finished(process, status=128 + number)
    (stopped,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if int(p.name) % 70]
    assert 1 <= stopped < 300
    # As if it had been killed later: lines behind the checkpoint, the last of them cut off.
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": stopped + 1, "loss": 0.0}) + '\n{"step": 9')
    assert f"Goes on from step {stopped} of" in finished(start(tmp_path))
    assert_as_without(tmp_path, without)


def test_another_config_is_refused_by_name(without):
    process = start(without, "--config.optimizer.learning_rate=0.5")
    _, err = process.communicate(timeout=240)
    assert process.returncode and re.search(r"config.optimizer.learning_rate=0.002, now it is 0.5.*--workdir", err), err


@pytest.mark.slow
def test_processes_stop_at_one_step(tmp_path, without):
    def both():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        together = ["--distributed", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
        return [start(tmp_path, *together, f"--process={i}", devices=1) for i in range(2)]

    processes = both()
    under_way(processes[0], tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        assert "Stopped by SIGTERM" in finished(process, status=128 + signal.SIGTERM)
    for process in both():
        finished(process)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == [line["step"] for line in lines(without)]
    # gloo adds in another order than one process does.
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, without)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
