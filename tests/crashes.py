"""Kills training at random moments: `python crashes.py FOLDER KILLS SEED` prints what came of it, as JSON.

What is imported is imported once: each run is forked before JAX has a backend. A run restores the latest checkpoint,
trains and saves, and writes a line before and after each step and save; lines survive a kill.
"""

import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import time

import conftest

conftest.simulate_devices()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import zerojax  # noqa: E402
from zerojax import manifest  # noqa: E402

EVERY = 5  # steps between saves
STEPS = 10**6  # more than a run gets to


def build():
    """The step, the state to begin with, its transformation and plan; 6 MB of state on two devices."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(512, 1024)).astype(np.float32), "b": np.zeros(1024, np.float32)}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    plan = zerojax.make_plan(params, mesh, stage=3)
    tx = zerojax.zero(optax.adam(1e-2), plan)
    loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2)
    step = zerojax.make_train_step(loss, tx, plan)
    return step, lambda: zerojax.create_train_state(params, tx, plan), tx, plan


def batch(step):
    return np.random.default_rng(step).normal(size=(4, 512)).astype(np.float32)


def digest(state):
    hashed = hashlib.sha256()
    for x in jax.tree.leaves(state):
        hashed.update(np.asarray(x).tobytes())
    return hashed.hexdigest()


def train(folder, log, wait):
    """A run, until it is killed."""
    say = lambda *words: os.write(log, (" ".join(map(str, words)) + "\n").encode())
    step, fresh, tx, plan = build()
    if zerojax.latest_step(folder) is None:
        state = fresh()
    else:
        state, extra = zerojax.restore_checkpoint(folder, tx, plan)
        assert extra == {"step": int(state.step)}
        say("restored", int(state.step), digest(state))
    pending = None
    while int(state.step) < STEPS:
        state, _ = step(state, batch(int(state.step)))
        at = int(state.step)
        say("step", at)
        if at % EVERY == 0:
            if pending is not None:
                zerojax.wait_until_finished()
                say("saved", pending)
            say("saving", at)
            zerojax.save_checkpoint(folder, state, extra={"step": at}, wait=wait, max_to_keep=2)
            pending = at
            if wait:
                say("saved", at)
                pending = None


def reference(steps, wanted):
    """Digests of an uninterrupted run at some steps, by a run of its own."""
    step, fresh, _, _ = build()
    state, found = fresh(), {}
    for i in range(steps):
        state, _ = step(state, batch(i))
        if i + 1 in wanted:
            found[i + 1] = digest(state)
    return found


def forked(run):
    """The process of a run."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)


def main(folder, kills, seed):
    draw, lines, results = random.Random(seed), folder.parent / "log", []
    for k in range(kills):
        lines.write_text("")
        log = os.open(lines, os.O_WRONLY | os.O_APPEND)
        child = forked(lambda log=log, k=k: train(folder, log, wait=bool(k % 2)))
        # It is under way when it has made a step; a step and a save are some tens of milliseconds each.
        ended, deadline = 0, time.monotonic() + 120
        while not ended and "step" not in lines.read_text() and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            time.sleep(draw.uniform(0, 0.6))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        os.close(log)
        said = [line.split() for line in lines.read_text().splitlines()]
        results.append({"said": said, "status": status, "latest": manifest.steps_in(folder)[-1:]})
    restored = {int(line[1]): line[2] for r in results for line in r["said"] if line[0] == "restored"}
    answer = folder.parent / "reference"
    child = forked(lambda: answer.write_text(json.dumps(reference(max(restored, default=0), restored))))
    assert os.waitpid(child, 0)[1] == 0
    print(json.dumps({"results": results, "reference": json.loads(answer.read_text())}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
