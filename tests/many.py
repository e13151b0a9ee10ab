"""What several processes do together, for tests/test_processes.py: `python many.py NAME FOLDER COUNT INDEX PORT`.

Each has one device.
"""

import json
import os
import pathlib
import signal
import sys

import jax
import models
import numpy as np
import optax
from flax import linen as nn

import zerojax

DATA = {name: np.concatenate([batch[name] for batch in models.mlp_batches()]) for name in ("x", "y")}
BUCKETS = {"bucket_bytes": 2**12}
RUNS = [
    ("stage 0", 0, None),
    ("stage 1", 1, None),
    ("stage 2", 2, zerojax.Offload(**BUCKETS)),
    ("params in host memory", 3, zerojax.Offload(params=True, **BUCKETS)),
    ("stage 3", 3, None),
]


def adamw():
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    return zerojax.chain(optax.clip_by_global_norm(0.5), zerojax.fused_adamw(schedule, weight_decay=0.1))


def build(devices, stage, offload=None):
    plan = zerojax.make_plan(models.mlp_params(), models.mesh_of(devices), stage=stage, min_size=1, offload=offload)
    tx = zerojax.zero(adamw(), plan)
    return plan, tx, zerojax.make_train_step(models.mlp_loss, tx, plan, accumulate=2)


def train(folder, devices):
    """Losses at each stage; of a restored half, too; held-out ones; and the weights, exported."""
    found = {}
    for name, stage, offload in RUNS:
        plan, tx, step = build(devices, stage, offload)
        init = lambda key: models.mlp_params()
        given = (init, tx, plan, jax.random.key(0)) if name == "stage 3" else (models.mlp_params(), tx, plan)
        state = zerojax.create_train_state(*given)
        loader = zerojax.Dataloader(DATA, plan.batch, rows=32, seed=1)
        losses = []
        for i in range(4):
            if i == 2:
                extra = {"data": loader.state()}
                zerojax.save_checkpoint(folder / name, state, extra=extra, wait=False)
                zerojax.wait_until_finished()
                state, extra = zerojax.restore_checkpoint(folder / name, tx, plan)
                loader = zerojax.Dataloader(DATA, plan.batch, rows=32, seed=1)
                loader.restore(extra["data"])
            state, metrics = step(state, loader.next_batch())
            losses.append(float(metrics["loss"]))
        evaluate = zerojax.make_eval_step(models.mlp_loss, plan)
        losses.append(float(evaluate(state.params, loader.next_batch())["loss"]))
        found[name] = losses
    zerojax.export_params(folder / "weights", state)
    back = zerojax.import_params(folder / "weights", plan)
    same = jax.tree.map(lambda a, b: jax.numpy.array_equal(a, b), back, state.params)
    found["engine"] = engine()
    found["imported"] = all(map(bool, jax.tree.leaves(same)))
    return found


class Loss(nn.Module):
    """Mean squared error of a linear map."""

    @nn.compact
    def __call__(self, batch):
        return jax.numpy.mean((nn.Dense(8)(batch["x"]) - batch["y"]) ** 2)


def engine():
    """Losses of `zerojax.initialize`."""
    config = {"train_batch_size": 32, "zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}
    made, _, _, _ = zerojax.initialize(config, model=Loss(), training_data=DATA)
    return [float(made.train_batch()["loss"]) for _ in range(2)]


def die(folder, devices):
    """A process ends in the middle: which and how the folder's name says."""
    how, victim = folder.name.split("-")
    plan, tx, step = build(devices, stage=1)
    state = zerojax.create_train_state(models.mlp_params(), tx, plan)
    loader = zerojax.Dataloader(DATA, plan.batch, rows=32, seed=1)
    for i in range(10**6):
        state, metrics = step(state, loader.next_batch())
        float(metrics["loss"])
        if i == 3 and jax.process_index() == int(victim):
            if how == "raise":
                raise RuntimeError("out of luck")
            os.kill(os.getpid(), signal.SIGKILL)


def main(name, folder, count, index, port):
    jax.config.update("jax_platforms", "cpu")
    cache = pathlib.Path(__file__).parent.parent / ".cache" / f"jax-{jax.__version__}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with zerojax.distributed(f"127.0.0.1:{port}", int(count), int(index), join_timeout_s=60, lost_timeout_s=10):
        print(json.dumps({"train": train, "die": die}[name](pathlib.Path(folder), int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
