"""Several processes on the loopback, one simulated device each: what one process with as many devices gives."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from concurrent import futures

import jax
import many
import pytest

import zerojax


def run(name, folder, count):
    """Starts all, waits, and leaves none: exit statuses, outputs and errors."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = [sys.executable, str(pathlib.Path(many.__file__)), name, str(folder), str(count)]
    one_device = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    start = lambda i: subprocess.Popen(
        [*program, str(i), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_device
    )
    processes = [start(i) for i in range(count)]
    try:
        with futures.ThreadPoolExecutor() as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=240), processes))
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_with_as_many_devices(tmp_path, count):
    statuses, outputs = run("train", tmp_path / "many", count)
    assert statuses == [0] * count, outputs[0][1][-3000:]
    results = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert results == results[:1] * count  # metrics are everyone's
    # The same programs on the same shards; sums over two or four addends that gloo makes in another order.
    wanted = many.train(tmp_path / "one", count)
    assert results[0].pop("imported") and wanted.pop("imported")
    assert len(wanted) == 6
    for stage, losses in wanted.items():
        assert results[0][stage] == pytest.approx(losses, rel=1e-6), stage
    # One process restores what several saved, and the other way round was in `many.train`.
    plan, tx, _ = many.build(1, stage=0)
    state, extra = zerojax.restore_checkpoint(tmp_path / "many" / "stage 3", tx, plan)
    assert int(state.step) == 2 and extra["data"]


@pytest.mark.parametrize("case", ["raise-1", "kill-1", "kill-0"])  # the one that dies; 0 is the coordinator
def test_all_end_when_one_does(tmp_path, case):
    how, victim = case.split("-")
    start = time.monotonic()
    statuses, outputs = run("die", tmp_path / case, 2)
    assert time.monotonic() - start < 60  # joining and compiling included; a loss is noticed in 10 seconds at most
    other = 1 - int(victim)
    assert statuses[int(victim)] == (1 if how == "raise" else -9) and statuses[other] not in (0, -9)
    survivor, dead = outputs[other][1], outputs[int(victim)][1]
    # A collective that fails is told by us; where the service notices first, JAX ends the process with its own words.
    assert re.search(rf"process {other} of 2 ends: |another task died", survivor), survivor[-3000:]
    if how == "raise":
        assert "process 1 of 2 ends: RuntimeError: out of luck" in dead and "start all again" in dead


def test_a_process_that_nobody_joins_gives_up():
    code = "import zerojax\nwith zerojax.distributed('127.0.0.1:1', 2, 1, join_timeout_s=2): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"process_id": 0}, "coordinator_address, num_processes is missing; pass all three"),
        ({}, r"JAX found no cluster to ask .*SLURM, Open MPI or Kubernetes"),
    ],
)
def test_what_is_missing_is_said(arguments, message):
    assert not jax.distributed.is_initialized()
    # In a process of its own: joining comes before JAX has devices.
    code = f"import zerojax\nwith zerojax.distributed(**{arguments!r}): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and re.search(f"ValueError: distributed: .*{message}", done.stderr, re.S), done.stderr
